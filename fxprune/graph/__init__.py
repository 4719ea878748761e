"""What a network is: tracing, operators, regions, and where adaptors fit. Nothing here rewrites a graph."""
