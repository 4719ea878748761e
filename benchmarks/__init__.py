"""What fxprune claims, measured: one script per claim, run as `python -m benchmarks.NAME`."""
