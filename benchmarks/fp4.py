"""FP4 solved against FP4 rounded, on each shipped reference model: benchmarks/results/fp4.md.

    .venv/bin/python -m benchmarks.fp4 [--models olmoe qwen2_moe] [--presets nvfp4 mxfp4]

The presets nvfp4 and mxfp4, once rounded to nearest with the same search for scales and once solved by GPTQ on calibration text of
four kinds, as compressed-tensors that `moebit evaluate` reads back. KL divergence to full precision on held-out text of those kinds and
of others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import moebit
from benchmarks.machine import facts

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "fp4.md"
TEXTS = ROOT / "reference" / "text"
KNOWN, NOVEL = ("wiki", "novels", "python", "speeches"), ("shakespeare", "c", "german", "french")
MODELS, PRESETS, CODES = ("olmoe", "qwen2_moe"), ("nvfp4", "mxfp4"), {"rtn": "rounded", "gptq": "solved"}
DONE = ROOT / "runs" / "fp4"  # cells: what is named on the command line is measured, the others are taken from here
SIZES = {"calibration.samples": 64, "calibration.seq_len": 256}
WINDOW, TOKENS, MEMORY = 256, 1024, "2GiB"


def divergence(path: Path, out: Path, preset: str, method: str) -> tuple[float, float, float]:
    """(bits on disk, KL on texts of calibrated kinds, KL on others) x 1000."""
    text = [f"{name}={TEXTS / f'{name}.calib.txt'}" for name in KNOWN] if method == "gptq" else []
    result = moebit.quantize(path, out, recipe=preset, text=text, overrides={"solver.method": method, **SIZES}, memory=MEMORY)
    assert isinstance(result, moebit.Result)
    evaluated = [f"{name}={TEXTS / f'{name}.eval.txt'}" for name in (*KNOWN, *NOVEL)]
    found = moebit.evaluate(out, against=path, text=evaluated, window=WINDOW, max_tokens=TOKENS, memory=MEMORY)
    kl = {name: 1000 * row["kl"] for name, row in found["texts"].items()}
    return found["average_bits"], sum(kl[name] for name in KNOWN) / len(KNOWN), sum(kl[name] for name in NOVEL) / len(NOVEL)


def measure(model: str, preset: str, method: str) -> None:
    """Measure one cell and keep it."""
    with tempfile.TemporaryDirectory() as scratch:
        found = divergence(ROOT / "reference" / model, Path(scratch) / "out", preset, method)
    DONE.mkdir(parents=True, exist_ok=True)
    (DONE / f"{model}-{preset}-{method}.json").write_text(json.dumps({"cell": found, "facts": facts(1, ["--models", model])}))


def rows() -> list[str]:
    """Table rows of all cells that were measured, and what solving gives."""
    lines = []
    for model in MODELS:
        for preset in PRESETS:
            files = [DONE / f"{model}-{preset}-{method}.json" for method in CODES]
            if not all(file.exists() for file in files):
                continue
            cells = [json.loads(file.read_text())["cell"] for file in files]
            for said, (bits, known, novel) in zip(CODES.values(), cells, strict=True):
                lines.append(f"| {model} | {preset} | {said} | {bits:.3f} | {known:.2f} | {novel:.2f} |")
            shares = [cells[1][k] / cells[0][k] for k in (1, 2)]
            lines.append(f"| {model} | {preset} | **solved / rounded** |  | {shares[0]:.2f} | {shares[1]:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    asked = parser.parse_args()
    head = [
        "# FP4, solved and rounded",
        "",
        "Made by `python -m benchmarks.fp4`: the presets of the rows on the shipped reference models, the codes rounded to",
        "nearest or solved by GPTQ, with the same search for scales. KL divergence to full precision x 1000, mean of four texts each,",
        f"{TOKENS} tokens of each in windows of {WINDOW}; calibration is on 64 windows of 256 tokens of the kinds that are called known.",
        "",
        "| model | type | codes | bits on disk | known | novel |",
        "|---|---|---|---:|---:|---:|",
    ]
    for model, preset, method in itertools.product(asked.models, asked.presets, CODES):
        measure(model, preset, method)
    last = json.loads(max(DONE.glob("*.json"), key=lambda file: file.stat().st_mtime).read_text())["facts"]
    RESULT.write_text("\n".join([*head, *rows(), "", last]) + "\n")


if __name__ == "__main__":
    main()
