"""What the bytes of a result depend on, and whether the input stays as it is while it is read."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebit.calibration.text import digest
from moebit.errors import BadInputError
from moebit.formats.differences import SETTINGS, difference
from moebit.formats.output import JOURNAL, partial_of
from moebit.formats.profile import Profile
from moebit.formats.seal import SEALED, is_intact
from moebit.plan.bitplan import BitPlan
from moebit.quantize.data import Data
from moebit.recipe import Recipe
from moebit.recipe.reading import parse_json, parse_yaml, read_text
from moebit.storage.checkpoint import Checkpoint, checkpoint_fingerprint
from moebit.storage.contents import Seen, changed, look_through
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


def circumstances(device: str, seen: Seen, recipe: Recipe) -> dict[str, Any]:
    """What the bytes may depend on besides the identity (sums of floats differ with the number of threads that add them up), and the
    recipe in full, whose digest is in the identity."""
    return {"device": device, "threads": torch.get_num_threads(), "shards": seen, SETTINGS: recipe.model_dump(mode="json")}


def seen_contents(checkpoint: Checkpoint, records: list[dict[str, Any]]) -> Seen:
    """The content of the input, looked through once; a run that is resumed has looked, and knows the files again if they are the same."""
    known = records[0].get("started", {}).get("shards") if records else None
    if isinstance(known, dict) and not changed(checkpoint.entries, known):
        return known
    return look_through(checkpoint.entries.values())


def check_unchanged(checkpoint: Checkpoint, seen: Seen) -> None:
    """Refuse to finish what was read from two versions of the input.

    Raises:
        BadInputError: shards whose content is not what was seen.
    """
    if other := changed(checkpoint.entries, seen):
        raise BadInputError(
            f"{checkpoint.path}: {', '.join(other)} changed while it was being read, the result would mix two versions of it; "
            "--overwrite starts again"
        )


def is_finished(out: Path, facts: Mapping[str, Any], recipe: Recipe, unknown: Collection[str]) -> bool:
    """Whether a whole output of this very run is there, so that nothing is left to do.

    Args:
        facts: the run's identity. unknown: what of it is only known when the work is done.

    Raises:
        BadInputError: a whole output of another run, saying what differs.
    """
    if not (out / SEALED).is_file() or os.path.lexists(out / JOURNAL) or os.path.lexists(partial_of(out)):
        return False
    text = read_text(out / SEALED)
    try:
        made = parse_json(text) if is_intact(text) else None
    except (ValueError, KeyError):
        made = None
    if made is None:
        return False
    known = {key: made.get(key) for key in facts if key not in unknown}
    asked = {key: value for key, value in facts.items() if key not in unknown}
    if known == asked:
        return True
    settings = parse_yaml(read_text(out / "recipe.yaml")) if (out / "recipe.yaml").is_file() else None
    other = difference({**known, SETTINGS: settings}, {**asked, SETTINGS: recipe.model_dump(mode="json")})
    raise BadInputError(f"{out} is finished and was made with another {other}; choose another -o, or --overwrite to replace it")
