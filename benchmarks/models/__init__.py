"""The networks that are measured: written out so that published weights load by name, and those that users bring."""
