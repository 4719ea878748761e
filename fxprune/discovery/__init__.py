"""What can be cut, and where features are read."""
