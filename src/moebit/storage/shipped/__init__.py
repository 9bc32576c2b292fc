"""Checkpoints that are shipped quantized, read as if they were stored plain: one adapter per format."""
