"""How operators that move values are read, and the sizes that a file computes."""
