"""A model's layers with random weights in float64: what is claimed to leave the function as it is has to show it here, before any work.

The layers have their real shapes; only the routed experts' intermediate size and the vocabulary are made small, which no transform
depends on. Random weights are windows into one short sequence of numbers and take no memory until a product wants them. One layer of
every kind is run, or all of them where layers hand something on beside the hidden states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from moebit.model.experts import ExpertsLayout, add_outputs, dispatch, read_experts
from moebit.model.proof.passage import Passage
from moebit.model.seam import ExpertsHandler
from moebit.model.skeleton import skeleton
from moebit.model.structure import Structure
from moebit.storage.checkpoint import Checkpoint
from moebit.storage.conversion import tied_names
from moebit.storage.edits import Edit, Edits, apply_edits
from moebit.storage.files import TensorSpec
from moebit.storage.weights import OwnNames, Weights

INTERMEDIATE, VOCABULARY = 2, 256
WINDOWS, LENGTH = 2, 12
POOL, STRIDES = 2**21, (17, 1009, 3, 1)
NARROW = (torch.float32, torch.float16, torch.bfloat16)


class InDouble(TorchFunctionMode):
    """Every cast to a narrower floating-point type becomes one to float64: models compute norms and softmax in float32 by themselves."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            func = torch.Tensor.double
        wide = tuple(torch.float64 if value in NARROW else value for value in args) if _names_type(args) else args
        named = {
            key: torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value for key, value in (kwargs or {}).items()
        }
        return func(*wide, **named)


def _names_type(args: Any) -> bool:
    return any(isinstance(value, torch.dtype) for value in args)


class RandomWeights(OwnNames):
    """Random values for every parameter of a skeleton, the same whenever they are read, after `edits`.

    Tied parameters have the same values, until edits tell them apart.
    """

    def __init__(self, model: PreTrainedModel, layouts: Mapping[str, ExpertsLayout], edits: Edits | None = None) -> None:
        self.model, self.entries = model, {}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for experts, layout in layouts.items():
            self._shapes |= {f"{experts}.{leaf}": shape for leaf, shape in _small_shapes(layout).items()}
        self._types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        self._same = tied_names(model)
        self._edits = dict(edits or {})
        generator = torch.Generator().manual_seed(0)
        self._pool = torch.randn(POOL, dtype=torch.float64, generator=generator)

    def available(self) -> set[str]:
        return set(self._shapes)

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(self._types[name], self._shapes[name])

    def divisible(self, name: str) -> bool:
        return True

    def expect(self, names: Iterable[str], start: int, stop: int) -> None:
        """Nothing: there are no files."""

    def stored_names(self, name: str) -> list[str]:
        return []

    def parameter(self, name: str) -> Tensor:
        return apply_edits(self._edits.get(name, ()), self._plain(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        edits: tuple[Edit, ...] = self._edits.get(name, ())
        if any(edit.needs_all(len(self._shapes[name])) for edit in edits):
            return self.parameter(name)[start:stop]
        return apply_edits(edits, self._plain(name)[start:stop], start)

    def expert_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.rows(name, start, stop)

    def _plain(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if not self._types[name].is_floating_point:
            return torch.zeros(shape, dtype=self._types[name])
        key = min(name, self._same.get(name, name))
        offset = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) % (POOL // 4)
        values = self._pool.as_strided(shape, STRIDES[4 - len(shape) :] if shape else (), offset)
        if len(shape) < 2:
            return 1 + 0.3 * values
        return values / max(shape[-2:] if len(shape) == 3 else shape[-1:]) ** 0.5


def _small_shapes(layout: ExpertsLayout) -> dict[str, tuple[int, ...]]:
    e, h, rows = layout.experts, layout.hidden, INTERMEDIATE * (2 if layout.gated else 1)
    turn = layout.transposed
    shapes: dict[str, tuple[int, ...]] = {
        layout.first: (e, h, rows) if turn else (e, rows, h),
        "down_proj": (e, INTERMEDIATE, h) if turn else (e, h, INTERMEDIATE),
    }
    return shapes | ({f"{layout.first}_bias": (e, rows), "down_proj_bias": (e, h)} if layout.bias else {})


class Rehearsal:
    """A model of random weights, to run some of its layers as they are and after edits.

    Attributes:
        kinds: for every layer, the first layer like it.
        weights: of the model as it is.
    """

    def __init__(self, checkpoint: Checkpoint, structure: Structure) -> None:
        with InDouble():
            model = skeleton(checkpoint.config, torch.float64).double()
        head = model.get_output_embeddings()
        if type(head) is nn.Linear and head.out_features > VOCABULARY:
            model.set_output_embeddings(nn.Linear(head.in_features, VOCABULARY, head.bias is not None, device="meta", dtype=torch.float64))
        self.model, self.structure = model, structure
        self.layouts = {s.experts: s.moe.layout for s in structure.layers if s.moe}
        self.weights = RandomWeights(model, self.layouts)
        signatures: dict[Any, int] = {}
        self.kinds = [signatures.setdefault(_signature(model.get_submodule(s.name)), s.index) for s in structure.layers]
        vocabulary = int(checkpoint.config.get_text_config().vocab_size)
        self._windows = torch.randint(0, vocabulary, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
        if self.passage().hands_on:
            self.kinds = list(range(len(structure.layers)))

    @property
    def representatives(self) -> list[int]:
        """Indices of the layers that have to be run."""
        return sorted(set(self.kinds))

    def passage(self, edits: Edits | None = None) -> Passage:
        """A few tokens in front of the layers, of the model after `edits`."""
        with InDouble():
            return Passage(self.model, self.structure, self._edited(edits), self._windows)

    def _edited(self, edits: Edits | None) -> RandomWeights:
        return RandomWeights(self.model, self.layouts, edits) if edits else self.weights

    def step(self, passage: Passage, index: int) -> None:
        """Advance a passage through one layer."""
        with InDouble(), passage.loaded(index) as layer:
            passage.hidden = passage.output(index, layer, self._experts(passage.weights, index), keep=True)

    def logits(self, passage: Passage) -> Tensor:
        """[N, L, V] float64 behind the last layer."""
        with InDouble():
            return passage.logits()

    def output(self, passage: Passage, index: int, edits: Edits | None = None) -> Tensor:
        """What a layer puts out for a passage's hidden states, after edits inside the layer; the passage stays where it is."""
        weights = self._edited(edits) if edits else passage.weights
        with InDouble(), passage.loaded(index, weights) as layer:
            return passage.output(index, layer, self._experts(weights, index))

    def _experts(self, weights: Weights, index: int) -> ExpertsHandler:
        sites = self.structure.layers[index]
        if sites.moe is None:
            return lambda module, x, ids, affinity: torch.zeros_like(x)
        name, layout = sites.experts, sites.moe.layout
        small = replace(layout, intermediate=INTERMEDIATE)

        def handler(module: nn.Module, x: Tensor, ids: Tensor, affinity: Tensor) -> Tensor:
            read = read_experts(weights, name, small, 0, layout.experts, torch.float64)
            outputs = torch.zeros(x.shape, dtype=torch.float64)
            add_outputs(module, x, read, dispatch(ids, affinity, layout.experts), outputs)
            return outputs

        return handler


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value; infinity where something is no number."""
    value = float((a - b).abs().max() / a.abs().max().clamp(min=1e-300))
    return value if value == value else float("inf")


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    """What a layer's course depends on: its modules, their shapes and their settings, but not its number."""
    result: list[Any] = []
    for name, module in layer.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str) and "idx" not in key}
        shapes = [(leaf, tuple(p.shape)) for leaf, p in module._parameters.items() if p is not None]
        result.append((name, type(module).__name__, tuple(sorted(plain.items())), tuple(shapes)))
    return tuple(result)
