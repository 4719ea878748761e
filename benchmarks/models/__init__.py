"""The networks that are measured, written out so that the published weights load by name."""
