"""Parts of a network: what they are called with, several as one, and the whole with others in their places."""
