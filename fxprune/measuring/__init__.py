"""Networks measured where they are served, each by its name, over several processes."""
