"""Profiles of a model on data sets, and what is decided from them: widths, switchable channels, whether to adapt."""
