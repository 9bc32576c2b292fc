"""moebit on one checkpoint, as a process of its own. Started by speed.py and memory.py.

python run_moebit.py MODEL TOKENS.jsonl OUT RESULT.json [JSON of more arguments of moebit.quantize]
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path


def main(model: str, tokens: str, out: str, result: str, more: str = "{}") -> None:
    began = time.perf_counter()
    import torch

    import moebit

    imported = time.perf_counter()
    done = moebit.quantize(model, out, text=[tokens], overwrite=True, **json.loads(more))
    finished = time.perf_counter()
    assert isinstance(done, moebit.Result)
    facts = {
        "import_seconds": imported - began,
        "load_seconds": None,
        "quantize_seconds": finished - imported,
        "layer_seconds": [layer.seconds for layer in done.layers],
        "planned_peak_bytes": done.plan.peak_bytes,
        "fallbacks": done.fallbacks,
        "peak_bytes": high_water(),
        "threads": torch.get_num_threads(),
        "versions": {"moebit": moebit.__version__},
    }
    Path(result).write_text(json.dumps(facts))


def high_water() -> int:
    """Most bytes that were resident at a time. VmHWM belongs to this program alone; ru_maxrss may still know the one that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
