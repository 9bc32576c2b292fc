"""Edits of parameters that leave the model's function as it is, applied when a parameter is read.

An edit speaks of an axis of the parameter as transformers stores it, so that transposed or interleaved experts need nothing of their own:
the input channels of a linear are axis -1, its output channels axis 0; of stacked experts axis -1 and -2 (the other way round where they
are stored transposed). Nothing of the checkpoint is copied: `EditedWeights` reads what is asked for, edits it, and rounds it once to the
type that is stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moebit.model.experts import ExpertsLayout
from moebit.storage.checkpoint import HubWeights
from moebit.storage.files import PIECE
from moebit.tensor.rotation import Rotation

SLAB_BYTES = 32 * 2**20  # of a parameter in the type that edits are computed in


@dataclass(frozen=True)
class Edit(ABC):
    """One change of one parameter. `axis` is counted from the end (-1 the last), or from the front for 0."""

    @abstractmethod
    def apply(self, tensor: Tensor, start: int = 0) -> Tensor:
        """The edited rows [start, start + len(tensor)) of the parameter's first axis; float32 or float64."""

    def needs_all(self, ndim: int) -> bool:
        """Whether the rows of the first axis depend on each other."""
        return False


@dataclass(frozen=True)
class Scale(Edit):
    """Channels of an axis times a factor.

    Attributes:
        factor: [n] along the axis, or [E, n] for stacked experts with a factor each.
        offset: of gains that count from there: 1 for a norm that multiplies with (1 + gain).
    """

    factor: Tensor
    axis: int = -1
    offset: float = 0.0

    def apply(self, tensor: Tensor, start: int = 0) -> Tensor:
        factor, axis = self.factor.to(tensor), self.axis % tensor.ndim
        if factor.ndim == 2 or axis == 0:
            factor = factor[start : start + len(tensor)]
        shape = [1] * tensor.ndim
        shape[axis] = factor.shape[-1] if axis else len(factor)
        if factor.ndim == 2:
            shape[0] = len(factor)
        factor = factor.reshape(shape)
        return (tensor + self.offset) * factor - self.offset if self.offset else tensor * factor


@dataclass(frozen=True)
class Constant(Edit):
    """Every entry becomes `value`: a gain that was folded into what reads the norm."""

    value: float

    def apply(self, tensor: Tensor, start: int = 0) -> Tensor:
        return torch.full_like(tensor, self.value)


@dataclass(frozen=True)
class Rotate(Edit):
    """`t R` along an axis: `W R` for what reads a rotated tensor (axis -1), `R^T W` for what writes one (its output axis)."""

    rotation: Rotation
    axis: int = -1

    def apply(self, tensor: Tensor, start: int = 0) -> Tensor:
        if self.axis % tensor.ndim == tensor.ndim - 1:
            return self.rotation.apply(tensor)
        return self.rotation.apply(tensor.transpose(self.axis, -1)).transpose(self.axis, -1).contiguous()

    def needs_all(self, ndim: int) -> bool:
        return self.axis % ndim == 0


@dataclass(frozen=True)
class RotateHeads(Edit):
    """The same rotation for every head, inside an axis: channels `channels[h]` of head h times diag(signs[h]) R.

    Attributes:
        rotation: of size D. channels: int64 [heads, D]. signs: [heads, D] of +1 and -1.
    """

    rotation: Rotation
    channels: Tensor
    signs: Tensor
    axis: int = -1

    def apply(self, tensor: Tensor, start: int = 0) -> Tensor:
        index, result = self.channels.flatten(), tensor.clone()
        heads = tensor.index_select(self.axis, index).transpose(self.axis, -1)
        turned = self.rotation.apply(heads.unflatten(-1, tuple(self.channels.shape)) * self.signs.to(heads)).flatten(-2)
        result.index_copy_(self.axis, index, turned.transpose(self.axis, -1))
        return result

    def needs_all(self, ndim: int) -> bool:
        return self.axis % ndim == 0


Edits = Mapping[str, tuple[Edit, ...]]


def joined(*several: Edits) -> dict[str, tuple[Edit, ...]]:
    """Edits one after the other."""
    result: dict[str, tuple[Edit, ...]] = {}
    for edits in several:
        for name, more in edits.items():
            result[name] = (*result.get(name, ()), *more)
    return result


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model whose head has become its own."""
    result = {**config, "tie_word_embeddings": False}
    if isinstance(inner := config.get("text_config"), dict):
        result["text_config"] = {**inner, "tie_word_embeddings": False}
    return result


def input_axis(layout: ExpertsLayout) -> int:
    """Where the input channels of stacked experts lie as they are stored."""
    return -2 if layout.transposed else -1


def output_axis(layout: ExpertsLayout) -> int:
    """Where the output channels of stacked experts lie as they are stored."""
    return -1 if layout.transposed else -2


def apply_edits(edits: Iterable[Edit], tensor: Tensor, start: int = 0) -> Tensor:
    """Rows [start, ...) of a parameter after its edits, in the type it came in; a limited number of rows at a time.

    Edits are computed in float64 where float32 or float64 is stored, else in float32, and rounded once.
    """
    edits = tuple(edits)
    if not edits:
        return tensor
    work = torch.float64 if tensor.dtype in (torch.float32, torch.float64) else torch.float32
    if any(edit.needs_all(tensor.ndim) for edit in edits):
        return _chain(edits, tensor.to(work), start).to(tensor.dtype)
    result = torch.empty(tensor.shape, dtype=tensor.dtype)
    step = max(1, SLAB_BYTES // max(1, tensor[:1].numel() * work.itemsize))
    for low in range(0, len(tensor), step):
        result[low : low + step] = _chain(edits, tensor[low : low + step].to(work), start + low)
    return result


def _chain(edits: Iterable[Edit], tensor: Tensor, start: int) -> Tensor:
    for edit in edits:
        tensor = edit.apply(tensor, start)
    return tensor


class EditedWeights(HubWeights):
    """A checkpoint as it is after some edits: whoever reads a parameter, or writes one to a file, gets the edited one.

    Attributes:
        untied: parameters that were tied to another one and have become their own.
    """

    def __init__(self, weights: HubWeights, edits: Edits | None = None, untie: Iterable[str] = ()) -> None:
        plain = weights
        for name in untie:
            plain = plain.with_own(name)
        self._plain = plain
        self.model, self.entries, self.unused, self.specs = plain.model, plain.entries, plain.unused, plain.specs
        self._sources, self._of = plain._sources, plain._of
        self.untied = tuple(untie)
        self._edits: dict[str, tuple[Edit, ...]] = {}
        self.add(edits or {})

    def add(self, edits: Edits) -> None:
        """Further edits, behind those that there are.

        Raises:
            KeyError: a parameter that the checkpoint does not have.
        """
        for name in edits:
            self._plain.specs[name]
        self._edits = joined(self._edits, edits)

    def edited(self, name: str) -> bool:
        return bool(self._edits.get(name))

    def refresh(self, layer: nn.Module, prefix: str, names: Iterable[str]) -> None:
        """Read parameters of a loaded layer again, after edits that were found while it was loaded.

        Args:
            prefix: the layer's name. names: parameters by full name; those that are not in memory (experts) are left alone.
        """
        for name in names:
            owner: Any = layer.get_submodule(name.removeprefix(f"{prefix}.").rpartition(".")[0])
            leaf = name.rpartition(".")[2]
            known = owner._parameters[leaf]
            if known.device.type != "meta":
                owner._parameters[leaf] = nn.Parameter(self.parameter(name).to(known.dtype), requires_grad=False)

    def parameter(self, name: str) -> Tensor:
        return apply_edits(self._edits.get(name, ()), self._plain.parameter(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if self._needs_all(name):
            return self.parameter(name)[start:stop]
        return apply_edits(self._edits.get(name, ()), self._plain.rows(name, start, stop), start)

    def expert_rows(self, name: str, start: int, stop: int) -> Tensor:
        return apply_edits(self._edits.get(name, ()), self._plain.expert_rows(name, start, stop), start)

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        if not self.edited(name):
            yield from self._plain.pieces(name)
            return
        spec, source = self.specs[name], self._of[name]
        as_it_is = source.converter is None or source.unchanged
        by_expert = len(spec.shape) == 3 and self._by_expert(name)
        if self._needs_all(name) or not (as_it_is or by_expert) or len(spec.shape) < 2:
            yield 0, self.parameter(name).contiguous()
            return
        row = spec.nbytes // spec.shape[0]
        step = max(1, PIECE // row)
        for start in range(0, spec.shape[0], step):
            stop = min(start + step, spec.shape[0])
            part = self.expert_rows(name, start, stop) if by_expert else self.rows(name, start, stop)
            yield start * row, part.contiguous()

    def _needs_all(self, name: str) -> bool:
        return any(edit.needs_all(len(self.specs[name].shape)) for edit in self._edits.get(name, ()))
