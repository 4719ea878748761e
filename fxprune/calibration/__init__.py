"""What a loader means: a handful of unlabelled images."""
