"""Compression as a step of other people's tools, one file for each, which need what it says."""
