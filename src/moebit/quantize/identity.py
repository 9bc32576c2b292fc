"""What the bytes of a result depend on, and whether the input stays as it is while it is read."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from moebit.calibration.text import digest
from moebit.errors import BadInputError
from moebit.formats.profile import Profile
from moebit.plan.bitplan import BitPlan
from moebit.quantize.data import Data
from moebit.recipe import Recipe
from moebit.storage.checkpoint import Checkpoint, checkpoint_fingerprint
from moebit.tensor import backend_of


def identity(
    checkpoint: Checkpoint, recipe: Recipe, data: Data, bits: BitPlan | None, *, memory: int, seed: int, device: str
) -> dict[str, Any]:
    """What the bytes of the result depend on; a resumed run must agree in all of it."""
    return {
        "moebit": version("moebit"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "input": checkpoint_fingerprint(checkpoint),
        "recipe": recipe.digest(),
        "calibration": digest(data.windows) if data.windows is not None else None,
        "memory": memory,
        "seed": seed,
        "compute": str(checkpoint.model.dtype).removeprefix("torch."),
        **({"bit_plan": bits.digest()} if bits else {}),
        **({"pool": digest(data.pool)} if data.pool is not None else {}),
        **({"profile": _digest_of(data.sets)} if data.sets is not None else {}),
        **({"solver_kernel": backend_of(torch.device(device))} if device != "cpu" else {}),
    }


def _digest_of(sets: dict[str, Tensor] | Profile) -> dict[str, Any]:
    if isinstance(sets, Profile):
        return {name: facts["sha256"] for name, facts in sets.sets.items()}
    return {name: digest(windows) for name, windows in sets.items()}


def last_written(checkpoint: Checkpoint) -> dict[str, int]:
    """When each shard was last written (0: it is gone): a run neither resumes nor finishes over a shard that changed underneath."""
    files = sorted({entry.file for entry in checkpoint.entries.values()})
    return {file.name: file.stat().st_mtime_ns if file.exists() else 0 for file in files}


def check_unchanged(checkpoint: Checkpoint, seen: Mapping[str, int]) -> None:
    """Refuse to finish what was read from two versions of the input.

    Raises:
        BadInputError: shards that were written after `seen` was noted.
    """
    changed = [name for name, when in last_written(checkpoint).items() if when != seen[name]]
    if changed:
        raise BadInputError(
            f"{checkpoint.path}: {', '.join(changed)} changed while it was being read, the result would mix two versions of it; "
            "--overwrite starts again"
        )
