"""A pass over a decoder layer that begins behind a linear whose inputs are known.

What enters attention's output projection is seen when that linear is calibrated; when the experts' inputs are captured afterwards, only the
linear itself has changed. Where the module around it hands on what the linear puts out, a stand-in for the module can answer from the
inputs that were kept, and attention is spared a pass. No layer is believed to be like that: `watched` looks at one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from moebit.model.capture import Call, observed
from moebit.model.replay import StandIn


@dataclass(frozen=True)
class KeptInput:
    """What entered a linear of a layer.

    Attributes:
        linear: its name in the layer. values: [T, in_features] for every token, in the windows' order.
    """

    linear: str
    values: Tensor

    @property
    def block(self) -> str:
        """The module around the linear."""
        return self.linear.rpartition(".")[0]


class Shortcut(StandIn):
    """Answers like the module around a linear, from kept inputs of the linear."""

    def __init__(self, block: nn.Module, linear: nn.Module, spec: TreeSpec, place: int) -> None:
        super().__init__(block)
        self._linear = [linear]  # in a list, so that it is no submodule
        self._spec, self._place = spec, place
        self.values: Tensor | None = None  # [B, L, in_features] of the batch that comes next

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves: list[Any] = [None] * self._spec.num_leaves
        leaves[self._place], self.values = self._linear[0](self.values), None
        return tree_unflatten(leaves, self._spec)

    @contextmanager
    def in_place(self, layer: nn.Module, name: str) -> Iterator[None]:
        """Stand where the module stands that is called `name` in the layer."""
        parent, _, leaf = name.rpartition(".")
        owner = layer.get_submodule(parent)
        setattr(owner, leaf, self)
        try:
            yield
        finally:
            setattr(owner, leaf, self._stood_for[0])


@dataclass
class Watched:
    """What a linear and the module around it were called with and returned, call by call."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # as returned, and a copy from then
    answers: list[Any] = field(default_factory=list)

    def stand_in(self, layer: nn.Module, kept: KeptInput, values: Tensor) -> Shortcut | None:
        """A stand-in for the module; None where it does more than to hand on what the linear makes of `values`."""
        if not len(self.inputs) == len(self.outputs) == len(self.answers) == 1 or not torch.equal(self.inputs[0], values):
            return None
        leaves, spec = tree_flatten(self.answers[0])
        tensors = [(place, leaf) for place, leaf in enumerate(leaves) if leaf is not None]
        if len(tensors) != 1 or not isinstance(tensors[0][1], Tensor):
            return None
        place, answer = tensors[0]
        put_out, copy = self.outputs[0]
        if answer.data_ptr() != put_out.data_ptr() or answer.stride() != put_out.stride() or not torch.equal(answer, copy):
            return None
        return Shortcut(layer.get_submodule(kept.block), layer.get_submodule(kept.linear), spec, place)


@contextmanager
def watched(layer: nn.Module, kept: KeptInput) -> Iterator[Watched]:
    """Watch the linear and the module around it inside this context."""
    seen = Watched()

    def on_linear(call: Call) -> None:
        seen.inputs.append(call.args[0])
        seen.outputs.append((call.output, call.output.clone()))

    linear, block = layer.get_submodule(kept.linear), layer.get_submodule(kept.block)
    with (
        observed({kept.linear: linear}, on_linear, outputs=True),
        observed({kept.block: block}, lambda call: seen.answers.append(call.output), outputs=True),
    ):
        yield seen


def adds_up(output: Tensor, without: Tensor, added: Tensor) -> bool:
    """Whether `output` is `without + added`, up to the rounding of its type, with a factor of one before `added`."""
    change, rounding = output.float() - without.float(), torch.finfo(output.dtype).eps * output.float().norm()
    factor = float((change * added).sum() / added.square().sum().clamp(min=1e-30))
    return abs(factor - 1) < 0.01 and bool((change - added).norm() <= rounding)
