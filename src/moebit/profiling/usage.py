"""How an output's experts are used on a text, and how far that is from the data it was made for: `drift`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebit.calibration.text import Texts
from moebit.errors import BadInputError
from moebit.formats.opening import native_modules, open_checkpoint
from moebit.formats.seal import SEALED
from moebit.formats.switch import Usage, read_usage
from moebit.memory import DEFAULT_MEMORY, Memory, memory_bytes
from moebit.methods.significance import expert_shares
from moebit.methods.switching import usage_distance
from moebit.model.structure import find_structure
from moebit.profiling.passes import Progress, run_pass
from moebit.profiling.profile import data_sets
from moebit.recipe.reading import read_object
from moebit.storage.checkpoint import Checkpoint
from moebit.storage.documents import Sealed, checked
from moebit.streaming.budget import make_budget

DRIFTED = 1.5  # times the distance of a data set to the nearest other one, from which on a text counts as other data


@dataclass(frozen=True)
class Observed:
    """An output, what it was made for, and its experts on new texts.

    Attributes:
        known: by experts module, the data sets it was made for, named in `sets`. new: the texts, named in `texts`.
        halves: the same for each half of every text, [2 D, E]: how much two pieces of one text differ.
    """

    checkpoint: Checkpoint
    manifest: dict[str, Any]
    sets: list[str]
    known: dict[str, Usage]
    texts: list[str]
    new: dict[str, Usage]
    halves: dict[str, Tensor]


def observe(
    out: str | Path,
    text: Texts,
    samples: int,
    length: int,
    memory: Memory,
    seed: int,
    progress: Progress | None,
) -> Observed:
    """Stream texts through an output and note how its experts are used.

    Raises:
        BadInputError: no native output of moebit, or one that does not say what it was made for; a text that is too short.
    """
    path, allowed = Path(out), memory_bytes(memory)
    if not (path / SEALED).is_file():
        raise BadInputError(f"{out}: no {SEALED} here; give the output of `moebit quantize`")
    known = read_usage(path)
    manifest = read_object(path / SEALED)
    if checked(Sealed, manifest, path / SEALED).profile is None:
        raise BadInputError(f"{path / SEALED}: does not say which data the output was made for; make it again")
    checkpoint = open_checkpoint(path)
    if not native_modules(checkpoint):
        raise BadInputError(f"{out}: not in the native format, the only one whose channels can be looked at one by one")
    structure, new, halves = find_structure(checkpoint.model), [], []
    sets = data_sets(checkpoint, text, samples, length, seed)
    for number, windows in enumerate(sets.values()):
        (progress or _silent)("texts", number, len(sets))
        parts = windows.chunk(2) if len(windows) > 1 else (windows, windows)
        found = [_pass(checkpoint, structure, part, allowed, progress or _silent) for part in parts]
        halves.append([{name: f[f"{name}.tokens"] for name in known} for f in found])
        new.append({key: found[0][key] + (found[1][key] if len(windows) > 1 else 0) for key in found[0]})
    (progress or _silent)("texts", len(sets), len(sets))
    usage = {
        name: Usage(
            torch.stack([found[f"{name}.tokens"] for found in new]),
            torch.stack([expert_shares(found[f"{name}.significance"]).float() for found in new]),
        )
        for name in known
    }
    pieces = {name: torch.stack([part[name] for pair in halves for part in pair]) for name in known}
    return Observed(checkpoint, manifest, list(manifest["profile"]["sets"]), known, list(sets), usage, pieces)


def _pass(checkpoint: Checkpoint, structure: Any, windows: Tensor, memory: int, progress: Progress) -> dict[str, Tensor]:
    budget = make_budget(checkpoint, structure, memory, windows.numel(), length=windows.shape[1], solve=False, hessians=False)
    return run_pass(
        checkpoint, structure, windows, budget, budget.store(Path(tempfile.gettempdir()), checkpoint.weights.device), None, progress
    )


def _silent(what: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


def drift(
    out: str | Path,
    *,
    text: Texts,
    samples: int = 16,
    length: int = 512,
    memory: Memory = DEFAULT_MEMORY,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """How far the use of experts on texts is from the data sets that an output was made for.

    The distance of two texts is, per layer, half the sum of absolute differences between the shares of tokens that experts get (0: alike,
    1: no expert in common); the mean over layers is reported.

    Returns:
        {"output", "sets": {NAME: distance to the nearest other set}, "texts": {NAME: {"nearest", "distance", "distances": {SET: ...},
        "noise": distance of the text's own halves, "drifted", "per_layer": [...]}}}. A text has drifted if it is further from every set
        than `DRIFTED` times the largest distance of a set to its nearest neighbour, and than its own noise. With a single set the noise
        alone is compared.

    Raises:
        BadInputError: as `observe`.
    """
    seen = observe(out, text, samples, length, memory, seed, progress)
    between = _distances({n: u.tokens for n, u in seen.known.items()}, {n: u.tokens for n, u in seen.known.items()}).mean(2)
    apart = between + torch.eye(len(seen.sets), dtype=torch.float64) * 9
    nearest = {name: float(apart[i].min()) for i, name in enumerate(seen.sets)} if len(seen.sets) > 1 else {}
    distances = _distances({n: u.tokens for n, u in seen.new.items()}, {n: u.tokens for n, u in seen.known.items()})
    noise = [
        float(
            _distances(
                {n: t[2 * i : 2 * i + 1] for n, t in seen.halves.items()}, {n: t[2 * i + 1 : 2 * i + 2] for n, t in seen.halves.items()}
            ).mean()
        )
        for i in range(len(seen.texts))
    ]
    usual = max(nearest.values(), default=0.0)
    result: dict[str, Any] = {"output": str(out), "sets": nearest, "texts": {}}
    for i, name in enumerate(seen.texts):
        mean = distances[i].mean(1)
        best = int(mean.argmin())
        result["texts"][name] = {
            "nearest": seen.sets[best],
            "distance": float(mean[best]),
            "distances": dict(zip(seen.sets, mean.tolist(), strict=True)),
            "noise": noise[i],
            "drifted": bool(float(mean[best]) > max(DRIFTED * usual, 2 * noise[i])),
            "per_layer": distances[i, best].tolist(),
        }
    return result


def _distances(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """[A, B, layers] distance of every text of `a` from every one of `b`; by experts module, tokens [texts, E]."""
    layers = []
    for name in a:
        mine, theirs = (t.double() / t.sum(1, keepdim=True).clamp(min=1) for t in (a[name], b[name]))
        layers.append(usage_distance(mine.unsqueeze(1), theirs.unsqueeze(0)))
    return torch.stack(layers, 2)
