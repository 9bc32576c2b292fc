"""Whether the tensors of an output are what its configuration says: names, types, shapes, widths, padding, finite values.

One function per format in `CHECKS`; what a format does not have a function for is checked by `finite` and the callers' own tables alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moebit.errors import BadInputError
from moebit.formats.compressed_reading import BESIDE, virtual_entries
from moebit.formats.compressed_tensors import METHOD as COMPRESSED
from moebit.formats.inputs_config import read_activations
from moebit.formats.names import ACTIVATIONS, METHOD
from moebit.formats.native import FORMAT_VERSION, WITH_ACTIVATIONS, PackedSpec, packed_specs
from moebit.formats.opening import open_checkpoint
from moebit.formats.overlay import overlay_specs
from moebit.model.inputs import DOWN, FIRST, LINEAR
from moebit.recipe import BIT_WIDTHS
from moebit.storage.files import PIECE_BYTES, TensorEntry, TensorSpec
from moebit.tensor import packed_row_bytes, unpack

CONFIG = "config.json"
CONFIG_REMEDY = "copy config.json and the shards again from where the output was made, or quantize again"
AGAIN = "copy this file again from where the output was made, or quantize again"
COMPRESSED_LEAVES = ("weight_packed", *BESIDE)
LEAVES = (".codes", ".scale", ".zero_point", ".bits")
TRANSFORMS = (f".{LINEAR}", f".{FIRST}", f".{DOWN}")
FORMS = {"signs": "signs", "permutation": "permutations"}
ORTHOGONAL = 1e-3


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: `what`, the file and tensor `where` it is, and the `remedy`."""

    what: str
    where: str
    remedy: str

    @classmethod
    def of(cls, error: Exception, where: str) -> Finding:
        """An error of ours, whose message ends with the remedy."""
        what, _, remedy = str(error).rpartition("; ")
        return cls(what or str(error), where, remedy if what else AGAIN)


def place(entry: TensorEntry) -> str:
    return f"{entry.file.name}: {entry.name}"


def format_of(config: Mapping[str, Any]) -> str:
    """The output format that a config.json speaks of."""
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method is None and isinstance(config.get("quantization"), dict):
        return "mlx"  # which says the grid under that key, and repeats it under the other
    return "dense" if quantization is None else "native" if method == METHOD else str(method)


def native(config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> list[Finding]:
    """Every quantized module against its tensors."""
    quantization = config["quantization_config"]
    found = []
    if config.get("experts_implementation") != METHOD:
        found.append(Finding(f"experts_implementation is {config.get('experts_implementation')!r}, not {METHOD!r}", CONFIG, CONFIG_REMEDY))
    known_version = quantization.get("format_version") in (FORMAT_VERSION, WITH_ACTIVATIONS)
    if not known_version or not isinstance(quantization.get("modules"), dict):
        version = quantization.get("format_version")
        return [*found, Finding(f"quantization_config has format_version {version!r} or no modules", CONFIG, CONFIG_REMEDY)]
    found += _activations(quantization, entries)
    known: set[str] = set()
    for name, entry in quantization["modules"].items():
        try:
            for stored, spec in native_specs(name, entry).items():
                known |= spec.specs(stored).keys() | {f"{stored}.zero_point"}
                found += _module(stored, spec, entries)
            found += _overlay(name, entry, entries, known)
        except (BadInputError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            found.append(Finding(f"module {name!r} cannot be understood ({type(error).__name__}: {error})", CONFIG, CONFIG_REMEDY))
            known |= {stored for stored in entries if stored.startswith(f"{name}.")}
        for leaf in ("weight", "gate_up_proj", "up_proj", "down_proj"):
            if f"{name}.{leaf}" in entries:
                found.append(Finding(f"{CONFIG} says that {name!r} is quantized", place(entries[f"{name}.{leaf}"]), CONFIG_REMEDY))
    packed = [name for name, entry in entries.items() if name.endswith(LEAVES) and entry.dtype == torch.uint8 and name not in known]
    found += [Finding(f"{CONFIG} says nothing of this packed tensor", place(entries[name]), CONFIG_REMEDY) for name in packed]
    return found


def _activations(quantization: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> list[Finding]:
    """What happens to inputs: it can be understood, and every transform has its tensors, and they are a transform's."""
    said = quantization.get(ACTIVATIONS)
    if (said is not None) != (quantization.get("format_version") == WITH_ACTIVATIONS):
        what = f"format_version is {quantization.get('format_version')} {'with' if said else 'without'} {ACTIVATIONS!r}"
        return [Finding(what, CONFIG, CONFIG_REMEDY)]
    try:
        activations = read_activations(quantization)
        strange = sorted((set(activations.reads) | {n.rpartition(".")[0] for n in activations.transforms}) - set(quantization["modules"]))
    except (BadInputError, KeyError, TypeError, ValueError, AttributeError) as error:
        return [Finding(f"{ACTIVATIONS!r} cannot be understood ({type(error).__name__}: {error})", CONFIG, CONFIG_REMEDY)]
    found = [Finding(f"{ACTIVATIONS!r} has a transform for {name!r}, which is not quantized", CONFIG, CONFIG_REMEDY) for name in strange]
    known: set[str] = set()
    for name, spec in activations.transforms.items():
        tensors = {f"{name}.{leaf}": wanted for leaf, wanted in spec.specs().items()}
        known |= tensors.keys()
        for stored, wanted in tensors.items():
            found += _transform_tensor(stored, wanted, entries.get(stored))
    unknown = [name for name in entries if name.rpartition(".")[0].endswith(TRANSFORMS) and name not in known]
    return found + [Finding(f"{CONFIG} says nothing of this transform", place(entries[name]), CONFIG_REMEDY) for name in unknown]


def _transform_tensor(stored: str, wanted: TensorSpec, entry: TensorEntry | None) -> Iterator[Finding]:
    """One tensor of a transform against what it has to be: signs, permutations, orthogonal blocks."""
    if entry is None:
        yield Finding(f"{CONFIG} asks for tensor {stored!r}, which no shard has", CONFIG, CONFIG_REMEDY)
        return
    if entry.spec != wanted:
        what = f"is {_said(entry.dtype, entry.shape)} where {CONFIG} says {_said(wanted.dtype, wanted.shape)}"
        yield Finding(what, place(entry), CONFIG_REMEDY)
        return
    value, leaf = entry.read(), stored.rpartition(".")[2]
    if leaf == "signs":
        good = bool((value.abs() == 1).all())
    elif leaf == "permutation":
        good = torch.equal(value.long().sort(-1).values, torch.arange(value.shape[1]).expand(value.shape))
    else:
        good = bool((value @ value.mT - torch.eye(value.shape[-1])).abs().max() < ORTHOGONAL)
    if not good:
        yield Finding(f"these are not {FORMS.get(leaf, 'orthogonal blocks')}", place(entry), AGAIN)


def native_specs(name: str, entry: Mapping[str, Any]) -> dict[str, PackedSpec]:
    """The stacks of one quantized module, stored name -> spec.

    Raises:
        ValueError: a width that is none; KeyError and the like: something is missing or of another kind.
    """
    parts = packed_specs({"format_version": FORMAT_VERSION, "modules": {name: entry}})[name]
    for projection, spec in parts.items():
        strange = sorted({str(b) for b in spec.bits if b not in BIT_WIDTHS})
        if strange:
            raise ValueError(f"{projection or 'it'} has {', '.join(strange)} bits")
    return {f"{name}.{projection}" if projection else name: spec for projection, spec in parts.items()}


def _module(name: str, spec: PackedSpec, entries: Mapping[str, TensorEntry]) -> list[Finding]:
    found, good = [], True
    for stored, wanted in spec.specs(name).items():
        entry = entries.get(stored)
        if entry is None:
            found.append(Finding(f"{CONFIG} asks for tensor {stored!r}, which no shard has", CONFIG, CONFIG_REMEDY))
        elif entry.spec != wanted:
            what = f"is {_said(entry.dtype, entry.shape)} where {CONFIG} says {_said(wanted.dtype, wanted.shape)}"
            found.append(Finding(what, place(entry), CONFIG_REMEDY))
        good = good and entry is not None and entry.spec == wanted
    if spec.symmetric and f"{name}.zero_point" in entries:
        found.append(
            Finding(f"{CONFIG} says that {name!r} is symmetric: it has no zero points", place(entries[f"{name}.zero_point"]), CONFIG_REMEDY)
        )
    if good:
        found += _contents(name, spec, entries)
    return found


def _overlay(name: str, entry: Mapping[str, Any], entries: Mapping[str, TensorEntry], known: set[str]) -> Iterator[Finding]:
    """Channels that stand in for the base's: their tensors, and that the places exist; adds the stored names to `known`."""
    for projection, spec in overlay_specs({"modules": {name: entry}}).get(name, {}).items():
        stored = f"{name}.overlay.{projection}"
        wanted = spec.specs(stored)
        known.update(wanted)
        for tensor, of in wanted.items():
            if tensor not in entries:
                yield Finding(f"{CONFIG} asks for tensor {tensor!r}, which no shard has", CONFIG, CONFIG_REMEDY)
                return
            if entries[tensor].spec != of:
                what = f"is {_said(entries[tensor].dtype, entries[tensor].shape)} where {CONFIG} says {_said(of.dtype, of.shape)}"
                yield Finding(what, place(entries[tensor]), CONFIG_REMEDY)
                return
        limits = {"expert": entry["experts"], "channel": entry["projections"][projection]["shape"][projection == "down_proj"]}
        for leaf, limit in limits.items():
            places = entries[f"{stored}.{leaf}"].read()
            if len(places) and not (int(places.min()) >= 0 and int(places.max()) < limit):
                yield Finding(f"speaks of {leaf} {int(places.max())} of {limit}", place(entries[f"{stored}.{leaf}"]), AGAIN)


def _contents(name: str, spec: PackedSpec, entries: Mapping[str, TensorEntry]) -> Iterator[Finding]:
    """Widths as config.json has them, and padding bits that are zero."""
    if spec.stacked and tuple(entries[f"{name}.bits"].read().tolist()) != spec.bits:
        said = entries[f"{name}.bits"].read().tolist()
        first = next(i for i, (stored, wanted) in enumerate(zip(said, spec.bits, strict=True)) if stored != wanted)
        what = f"expert {first} has {said[first]} bits where {CONFIG} says {spec.bits[first]}"
        yield Finding(what, place(entries[f"{name}.bits"]), CONFIG_REMEDY)
        return
    out, inputs = spec.shape
    rows = {f"{name}.codes": (spec.code_offsets(), out, inputs)}
    if not spec.symmetric:
        rows[f"{name}.zero_point"] = (spec.zero_offsets(), 1, out * spec.groups)
    for stored, (offsets, count, values) in rows.items():
        if values % 8:
            flat = _flat(entries[stored])
            for matrix, bits in enumerate(spec.bits):
                raw = flat.read(offsets[matrix], offsets[matrix + 1]).view(count, packed_row_bytes(values, bits))
                if bool(unpack(raw[:, -bits:].contiguous(), bits, 8)[:, values % 8 :].any()):
                    what = f"the padding of matrix {matrix} is not zero: these bytes are no rows of {values} values of {bits} bits"
                    yield Finding(what, place(entries[stored]), AGAIN)
                    break


def dense(config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> list[Finding]:
    """Nothing is packed."""
    packed = [entry for name, entry in entries.items() if name.endswith(".codes") and entry.dtype == torch.uint8]
    return [Finding(f"packed codes, but {CONFIG} has no quantization_config", place(entry), CONFIG_REMEDY) for entry in packed]


def compressed(config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> list[Finding]:
    """Every module with packed codes or scales against the grid that the configuration has for it."""
    quantization, found = config["quantization_config"], []
    if not isinstance(quantization.get("config_groups"), dict):
        return [Finding("quantization_config has no config_groups", CONFIG, CONFIG_REMEDY)]
    modules: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        module, _, leaf = name.rpartition(".")
        if leaf in ("weight", *COMPRESSED_LEAVES):
            modules.setdefault(module, {})[name] = entry
    for tensors in modules.values():
        leaves = {name.rpartition(".")[2] for name in tensors}
        if not leaves & set(COMPRESSED_LEAVES):
            continue
        first = place(next(iter(tensors.values())))
        if not leaves & {"weight", "weight_packed"}:
            found.append(Finding("scales without the codes that they belong to", first, AGAIN))
            continue
        try:
            virtual_entries(tensors, quantization)
        except BadInputError as error:
            found.append(Finding.of(error, first))
        except (ValueError, TypeError, KeyError) as error:
            found.append(Finding(f"{CONFIG} and the tensors do not fit together ({type(error).__name__}: {error})", first, CONFIG_REMEDY))
    return found


CHECKS: dict[str, Callable[[Mapping[str, Any], Mapping[str, TensorEntry]], list[Finding]]] = {
    "native": native,
    "dense": dense,
    COMPRESSED: compressed,
}


def against_model(path: Path) -> list[Finding]:
    """The tensors against the model that transformers builds from config.json: none missing, none of another shape."""
    try:
        checkpoint = open_checkpoint(path)
    except BadInputError as error:
        return [Finding.of(error, CONFIG)]
    except Exception as error:  # a damaged configuration can make a model's code fail in any way
        return [Finding(f"transformers cannot build the model ({type(error).__name__}: {error})", CONFIG, AGAIN)]
    return [
        Finding(f"has shape {list(entry.shape)} where the model of {CONFIG} has {list(tensor.shape)}", place(entry), CONFIG_REMEDY)
        for name, tensor in checkpoint.model.state_dict().items()
        if (entry := checkpoint.entries.get(name)) is not None and entry.shape != tuple(tensor.shape)
    ]


def finite(entry: TensorEntry) -> Finding | None:
    """The first value of a floating-point tensor that is not a number or infinite. Reads piece by piece."""
    if not entry.dtype.is_floating_point:
        return None
    flat = _flat(entry)
    step = PIECE_BYTES // entry.dtype.itemsize
    for start in range(0, flat.shape[0], step):
        piece = flat.read(start, min(flat.shape[0], start + step)).float()
        if not bool(torch.isfinite(piece).all()):
            first = int((~torch.isfinite(piece)).nonzero()[0])
            index = [int(i) for i in torch.unravel_index(torch.tensor(start + first), entry.shape)] if entry.shape else []
            return Finding(f"holds {piece[first].item()} at {index}", place(entry), AGAIN)
    return None


def _flat(entry: TensorEntry) -> TensorEntry:
    return replace(entry, shape=(math.prod(entry.shape),))


def _said(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
