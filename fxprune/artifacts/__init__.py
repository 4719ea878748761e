"""Compressed networks kept in a folder, and made again from it."""
