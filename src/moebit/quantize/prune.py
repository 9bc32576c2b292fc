"""`prune`: a checkpoint with fewer routed experts, the same number in every layer, in full precision."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebit.calibration.text import Texts, digest
from moebit.errors import BadInputError
from moebit.formats.fewer import Piece, chosen_of, groups_of, layer_pieces, with_experts
from moebit.formats.opening import open_checkpoint, quantized_modules
from moebit.formats.output import OutputDirectory, check_free, check_space, disk_error, partial_of
from moebit.memory import DEFAULT_MEMORY, Memory, memory_bytes
from moebit.model.structure import Structure, find_structure
from moebit.plan.disk import output_config
from moebit.profiling.passes import Progress
from moebit.profiling.profile import LENGTH, SAMPLES, data_sets
from moebit.profiling.saliency import BY, saliencies
from moebit.storage.checkpoint import Checkpoint, checkpoint_fingerprint
from moebit.storage.edits import EditedWeights
from moebit.streaming.budget import make_budget


@dataclass(frozen=True)
class Pruned:
    """What was made.

    Attributes:
        path: the output. experts: how many every layer had, and has. removed: layer -> numbers of the removed experts, rising.
        size_before, size_after: bytes of the weights.
    """

    path: Path
    experts: tuple[int, int]
    removed: dict[int, list[int]]
    size_before: int
    size_after: int


def prune(
    model: str | Path,
    out: str | Path,
    *,
    remove: float,
    by: str = "reap",
    text: Texts = (),
    samples: int = SAMPLES,
    length: int = LENGTH,
    memory: Memory = DEFAULT_MEMORY,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Pruned:
    """Write a checkpoint without the experts that a text misses least.

    Every layer keeps the same number of experts, because a configuration has one number for all; where the router chooses among groups
    first, every group does. Rows of routers and correction biases go with their experts; shared experts stay.

    Args:
        model: a full-precision checkpoint. out: the directory to make.
        remove: the share of every layer's experts that goes, above 0 and below 1. by: `reap`, `measured`, `frequency` or `random`.
        text: what decides; not needed for `random`. samples, length: windows of every text. seed: of windows, and of `random`.

    Raises:
        BadInputError: a model that cannot be pruned, nothing to remove, fewer experts left than a token is sent to, no text.
        InterruptedWorkError: the disk failed on the way; resume goes on.
    """
    if by not in BY:
        raise BadInputError(f"--by {by}: choose one of {', '.join(BY)}")
    if not 0 < remove < 1:
        raise BadInputError(f"--remove {remove}: a share above 0 and below 1 is expected, such as 0.25")
    checkpoint = open_checkpoint(model, compute=None)
    if quantized_modules(checkpoint) is not None:
        raise BadInputError(f"{model} is already quantized; give the full-precision checkpoint")
    target, origin = Path(out).resolve(), checkpoint.path.resolve()
    if target == origin or target in origin.parents or origin in target.parents:
        raise BadInputError(f"-o {out}: the output and the checkpoint must be apart; choose another -o")
    check_free(Path(out), resume=resume, overwrite=overwrite)
    structure = find_structure(checkpoint.model)
    config = output_config(checkpoint, EditedWeights(checkpoint.weights))
    before = _experts(structure)
    groups = groups_of(config)
    after = _left(before, remove, groups, chosen_of(config))
    new_config = with_experts(config, before, after)
    for sites in structure.layers:
        layer_pieces(checkpoint.weights, sites, range(after))  # refused before the work
    sets = data_sets(checkpoint, text, samples, length, seed) if by != "random" else {}
    job = _Job(checkpoint, structure, Path(out), (before, after), groups, by, memory_bytes(memory), seed, progress or _silent)
    try:
        return job.run(sets, new_config, remove, resume=resume, overwrite=overwrite)
    except OSError as error:
        raise disk_error(error, partial_of(Path(out))) from error


def _silent(what: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


def _experts(structure: Structure) -> int:
    counts = {layer.moe.layout.experts for layer in structure.moe_layers if layer.moe}
    if len(counts) != 1:
        raise BadInputError(f"layers have {sorted(counts)} experts; pruning wants the same number in every layer")
    return counts.pop()


def _left(before: int, remove: float, groups: int, chosen: int) -> int:
    """How many experts stay.

    Raises:
        BadInputError: all of them, or fewer than a token is sent to.
    """
    each = before // groups
    left = groups * (each - int(remove * each + 1e-9))
    if left == before:
        within = f" of each of its {groups} groups" if groups > 1 else ""
        raise BadInputError(f"--remove {remove}: takes not one of {each} experts{within}; give at least {1 / each:.3g}")
    if left < chosen or left < groups:
        raise BadInputError(f"--remove {remove}: leaves {left} of {before} experts, and a token is sent to {chosen}; remove less")
    return left


def kept_experts(saliency_E: Tensor, left: int, groups: int) -> list[int]:
    """The numbers of the experts that stay, rising: those with the largest saliency, as many of every group."""
    by_group = saliency_E.double().view(groups, -1)
    chosen = by_group.argsort(dim=1, descending=True, stable=True)[:, : left // groups]
    return (chosen + torch.arange(groups).unsqueeze(1) * by_group.shape[1]).flatten().sort().values.tolist()


@dataclass(frozen=True)
class _Job:
    """A pruning that is decided but for the experts."""

    checkpoint: Checkpoint
    structure: Structure
    out: Path
    experts: tuple[int, int]
    groups: int
    by: str
    memory: int
    seed: int
    progress: Progress

    def run(self, sets: Mapping[str, Tensor], config: Mapping[str, Any], remove: float, *, resume: bool, overwrite: bool) -> Pruned:
        check_space(self.out, self.checkpoint.size_bytes)
        identity = {
            "moebit": version("moebit"), "input": checkpoint_fingerprint(self.checkpoint), "remove": remove, "by": self.by,
            "sets": {name: digest(windows) for name, windows in sets.items()}, "memory": self.memory, "seed": self.seed,
        }  # fmt: skip
        with OutputDirectory(self.out, identity, resume=resume, overwrite=overwrite) as output:
            kept = self._decided(output, sets)
            size = self._write(output, kept)
            removed = {index: sorted(set(range(self.experts[0])) - set(stay)) for index, stay in kept.items()}
            output.finish(self.checkpoint.path, config, _documents(self, identity, removed))
        return Pruned(self.out, self.experts, removed, self.checkpoint.size_bytes, size)

    def _decided(self, output: OutputDirectory, sets: Mapping[str, Tensor]) -> dict[int, list[int]]:
        """layer -> experts that stay; from the journal where that was decided."""
        known = next((entry for entry in output.entries if entry["kind"] == "kept"), None)
        if known is None:
            windows = torch.cat(list(sets.values())) if sets else torch.zeros(1, 1, dtype=torch.int64)
            budget = make_budget(
                self.checkpoint, self.structure, self.memory, windows.numel(), length=windows.shape[1], solve=False, hessians=False
            )
            found = saliencies(self.checkpoint, self.structure, windows, budget, self.by, self.seed, self.progress)
            kept = {str(index): kept_experts(saliency, self.experts[1], self.groups) for index, saliency in found.items()}
            output.record("kept", [], experts=kept)
            known = output.entries[-1]
        return {int(index): experts for index, experts in known["experts"].items()}

    def _write(self, output: OutputDirectory, kept: Mapping[int, list[int]]) -> int:
        """Write a shard for every layer and one for the rest, unless the journal has them; returns their bytes."""
        weights, layers = self.checkpoint.weights, self.structure.layers
        done = {file for entry in output.entries for file in entry["files"]}
        prefixes = tuple(f"{layer.name}." for layer in layers)
        for number in range(len(layers) + 1):
            name = output.shard_name(number, len(layers) + 1)
            if name in done:
                continue
            if number < len(layers):
                found = layer_pieces(weights, layers[number], kept.get(layers[number].index, []))
            else:
                rest = [parameter for parameter in sorted(weights.available()) if not parameter.startswith(prefixes)]
                stored = dict.fromkeys([*(s for parameter in rest for s in weights.stored_names(parameter)), *weights.unused])
                found = {s: Piece(weights.entries[s]) for s in stored}
            with output.shard(name, {stored: piece.spec for stored, piece in found.items()}) as shard:
                for target, piece in found.items():
                    piece.write(shard, target)
            output.record("layer" if number < len(layers) else "rest", [name])
        return sum(file.stat().st_size for file in output.partial.glob("model-*.safetensors"))


def _documents(job: _Job, identity: Mapping[str, Any], removed: Mapping[int, list[int]]) -> dict[str, str]:
    before, after = job.experts
    said = {
        **identity,
        "format": "pruned",
        "experts_before": before,
        "experts_after": after,
        "removed": {str(k): v for k, v in removed.items()},
    }
    rows = "".join(f"| {index} | {', '.join(map(str, experts))} |\n" for index, experts in removed.items())
    served = f" on {', '.join(identity['sets'])}" if identity["sets"] else ""
    card = (
        f"---\nbase_model: {job.checkpoint.path.name}\nlibrary_name: transformers\ntags: [moebit, pruned, moe]\n---\n\n"
        f"# {job.checkpoint.path.name} with {after} of {before} experts\n\n"
        f"moebit removed {before - after} experts of every layer, those with the least saliency by {job.by}{served}; full precision.\n\n"
        f"| layer | removed experts |\n|---:|---|\n{rows}"
    )
    return {"moebit.json": json.dumps(said, indent=1) + "\n", "README.md": card}
