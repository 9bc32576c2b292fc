"""Grids: which numbers a weight may become, and how they lie in bytes."""
