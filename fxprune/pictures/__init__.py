"""Pictures as SVG: a network, a front, the course of a recovery, the spread of latencies."""
