"""One call of a decoder layer: its arguments, what it returns, and what it hands to later layers beside the hidden states.

What a layer hands on (a router's memory, tokens that an indexer selected, shared keys and values) reaches the later layers as the model's
own forward passes it on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from moebit.errors import BadInputError


class StopForward(Exception):
    """Raised inside a forward that has delivered what it was run for."""


@dataclass(frozen=True)
class LayerReturn:
    """The form of what a decoder layer returns.

    Attributes:
        spec: the nesting of its output. hidden: which leaf of it holds the hidden states.
        kinds: (shape, dtype) of every leaf in the trial forward, None for what is no tensor.
    """

    spec: TreeSpec
    hidden: int
    kinds: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]

    @classmethod
    def of(cls, layer: nn.Module, out: Any, hidden: Tensor) -> LayerReturn:
        """Read off one call, whose hidden states went in as `hidden`.

        Raises:
            BadInputError: nothing in the output looks like hidden states.
        """
        leaves, spec = tree_flatten(out)
        place = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.shape == hidden.shape), None)
        if place is None:
            raise BadInputError(
                f"{type(layer).__name__} returns {type(out).__name__} without a tensor of the hidden states' shape {list(hidden.shape)}; "
                "moebit does not understand this layer"
            )
        return cls(spec, place, tuple((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else None for leaf in leaves))

    def filled(self, hidden: Tensor, others: float = 0.0) -> Any:
        """An output with these hidden states and stand-ins for everything else."""
        leaves = [None if kind is None else torch.full(kind[0], others).to(kind[1]) for kind in self.kinds]
        leaves[self.hidden] = hidden
        return tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class Handed:
    """Stands in a recorded argument for what an earlier layer returns beside its hidden states."""

    layer: int
    leaf: int


@dataclass
class Carried:
    """What the layers of one batch hand to later ones beside the hidden states.

    Attributes:
        values: of layers that ran with `keep`, until the last layer that takes them has run. last_use: that layer.
        written: mappings that the model passes empty to its layers, for them to write into and read from.
    """

    values: dict[Handed, Any] = field(default_factory=dict)
    last_use: dict[Handed, int] = field(default_factory=dict)
    written: list[MutableMapping[Any, Any]] = field(default_factory=list)

    def note(self, value: Any) -> None:
        """Remember an argument if it is a mapping to be written into."""
        if isinstance(value, MutableMapping) and not value and not any(value is known for known in self.written):
            self.written.append(value)

    def tensors(self) -> dict[str, Tensor]:
        """The call as named tensors, for a file."""
        result = {f"handed.{key.layer}.{key.leaf}": value for key, value in self.values.items() if isinstance(value, Tensor)}
        for number, entries in enumerate(self.written):
            for key, value in entries.items():
                for place, item in enumerate(value if isinstance(value, tuple | list) else [value]):
                    several = place if isinstance(value, tuple | list) else ""
                    result[f"written.{number}.{several}.{json.dumps(key)}"] = item
        return result

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        for name, tensor in tensors.items():
            kind, first, second, *key = name.split(".", 3)
            if kind == "handed":
                self.values[Handed(int(first), int(second))] = tensor
            elif second == "":
                self.written[int(first)][json.loads(key[0])] = tensor
            else:
                entries, entry = self.written[int(first)], json.loads(key[0])
                entries[entry] = (*entries.get(entry, ()), tensor)


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one decoder layer for one batch; the hidden states (first positional or `hidden_states`) are left out.

    Attributes:
        index: of the layer. returns: what it returns, None for one tensor.
        carried: of this batch; shared by its calls.
        wanted: what later layers want of this one's output.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool
    index: int = 0
    returns: LayerReturn | None = None
    carried: Carried = field(default_factory=Carried)
    wanted: set[Handed] = field(default_factory=set)

    def run(self, layer: nn.Module, hidden: Tensor, keep: bool = False) -> Tensor:
        """The layer's output hidden states.

        Args:
            keep: this run counts: what the layer hands on beside the hidden states is kept for the layers after it.

        Raises:
            BadInputError: a layer whose output is not what it was in the trial forward.
        """
        args, kwargs = swapped(self.args, self._taken), swapped(self.kwargs, self._taken)
        out = LayerCall(args, kwargs, self.by_name).apply(layer, hidden)
        leaves, spec = tree_flatten(out)
        place = self.returns.hidden if self.returns else 0
        if len(leaves) <= place or not isinstance(leaves[place], Tensor) or (self.returns is not None and spec != self.returns.spec):
            raise BadInputError(
                f"{type(layer).__name__} returns {type(out).__name__}, not hidden states as in the trial forward; "
                "moebit does not understand this layer"
            )
        if keep:
            self.carried.values.update({key: leaves[key.leaf] for key in self.wanted})
            for key in [key for key in self.carried.values if self.carried.last_use[key] <= self.index]:
                del self.carried.values[key]
        return leaves[place]

    @property
    def hands_on(self) -> bool:
        """Whether this batch's layers hand on, or write into, anything beside the hidden states."""
        return bool(self.wanted or self.carried.last_use or self.carried.written)

    def some(self, windows: Tensor, of: int) -> LayerCall:
        """The call for some windows of its batch of `of`: arguments whose first axis counts windows are cut, all others shared."""

        def cut(value: Any) -> Any:
            return value[windows] if isinstance(value, Tensor) and of > 1 and value.ndim and len(value) == of else value

        return replace(self, args=swapped(self.args, cut), kwargs=swapped(self.kwargs, cut))

    def apply(self, layer: nn.Module, hidden: Tensor) -> Any:
        """The layer's whole output."""
        if self.by_name:
            return layer(*self.args, hidden_states=hidden, **self.kwargs)
        return layer(hidden, *self.args, **self.kwargs)

    def _taken(self, value: Any) -> Any:
        return self.carried.values[value] if isinstance(value, Handed) else value


def swapped(value: Any, swap: Callable[[Any], Any]) -> Any:
    """`value` with its leaves replaced; containers in which nothing changes stay the same objects (layers may write into them)."""
    if isinstance(value, tuple | list):
        items = [swapped(item, swap) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        entries = {key: swapped(item, swap) for key, item in value.items()}
        return value if all(entries[key] is value[key] for key in value) else entries
    return swap(value)


def same_arguments(call: LayerCall, known: LayerCall, same: Callable[[Any, Any], Any]) -> LayerCall:
    """The call with arguments that equal those of another batch's stored once."""
    kwargs: Mapping[str, Any] = {key: same(value, known.kwargs.get(key)) for key, value in call.kwargs.items()}
    args = tuple(same(a, b) for a, b in zip(call.args, known.args, strict=True))
    return LayerCall(args, dict(kwargs), call.by_name, call.index, call.returns, call.carried, call.wanted)


def same_or_known(value: object, known: object) -> object:
    """`known` in the place of a value, or of tensors inside of it, that equals it bit for bit."""
    if isinstance(value, Tensor) and isinstance(known, Tensor):
        return known if value.shape == known.shape and value.dtype == known.dtype and torch.equal(value, known) else value
    if isinstance(value, tuple) and isinstance(known, tuple) and len(value) == len(known):
        return tuple(same_or_known(a, b) for a, b in zip(value, known, strict=True))
    return value
