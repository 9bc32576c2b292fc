"""Experts that do not go through transformers' experts interface, put behind it: one declared adapter per architecture."""

from __future__ import annotations

from torch import nn


def adapt(model: nn.Module) -> None:
    """Put adapters in place, in a skeleton or in a model that is about to be loaded."""
