"""What fxprune claims, measured: one script for each claim, run as `python -m benchmarks.claims.NAME`."""
