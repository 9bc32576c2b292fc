"""What a peer's run tells speed.py, in the form of run_moebit.py."""

from __future__ import annotations

import json
import resource
from importlib.metadata import version
from pathlib import Path

import torch


def write(result: str, began: float, loaded: float, finished: float, packages: tuple[str, ...]) -> None:
    facts = {
        "load_seconds": loaded - began,
        "quantize_seconds": finished - loaded,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in packages},
    }
    Path(result).write_text(json.dumps(facts))
