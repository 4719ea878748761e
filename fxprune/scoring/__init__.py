"""What dropping a set of regions costs."""
