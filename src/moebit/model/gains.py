"""Norms whose stored weight is not the gain itself, found by trying them: with weights of zero a plain norm gives nothing."""

from __future__ import annotations

import copy

import torch
from torch import nn


def shifted_gain(model: nn.Module) -> str | None:
    """The first norm of a model that multiplies by something else than its weight, such as weight + 1; None where there is none.

    One norm of each class is tried on the CPU; classes that take more than one input or hold more than a weight are passed over.
    """
    tried: set[type[nn.Module]] = set()
    for name, module in model.named_modules():
        only = [leaf for leaf, _ in module.named_parameters()] == ["weight"] and not list(module.children())
        if not only or "norm" not in type(module).__name__.lower() or type(module) in tried:
            continue
        tried.add(type(module))
        if _gives_something(module):
            return name
    return None


@torch.no_grad()
def _gives_something(module: nn.Module) -> bool:
    norm = copy.deepcopy(module).to_empty(device="cpu").float()
    weight = norm.get_parameter("weight").zero_()
    try:
        result = norm(torch.linspace(-1, 2, 2 * weight.numel()).view(2, -1))
    except TypeError:  # it wants further inputs
        return False
    return bool(result.abs().max() > 0)
