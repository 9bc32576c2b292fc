"""Edits of parameters that leave the model's function as it is, applied when a parameter is read.

An edit speaks of an axis of the parameter as transformers stores it, so that transposed or interleaved experts need nothing of their own:
the input channels of a linear are axis -1, its output channels axis 0; of stacked experts axis -1 and -2 (the other way round where they
are stored transposed). Nothing of the checkpoint is copied: `EditedWeights` reads what is asked for, edits it, and rounds it once to the
type that is stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moebit.storage.checkpoint import Checkpoint
from moebit.storage.conversion import tied_names
from moebit.storage.files import Entry, TensorSpec
from moebit.storage.weights import Weights
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
    """Every head is rotated alike, inside an axis: the channels `channels[h]` of head h are multiplied with diag(signs[h]) R.

    Attributes:
        rotation: of size D. channels: int64 [heads, D]. signs: [heads, D] of +1 and -1.
    """

    rotation: Rotation
    channels: Tensor
    signs: Tensor
    axis: int = -1

    def apply(self, tensor: Tensor, start: int = 0) -> Tensor:
        index, result = self.channels.flatten().to(tensor.device), tensor.clone()
        heads = tensor.index_select(self.axis, index).transpose(self.axis, -1)
        turned = self.rotation.apply(heads.unflatten(-1, tuple(self.channels.shape)) * self.signs.to(heads)).flatten(-2)
        result.index_copy_(self.axis, index, turned.transpose(self.axis, -1))
        return result

    def needs_all(self, ndim: int) -> bool:
        return self.axis % ndim == 0


@dataclass(frozen=True)
class Replace(Edit):
    """Another value altogether, for a router that was corrected or rounded: the one edit that changes the model's function."""

    value: Tensor

    def apply(self, tensor: Tensor, start: int = 0) -> Tensor:
        return self.value[start : start + len(tensor)].to(tensor)


Edits = Mapping[str, tuple[Edit, ...]]


def placed(checkpoint: Checkpoint, device: torch.device) -> Checkpoint:
    """The checkpoint with its weights handed out on a device."""
    return replace(checkpoint, weights=EditedWeights(checkpoint.weights, device=device)) if device.type != "cpu" else checkpoint


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
    result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    step = max(1, SLAB_BYTES // max(1, tensor[:1].numel() * work.itemsize))
    for low in range(0, len(tensor), step):
        result[low : low + step] = _chain(edits, tensor[low : low + step].to(work), start + low)
    return result


def _chain(edits: Iterable[Edit], tensor: Tensor, start: int) -> Tensor:
    for edit in edits:
        tensor = edit.apply(tensor, start)
    return tensor


class EditedWeights(Weights):
    """Other weights as they are after some edits: who reads a parameter, or writes one to a file, gets the edited one.

    Args:
        edits: by parameter, in the order in which they are applied.
        own: parameters that are tied to another one and become a copy of it, which is edited apart.
        untied: those of the model's tied parameters that the output has to declare as untied; `own` where nothing is given.
        device: where parameters are edited and handed out; they are read on the host.

    Attributes:
        untied: as given.
    """

    def __init__(
        self,
        weights: Weights,
        edits: Edits | None = None,
        own: Iterable[str] = (),
        untied: Iterable[str] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._plain = weights
        self.device = device or weights.device
        self.model, self.unused = weights.model, weights.unused
        self._copied = {name: tied_names(weights.model)[name] for name in own}
        copies = {
            name: replace(weights.entries[weights.stored_names(other)[0]], name=name)  # type: ignore[type-var]
            for name, other in self._copied.items()
        }
        self.entries: Mapping[str, Entry] = {**weights.entries, **copies}
        self.untied = tuple(self._copied if untied is None else untied)
        self._edits: dict[str, tuple[Edit, ...]] = {}
        self.add(edits or {})

    def add(self, edits: Edits) -> None:
        """Further edits, behind those that there are.

        Raises:
            KeyError: a parameter that the checkpoint does not have.
        """
        known = self.available()
        unknown = [name for name in edits if name not in known]
        if unknown:
            raise KeyError(unknown[0])
        self._edits = joined(self._edits, edits)

    def on(self, device: torch.device) -> EditedWeights:
        """Return weights with the edits that were added so far, which hand out their values on a device."""
        return EditedWeights(self._plain, self._edits, self._copied, self.untied, device)

    def edited(self, name: str) -> bool:
        """Whether a parameter differs from what is stored."""
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

    def available(self) -> set[str]:
        return self._plain.available() | self._copied.keys()

    def spec(self, name: str) -> TensorSpec:
        return self._plain.spec(self._source(name))

    def parameter(self, name: str) -> Tensor:
        return apply_edits(self._edits.get(name, ()), self._moved(lambda: self._plain.parameter(self._source(name))))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if self._needs_all(name):
            return self.parameter(name)[start:stop]
        return apply_edits(self._edits.get(name, ()), self._moved(lambda: self._plain.rows(self._source(name), start, stop)), start)

    def expert_rows(self, name: str, start: int, stop: int) -> Tensor:
        return apply_edits(self._edits.get(name, ()), self._moved(lambda: self._plain.expert_rows(name, start, stop)), start)

    def expect(self, names: Iterable[str], start: int, stop: int) -> None:
        self._plain.expect(names, start, stop)

    def divisible(self, name: str) -> bool:
        return self._plain.divisible(self._source(name)) and not self._needs_all(name)

    def stored_names(self, name: str) -> list[str]:
        return [name] if name in self._copied else self._plain.stored_names(name)

    def stored_by_pattern(self, name: str) -> dict[str, list[str]]:
        return {name: [name]} if name in self._copied else self._plain.stored_by_pattern(name)

    def stored_form(self, name: str, tensor: Tensor, start: int = 0) -> dict[str, Tensor]:
        return {name: tensor} if name in self._copied else self._plain.stored_form(name, tensor, start)

    def stored_together(self) -> dict[str, list[str]]:
        return self._plain.stored_together()

    def merged(self) -> set[str]:
        return self._plain.merged()

    def _moved(self, read: Callable[[], Tensor]) -> Tensor:
        """What is read, on the device; the reading itself, which may unpack what is stored, is the host's."""
        if self.device.type == "cpu":
            return read()
        with torch.device("cpu"):
            tensor = read()
        return tensor.to(self.device)

    def _source(self, name: str) -> str:
        """The parameter from which the values come."""
        return self._copied.get(name, name)

    def _needs_all(self, name: str) -> bool:
        return any(edit.needs_all(len(self.spec(name).shape)) for edit in self._edits.get(name, ()))
