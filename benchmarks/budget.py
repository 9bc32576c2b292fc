"""What one budget gives against one width or type for all, at equal bytes, for every engine: benchmarks/results/budget.md.

    make quality-budget        (or: .venv/bin/python -m benchmarks.budget [--models reference/olmoe] [--engines transformers])

The cells of benchmarks/protocol-budget.yaml, kept in runs/budget under a hash of everything they depend on, as in benchmarks/quality.py. A
table is written from the cells that are there, and says which are not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from scipy.stats import spearmanr

import moebit
from benchmarks.machine import facts
from benchmarks.moqa import evaluate, kept, mean_kl
from benchmarks.quality import ROOT, TEXTS, digest, markdown_row, numeric_code

RESULTS = ROOT / "benchmarks" / "results" / "budget.md"
PROTOCOL = ROOT / "benchmarks" / "protocol-budget.yaml"
CACHE = ROOT / "runs" / "budget"
DOCUMENTS = {"moebit.json", "recipe.yaml", "README.md", "report.json", "report.html"}  # beside what an engine reads

Cell = dict[str, Any]


def cells(protocol: dict[str, Any]) -> Iterator[Cell]:
    """Every combination of model, engine and size; a cell is a pair of outputs."""
    for model in protocol["models"]:
        for engine, sizes in protocol["engines"].items():
            for size, how in sizes.items():
                yield {"model": model, "engine": engine, "size": size, **how}


def key_of(cell: Cell, protocol: dict[str, Any], code: str) -> str:
    settings = [protocol[name] for name in ("texts", "calibration", "profile", "gguf_pre")]
    return digest(cell, settings, code, ROOT / cell["model"] / "model.safetensors", TEXTS)


def read_bytes(out: Path) -> int:
    """Bytes of what an engine reads."""
    return sum(file.stat().st_size for file in out.iterdir() if file.name not in DOCUMENTS)


def profile_of(model: Path, protocol: dict[str, Any], code: str) -> Path:
    """The profile of a model, which all engines and sizes share."""
    settings = protocol["profile"]
    path = CACHE / f"profile-{digest(str(model.name), settings, protocol['calibration'], code, model / 'model.safetensors', TEXTS)}"
    texts = {name: TEXTS / f"{name}.calib.txt" for name in protocol["calibration"]["sets"]}
    moebit.profile(
        model, path, text=texts, recipe=settings["recipe"], samples=settings["samples"], length=settings["length"],
        widths=settings["widths"],
    )  # fmt: skip
    return path


def run(cell: Cell, protocol: dict[str, Any], code: str) -> dict[str, Any]:
    """Both outputs of a cell: uniform, and one budget of the same bytes."""
    began, model, calibration = time.perf_counter(), ROOT / cell["model"], protocol["calibration"]
    profile = profile_of(model, protocol, code)
    names = [*protocol["texts"]["known"], *protocol["texts"]["novel"]]
    options: dict[str, Any] = {
        "recipe": cell["recipe"],
        "text": {name: TEXTS / f"{name}.calib.txt" for name in calibration["sets"]},
        "overrides": {
            "calibration.samples": calibration["samples"],
            "calibration.seq_len": calibration["seq_len"],
            **cell.get("overrides", {}),
        },
        "format": cell.get("format"),
        "gguf_pre": protocol["gguf_pre"] if cell["engine"] == "llama.cpp" else None,
    }
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        uniform, budget = Path(scratch) / "uniform", Path(scratch) / "budget"
        moebit.quantize(model, uniform, engine=cell["engine"], **options)
        limit = read_bytes(uniform)
        rows["uniform"] = {"bytes": limit, **evaluate(uniform, model, protocol, names)}
        made = moebit.quantize(model, budget, engine=cell["engine"], size=limit, profile=profile, **options)
        assert isinstance(made, moebit.Result)
        spent = dict(made.plan.spent or {})
        rows["one budget"] = {"bytes": read_bytes(budget), "spent": spent, **evaluate(budget, model, protocol, names)}
    return {"cell": cell, "rows": rows, "seconds": time.perf_counter() - began}


def table(results: list[dict[str, Any]], missing: list[Cell], protocol: dict[str, Any]) -> str:
    """The Markdown document."""
    known, novel = protocol["texts"]["known"], protocol["texts"]["novel"]
    lines = [
        "# One budget against the same for all", "",
        "Made by `make quality-budget`; the protocol is [protocol-budget.yaml](../protocol-budget.yaml). KL to full precision,",
        "nats × 1000, mean per token of held-out text. Every pair has one preset and the same bytes on disk: the budget of",
        "`quantize --size` is the size of the uniform output.", "", facts(torch.get_num_threads()), "",
    ]  # fmt: skip
    heads = ["engine", "size", "choice", "known", "novel", "of uniform", "MB", "filled", "predicted", "matrices"]
    for model in protocol["models"]:
        mine = [one for one in results if one["cell"]["model"] == model]
        if not mine:
            continue
        lines += [f"## {model}", "", markdown_row(heads), markdown_row(["---"] * 3 + ["---:"] * 6 + ["---"])]
        for one in mine:
            whole = mean_kl([one["rows"]["uniform"]], [*known, *novel])[0]
            for name, row in one["rows"].items():
                spent = row.get("spent", {})
                lines.append(
                    markdown_row(
                        [
                            one["cell"]["engine"],
                            one["cell"]["size"],
                            name if spent else f"{name} ({one['cell']['recipe']})",
                            f"{mean_kl([row], known)[0]:.2f}",
                            f"{mean_kl([row], novel)[0]:.2f}",
                            f"{mean_kl([row], [*known, *novel])[0] / whole:.2f}",
                            f"{row['bytes'] / 1e6:.3f}",
                            f"{row['bytes'] / spent['limit_bytes']:.2%}" if spent else "",
                            f"{1000 * spent['predicted_loss']:.2f}" if spent else "",
                            ", ".join(f"{count} × {kind}" for kind, count in spent.get("matrices", {}).items()),
                        ]
                    )
                )
        lines += ["", *correlation(mine, [*known, *novel]), ""]
    if missing:
        named = ", ".join(f"{cell['model']} {cell['engine']} {cell['size']}" for cell in missing)
        lines += [f"Not measured yet, in this state of the code: {named}.", ""]
    return "\n".join(lines)


def correlation(results: list[dict[str, Any]], names: list[str]) -> list[str]:
    """How well predictions order what was measured."""
    rows = [one["rows"]["one budget"] for one in results]
    if len(rows) < 3:
        return []
    rank = spearmanr([row["spent"]["predicted_loss"] for row in rows], [mean_kl([row], names)[0] for row in rows])[0]
    return [f"Predicted against measured loss of {len(rows)} budgets: rank correlation {rank:.3f}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--engines", nargs="*")
    chosen = parser.parse_args()
    protocol, code = yaml.safe_load(PROTOCOL.read_text()), digest(*numeric_code())
    CACHE.mkdir(parents=True, exist_ok=True)
    results, missing = [], []
    for cell in cells(protocol):
        key = key_of(cell, protocol, code)
        wanted = cell["model"] in (chosen.models or [cell["model"]]) and cell["engine"] in (chosen.engines or [cell["engine"]])
        if not wanted and not (CACHE / f"{key}.json").exists():
            missing.append(cell)
            continue
        results.append(kept(CACHE, key, lambda cell=cell: run(cell, protocol, code)))  # type: ignore[misc]
        print(json.dumps({**cell, "seconds": round(results[-1]["seconds"])}), flush=True)
    RESULTS.write_text(table(results, missing, protocol))


if __name__ == "__main__":
    main()
