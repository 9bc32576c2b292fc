"""compressed-tensors: what transformers and vLLM read without moebit.

Matrices are stored by the checkpoint's own names, one by one for experts, as formats/compressed_matrix.py says. Here is what is said about
them in config.json; formats/compressed_reading.py reads an
output back. Source: the compressed-tensors package 0.20.0 and its documents.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moebit.errors import BadInputError
from moebit.formats.class_names import in_every_class, plain_prediction
from moebit.formats.compressed_matrix import FLOAT, INT, storage
from moebit.formats.native import PackedSpec
from moebit.model.experts import ExpertsLayout, layout_of
from moebit.model.seam import is_experts
from moebit.storage.weights import Weights

METHOD = "compressed-tensors"
VERSION = "0.20.0"  # of the package whose packing this is; 0.18.0 and later have the same

Modules = Mapping[str, Mapping[str, PackedSpec]]
# Module of the transformers class -> {"" or projection: the checkpoint's names (without .weight), one per matrix}.
Names = dict[str, dict[str, list[str]]]


def check(weights: Weights, modules: Modules) -> None:
    """Refuse what cannot be written.

    Raises:
        BadInputError: naming the module and the reason.
    """
    for name, parts in modules.items():
        for projection, spec in parts.items():
            where = f"{name}.{projection}" if projection else name
            odd = sorted(set(spec.bits) - {8})
            if storage(spec) in (INT, FLOAT) and odd:
                raise BadInputError(
                    f"plan: {where} has {odd[0]} bits; a recipe with 8-bit activations or fp8 weights has 8-bit weights only"
                )
        stored_modules(weights, name)


# --- the checkpoint's names


def stored_modules(weights: Weights, name: str, form: str = METHOD) -> dict[str, list[str]]:
    """The checkpoint's names of a linear's or an experts module's matrices: {"": [name]} or {projection: [name per expert]}.

    Args:
        form: the format, for messages.

    Raises:
        BadInputError: they are not stored one by one, each as [out, in].
    """
    module = weights.model.get_submodule(name)
    if not is_experts(module):
        parameter = f"{name}.weight"
        stored = weights.stored_names(parameter)
        forms = weights.stored_form(parameter, torch.empty(weights.spec(parameter).shape, device="meta"))
        shared = weights.stored_together().get(parameter, [])
        if len(stored) != 1 or shared or forms[stored[0]].shape != weights.spec(parameter).shape:
            raise BadInputError(
                f"format {form}: {name} is stored in another form than its module's ({', '.join(stored)}); "
                "keep it in full precision with weights.ignore, or write the native format"
            )
        return {"": [_module(stored[0])]}
    layout = layout_of(module, name)
    result: dict[str, list[str]] = {}
    for leaf in (layout.first, "down_proj"):
        result |= _expert_modules(weights, name, leaf, layout, form)
    return {projection: result[projection] for projection in layout.projections}


def _expert_modules(weights: Weights, name: str, leaf: str, layout: ExpertsLayout, form: str) -> dict[str, list[str]]:
    """Names by projection, found by sending a first expert with marked rows back through the checkpoint's own conversion."""
    parameter = f"{name}.{leaf}"
    by_pattern = weights.stored_by_pattern(parameter)
    projections = ["down_proj"] if leaf == "down_proj" else [p for p in layout.projections if p != "down_proj"]
    if any(len(stored) != layout.experts for stored in by_pattern.values()) or len(by_pattern) != len(projections):
        raise BadInputError(
            f"format {form}: {parameter} is stored stacked ({', '.join(s[0] for s in by_pattern.values())}); engines read "
            "packed experts only where the checkpoint has them one by one; write the native or dense format"
        )
    out, inputs = layout.features(projections[0])
    probe = torch.empty(1, out * len(projections), inputs, dtype=torch.uint8)
    for mark, projection in enumerate(projections):
        probe[:, layout.rows(projection) if leaf != "down_proj" else slice(None)] = mark
    result = {}
    for stored, value in weights.stored_form(parameter, layout.stacked(probe)).items():
        mark = int(value.flatten()[0])
        numbered = next((every for every in by_pattern.values() if every[0] == stored), None)
        if numbered is None or value.shape != (out, inputs) or not bool((value == mark).all()) or not stored.endswith(".weight"):
            raise BadInputError(
                f"format {form}: {parameter} is stored in another form than [out, in] per expert and projection ({stored}); "
                "write the native or dense format"
            )
        result[projections[mark]] = [_module(every) for every in numbered]
    return result


def _module(stored: str) -> str:
    return stored.removesuffix(".weight")


# --- config.json


def quantization_config(weights: Weights, modules: Modules, names: Names) -> dict[str, Any]:
    """The `quantization_config` of these modules.

    One kind of grid over linears and experts is said of all `Linear`s, and what stays in full precision is named in `ignore`: engines
    rename modules, classes keep their names. Several kinds are one group each with the names of what they are for; the group that experts
    belong to comes first, since transformers takes the experts' grid from the first group that fits.
    """
    kinds: dict[tuple[int, int], list[str]] = {}
    for name in sorted(modules, key=lambda n: not is_experts(weights.model.get_submodule(n))):
        for projection, spec in modules[name].items():
            kinds.setdefault((spec.bits[0], spec.group_size), []).extend(_targets(name, names[name][projection], spec))
    spec = next(iter(next(iter(modules.values())).values()))
    of_all = len(kinds) == 1 and any("" in parts for parts in modules.values())
    groups = {
        f"group_{number}": _group(spec, bits, group_size, ["Linear"] if of_all else list(dict.fromkeys(targets)))
        for number, ((bits, group_size), targets) in enumerate(kinds.items())
    }
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "format": storage(spec),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored(weights, modules),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _targets(name: str, stored: list[str], spec: PackedSpec) -> list[str]:
    """A linear under both of its names; all experts of a module, whose grids engines want alike, by one expression."""
    if spec.stacked:
        return [_numbered(each) + r"\..*" for each in in_every_class(stored[0])]
    return [other for each in (name, *stored) for other in in_every_class(each)]


def _numbered(first: str) -> str:
    """An expression for all experts, from the name of the first: `x.experts.0.w1` -> `re:x\\.experts\\.\\d+`."""
    before = re.split(r"\.0(?=\.)", first)
    return "re:" + re.escape(".0".join(before[:-1])) + r"\.\d+"


def _group(spec: PackedSpec, bits: int, group_size: int, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": {
            "num_bits": bits,
            "type": "float" if spec.float8 or spec.ggml else "int",
            "symmetric": spec.symmetric,
            **_grouping(spec, group_size),
            "dynamic": False,
        },
        "input_activations": _input_grid(spec),
        "output_activations": None,
        "format": storage(spec),
    }


def _grouping(spec: PackedSpec, group_size: int) -> dict[str, Any]:
    if spec.block_rows > 1:
        return {"strategy": "block", "group_size": None, "block_structure": [spec.block_rows, group_size]}
    if spec.ggml:
        scales = {"nvfp4": "torch.float8_e4m3fn", "mxfp4": "torch.uint8"}[spec.ggml]
        strategy = "tensor_group" if spec.ggml == "nvfp4" else "group"
        return {"strategy": strategy, "group_size": group_size, "scale_dtype": scales, "zp_dtype": scales}
    whole_row = group_size == -1
    return {"strategy": "channel" if whole_row else "group", "group_size": None if whole_row else group_size}


def _input_grid(spec: PackedSpec) -> dict[str, Any] | None:
    """How an engine rounds inputs: every token on a grid of its own, or, for FP8 in blocks, as many of its channels as a block has."""
    if spec.input_bits == 16:
        return None
    grid = {"num_bits": 8, "type": "float" if spec.input_float8 else "int", "symmetric": True, "dynamic": True}
    return {**grid, "strategy": "token"} if spec.block_rows == 1 else {**grid, "strategy": "group", "group_size": spec.group_size}


def ignored(weights: Weights, modules: Modules) -> list[str]:
    """Every matrix of the model that is not quantized, by its names in transformers and in the checkpoint.

    Routers and gates are among them whatever their class: what is a parameter in transformers is a linear elsewhere.
    """
    result: list[str] = []
    for name, module in weights.model.named_modules():
        weight = getattr(module, "weight", None)
        if is_experts(module) and name not in modules:
            firsts = [other for first in _first_experts(weights, name) for other in in_every_class(first)]
            result += dict.fromkeys(_numbered(first) + r"\..*" for first in firsts)
        elif isinstance(weight, Tensor) and weight.ndim == 2 and name not in modules and not isinstance(module, nn.Embedding):
            stored = weights.stored_names(f"{name}.weight") if f"{name}.weight" in weights.available() else []
            names = [name, *(_module(s) for s in stored if len(stored) == 1)]
            result += [other for each in names for other in in_every_class(each)]
    return list(dict.fromkeys([*result, *plain_prediction(weights)]))


def _first_experts(weights: Weights, name: str) -> Iterator[str]:
    layout = layout_of(weights.model.get_submodule(name), name)
    for leaf in (layout.first, "down_proj"):
        for stored in weights.stored_by_pattern(f"{name}.{leaf}").values():
            if len(stored) == layout.experts > 1:
                yield _module(stored[0])
