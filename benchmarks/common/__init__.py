"""What the scripts share: networks and images, one compression opened, result files, options, tables."""
