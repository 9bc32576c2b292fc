"""Which expert parameters of a checkpoint's files moebit can quantize, and which stay as they are, and why.

Counted is what lies in the files: experts of layers that text reaches, experts of a wrapper's towers, stacked matrices that don't go
through the experts interface, and experts of layers that the model class does not have (multi-token prediction).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from moebit.errors import BadInputError
from moebit.model.seam import is_experts
from moebit.model.structure import Structure
from moebit.storage.checkpoint import Checkpoint

LARGEST_SHARE = 0.05
STORED_EXPERT = re.compile(r"(^|\.)experts[.\d]")  # in stored names; `shared_experts.` is something else


@dataclass(frozen=True)
class Reach:
    """Expert parameters by whether the structure covers them.

    Attributes:
        covered: experts module in the structure -> parameters.
        left: what is not -> (parameters of routed experts, why).
    """

    covered: dict[str, int]
    left: dict[str, tuple[int, str]]

    @property
    def share(self) -> float:
        """Share of the expert parameters that the structure does not cover."""
        count = sum(parameters for parameters, _ in self.left.values())
        return count / max(1, count + sum(self.covered.values()))

    def check(self, accepted: bool) -> None:
        """Refuse a plan that would leave much of a model's experts as they are.

        Raises:
            BadInputError: more than `LARGEST_SHARE` of the expert parameters, and the user has not agreed.
        """
        if accepted or self.share <= LARGEST_SHARE:
            return
        largest = sorted(self.left.items(), key=lambda item: -item[1][0])
        parts = "; ".join(f"{name} ({parameters:,} parameters: {why})" for name, (parameters, why) in largest[:3])
        more = f"; and {len(largest) - 3} more" if len(largest) > 3 else ""
        raise BadInputError(
            f"{self.share:.1%} of the expert parameters would stay in full precision: {parts}{more}. "
            "If that is what you want: --accept-unquantized (accept_unquantized=True)"
        )


def expert_reach(checkpoint: Checkpoint, structure: Structure) -> Reach:
    """Look at every module and at the stored tensors that the model class does not use."""
    model: Any = checkpoint.model
    names = [layer.experts for layer in structure.layers if layer.moe]
    covered = {name: _parameters(model, name) for name in names}
    left: dict[str, tuple[int, str]] = {}
    for name, module in model.named_modules():
        if name in covered:
            continue
        in_layers = name.startswith(f"{structure.list_name}.")
        if is_experts(module):
            left[name] = (_parameters(model, name), "text does not reach them" if in_layers else "outside the language model's layers")
        elif in_layers and not isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd):
            count = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim >= 3 and min(p.shape) > 1)
            if count:
                why = f"{type(module).__name__} holds stacked matrices that do not go through the experts interface"
                left[name] = (0 if "shared" in name else count, why)  # shared experts are kept, too, but are not routed ones
    for stored in checkpoint.weights.unused:
        found = STORED_EXPERT.search(stored)
        if found:
            name = stored[: found.start()] + f"{found[1]}experts"
            known = left.get(name, (0, ""))[0]
            left[name] = (known + math.prod(checkpoint.entries[stored].shape), f"stored, but {type(model).__name__} has no such layer")
    return Reach(covered, left)


def _parameters(model: Any, name: str) -> int:
    return sum(p.numel() for p in model.get_submodule(name).parameters(recurse=False) if p.ndim >= 3)
