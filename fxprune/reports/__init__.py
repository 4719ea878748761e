"""Telling people what was measured."""
