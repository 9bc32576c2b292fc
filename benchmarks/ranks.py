"""How much faster are several ranks than one? `python benchmarks/ranks.py --help`.

GPTQ at 4 bits of a random model with OLMoE's layers (fewer of them, and fewer experts, so that it takes minutes), from 1 rank and from
several on this machine, one thread each, in turn. The weights have to have the same bytes, or the script fails. Of every run it notes the
wall time and the processor time of its busiest rank behind the imports; the latter says what the ranks' work is, also on a machine that
does other things, but not how long they wait for each other. Writes benchmarks/results/ranks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from machine import ROOT, environment, facts
from shapes import olmoe, write_fast
from synthetic import write_tokens

RESULTS = Path(__file__).parent / "results" / "ranks.md"
SHAPE = {"layers": 2, "experts": 32, "top_k": 8, "hidden": 1024, "intermediate": 512, "heads": 8, "vocabulary": 1024}
# What a rank runs: it imports everything, and then measures itself.
RANK = """
import json, sys, time
import moebit, moebit.cli
from moebit.quantize.main import quantize
model, out, text, windows, length, told = sys.argv[1:]
overrides = {"calibration.samples": int(windows), "calibration.seq_len": int(length)}
wall, own = time.perf_counter(), time.process_time()
quantize(model, out, recipe="gptq-w4", text={"random": text}, overrides=overrides, overwrite=True)
print(json.dumps({"wall": time.perf_counter() - wall, "own": time.process_time() - own}), file=open(told, "w"))
"""


def run(size: int, model: Path, text: Path, windows: int, length: int) -> dict[str, Any]:
    """Seconds of a run from `size` ranks, and its weights."""
    out = model.parent / f"out-{size}"
    shutil.rmtree(out, ignore_errors=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks, told = [], [model.parent / f"told-{rank}.json" for rank in range(size)]
    for rank in range(size):
        more = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if size > 1 else {}
        arguments = [sys.executable, "-c", RANK, model, out, text, str(windows), str(length), told[rank]]
        ranks.append(subprocess.Popen([str(each) for each in arguments], env=environment(1, more)))
    if any([rank.wait() for rank in ranks]):
        raise SystemExit(f"a run from {size} ranks failed")
    seen = [json.loads(file.read_text()) for file in told]
    weights = {file.name: file.read_bytes() for file in sorted(out.glob("*.safetensors"))}
    return {"wall": max(each["wall"] for each in seen), "own": max(each["own"] for each in seen), "weights": weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ranks")
    asked = parser.parse_args()
    model, text = asked.runs / "model", asked.runs / "text.jsonl"
    shutil.rmtree(asked.runs, ignore_errors=True)
    write_fast(olmoe(**SHAPE), model)
    write_tokens(text, asked.windows, asked.length, SHAPE["vocabulary"])
    found = {size: run(size, model, text, asked.windows, asked.length) for size in (1, *asked.ranks)}
    if any(each["weights"] != found[1]["weights"] for each in found.values()):
        raise SystemExit("the weights differ")
    rows = "\n".join(
        f"| {size} | {each['wall']:.1f} | {found[1]['wall'] / each['wall']:.2f} | {each['own']:.1f} | {found[1]['own'] / each['own']:.2f} |"
        for size, each in found.items()
    )
    shape = ", ".join(f"{name} {value}" for name, value in SHAPE.items())
    RESULTS.write_text(
        "# Several ranks beside one\n\n"
        "GPTQ at 4 bits; the weights have the same bytes from all. `benchmarks/ranks.py` says what is measured.\n\n"
        "| ranks | wall, s | times as fast | busiest rank's processor time, s | one rank's divided by it |\n|---:|---:|---:|---:|---:|\n"
        f"{rows}\n\n- {shape}; {asked.windows} windows of {asked.length} tokens\n"
        f"- load of the machine when it ended, mean of a minute: {os.getloadavg()[0]:.1f}\n{facts(1, sys.argv[1:])}\n"
    )
    print(RESULTS.read_text())
    shutil.rmtree(asked.runs)


if __name__ == "__main__":
    main()
