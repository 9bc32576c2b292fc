"""What a quantization will do, known before it starts: structure, sizes, memory, time, and whether it can be done at all."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moebit.calibration.statistics import LAYER_SAMPLE
from moebit.errors import BadInputError
from moebit.formats import compressed_tensors
from moebit.formats.engines import ANY, Verdict, check_engine, verdicts
from moebit.formats.inputs_config import describe_activations
from moebit.formats.native import PackedSpec, average_bits
from moebit.methods.awq import SAMPLE
from moebit.methods.drift import MUS
from moebit.methods.online import search_flops
from moebit.model.coverage import Coverage, expert_coverage
from moebit.model.inputs import Activations
from moebit.model.structure import LayerSites, Structure
from moebit.plan.inputs import ActivationPlan, plan_activations
from moebit.plan.transforms import NO_TRANSFORMS, Transforms
from moebit.recipe import BIT_WIDTHS, Recipe
from moebit.recipe.reading import is_there, read_json
from moebit.storage.checkpoint import Checkpoint, HubWeights
from moebit.streaming.budget import Budget, make_budget
from moebit.streaming.routing import not_linear

FLOPS_PER_THREAD = 50e9  # float32 products on an AVX-512 core, cautiously; only for the time estimate


@dataclass(frozen=True)
class BitPlan:
    """Bit widths that differ from the recipe's, by full module name. Specified in docs/format.md; a person can edit it.

    Attributes:
        experts: experts module -> projection -> one width, or one per expert.
        linears: linear -> width.
    """

    experts: Mapping[str, Mapping[str, int | list[int]]]
    linears: Mapping[str, int]

    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.experts, self.linears], sort_keys=True).encode()).hexdigest()

    def widths(self, name: str, projection: str, count: int, default: int) -> tuple[int, ...]:
        """One width per expert.

        Raises:
            BadInputError: not as many as there are experts, or a width that does not exist.
        """
        bits = self.experts.get(name, {}).get(projection, default)
        if not isinstance(bits, int | list):
            raise BadInputError(f"plan: {name}.{projection}: expected a width or a list of widths, got {bits!r}")
        result = (bits,) * count if isinstance(bits, int) else tuple(bits)
        if len(result) != count:
            raise BadInputError(f"plan: {name}.{projection} has {len(result)} widths for {count} experts")
        return _check_widths(f"{name}.{projection}", result)


def _check_widths(name: str, widths: tuple[int, ...]) -> tuple[int, ...]:
    for number, width in enumerate(widths):
        if type(width) is not int or width not in BIT_WIDTHS:
            raise BadInputError(f"plan: {name}, entry {number}: {width!r} bits; choose one of {', '.join(map(str, BIT_WIDTHS))}")
    return widths


def load_bit_plan(file: str | Path) -> BitPlan:
    """Read a plan file.

    Raises:
        BadInputError: no such file, not JSON, another version, unknown keys.
    """
    path = Path(file)
    if not is_there(path):
        raise BadInputError(f"--plan: no such file: {path}")
    data = read_json(path, "--plan ")
    if (
        not isinstance(data, dict)
        or data.get("version") != 1
        or not isinstance(data.get("experts", {}), dict)
        or not isinstance(data.get("linears", {}), dict)
    ):
        raise BadInputError(f'--plan {path}: expected {{"version": 1, "experts": {{...}}, "linears": {{...}}}} as docs/format.md has it')
    unknown = sorted(set(data) - {"version", "made", "experts", "linears"})
    wrong = [name for name, parts in data.get("experts", {}).items() if not isinstance(parts, dict)]
    if unknown or wrong:
        what = f"unknown key {unknown[0]!r}" if unknown else f"{wrong[0]}: expected {{projection: width or list of widths}}"
        raise BadInputError(f"--plan {path}: {what}; docs/format.md has the form")
    return BitPlan(data.get("experts", {}), data.get("linears", {}))


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
        transforms: what is done to the weights before they are quantized, and where it can be.
        engines: what each engine makes of the output.
        routers: where the recipe works on routers: by layer, why this one cannot be aligned or realigned; None where it can.
        inputs: which inputs are rounded and transformed as the output runs.
    """

    recipe: Recipe
    structure: Structure
    linears: dict[str, PackedSpec]
    experts: dict[str, dict[str, PackedSpec]]
    kept: dict[str, str]
    size_bytes: int
    budget: Budget
    seconds: float
    coverage: Coverage
    engines: dict[str, Verdict]
    as_stored: tuple[str, ...] = ()
    transforms: Transforms = NO_TRANSFORMS
    routers: Mapping[int, str | None] = field(default_factory=dict)
    inputs: ActivationPlan = field(default_factory=ActivationPlan)

    @property
    def activations(self) -> Activations:
        return self.inputs.activations

    @property
    def chunk(self) -> dict[int, int]:
        return self.budget.chunk

    @property
    def peak_bytes(self) -> int:
        return self.budget.peak_bytes

    @property
    def spill(self) -> bool:
        return self.budget.spill

    @property
    def modules(self) -> dict[str, dict[str, PackedSpec]]:
        """Every quantized module: {"": spec} for a linear, {projection: spec} for experts."""
        return {**{name: {"": spec} for name, spec in self.linears.items()}, **self.experts}

    @property
    def average_bits(self) -> float:
        return (
            compressed_tensors.average_bits(self.modules) if self.recipe.format == compressed_tensors.METHOD else average_bits(self.modules)
        )

    def describe(self) -> dict[str, Any]:
        """For JSON."""
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
            "unquantized_expert_share": self.coverage.share,
            "experts_per_chunk": self.chunk,
            "engines": {name: verdict.describe() for name, verdict in self.engines.items()},
            **({"transforms": self.transforms.describe()} if self.transforms else {}),
            **({"routers": self._describe_routers()} if self.routers else {}),
            **({"activations": _describe_inputs(self.inputs)} if self.recipe.activations.rounded or self.activations else {}),
        }

    def _describe_routers(self) -> dict[str, Any]:
        left = {self.structure.layers[index].name: reason for index, reason in self.routers.items() if reason}
        return {"changed": len(self.routers) - len(left), "left": left}


def _describe_inputs(inputs: ActivationPlan) -> dict[str, Any]:
    """What happens to activations, for people and JSON: names of layers and counts instead of every module."""
    return {**describe_activations(inputs.activations), "inputs_only": inputs.inputs_only, "untransformed": inputs.untransformed}


def make_plan(
    checkpoint: Checkpoint,
    structure: Structure,
    recipe: Recipe,
    memory: int,
    bits: BitPlan | None = None,
    engine: str = ANY,
    transforms: Transforms = NO_TRANSFORMS,
) -> Plan:
    """Decide what is quantized and how, and check that it can be.

    Args:
        bits: widths that differ from the recipe's.
        engine: what has to run the output: transformers, vllm, or any of them.
        transforms: what was found out about the weights' transforms; `checkpoint` is the transformed one.

    Raises:
        BadInputError: a group size that does not divide (naming the layer and what would), an ignore pattern that matches nothing,
            a format that cannot hold it, an engine that cannot run it.
    """
    bits = bits or BitPlan({}, {})
    linears: dict[str, PackedSpec] = {}
    experts: dict[str, dict[str, PackedSpec]] = {}
    coverage = expert_coverage(checkpoint, structure)
    kept: dict[str, str] = {name: why for name, (_, why) in coverage.left.items()}
    used: set[str] = set()
    for layer in structure.layers:
        kept |= {f"{layer.name}.{name}": reason for name, reason in layer.kept.items()}
        for name in (name for group in layer.groups for name in group.names):
            full = f"{layer.name}.{name}"
            pattern = next((p for p in recipe.weights.ignore if fnmatch.fnmatch(full, p)), None)
            if pattern:
                used.add(pattern)
                kept[full] = f"ignored ({pattern})"
            elif recipe.weights.scope == "experts":
                kept[full] = "scope: experts"
            else:
                module = checkpoint.model.get_submodule(full)
                widths = _check_widths(full, (bits.linears.get(full, recipe.weights.bits),))
                shape = (int(module.out_features), int(module.in_features))
                linears[full] = _spec(recipe, full, shape, widths, _dtype(checkpoint, f"{full}.weight"), stacked=False)
        if layer.moe:
            full = f"{layer.name}.{layer.moe.experts}"
            pattern = next((p for p in recipe.weights.ignore if fnmatch.fnmatch(full, p)), None)
            if pattern:
                used.add(pattern)
                kept[full] = f"ignored ({pattern})"
                continue
            layout = layer.moe.layout
            experts[full] = {
                p: _spec(
                    recipe,
                    f"{full}.{p}",
                    layout.features(p),
                    bits.widths(full, p, layout.experts, recipe.weights.bits),
                    _dtype(checkpoint, f"{full}.{p if p == 'down_proj' else layout.first}"),
                    stacked=True,
                )
                for p in layout.projections
            }
    _check_names(bits, linears, experts)
    _check_dense(checkpoint, recipe, [*linears, *experts])
    unused = sorted(set(recipe.weights.ignore) - used)
    if unused:
        raise BadInputError(
            f"weights.ignore: {unused[0]!r} matches no linear and no experts of this model "
            f"(names look like {next(iter(linears or experts))!r})"
        )
    if not linears and not experts:
        raise BadInputError("this recipe quantizes nothing in this model: everything is ignored")
    modules = {**{name: {"": spec} for name, spec in linears.items()}, **experts}
    if recipe.format == compressed_tensors.METHOD and isinstance(checkpoint.weights, HubWeights):
        compressed_tensors.check(checkpoint.weights, modules)
    merged = checkpoint.weights.merged() if isinstance(checkpoint.weights, HubWeights) else ()
    inputs = plan_activations(checkpoint.model, structure, recipe, modules)
    engines = verdicts(recipe.format, modules, structure, merged, inputs.activations)
    check_engine(engine, engines)
    tokens = recipe.calibration.samples * recipe.calibration.seq_len if recipe.needs_calibration else 0
    tokens *= 1 + recipe.calibration.pool if recipe.calibration.balance != "none" else 1
    return Plan(
        recipe,
        structure,
        linears,
        experts,
        kept,
        _output_size(checkpoint, linears, experts, recipe) + sum(spec.nbytes for spec in inputs.activations.transforms.values()),
        make_budget(
            checkpoint,
            structure,
            memory,
            tokens,
            length=recipe.calibration.seq_len,
            solve=True,
            hessians=recipe.needs_hessians,
            streams=1 + recipe.needs_reference,
            drift=recipe.solver.drift != "none",
        ),
        _seconds(checkpoint, structure, recipe, tokens) + _search_seconds(inputs.activations),
        coverage,
        engines,
        tuple(getattr(checkpoint.weights, "unused", ())),
        transforms,
        _routers(checkpoint, structure) if recipe.router.active else {},
        inputs,
    )


def _routers(checkpoint: Checkpoint, structure: Structure) -> dict[int, str | None]:
    """By layer with experts: why its router cannot be changed, or None."""
    shared = checkpoint.weights.stored_together() if isinstance(checkpoint.weights, HubWeights) else {}
    result: dict[int, str | None] = {}
    for sites in structure.moe_layers:
        assert sites.moe is not None
        name = f"{sites.name}.{sites.moe.router}.weight"
        together = f"it is stored in one tensor with {', '.join(shared[name])}" if name in shared else None
        result[sites.index] = together or not_linear(checkpoint.model.get_submodule(sites.name), sites)
    return result


def _check_names(bits: BitPlan, linears: Mapping[str, PackedSpec], experts: Mapping[str, Mapping[str, PackedSpec]]) -> None:
    known = {**{name: {"": None} for name in linears}, **experts}
    for name, wanted in [*bits.experts.items(), *((name, None) for name in bits.linears)]:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        parts = {""} if wanted is None else set(wanted)
        if name not in known or not parts <= set(known[name]):
            what = name if wanted is None else f"{name} ({', '.join(wanted)})"
            raise BadInputError(f"plan: {what} is not quantized by this recipe in this model; nearest: {near[0] if near else 'none'}")


def _check_dense(checkpoint: Checkpoint, recipe: Recipe, names: list[str]) -> None:
    """`dense` writes the checkpoint's own tensors, so that each must stand for one parameter."""
    shared = checkpoint.weights.stored_together() if recipe.format == "dense" and isinstance(checkpoint.weights, HubWeights) else {}
    for parameter, others in shared.items():
        if parameter.rpartition(".")[0] in names:
            raise BadInputError(
                f"format dense: {parameter} is stored in one tensor with {', '.join(others)}; write the native format instead"
            )


def _spec(recipe: Recipe, name: str, shape: tuple[int, int], bits: tuple[int, ...], dtype: torch.dtype, stacked: bool) -> PackedSpec:
    w = recipe.weights
    if w.group_size != -1 and shape[1] % w.group_size:
        fitting = [str(size) for size in (32, 64, 128, -1) if size == -1 or shape[1] % size == 0]
        raise BadInputError(
            f"{name}: group size {w.group_size} does not divide its {shape[1]} input channels; "
            f"set weights.group_size to one of {', '.join(fitting)}, "
            "or keep this module in full precision with weights.ignore"
        )
    engine_rounds = recipe.activations.bits if recipe.format == compressed_tensors.METHOD else 16  # native says so apart: plan.activations
    return PackedSpec(bits, shape, w.group_size, w.symmetric, dtype, stacked, w.type == "fp8", engine_rounds)


def _dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    specs = getattr(checkpoint.weights, "specs", {})
    return specs[name].dtype if name in specs else torch.bfloat16


def _output_size(checkpoint: Checkpoint, linears: dict[str, PackedSpec], experts: dict[str, dict[str, PackedSpec]], recipe: Recipe) -> int:
    total = checkpoint.plain_bytes
    if recipe.format == "dense":
        return total
    packed = compressed_tensors.nbytes if recipe.format == compressed_tensors.METHOD else _packed_bytes
    for name, spec in linears.items():
        total += packed(spec) - spec.weights * _dtype(checkpoint, f"{name}.weight").itemsize
    for name, parts in experts.items():
        total += sum(packed(spec) - spec.weights * _dtype(checkpoint, f"{name}.down_proj").itemsize for spec in parts.values())
    return total


def _packed_bytes(spec: PackedSpec) -> int:
    """Of the native format, the widths of stacked matrices included."""
    return sum(tensor.nbytes for tensor in spec.specs("").values())


def _seconds(checkpoint: Checkpoint, structure: Structure, recipe: Recipe, tokens: int) -> float:
    """A rough estimate from the floating-point operations of forwards, Hessians and solves."""
    flops, drifts = 0.0, recipe.solver.drift != "none"
    runs, moments = (2, 3) if drifts else (1, 1)  # with drift, full precision runs beside, and its difference is multiplied with the inputs
    for layer in structure.layers:
        for group in layer.groups:
            for name in group.names:
                module: Any = checkpoint.model.get_submodule(f"{layer.name}.{name}")
                weights = module.in_features * module.out_features
                flops += (4 + 2 * runs) * tokens * weights + _solve_flops(recipe, 1, module.out_features, module.in_features)
            flops += moments * tokens * group.in_features**2 if recipe.needs_hessians else 0
        if layer.moe:
            layout = layer.moe.layout
            slots = tokens * layer.moe.top_k
            flops += 2 * runs * slots * layout.parameters_per_expert + moments * slots * (layout.hidden**2 + layout.intermediate**2)
            flops += _solve_flops(recipe, layout.experts, 2 * layout.intermediate, layout.hidden)
            flops += _solve_flops(recipe, layout.experts, layout.hidden, layout.intermediate)
    return 1 + flops / (FLOPS_PER_THREAD * torch.get_num_threads())


def _search_seconds(activations: Activations) -> float:
    """Of finding online transforms."""
    found = [spec for spec in activations.transforms.values() if spec.kind == "duquant"]
    return sum(search_flops(spec.channels, LAYER_SAMPLE, spec.count) for spec in found) / (FLOPS_PER_THREAD * torch.get_num_threads())


def _solve_flops(recipe: Recipe, count: int, out: int, inputs: int) -> float:
    search = 100 * out * inputs if recipe.solver.clip_search else 0
    if recipe.solver.method == "rtn":
        return float(count * (search + 10 * out * inputs))
    if recipe.solver.method == "awq":
        return float(count * (search + 20 * out * inputs * (10 + 2 * SAMPLE)))
    fits = len(MUS) + 1 if recipe.solver.drift != "none" else 0
    return float(count * (out * inputs**2 + 2 * inputs**3 + search + fits * (4 * out * inputs**2 + inputs**3 / 3)))


def describe_structure(checkpoint: Checkpoint, structure: Structure) -> dict[str, Any]:
    """What the model is made of, for people and JSON: layers, experts, routers, parameters and bytes by part."""
    parts = _parts(checkpoint, structure)
    moe = structure.moe_layers
    first = moe[0].moe
    assert first is not None
    return {
        "model": str(checkpoint.path),
        "architecture": type(checkpoint.model).__name__,
        "layers": len(structure.layers),
        "moe_layers": len(moe),
        "experts": first.layout.experts,
        "top_k": first.top_k,
        "hidden_size": first.layout.hidden,
        "expert_intermediate_size": first.layout.intermediate,
        "shared_experts": bool(first.shared),
        "router": first.router_kind,
        "parameters": sum(part["parameters"] for part in parts.values()),
        "parts": parts,
        "size_bytes": checkpoint.size_bytes,
        "shipped": checkpoint.shipped.describe() if checkpoint.shipped else None,
        "not_in_model": (unused := list(getattr(checkpoint.weights, "unused", []))),
        "not_in_model_bytes": sum(checkpoint.entries[stored].spec.nbytes for stored in unused),
        "per_layer": [_describe_layer(layer) for layer in structure.layers],
    }


def _describe_layer(layer: LayerSites) -> dict[str, Any]:
    moe = layer.moe
    result: dict[str, Any] = {"layer": layer.index, "linears": sum(len(g.names) for g in layer.groups), "kept": layer.kept}
    if moe:
        result |= {"experts": moe.layout.experts, "top_k": moe.top_k, "router": moe.router_kind, "shared": list(moe.shared)}
    return result


def _parts(checkpoint: Checkpoint, structure: Structure) -> dict[str, dict[str, int]]:
    labels = {}
    for layer in structure.layers:
        if layer.moe:
            labels[f"{layer.name}.{layer.moe.experts}."] = "routed experts"
            if layer.moe.router:
                labels[f"{layer.name}.{layer.moe.router}."] = "routers"
            labels |= {f"{layer.name}.{name}.": "shared experts" for name in layer.moe.shared}
    prefixes = [layer.name + "." for layer in structure.layers]
    specs = getattr(checkpoint.weights, "specs", {})
    result: dict[str, dict[str, int]] = {}
    for name, parameter in checkpoint.model.named_parameters():
        label = next((text for prefix, text in labels.items() if name.startswith(prefix)), None)
        if label is None:
            label = "attention and other layers" if any(name.startswith(p) for p in prefixes) else "embeddings, norm and head"
        part = result.setdefault(label, {"parameters": 0, "bytes": 0})
        part["parameters"] += math.prod(parameter.shape)
        part["bytes"] += specs[name].nbytes if name in specs else parameter.numel() * 2
    return result
