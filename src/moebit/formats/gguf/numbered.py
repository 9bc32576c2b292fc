"""Numbered rows in place of a checkpoint's weights, and their way through llama.cpp's converter.

The payloads are small whole numbers, which float32 holds exactly. Each is constant along all axes but one and holds only that one: strides
of 0. `_Thin` keeps the results of stacking and copying thin, so that the rows of 256 experts need no more memory than their numbers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moebit.formats.gguf.converter import UNMAPPABLE, Converter, LazyTensor
from moebit.storage.files import TensorSpec

LARGEST = 2**24  # whole numbers that float32 tells apart
aten = torch.ops.aten
Payload = Callable[[tuple[int, ...], int], Tensor]


def two_axes(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape with at least two axes: a vector is lines of one place."""
    return tuple(shape) if len(shape) > 1 else (math.prod(shape), 1)


def _along_rows(shape: tuple[int, ...], numbers: Tensor) -> Tensor:
    """One number for every line of [.., out, in], the same everywhere in it; only the numbers take memory."""
    return numbers.view(*two_axes(shape)[:-1], 1).expand(two_axes(shape)).view(shape)


def _along_places(shape: tuple[int, ...], numbers: Tensor) -> Tensor:
    """One number for every place in a line, the same in every line with the same leading indices."""
    *leading, _, width = two_axes(shape)
    return numbers.view(*leading, 1, width).expand(two_axes(shape)).view(shape)


def counted(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float32)


def shuffle(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(count)).to(torch.float32)


def other_number(number: float) -> float:
    """A number of its own for every number of a tensor, not in their order: 7919 is a prime."""
    return float(number * 7919 % LARGEST)


def rows_count(shape: tuple[int, ...]) -> int:
    return math.prod(two_axes(shape)[:-1])


def places_count(shape: tuple[int, ...]) -> int:
    *leading, _, width = two_axes(shape)
    return math.prod(leading) * width


def lines_at_most(shape: tuple[int, ...]) -> int:
    """How many lines a tensor has, stored as it is or transposed."""
    return max(rows_count(shape), places_count(shape))


def _one_number(shape: tuple[int, ...], number: float) -> Tensor:
    return torch.full((1,) * len(shape), number).expand(shape)


PAYLOADS: dict[str, Payload] = {
    "line": lambda shape, _: _along_rows(shape, counted(rows_count(shape))),
    "shuffled line": lambda shape, _: _along_rows(shape, shuffle(rows_count(shape))),
    "place": lambda shape, _: _along_places(shape, counted(places_count(shape))),
    "shuffled place": lambda shape, _: _along_places(shape, shuffle(places_count(shape))),
    "tensor": lambda shape, number: _one_number(shape, float(number)),
    "scattered tensor": lambda shape, number: _one_number(shape, other_number(number)),
}


def numbered(given: Mapping[str, TensorSpec], payload: Payload) -> dict[str, LazyTensor]:
    def loader(shape: tuple[int, ...], number: int) -> Callable[[], Tensor]:
        return lambda: payload(shape, number)

    return {
        name: LazyTensor(TensorSpec(torch.float32, spec.shape), loader(spec.shape, number))
        for number, (name, spec) in enumerate(given.items())
    }


def send(
    converter: Converter, directory: Path, tensors: Mapping[str, LazyTensor], came: dict[str, str], failed: dict[str, str]
) -> dict[str, Tensor]:
    """GGUF name → what arrived there; `came` notes behind which tensor. Tensors on which the converter fails are noted and left out."""
    arrived: dict[str, Tensor] = {}
    with converter.active(), torch.inference_mode():
        model = converter.model(directory, tensors)
        back = _names_back(model, tensors)
        with contextlib.suppress(*UNMAPPABLE):
            model.dequant_model()
        for name in list(model.model_tensors):
            source = back.get(name, name)
            if source not in tensors or source in failed:
                continue
            try:
                with _Thin():
                    for new_name, data in model.modify_tensors(tensors[source].load(), name, _block(name)):
                        arrived[new_name], came[new_name] = data, source
            except UNMAPPABLE as error:
                failed[source] = f"{type(error).__name__}: {error}"
    return arrived


def _names_back(model: Any, tensors: Mapping[str, LazyTensor]) -> dict[str, str]:
    """The converter's name of a tensor → the checkpoint's; the converter's filter renames some and drops others."""
    items = ((name, model.filter_tensors((name, lambda: None))) for name in tensors)
    return {item[0]: name for name, item in items if item}


def _block(name: str) -> int | None:
    """The number of the block as the converter takes it from a name: the first part that is a number."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def thin(values: Tensor) -> Tensor:
    """The values without the repeats that strides of 0 make."""
    for axis in range(values.ndim):
        if values.stride(axis) == 0 and values.shape[axis] > 1:
            values = values.narrow(axis, 0, 1)
    return values


class _Thin(TorchDispatchMode):
    """Stacks and copies of tensors with strides of 0 have them, too; everything else runs as it does anywhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (aten.stack.default, aten.cat.default):
            return _joined(func, list(args[0]), args[1] if len(args) > 1 else kwargs.get("dim", 0))
        if func in (aten.clone.default, aten._to_copy.default):
            return func(thin(args[0]), *args[1:], **kwargs).expand(args[0].shape)
        if func in (aten.view.default, aten._unsafe_view.default):
            try:
                return func(*args, **kwargs)
            except RuntimeError:  # a view that needs what a copy would have had
                return func(args[0].clone(memory_format=torch.contiguous_format), *args[1:], **kwargs)
        return func(*args, **kwargs)


def _joined(func: Any, parts: list[Tensor], axis: int) -> Tensor:
    """`stack` or `cat` of the one copy along every axis that all parts only repeat."""
    stacking = func is aten.stack.default
    joined = axis % (parts[0].ndim + stacking)
    small, shape = parts, list(parts[0].shape)
    for at in range(parts[0].ndim):
        if (stacking or at != joined) and all(part.stride(at) == 0 and part.shape[at] > 1 for part in parts):
            small = [part.narrow(at, 0, 1) for part in small]
    if stacking:
        shape.insert(joined, len(parts))
    else:
        shape[joined] = sum(part.shape[joined] for part in parts)
    return func(small, axis).expand(shape)
