"""What learned rounding adds to our presets, and what it costs: benchmarks/results/refine.md.

    .venv/bin/python benchmarks/refine.py [MODEL/PRESET/STEPS ...]

Cells that were run are kept in runs/refine; without arguments all cells are run that are missing. Calibrated on four texts, judged on
others: KL of the full-precision distribution from the quantized one, over known and over novel domains.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import moebit

MODELS, PRESETS, STEPS = ("olmoe", "qwen2_moe"), ("best-w2", "best-w3"), (0, 100, 300)
KNOWN, NOVEL = ("wiki", "novels", "python", "speeches"), ("shakespeare", "c", "german", "french")
CALIBRATION = {"calibration.samples": 64, "calibration.seq_len": 256}
MOST_TOKENS = 4096
ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "runs" / "refine"


def text(kind: str, names: tuple[str, ...]) -> dict[str, Path]:
    return {name: ROOT / "reference" / "text" / f"{name}.{kind}.txt" for name in names}


def run(model: str, preset: str, steps: int) -> None:
    """Quantize and judge one cell, and keep its numbers."""
    refine = {"refine.kind": "straight_through", "refine.steps": steps} if steps else {}
    path, out = ROOT / "reference" / model, CELLS / f"{model}-{preset}-{steps}"
    began, processor = time.perf_counter(), time.process_time()
    done = moebit.quantize(path, out, recipe=preset, text=text("calib", KNOWN), overrides={**CALIBRATION, **refine}, overwrite=True)
    assert isinstance(done, moebit.Result)
    facts: dict[str, Any] = {"seconds": time.perf_counter() - began, "processor": time.process_time() - processor}
    found = moebit.evaluate(out, against=path, text=text("eval", (*KNOWN, *NOVEL)), max_tokens=MOST_TOKENS)
    facts["kl"] = {name: values["kl"] for name, values in found["texts"].items()}
    facts["refine"] = [dict(layer.refine) for layer in done.layers]
    facts["estimate"] = done.plan.seconds
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1))


def mean(cell: dict[str, Any], names: tuple[str, ...]) -> float:
    return 1000 * statistics.mean(cell["kl"][name] for name in names)


def table() -> str:
    """The Markdown document."""
    lines = [
        "# Learned rounding",
        "",
        "Made by `benchmarks/refine.py`. Our presets without learned rounding (0 steps) and with it, `refine.rate: auto`, calibrated on 64",
        f"windows of 256 tokens of four domains. KL × 1000 on the `eval` texts, {MOST_TOKENS} tokens of each; in brackets,",
        "relative to 0 steps.",
        f"torch {torch.__version__}, {torch.get_num_threads()} thread; processor seconds of the whole quantization.",
        "",
        "| model | preset | steps | known domains | novel domains | processor seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for model in MODELS:
        for preset in PRESETS:
            basis: dict[str, Any] | None = None
            for steps in STEPS:
                file = CELLS / f"{model}-{preset}-{steps}.json"
                if not file.exists():
                    continue
                cell = json.loads(file.read_text())
                basis = cell if steps == 0 else basis
                shares = [f"{mean(cell, some):.2f}" + (f" ({mean(cell, some) / mean(basis, some):.2f})" if steps and basis else "")
                          for some in (KNOWN, NOVEL)]  # fmt: skip
                lines.append(f"| {model} | {preset} | {steps} | {shares[0]} | {shares[1]} | {cell['processor']:.0f} |")
    return "\n".join(lines) + "\n"


def main(*cells: str) -> None:
    wanted = [cell.split("/") for cell in cells] or [[m, p, str(s)] for m in MODELS for p in PRESETS for s in STEPS]
    CELLS.mkdir(parents=True, exist_ok=True)
    for model, preset, steps in wanted:
        if not (CELLS / f"{model}-{preset}-{steps}.json").exists():
            run(model, preset, int(steps))
            print(model, preset, steps, flush=True)
    (ROOT / "benchmarks" / "results" / "refine.md").write_text(table())


if __name__ == "__main__":
    main(*sys.argv[1:])
