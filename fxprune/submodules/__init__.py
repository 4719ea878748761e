"""A part of a network: what it is called with, and the whole with another part in its place."""
