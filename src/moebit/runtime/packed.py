"""Modules whose weights stay packed in memory: multiplied as they are, or dequantized one matrix at a time.

On a CUDA device everything here stays there but the number of tokens of each expert, which the host waits for once per layer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moebit.errors import BadInputError
from moebit.formats.native import PackedSpec, unpack_matrices
from moebit.formats.overlay import OverlaySpec
from moebit.model.inputs import InputStep
from moebit.runtime import gradients
from moebit.runtime.kernels import Stack
from moebit.runtime.paths import (
    ALWAYS,
    PATHS,
    Path,
    by_triton,
    compiled,
    dequantized,
    few_rows,
    packed_product,
    taken,
    why_not,
)


class PackedModule(nn.Module):
    """Packed matrices: buffers `codes`, `scale`, `zero_point` and, of a stack, `bits`, as in the file; nothing else is kept of them.

    Attributes:
        path: how they are multiplied; `use` sets it.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    path: Path = "auto"

    def __init__(self, spec: PackedSpec) -> None:
        super().__init__()
        self.spec = spec
        self._code_offsets, self._zero_offsets = spec.code_offsets(), spec.zero_offsets()
        self._bits, self._code_at, self._zero_at = (np.array(a, np.int64) for a in (spec.bits, self._code_offsets, self._zero_offsets))
        self._prepared: tuple[tuple[Tensor | None, ...], Stack] | None = None
        for name, tensor in spec.specs("").items():
            self.register_buffer(name.removeprefix("."), torch.empty(tensor.shape, dtype=tensor.dtype))

    def stack(self) -> Stack:
        """The buffers as the compiled kernels take them; made anew when one of them was replaced."""
        buffers = (self.codes, self.scale, None if self.spec.symmetric else self.zero_point)
        if self._prepared is None or any(a is not b for a, b in zip(self._prepared[0], buffers, strict=True)):
            codes, scale, zeros = buffers
            scale = scale if self.spec.stacked else scale.unsqueeze(0)
            stack = Stack(codes.flatten(), scale, zeros, self._bits, self._code_at, self._zero_at, self.spec.shape)
            self._prepared = (buffers, stack)
        return self._prepared[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # a copy's arrays would not be views of its buffers

    def few_rows(self, e: int, dtype: torch.dtype) -> int:
        """Up to how many rows of input matrix e is multiplied as it is packed."""
        if by_triton(self.path, self.codes.device, dtype):
            return ALWAYS
        if not compiled(self.path, self.codes.device, dtype):
            return 0
        return few_rows(self.path, self.stack(), self.spec.bits[e], dtype, matrices=8 if self.spec.stacked else 1)

    def matrices(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """[stop - start, out, in] weights."""
        stack = self.stack()
        if compiled(self.path, self.codes.device, dtype):
            result = torch.empty(stop - start, *self.spec.shape, dtype=dtype)
            for e in range(start, stop):
                dequantized(stack, e, result[e - start])
            return result
        codes = stack.codes[self._code_offsets[start] : self._code_offsets[stop]]
        zeros = None if stack.zeros is None else stack.zeros[self._zero_offsets[start] : self._zero_offsets[stop]]
        return unpack_matrices(codes, stack.scale[start:stop], zeros, list(self.spec.bits[start:stop]), self.spec.shape, dtype)


class PackedMatrices(PackedModule):
    """A stack of packed matrices: one projection of all experts."""

    def unpacked(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """[stop - start, out, in] weights."""
        return self.matrices(start, stop, dtype)

    def unpack_into(self, e: int, target: Tensor, rows: slice) -> None:
        """Write matrix e to target[rows]; target is [rows, in]."""
        if compiled(self.path, self.codes.device, target.dtype):
            dequantized(self.stack(), e, target, rows)
        else:
            target[rows] = self.matrices(e, e + 1, target.dtype)[0]


class PackedLinear(PackedModule):
    """A linear layer over a packed weight. What happens to its input comes in front, as a hook (`model/inputs.py`)."""

    bias: nn.Parameter | None

    def __init__(self, spec: PackedSpec, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(spec)
        self.dtype = dtype
        self.out_features, self.in_features = spec.shape
        self.register_parameter("bias", nn.Parameter(torch.empty(spec.shape[0], dtype=dtype), requires_grad=False) if bias else None)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """[out, in] weights."""
        return self.matrices(0, 1, dtype)[0]

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, made anew at every access: some architectures read a linear's weight instead of calling it.

        It is for inputs as they are, whatever the packed one expects.
        """
        step: InputStep | None = getattr(self, "moebit_inputs", None)
        if step is None or step.transform is None:
            return self.unpacked(self.dtype)
        return step.transform.value().undo(self.unpacked(torch.float32)).to(self.dtype)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """[..., out]; differentiable with respect to the input and the bias. torch.compile leaves it out of its graphs."""
        if gradients.wanted(x, self.bias):
            return gradients.linear(x, self.bias, self.out_features, partial(self.unpacked, x.dtype))
        rows = x.numel() // self.in_features
        if not 0 < rows <= self.few_rows(0, x.dtype):
            return nn.functional.linear(x, self.unpacked(x.dtype), self.bias)
        y = torch.empty(rows, self.out_features, device=x.device)
        packed_product(self.path, self.stack(), x.reshape(rows, -1), [0], [0, rows], torch.arange(rows, device=x.device), y)
        result = y.view(*x.shape[:-1], self.out_features)
        return result.to(x.dtype) if self.bias is None else (result + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.spec.bits[0]} bits, group {self.spec.group_size}"


class PackedChannels(PackedMatrices):
    """Channels of one projection that stand in for the base's (formats/overlay.py): a stack of [1, H] matrices and their places.

    Attributes:
        expert, channel: int32 [n], rising.
    """

    expert: Tensor
    channel: Tensor

    def __init__(self, spec: PackedSpec) -> None:
        super().__init__(spec)
        register_places(self, len(spec.bits))

    def values_of(self, low: int, high: int, dtype: torch.dtype) -> Tensor:
        """[high - low, H] of some channels."""
        return self.matrices(low, high, dtype)[:, 0]


class FullChannels(nn.Module):
    """Channels of one projection that stand in for the base's, in full precision: values [n, H] and their places."""

    expert: Tensor
    channel: Tensor
    values: Tensor

    def __init__(self, spec: OverlaySpec) -> None:
        super().__init__()
        register_places(self, spec.channels)
        self.register_buffer("values", torch.empty(spec.channels, spec.hidden, dtype=spec.dtype))

    def values_of(self, low: int, high: int, dtype: torch.dtype) -> Tensor:
        """[high - low, H] of some channels."""
        return self.values[low:high].to(dtype)


def register_places(module: nn.Module, count: int) -> None:
    for leaf in ("expert", "channel"):
        module.register_buffer(leaf, torch.empty(count, dtype=torch.int32))


def use(model: nn.Module, path: Path) -> nn.Module:
    """Have a model's packed modules multiply in one way (`moebit.runtime.PATHS`), in place; returns the model.

    Raises:
        BadInputError: no such way, one that this processor or a module's grid rules out, or a model without packed modules.
    """
    if path not in PATHS:
        raise BadInputError(f"no way of multiplying is called {path!r}: choose from {', '.join(PATHS)}")
    modules = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
    if not modules:
        raise BadInputError(f"{type(model).__name__} has no packed modules: load a native output of moebit")
    for name, module in modules.items():
        reason = why_not(path, module.stack())
        if reason:
            raise BadInputError(f"{name} cannot be multiplied by {path!r}: {reason}")
    for module in modules.values():
        module.path = path
    return model


def multiplied(model: nn.Module) -> tuple[Path, ...]:
    """The ways in which a model's packed modules multiply where they lie now; none if it has no packed modules."""
    found = {taken(module.path, module.codes.device) for module in model.modules() if isinstance(module, PackedModule)}
    return tuple(path for path in PATHS if path in found)
