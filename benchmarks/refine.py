"""What learned rounding adds to our presets, and what it costs: benchmarks/results/refine.md.

    .venv/bin/python benchmarks/refine.py [MODEL/PRESET/VARIANT ...]

Cells that were run are kept in runs/refine; without arguments all cells are run that are missing, which takes hours of one thread. A cell
is calibrated on four texts and judged on others: KL of the full-precision distribution from the quantized one, over known and over novel
domains, on `tune` text, which is there to choose by, and on `eval` text, which is there to report.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

import moebit
from moebit.methods.latent import Latent

MODELS, PRESETS = ("olmoe", "qwen2_moe"), ("best-w2", "best-w3", "best-w4")
KNOWN, NOVEL = ("wiki", "novels", "python", "speeches"), ("shakespeare", "c", "german", "french")
CALIBRATION = {"calibration.samples": 64, "calibration.seq_len": 256}
RATES = {"best-w2": 0.006, "best-w3": 0.003, "best-w4": 0.002}
PLAIN, LEARNED = "solver alone", {"refine.kind": "straight_through", "refine.steps": 100}
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {"refine.kind": "none"},
    "100": LEARNED,
    "50": {**LEARNED, "refine.steps": 50},
    "300": {**LEARNED, "refine.steps": 300},
    "800": {**LEARNED, "refine.steps": 800},
    "100-codes": {**LEARNED, "refine.tune": ["codes"]},
    "100-scales": {**LEARNED, "refine.tune": ["scales"]},
    "100-from-rtn": {**LEARNED, "solver.method": "rtn", "solver.refit": False, "solver.drift": "none", "solver.output_aware": False},
    "100-without-drift": {**LEARNED, "solver.drift": "none"},
    "100-gumbel": {**LEARNED, "refine.kind": "gumbel"},
    "100-sign": {**LEARNED, "refine.kind": "sign", "refine.rate": "auto"},
    "200x1024": {**LEARNED, "refine.steps": 200, "refine.tokens": 1024},
}
MOST_TOKENS = 2048
ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "runs" / "refine"


def text(kind: str, names: tuple[str, ...]) -> dict[str, Path]:
    return {name: ROOT / "reference" / "text" / f"{name}.{kind}.txt" for name in names}


def cell_file(model: str, preset: str, variant: str) -> Path:
    return CELLS / f"{model}-{preset}-{variant.replace(' ', '-')}.json"


def overrides(preset: str, variant: str) -> dict[str, Any]:
    chosen = VARIANTS[variant]
    return {**CALIBRATION, **({} if variant == PLAIN else {"refine.rate": RATES[preset]}), **chosen}


def run(model: str, preset: str, variant: str) -> None:
    """Quantize and judge one cell, and keep its numbers."""
    path, file = ROOT / "reference" / model, cell_file(model, preset, variant)
    began, processor = time.perf_counter(), time.process_time()
    done = moebit.quantize(
        path, file.with_suffix(""), recipe=preset, text=text("calib", KNOWN), overrides=overrides(preset, variant), overwrite=True
    )
    assert isinstance(done, moebit.Result)
    facts: dict[str, Any] = {"seconds": time.perf_counter() - began, "processor": time.process_time() - processor}
    for kind in ("tune", "eval"):
        found = moebit.evaluate(file.with_suffix(""), against=path, text=text(kind, (*KNOWN, *NOVEL)), max_tokens=MOST_TOKENS)
        facts[kind] = {name: values["kl"] for name, values in found["texts"].items()}
    facts["refine"] = [dict(layer.refine) for layer in done.layers]
    facts["estimate"] = done.plan.seconds
    facts["code"] = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    facts["date"] = date.today().isoformat()
    file.write_text(json.dumps(facts, indent=1))


def step_cost() -> dict[str, float]:
    """Seconds of the processor of one step over all experts of a layer, beside its parts and the bare products of its tokens."""
    found = dict[str, float]()

    def measure(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "moebit.learn" or found or "down_proj" not in arguments[0]:
            return
        quantized, weights, objective = arguments
        slots = objective.slots.bounds[-1] * len(objective.batches.of(0)) // len(objective.tokens)
        products = _seconds(lambda: _bare_products(weights, slots))
        latents = {name: Latent(q, weights[name]) for name, q in quantized.items()}
        values = {name: latent.value() for name, latent in latents.items()}
        gradients = objective.gradients(values, 0)[1]
        found["bare forward products"] = products
        found["forward and backward"] = _seconds(lambda: objective.gradients(values, 0))
        found["values of the latents"] = _seconds(lambda: [latent.value() for latent in latents.values()])
        copies = [{name: g.clone() for name, g in gradients.items()} for _ in range(REPEATS)]
        found["moving the latents"] = _seconds(lambda: [latents[n].move(g, True, True, 1e-3, 1) for n, g in copies.pop().items()])

    sys.addaudithook(measure)
    small = {
        "calibration.samples": 16,
        "calibration.seq_len": 256,
        "refine.kind": "straight_through",
        "refine.steps": 1,
        "refine.rate": 0.002,
    }
    out = CELLS / "step"
    moebit.quantize(ROOT / "reference" / "olmoe", out, recipe="best-w2", text=text("calib", KNOWN), overrides=small, overwrite=True)
    return found


REPEATS = 5


def _seconds(work: Callable[[], object]) -> float:
    """The least processor time of a few calls."""
    taken = []
    for _ in range(REPEATS):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)


def _bare_products(weights: dict[str, torch.Tensor], slots: int) -> None:
    """As many rows through all projections, evenly over the experts, in one batched product each."""
    for w in weights.values():
        torch.bmm(torch.ones(len(w), max(1, slots // len(w)), w.shape[2]), w.float().mT)


def step_rows() -> list[str]:
    """The lines about the cost of a step."""
    file = CELLS / "step.json"
    if not file.exists():
        return []
    cost = json.loads(file.read_text())
    bare = cost["bare forward products"]
    total = sum(cost.values()) - bare
    lines = ["", "One step over all experts of a layer of olmoe (best-w2, 2048 tokens), seconds of the processor, the least of five:", ""]
    lines += ["| part | seconds | times the bare products |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {value:.4f} | {value / bare:.2f} |" for name, value in {**cost, "the whole step": total}.items()]
    return lines


def mean(cell: dict[str, Any], kind: str, names: tuple[str, ...]) -> float:
    return 1000 * statistics.mean(cell[kind][name] for name in names)


def row(model: str, preset: str, variant: str, cell: dict[str, Any], plain: dict[str, Any] | None) -> str:
    """One line of the table: KL, in brackets relative to the solver alone."""
    numbers = []
    for kind in ("tune", "eval"):
        for names in (KNOWN, NOVEL):
            value = mean(cell, kind, names)
            share = f" ({value / mean(plain, kind, names):.2f})" if plain is not None and variant != PLAIN else ""
            numbers.append(f"{value:.2f}{share}")
    return f"| {model} | {preset} | {variant} | {' | '.join(numbers)} | {cell['processor']:.0f} | {cell['estimate']:.0f} |"


def table() -> str:
    """The Markdown document."""
    cells = {
        (model, preset, variant): json.loads(file.read_text())
        for model in MODELS
        for preset in PRESETS
        for variant in VARIANTS
        if (file := cell_file(model, preset, variant)).exists()
    }
    commits = sorted({f"{cell['code']} ({cell['date']})" for cell in cells.values()})
    lines = [
        "# Learned rounding",
        "",
        "Made by `benchmarks/refine.py`. Our presets as the solver leaves them and with learned rounding (steps, what differs), calibrated",
        f"on 64 windows of 256 tokens of four domains; one rate: {', '.join(f'{rate} at {preset}' for preset, rate in RATES.items())}.",
        f"KL × 1000, mean over known and over novel domains, {MOST_TOKENS} tokens of each; in brackets, relative to the solver alone.",
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} thread.",
        f"Code: {', '.join(commits)}.",
        "Seconds: of the processor for the whole quantization, and what the plan said. Rows that are not there were not run.",
        "",
        "| model | preset | variant | tune: known | novel | eval: known | novel | seconds | planned |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [row(*key, cell, cells.get((key[0], key[1], PLAIN))) for key, cell in cells.items()]
    return "\n".join(lines + step_rows()) + "\n"


def main(*cells: str) -> None:
    wanted = [tuple(cell.split("/")) for cell in cells] or [(m, p, v) for m in MODELS for p in PRESETS for v in VARIANTS]
    CELLS.mkdir(parents=True, exist_ok=True)
    if not (CELLS / "step.json").exists():
        (CELLS / "step.json").write_text(json.dumps(step_cost(), indent=1))
    for model, preset, variant in wanted:
        if not cell_file(model, preset, variant).exists():
            run(model, preset, variant)
            print(model, preset, variant, flush=True)
    (ROOT / "benchmarks" / "results" / "refine.md").write_text(table())


if __name__ == "__main__":
    main(*sys.argv[1:])
