"""Quantization methods, one file per idea: each names its source, writes its equation out and lists where it departs from it."""
