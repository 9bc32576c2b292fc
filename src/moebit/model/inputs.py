"""What happens to the inputs of quantized matrices before they are multiplied: an online transform, and rounding.

One place for all who run a quantized model: the streaming skeleton and packed modules get the same steps from `attach`, as their attribute
`moebit_inputs`: linears with a hook in front of their forward, experts for `model/experts.py` to look at. Full-precision models have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moebit.model.attention import round_attention
from moebit.model.capture import put_in_front
from moebit.model.seam import is_experts
from moebit.storage.files import TensorSpec
from moebit.tensor.blocks import BlockTransform, block_size, hadamard
from moebit.tensor.row_rounding import Rounding

FIRST, DOWN, LINEAR = "first_transform", "down_transform", "transform"  # what transforms are called inside the modules that own them


@dataclass(frozen=True)
class TransformSpec:
    """An online transform as it is stored.

    Attributes:
        kind: `hadamard` stores its signs, `duquant` two rotations and a permutation (docs/format.md).
        channels: of the input. count: M, one per expert, or 1 for all.
    """

    kind: Literal["hadamard", "duquant"]
    channels: int
    count: int = 1

    @property
    def block(self) -> int:
        return block_size(self.channels)

    def specs(self) -> dict[str, TensorSpec]:
        """The stored tensors."""
        rows = (self.count, self.channels)
        if self.kind == "hadamard":
            return {"signs": TensorSpec(torch.int8, rows)}
        blocks = TensorSpec(torch.float32, (self.count, self.channels // self.block, self.block, self.block))
        return {"first": blocks, "permutation": TensorSpec(torch.int32, rows), "second": blocks}

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs().values())

    def tensors(self, transform: BlockTransform) -> dict[str, Tensor]:
        """What is stored of a transform."""
        found = {leaf: getattr(transform, leaf) for leaf in self.specs()}
        return {leaf: value.to(spec.dtype) for (leaf, spec), value in zip(self.specs().items(), found.values(), strict=True)}

    def transform(self, tensors: Mapping[str, Tensor]) -> BlockTransform:
        """The inverse of `tensors`."""
        if self.kind == "hadamard":
            block = hadamard(self.block).to(tensors["signs"].device)
            return BlockTransform(signs=tensors["signs"], first=block.expand(self.count, 1, -1, -1))
        return BlockTransform(first=tensors["first"], permutation=tensors["permutation"], second=tensors["second"])


class OnlineTransform(nn.Module):
    """A transform inside a model: its stored tensors are buffers, so that they are read, moved and saved with the model's own."""

    def __init__(self, spec: TransformSpec) -> None:
        super().__init__()
        self.spec = spec
        for leaf, tensor in spec.specs().items():
            self.register_buffer(leaf, torch.empty(tensor.shape, dtype=tensor.dtype))

    def value(self) -> BlockTransform:
        return self.spec.transform(dict(self.named_buffers()))

    def forward(self, x: Tensor, bounds: list[int] | None = None, start: int = 0) -> Tensor:
        """[S, N] rows times the transform; where there is one per expert, rows [bounds[c], bounds[c + 1]) are of expert `start + c`."""
        transform = self.value()
        return transform.apply(x) if bounds is None else transform.apply_ragged(x, bounds, start)


@dataclass(frozen=True)
class InputStep:
    """Transform, then round, in float32 at least; back in the type of the input. Without either, nothing."""

    transform: OnlineTransform | None = None
    rounding: Rounding | None = None

    def __call__(self, x: Tensor, bounds: list[int] | None = None, start: int = 0) -> Tensor:
        if x.is_meta or not (self.transform or self.rounding):  # on meta there is only the structure to see, and who shares an input
            return x
        wide = x if x.dtype == torch.float64 else x.float()
        if self.transform is not None:
            wide = self.transform(wide, bounds, start)
        if self.rounding is not None:
            wide = self.rounding(wide)
        return wide.to(x.dtype)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A forward pre-hook that rotates and rounds the first argument."""
        return (self(args[0]), *args[1:])


@dataclass(frozen=True)
class ExpertSteps:
    """The two inputs of an experts module: of gate and up (or the lone up), and of down."""

    first: InputStep
    down: InputStep


@dataclass(frozen=True)
class Activations:
    """What an output asks of those who run it.

    Attributes:
        inputs: how the inputs of quantized linears and experts, and of the experts' down projections, are rounded; None: not at all.
        transforms: by stored name, MODULE.transform of a linear, MODULE.first_transform and MODULE.down_transform of experts.
        reads: linear -> the transform of its input, which it may share with others.
        attention: how query, key and value are rounded, in the attention modules called `attention_modules`.
    """

    inputs: Rounding | None = None
    transforms: Mapping[str, TransformSpec] = field(default_factory=dict)
    reads: Mapping[str, str] = field(default_factory=dict)
    attention: Rounding | None = None
    attention_modules: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.inputs or self.transforms or self.attention_modules)

    def below(self, names: Iterable[str]) -> dict[str, TransformSpec]:
        """The transforms that belong to modules of these names."""
        owners = set(names)
        return {name: spec for name, spec in self.transforms.items() if name.rpartition(".")[0] in owners}


def attach(model: nn.Module, activations: Activations, quantized: Iterable[str], place: Callable[[str], str] = lambda name: name) -> None:
    """Give the quantized modules of a model their steps, in place; transforms are added as submodules without values yet.

    Args:
        quantized: stored names of the quantized linears and experts. place: stored name -> name in this model.
    """
    with torch.device("meta"):
        owned = {name: OnlineTransform(spec) for name, spec in activations.transforms.items()}
    for name, transform in owned.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(place(owner)).add_module(leaf, transform)
    for name in quantized:
        module: Any = model.get_submodule(place(name))
        if is_experts(module):
            first, down = owned.get(f"{name}.{FIRST}"), owned.get(f"{name}.{DOWN}")
            module.moebit_inputs = ExpertSteps(InputStep(first, activations.inputs), InputStep(down, activations.inputs))
        else:
            module.moebit_inputs = InputStep(owned.get(activations.reads.get(name, "")), activations.inputs)
            put_in_front(module, module.moebit_inputs.before)
    for name in activations.attention_modules:
        round_attention(model.get_submodule(place(name)), activations.attention)
