"""Networks, weights and inputs by what people call them: a name, a file or a folder."""
