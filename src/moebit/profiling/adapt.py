"""`adapt`: an output whose data has changed gets the kept channels of experts that matter more now, at more bits; and back.

What is on disk stays: overlay.safetensors comes beside the shards, and index, config.json and moebit.json name it. Their former texts
are kept in overlay.json, so that `undo` gives back the bytes that were.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebit.calibration.text import Texts
from moebit.errors import BadInputError
from moebit.formats.carried import copy_carried
from moebit.formats.native import pack_stack
from moebit.formats.opening import native_modules
from moebit.formats.output import partial_of
from moebit.formats.overlay import FULL, OVERLAY_FILE, OverlaySpec, overlay_specs
from moebit.formats.ownership import REPORTS, sealed_names
from moebit.formats.seal import KEY, SEALED, is_intact, seal
from moebit.formats.switch import Kept, read_kept
from moebit.memory import DEFAULT_MEMORY, Memory
from moebit.methods.allocation import fuzzy_widths
from moebit.methods.significance import baseline
from moebit.profiling.passes import Progress
from moebit.profiling.profile import LADDER
from moebit.profiling.usage import Observed, observe
from moebit.recipe import load_recipe
from moebit.recipe.reading import parse_json, read_object
from moebit.storage.durable import replace_text
from moebit.storage.files import INDEX, ShardFile, TensorSpec, sha256, sync_directory
from moebit.storage.places import check_inside
from moebit.tensor import QTensor, UniformGrid, solve_rtn

BEFORE = "overlay.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class Adaptation:
    """What `adapt` did.

    Attributes:
        path: of the adapted output; of `out` itself, and nothing was written, where no expert needs more bits than it has.
        raised: experts by module whose width rose. channels: that were rounded anew, by projection and module.
        bytes_written: the overlay; all else that changed is three documents. seconds: the texts' pass included.
        noted: seconds of the texts' pass alone.
    """

    path: Path
    raised: dict[str, list[int]]
    channels: int
    bytes_written: int
    seconds: float
    noted: float


@dataclass(frozen=True)
class _Part:
    """The channels of one projection that get another width: places int32 [n], original values [n, H], widths."""

    expert: Tensor
    channel: Tensor
    values: Tensor
    bits: tuple[int, ...]


def adapt(
    out: str | Path,
    *,
    text: Texts = (),
    to: str | Path | None = None,
    in_place: bool = False,
    keep: bool = False,
    undo: bool = False,
    samples: int = 16,
    length: int = 512,
    memory: Memory = DEFAULT_MEMORY,
    seed: int = 0,
    progress: Progress | None = None,
) -> Adaptation:
    """Adapt an output to texts, or take that back.

    The significance of the experts is measured again on the texts, with the output itself; they are clustered again under the size that
    they have. The kept channels of every expert whose width would rise are rounded to that width from their full-precision values.

    Args:
        out: a native output with switchable channels (`switching.share`).
        to: a new directory; it shares the unchanged files of `out` (hard links where the disk has them). in_place: change `out` itself.
        keep: leave these channels at 16 bits instead of rounding them.
        undo: take an adaptation of `out` back, in place; every byte is as before.

    Raises:
        BadInputError: no channels to switch, an output that is adapted already, neither or both of `to` and `in_place`.
    """
    path = Path(out)
    if undo:
        if text or to is not None:
            raise BadInputError("--undo takes an adaptation back, in place; give neither --text nor -o")
        return _undo(path)
    if (to is None) != in_place:
        raise BadInputError("give either -o OUT2 or --in-place")
    if (path / BEFORE).exists():
        raise BadInputError(f"{out} is adapted already; `moebit adapt {out} --undo` takes that back")
    began = time.perf_counter()
    kept = read_kept(path)
    if not kept:
        raise BadInputError(f"{out} keeps no channels to switch; quantize with --set switching.share=0.01")
    target = path if to is None else Path(to)
    if to is not None and (target.exists() or partial_of(target).exists()):
        raise BadInputError(f"-o {to} exists; choose another directory")
    seen = observe(path, text, samples, length, memory, seed, progress)
    noted = time.perf_counter() - began
    widths = new_widths(seen)
    parts = {name: _parts(seen, name, kept[name], widths[name]) for name in kept}
    raised = {name: sorted({int(e) for part in found.values() for e in part.expert.tolist()}) for name, found in parts.items()}
    facts = {"texts": seen.texts, "keep": keep, "samples": samples, "length": length, "raised": {n: len(e) for n, e in raised.items()}}
    count = sum(len(part.bits) for found in parts.values() for part in found.values())
    if not count:
        return Adaptation(path, raised, 0, 0, time.perf_counter() - began, noted)
    if to is not None:
        _copy(path, partial_of(target))
    written = _write(partial_of(target) if to is not None else path, seen, parts, keep, facts)
    if to is not None:
        os.replace(partial_of(target), target)
        sync_directory(target.parent)
    return Adaptation(target, raised, count, written, time.perf_counter() - began, noted)


def new_widths(seen: Observed) -> dict[str, Tensor]:
    """By experts module, int64 [E] the width of every expert if they were clustered on the new texts, at the size that they have.

    Fuzzy clusters (methods/allocation.py), whatever chose the widths at first: other methods want full-precision weights.
    """
    modules = native_modules(seen.checkpoint)
    ladder = tuple((seen.manifest["profile"].get("allocation") or {}).get("ladder", LADDER))
    j, sizes, weights, budget = [], [], [], 0
    for name, usage in seen.new.items():
        specs = modules[name]
        count = len(specs["down_proj"].bits)
        j.append(baseline(usage.significance.double()))
        one = [sum(_at(spec, width) for spec in specs.values()) for width in ladder]
        sizes += [one] * count
        weights += [sum(spec.shape[0] * spec.shape[1] for spec in specs.values())] * count
        budget += sum(spec.nbytes for spec in specs.values())
    table = torch.tensor(sizes, dtype=torch.int64)
    choice = fuzzy_widths(j, len(ladder), table, torch.tensor(weights), max(budget, int(table[:, 0].sum())))
    bits = torch.tensor(ladder)[choice]
    return dict(zip(seen.new, bits.split([len(each) for each in j]), strict=True))


def _at(spec: Any, width: int) -> int:
    """Bytes of one matrix of a stack at another width."""
    return int(type(spec)((width,), spec.shape, spec.group_size, spec.symmetric, spec.scale_dtype, True).nbytes)


def _parts(seen: Observed, name: str, kept: Kept, widths_E: Tensor) -> dict[str, _Part]:
    """Projection -> its kept channels in experts whose width rises there."""
    found, modules = {}, native_modules(seen.checkpoint)
    for projection, values in kept.vectors.items():
        present = torch.tensor(modules[name][projection].bits)
        e = kept.channels.expert.long()
        own = (widths_E[e] > present[e]).nonzero()[:, 0]
        if len(own):
            bits = tuple(int(b) for b in widths_E[e[own]])
            found[projection] = _Part(kept.channels.expert[own], kept.channels.channel[own], values[own], bits)
    return found


def _write(path: Path, seen: Observed, parts: Mapping[str, Mapping[str, _Part]], keep: bool, facts: dict[str, Any]) -> int:
    """The overlay and the documents that name it; returns the overlay's bytes."""
    texts = {name: (path / name).read_text(encoding="utf-8") for name in (INDEX, CONFIG, SEALED)}
    replace_text(path / BEFORE, json.dumps({"version": 1, "before": texts}, indent=1) + "\n")
    config, index, sealed = (json.loads(texts[name]) for name in (CONFIG, INDEX, SEALED))
    modules = config["quantization_config"]["modules"]
    for name, found in parts.items():
        if found:
            modules[name]["overlay"] = {
                p: {"channels": len(part.bits), "bits": FULL if keep else list(part.bits)} for p, part in found.items()
            }
    specs = overlay_specs(config["quantization_config"])
    tensors: dict[str, Tensor] = {}
    signed = load_recipe(path / "recipe.yaml").weights.signed
    for name, stored in specs.items():
        for projection, spec in stored.items():
            tensors |= _tensors(f"{name}.overlay.{projection}", spec, parts[name][projection], signed)
    with ShardFile(path / OVERLAY_FILE, {n: TensorSpec(t.dtype, tuple(t.shape)) for n, t in tensors.items()}) as shard:
        for name, tensor in tensors.items():
            shard.write(name, tensor)
    index["weight_map"] = dict(sorted({**index["weight_map"], **dict.fromkeys(tensors, OVERLAY_FILE)}.items()))
    index["metadata"]["total_size"] += sum(tensor.nbytes for tensor in tensors.values())
    replace_text(path / INDEX, json.dumps(index, indent=1))
    replace_text(path / CONFIG, json.dumps(config, indent=2) + "\n")
    files = sealed.pop("files") | {name: sha256(path / name) for name in (INDEX, CONFIG, OVERLAY_FILE, BEFORE)}
    sealed.pop(KEY)
    replace_text(path / SEALED, seal({**sealed, "adapted": facts}, files))
    return (path / OVERLAY_FILE).stat().st_size


def _tensors(stored: str, spec: OverlaySpec, part: _Part, signed: bool) -> dict[str, Tensor]:
    where = {f"{stored}.expert": part.expert, f"{stored}.channel": part.channel}
    if spec.packed is None:
        return {**where, f"{stored}.values": part.values.to(spec.dtype)}
    grid = UniformGrid(spec.packed.group_size, spec.packed.symmetric, signed, spec.packed.scale_dtype)
    q: QTensor = solve_rtn(part.values.unsqueeze(1), torch.tensor(part.bits), grid)
    codes, zeros = pack_stack(q)
    packed = {f"{stored}.codes": codes, f"{stored}.scale": q.params.scale, f"{stored}.bits": q.bits.to(torch.uint8)}
    return {**where, **packed, **({} if spec.packed.symmetric else {f"{stored}.zero_point": zeros})}


def _undo(path: Path) -> Adaptation:
    began = time.perf_counter()
    if not (path / BEFORE).is_file():
        raise BadInputError(f"{path}: not adapted, so there is nothing to take back")
    for name, text in former_texts(path).items():
        replace_text(path / name, text)
    for name in (OVERLAY_FILE, BEFORE):
        (path / name).unlink(missing_ok=True)
    sync_directory(path)
    return Adaptation(path, {}, 0, 0, time.perf_counter() - began, 0.0)


def former_texts(path: Path) -> dict[str, str]:
    """What index, config.json and moebit.json were before an adaptation, as overlay.json keeps them.

    Raises:
        BadInputError: overlay.json speaks of other files, or its texts are not those that the former moebit.json sealed.
    """
    document = read_object(path / BEFORE)
    before = document.get("before")
    damaged = BadInputError(f"{path / BEFORE}: is not what `moebit adapt` wrote, so that nothing is taken back")
    if document.get("version") != 1 or not isinstance(before, dict) or set(before) != {INDEX, CONFIG, SEALED}:
        raise damaged
    try:
        if not is_intact(before[SEALED]):
            raise damaged
        files = parse_json(before[SEALED])["files"]
        digests = {name: hashlib.sha256(before[name].encode()).hexdigest() for name in (INDEX, CONFIG)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged from error
    if any(files.get(name) != digest for name, digest in digests.items()):
        raise damaged
    return before


def _copy(source: Path, target: Path) -> None:
    """The output once more under another directory: its sealed weights are linked where the disk can, all else is copied.

    Links share their bytes, and nothing ever changes sealed weights; a page or a document may change.

    Raises:
        BadInputError: the output's seal is not intact.
    """
    names = sealed_names(source)
    if names is None:
        raise BadInputError(f"{source}: has no intact {SEALED}; `moebit verify {source}` says what is wrong")
    target.mkdir(parents=True)
    for file in sorted(source / name for name in {*names, *REPORTS}):
        if file.suffix == ".safetensors" and not file.is_symlink():
            try:
                os.link(file, target / file.name)
                continue
            except OSError:  # another disk, or one without links
                pass
        if file.is_file() and (file.name not in REPORTS or not file.is_symlink()):
            copy_carried([check_inside(file)], target)
