"""One script for each claim; what its first line says is what it measures."""
