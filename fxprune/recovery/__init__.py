"""Deciding which cuts are cheap, and repairing what they cost, from a handful of unlabelled images."""
