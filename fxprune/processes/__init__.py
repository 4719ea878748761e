"""Several processes and threads on one job."""
