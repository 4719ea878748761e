"""How long networks take, side by side."""
