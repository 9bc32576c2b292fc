"""What a quantization will do, known before it starts: structure, sizes, memory, time, and whether it can be done at all."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moebit.errors import BadInputError
from moebit.formats.engines import ANY, Verdict, check_engine, verdicts
from moebit.formats.gguf.target import GgufPlan, GgufTarget
from moebit.formats.inputs_config import describe_activations
from moebit.formats.native import PackedSpec
from moebit.formats.sink import Sink
from moebit.formats.sinks import SINKS
from moebit.model.inputs import Activations
from moebit.model.proof.router import not_linear
from moebit.model.reach import Reach, expert_reach
from moebit.model.structure import LayerSites, MoESite, Structure
from moebit.plan.bitplan import BitPlan
from moebit.plan.describe import read_as
from moebit.plan.estimate import budget, output_size, seconds, stored_dtype
from moebit.plan.gguf import GgufChooser
from moebit.plan.grids import Grid, GridChooser
from moebit.plan.inputs import ActivationPlan, plan_activations
from moebit.plan.transforms import NO_TRANSFORMS, Transforms
from moebit.recipe import Recipe
from moebit.storage.checkpoint import Checkpoint
from moebit.streaming.budget import Budget
from moebit.tensor.grids.ggml import GRIDS


@dataclass(frozen=True)
class Plan:
    """A recipe applied to a checkpoint, on paper.

    Attributes:
        linears: quantized linears by full name.
        experts: quantized experts modules by full name, each projection's spec.
        kept: full names of what stays in full precision though it is a matrix of a decoder layer or an expert, with the reason.
        coverage: which expert parameters of the files the structure covers. What the recipe ignores by name is the user's wish.
        size_bytes: of the output's tensors. budget: the pieces in which the work is done. seconds: an estimate.
        as_stored: stored tensors that the model class does not use; they are written as they are.
        left_over: files with tensors of which nothing is read, and how many they hold. read_as: the model type, if it is another's.
        transforms: what is done to the weights before they are quantized, and where it can be.
        engines: what each engine makes of the output.
        routers: where the recipe works on routers: by layer, why this one cannot be aligned or realigned; None where it can.
        inputs: which inputs are rounded and transformed as the output runs.
        gguf: the types of a GGUF file's tensors, where that is what is written.
        spent: what a budget was spent on and what is predicted for it (profiling/spend.py), where there was one.
        group_sizes: module -> the group size that it has where the recipe's does not divide its rows; -1 is the whole row.
        original: how the checkpoint is itself quantized, where the output has fewer bits; "" otherwise.
    """

    recipe: Recipe
    structure: Structure
    linears: dict[str, PackedSpec]
    experts: dict[str, dict[str, PackedSpec]]
    kept: dict[str, str]
    size_bytes: int
    budget: Budget
    seconds: float
    coverage: Reach
    engines: dict[str, Verdict]
    as_stored: tuple[str, ...] = ()
    transforms: Transforms = NO_TRANSFORMS
    routers: Mapping[int, str | None] = field(default_factory=dict)
    inputs: ActivationPlan = field(default_factory=ActivationPlan)
    gguf: GgufPlan | None = None
    spent: Mapping[str, Any] | None = None
    left_over: Mapping[str, int] = field(default_factory=dict)
    read_as: dict[str, str] | None = None
    group_sizes: Mapping[str, int] = field(default_factory=dict)
    original: str = ""

    @property
    def activations(self) -> Activations:
        """What happens to inputs, for those who run the output."""
        return self.inputs.activations

    @property
    def chunk(self) -> dict[int, int]:
        """Experts in memory at a time, by layer."""
        return self.budget.chunk

    @property
    def peak_bytes(self) -> int:
        """An estimate of the process's peak memory."""
        return self.budget.peak_bytes

    @property
    def spill(self) -> bool:
        """Whether the hidden states go to a file."""
        return self.budget.spill

    @property
    def modules(self) -> dict[str, dict[str, PackedSpec]]:
        """Every quantized module: {"": spec} for a linear, {projection: spec} for experts."""
        return {**{name: {"": spec} for name, spec in self.linears.items()}, **self.experts}

    @property
    def average_bits(self) -> float:
        """8 x bytes of what is quantized / number of weights."""
        return SINKS[self.recipe.format].average_bits(self.modules)

    def describe(self) -> dict[str, Any]:
        """The plan as values that JSON knows, for people and programs."""
        return {
            "size_bytes": self.size_bytes,
            "average_bits": self.average_bits,
            "peak_memory_bytes": self.peak_bytes,
            "memory": self.budget.memory,
            "seconds": round(self.seconds, 1),
            "quantized_linears": len(self.linears),
            "quantized_experts_modules": len(self.experts),
            "kept": self.kept,
            "kept_as_stored": list(self.as_stored),
            **({"left_over": dict(self.left_over)} if self.left_over else {}),
            **({"read_as": self.read_as} if self.read_as else {}),
            "unquantized_expert_share": self.coverage.share,
            "experts_per_chunk": self.chunk,
            "engines": {name: verdict.describe() for name, verdict in self.engines.items()},
            **({"original": self.original} if self.original else {}),
            **({"gguf": self.gguf.describe()} if self.gguf else {}),
            **({"budget": dict(self.spent)} if self.spent else {}),
            **({"other_group_sizes": dict(self.group_sizes)} if self.group_sizes else {}),
            **({"transforms": self.transforms.describe()} if self.transforms else {}),
            **({"routers": self._describe_routers()} if self.routers else {}),
            **({"activations": self._describe_inputs()} if self.recipe.activations.rounded or self.activations else {}),
        }

    def _describe_routers(self) -> dict[str, Any]:
        left = {self.structure.layers[index].name: reason for index, reason in self.routers.items() if reason}
        return {"changed": len(self.routers) - len(left), "left": left}

    def _describe_inputs(self) -> dict[str, Any]:
        """What happens to activations: names of layers and counts instead of every module."""
        inputs = self.inputs
        return {**describe_activations(inputs.activations), "inputs_only": inputs.inputs_only, "untransformed": inputs.untransformed}


def make_plan(
    checkpoint: Checkpoint,
    structure: Structure,
    recipe: Recipe,
    memory: int,
    bits: BitPlan | None = None,
    engine: str = ANY,
    transforms: Transforms = NO_TRANSFORMS,
    target: GgufTarget | None = None,
) -> Plan:
    """Decide what is quantized and how, and check that it can be.

    Args:
        bits: widths that differ from the recipe's.
        engine: what has to run the output: transformers, vllm, or any of them.
        transforms: what was found out about the weights' transforms; `checkpoint` is the transformed one.
        target: what llama.cpp's converter does to the checkpoint, for format gguf.

    Raises:
        BadInputError: a group size that does not divide (naming the layer and what would), an ignore pattern that matches nothing,
            a format that cannot hold it, an engine that cannot run it.
    """
    sink, coverage = SINKS[recipe.format], expert_reach(checkpoint, structure)
    bits = bits or BitPlan()
    if bits.types and target is None:
        raise BadInputError(f"plan: types of GGUF tensors, and the format is {recipe.format}; set format: gguf")
    types = GgufChooser.of(checkpoint, structure, recipe, target, bits.types) if target else None
    grids = GridChooser(recipe)
    choice = _Chooser(checkpoint, recipe, bits, sink, grids, types).choose(structure)
    choice.check(bits, recipe)
    grids.check(next(iter(choice.modules)))
    gguf = types.plan() if types else None
    modules, merged = choice.modules, tuple(checkpoint.weights.merged())
    sink.check(checkpoint.weights, modules)
    inputs = plan_activations(checkpoint.model, structure, recipe, modules)
    engines = verdicts(recipe.format, modules, structure, merged, inputs.activations)
    check_engine(engine, engines)
    return Plan(
        recipe,
        structure,
        choice.linears,
        choice.experts,
        {name: why for name, (_, why) in coverage.left.items()} | choice.kept,
        gguf.size_bytes if gguf else output_size(checkpoint, modules, sink, inputs.activations),
        budget(checkpoint, structure, recipe, memory),
        seconds(checkpoint, structure, recipe, inputs.activations),
        coverage,
        engines,
        tuple(checkpoint.weights.unused),
        transforms,
        _routers(checkpoint, structure) if recipe.router.active else {},
        inputs,
        gguf,
        left_over=checkpoint.left_over,
        read_as=read_as(checkpoint),
        group_sizes=grids.instead,
        original=_original(checkpoint, sink.average_bits(modules)),
    )


def _original(checkpoint: Checkpoint, bits: float) -> str:
    """How a checkpoint is itself quantized that is rounded to fewer bits: what that costs comes on top of what it has lost before."""
    shipped = checkpoint.shipped
    if shipped is None or shipped.average_bits <= bits:
        return ""
    return f"{shipped.method}, {shipped.scheme}, {shipped.average_bits:.2f} bits per quantized weight"


@dataclass(frozen=True)
class _Choice:
    """What is quantized, and how.

    Attributes:
        kept: what is not, with the reason. used: patterns of `weights.ignore` that matched something.
    """

    linears: dict[str, PackedSpec] = field(default_factory=dict)
    experts: dict[str, dict[str, PackedSpec]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    @property
    def modules(self) -> dict[str, dict[str, PackedSpec]]:
        return {**{name: {"": spec} for name, spec in self.linears.items()}, **self.experts}

    def check(self, bits: BitPlan, recipe: Recipe) -> None:
        """Refuse widths and patterns that mean nothing here, and a recipe that quantizes nothing."""
        bits.check_names(self.modules)
        unused = sorted(set(recipe.weights.ignore) - self.used)
        if unused:
            raise BadInputError(
                f"weights.ignore: {unused[0]!r} matches no linear and no experts of this model "
                f"(names look like {next(iter(self.linears or self.experts))!r})"
            )
        if not self.linears and not self.experts:
            (why, _), *_ = Counter(self.kept.values()).most_common(1) or [("everything is ignored", 0)]
            raise BadInputError(f"this recipe quantizes nothing in this model: {why}")


@dataclass(frozen=True)
class _Chooser:
    """Decides for every linear and every experts module."""

    checkpoint: Checkpoint
    recipe: Recipe
    bits: BitPlan
    sink: type[Sink]
    grids: GridChooser
    types: GgufChooser | None = None

    def choose(self, structure: Structure) -> _Choice:
        """Walk through the layers."""
        choice = _Choice()
        for layer in structure.layers:
            choice.kept.update({f"{layer.name}.{name}": reason for name, reason in layer.kept.items()})
            for group in layer.groups:
                for name in group.names:
                    self._linear(choice, f"{layer.name}.{name}")
            if layer.moe:
                self._experts(choice, layer, layer.moe)
        return choice

    def _linear(self, choice: _Choice, name: str) -> None:
        if self._ignored(choice, name):
            return
        if self.recipe.weights.scope == "experts":
            choice.kept[name] = "scope: experts"
            return
        kinds = self._kinds(choice, name, [f"{name}.weight"])
        if kinds is None:
            return
        module: Any = self.checkpoint.model.get_submodule(name)
        shape = (int(module.out_features), int(module.in_features))
        grid = self._grid(choice, name, [shape])
        if grid:
            widths = self.bits.width(name, grid.bits)
            choice.linears[name] = self._spec(grid, f"{name}.weight", shape, widths, kinds.get(f"{name}.weight", ""), stacked=False)

    def _experts(self, choice: _Choice, layer: LayerSites, moe: MoESite) -> None:
        name, layout = f"{layer.name}.{moe.experts}", moe.layout
        if self._ignored(choice, name):
            return
        kinds = self._kinds(choice, name, [f"{name}.{layout.first}", f"{name}.down_proj"])
        if kinds is None:
            return
        grid = self._grid(choice, name, [layout.features(p) for p in layout.projections])
        if grid is None:
            return
        choice.experts[name] = {
            p: self._spec(
                grid,
                f"{name}.{p if p == 'down_proj' else layout.first}",
                layout.features(p),
                self.bits.widths(name, p, layout.experts, grid.bits),
                kinds.get(f"{name}.{p if p == 'down_proj' else layout.first}", ""),
                stacked=True,
            )
            for p in layout.projections
        }

    def _kinds(self, choice: _Choice, name: str, parameters: list[str]) -> dict[str, str] | None:
        """The block types of a module's parameters in a GGUF file, {} for other formats; None where the module is kept."""
        if self.types is None:
            return {}
        kinds, reason = self.types.decide(parameters)
        if reason:
            choice.kept[name] = reason
        return None if reason else kinds

    def _pattern(self, name: str) -> str | None:
        """The pattern that has a module ignored."""
        return next((p for p in self.recipe.weights.ignore if fnmatch.fnmatch(name, p)), None)

    def _ignored(self, choice: _Choice, name: str) -> bool:
        pattern = self._pattern(name)
        if pattern:
            choice.used.add(pattern)
            choice.kept[name] = f"ignored ({pattern})"
        return pattern is not None

    def _grid(self, choice: _Choice, name: str, shapes: list[tuple[int, int]]) -> Grid | None:
        """The module's grid; None where it is kept, or where a GGUF file says the types."""
        if self.types is not None:
            return Grid(self.recipe.weights.bits, self.recipe.weights.group_size)
        found = self.grids.choose(name, shapes)
        if isinstance(found, str):
            choice.kept[name] = found
            return None
        return found

    def _spec(self, grid: Grid, parameter: str, shape: tuple[int, int], bits: tuple[int, ...], ggml: str, *, stacked: bool) -> PackedSpec:
        """How a stack of matrices is stored.

        Args:
            parameter: whose type the scales get. ggml: block type in a GGUF file.
        """
        dtype = stored_dtype(self.checkpoint, parameter)
        if ggml:
            kind = GRIDS[ggml]
            return PackedSpec((kind.bits,) * len(bits), shape, kind.group, self.recipe.weights.symmetric, dtype, stacked, ggml=ggml)
        spec = self.grids.spec(grid, shape, bits, self.sink.scale_dtype(dtype), stacked=stacked)
        input_bits = self.sink.input_bits(self.recipe.activations.bits)
        return replace(spec, input_bits=input_bits, input_float8=input_bits == 8 and self.recipe.input_float8)


def _routers(checkpoint: Checkpoint, structure: Structure) -> dict[int, str | None]:
    """By layer with experts: why its router cannot be changed, or None."""
    shared = checkpoint.weights.stored_together()
    result: dict[int, str | None] = {}
    for sites in structure.moe_layers:
        assert sites.moe is not None
        name = f"{sites.name}.{sites.moe.router}.weight"
        beside = f"it is stored in one tensor with {', '.join(shared[name])}" if name in shared else None
        result[sites.index] = beside or not_linear(checkpoint.model.get_submodule(sites.name), sites)
    return result
