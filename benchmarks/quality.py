"""What quantization costs the reference models: the cells of benchmarks/protocol.yaml, as benchmarks/results/quality.md.

    make quality        (or: .venv/bin/python benchmarks/quality.py)

Every cell is kept in runs/quality under a hash of everything it depends on (protocol, recipe, texts, model, moebit's own code), so that an
interrupted run goes on where it was and a changed one starts again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

import moebit
from moebit.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ROOT / "reference" / "text"
Measure = Callable[[Path, Path, dict[str, Any]], dict[str, Any]]  # (output, model, the protocol's texts) -> numbers, for JSON
NEUTRAL = (
    "__main__.py", "cli", "quantize/documents.py", "report", "formats/verify.py", "runtime/generate.py", "evaluate/judging.py",
    "evaluate/tasks.py", "evaluate/task_data.py",
)  # fmt: skip


def digest(*parts: Any) -> str:
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            for file in sorted(p for p in ([part] if part.is_file() else part.rglob("*")) if p.is_file() and "__pycache__" not in p.parts):
                state.update(file.read_bytes())
        else:
            state.update(json.dumps(part, sort_keys=True).encode())
    return state.hexdigest()[:20]


def numeric_code() -> list[Path]:
    """moebit's modules, without those that no number of a cell depends on; of the recipes, a cell's own counts."""
    package = Path(moebit.__file__).parent
    neutral = {package / name for name in NEUTRAL}
    return sorted(file for file in package.rglob("*.py") if not neutral & {file, *file.parents})


def cells(protocol: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of model, bit width, row and seed."""
    for model in protocol["models"]:
        yield {"model": model, "row": "full precision", "bits": 16, "seed": 0}
        for bits in protocol["bits"]:
            for row, spec in protocol["cells"].items():
                if not spec or bits not in spec.get("bits_of", {}).get(model, spec.get("bits", protocol["bits"])):
                    continue
                seeds = protocol["seeds"].get(bits, protocol["seeds"]["other"])
                for seed in seeds if "calibration" in spec and not spec.get("one_seed") else [0]:
                    yield {**spec, "model": model, "row": row, "bits": bits, "seed": seed}


def with_copies(protocol: dict[str, Any], folder: str, make: Callable[[Path, Path], str], bits_of: dict[str, list[Any]]) -> dict[str, Any]:
    """The protocol with a copy of each of its models behind them, made where it is not there, in `runs/FOLDER`.

    Args:
        make: (model, copy) -> what is to be said about it. bits_of: of rows that do not run at all of their widths on copies.
    """
    copies = []
    for model in protocol["models"]:
        copy = Path("runs") / folder / Path(model).name
        if not (ROOT / copy / "model.safetensors").exists():
            (ROOT / copy).parent.mkdir(parents=True, exist_ok=True)
            print(f"{copy}: {make(ROOT / model, ROOT / copy)}", flush=True)
        copies.append(str(copy))
    rows = {
        row: {**spec, "bits_of": {**spec.get("bits_of", {}), **dict.fromkeys(copies, bits_of[row])}} if spec and row in bits_of else spec
        for row, spec in protocol["cells"].items()
    }
    return {**protocol, "models": [*protocol["models"], *copies], "cells": rows}


def evaluated(out: Path, model: Path, texts: dict[str, Any]) -> dict[str, Any]:
    """What `moebit evaluate` says about an output on the protocol's texts, without the layers."""
    files = {name: TEXTS / f"{name}.{texts.get('split', 'eval')}.txt" for name in [*texts["known"], *texts["novel"]]}
    result = moebit.evaluate(
        out, against=model if out != model else None, text=files, window=texts["window"], max_tokens=texts["max_tokens"]
    )
    for row in result["texts"].values():
        row.pop("per_layer", None)
    return result


def run(cell: dict[str, Any], protocol: dict[str, Any], cache: Path, code: str, measure: Measure = evaluated) -> dict[str, Any]:
    """One cell's evaluation, from the cache where it is there. Rows that come to the same recipe and text share it."""
    texts, calibration = protocol["texts"], protocol["calibration"]
    model = ROOT / cell["model"]
    file = cache / f"{key_of(cell, protocol, code, measure)}.json"
    if file.exists():
        return json.loads(file.read_text()) | {"cell": cell}
    source, recipe = source_of(cell, calibration), recipe_of(cell, protocol)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        out = model
        if recipe is not None:
            out = Path(scratch) / "out"
            chosen = calibration_texts(source, calibration, cell, cache)
            began = time.perf_counter()
            moebit.quantize(model, out, recipe=recipe, text=chosen, seed=cell["seed"])
        quantized = time.perf_counter() - began
        result = measure(out, model, texts)
    result |= {"cell": cell, "quantize_seconds": quantized, "seconds": time.perf_counter() - began}
    file.write_text(json.dumps(result))
    return result


def key_of(cell: dict[str, Any], protocol: dict[str, Any], code: str, measure: Measure = evaluated) -> str:
    """A hash of everything that a cell's numbers depend on."""
    model, recipe = ROOT / cell["model"], recipe_of(cell, protocol)
    named = () if measure is evaluated else (measure.__name__,)
    parts = (protocol["texts"], source_of(cell, protocol["calibration"]), cell["seed"], recipe.digest() if recipe else None, *named)
    return digest(*parts, code, model / "config.json", model / "model.safetensors", TEXTS)


def source_of(cell: dict[str, Any], calibration: dict[str, Any]) -> Any:
    """Names of domains, or how the model writes the text itself; None where the cell is not calibrated."""
    return calibration[cell["calibration"]] if "calibration" in cell else None


def recipe_of(cell: dict[str, Any], protocol: dict[str, Any]) -> Recipe | None:
    """The recipe of a cell with everything that the protocol and the cell set in it; None for full precision."""
    if "recipe" not in cell:
        return None
    calibration, bits = protocol["calibration"], cell["bits"]
    sizes = {"calibration.samples": calibration["samples"], "calibration.seq_len": calibration["seq_len"]} if "calibration" in cell else {}
    widths = protocol.get("widths", {}).get(bits, {"weights.bits": bits})
    return load_recipe(cell["recipe"].format(bits=bits), {**widths, **sizes, **cell.get("set", {})})


def calibration_texts(source: Any, calibration: dict[str, Any], cell: dict[str, Any], cache: Path) -> dict[str, Path]:
    """The files that a cell is calibrated on: the texts of domains, or what the model writes itself."""
    if source is None:
        return {}
    if not isinstance(source, dict):
        return {name: TEXTS / f"{name}.calib.txt" for name in source}
    return {
        "sample": written(
            ROOT / cell["model"],
            source,
            calibration["samples"],
            calibration["seq_len"],
            cell["seed"],
            cache,
        )[0]
    }


def written(model: Path, how: dict[str, Any], sequences: int, length: int, seed: int, cache: Path) -> tuple[Path, dict[str, Any]]:
    """(file, report) of text that a model wrote itself, kept for whoever asks for the same."""
    sizes = {"sequences": sequences, "length": length, "seed": seed}
    package = Path(moebit.__file__).parent
    code = [package / "calibration", package / "model", package / "streaming", package / "storage"]
    key = digest(how, sizes, *code, model / "config.json", model / "model.safetensors")
    file, report = cache / f"sample-{key}.jsonl", cache / f"sample-{key}.json"
    if not report.exists():
        made = moebit.sample(model, file, **how, **sizes, resume=True, overwrite=True)
        report.write_text(json.dumps(made))
    return file, dict(json.loads(report.read_text()))


def mean_over(results: list[dict[str, Any]], names: list[str], key: str) -> tuple[float, float]:
    """(mean over domains and seeds, standard deviation over seeds of the domains' mean)."""
    per_seed = [statistics.fmean(r["texts"][name][key] for name in names) for r in results]
    return statistics.fmean(per_seed), statistics.stdev(per_seed) if len(per_seed) > 1 else math.nan


def kl_cells(same: list[dict[str, Any]], known: list[str], novel: list[str], digits: int = 2) -> list[str]:
    """KL × 1000 of a row: by domain, the mean over the known ones with its spread over seeds, the mean over the novel ones."""
    mean, spread = mean_over(same, known, "kl")
    return [
        *(f"{1000 * mean_over(same, [name], 'kl')[0]:.{digits}f}" for name in [*known, *novel]),
        f"{1000 * mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {1000 * spread:.{digits}f}"),
        f"{1000 * mean_over(same, novel, 'kl')[0]:.{digits}f}",
    ]


def table(results: list[dict[str, Any]], protocol: dict[str, Any]) -> str:
    """The Markdown document."""
    known, novel = protocol["texts"]["known"], protocol["texts"]["novel"]
    lines = [
        "# Quality of the presets on the reference models",
        "",
        "Made by `make quality`; the protocol is [protocol.yaml](../protocol.yaml). KL is that of the full-precision distribution",
        "from the quantized one, nats × 1000, mean per token of held-out text (lower is better); ± is the standard deviation over",
        "calibration seeds of the mean over the four known domains. `same experts` is the share of tokens whose set of experts is",
        "unchanged. RTN and GPTQ use the same grid, groups (128, symmetric) and clipping search, so that they differ in rounding",
        "alone; min-max does no search. GPTQ is calibrated on the four known domains, or on wiki alone.",
        "",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads.",
        "",
    ]
    for model in protocol["models"]:
        mine = [r for r in results if r["cell"]["model"] == model]
        full = next(r for r in mine if r["cell"]["row"] == "full precision")
        lines += [f"## {model}", "", "KL × 1000 by domain:", ""]
        heads = ["bits", "method", *known, *novel, "known, mean", "novel, mean", "same experts", "bits on disk"]
        lines += [markdown_row(heads), markdown_row(["---"] * 2 + ["---:"] * (len(heads) - 2))]
        groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
        for r in mine:
            if r is not full:
                groups.setdefault((r["cell"]["bits"], r["cell"]["row"]), []).append(r)
        for (bits, row), same in groups.items():
            exact = mean_over(same, [*known, *novel], "routing_exact")[0]
            tail = [f"{exact:.1%}", f"{same[0]['average_bits']:.3f}"]
            lines.append(markdown_row([str(bits), row, *kl_cells(same, known, novel), *tail]))
        lines += [
            "",
            "Perplexity (seed 0):",
            "",
            markdown_row(["bits", "method", *known, *novel]),
            markdown_row(["---"] * 2 + ["---:"] * len([*known, *novel])),
        ]
        for r in [full, *(same[0] for same in groups.values())]:
            lines.append(
                markdown_row([str(r["cell"]["bits"]), r["cell"]["row"], *(f"{r['texts'][n]['perplexity']:.3f}" for n in [*known, *novel])])
            )
        lines.append("")
    return "\n".join([*lines, *findings(results, protocol)]) + "\n"


def findings(results: list[dict[str, Any]], protocol: dict[str, Any]) -> list[str]:
    """What the table is asked to show, computed from it."""
    known = protocol["texts"]["known"]
    lines = ["## What it shows", ""]
    for model in protocol["models"]:
        mine = [r for r in results if r["cell"]["model"] == model]
        full = next(r for r in mine if r["cell"]["row"] == "full precision")
        for bits in [b for b in protocol["bits"] if b < 8]:
            gptq = [r for r in mine if (r["cell"]["row"], r["cell"]["bits"]) == ("GPTQ", bits)]
            rtn = [r for r in mine if (r["cell"]["row"], r["cell"]["bits"]) == ("RTN", bits)]
            wins = [name for name in known if mean_over(gptq, [name], "kl")[0] < mean_over(rtn, [name], "kl")[0]]
            lost = [name for name in known if name not in wins]
            ratio = mean_over(gptq, known, "kl")[0] / mean_over(rtn, known, "kl")[0]
            lines.append(
                f"- {model}, {bits} bits: GPTQ's KL is below RTN's on {len(wins)} of {len(known)} calibrated domains"
                f"{' (not on ' + ', '.join(lost) + ')' if lost else ''}; {ratio:.2f} of it on their mean."
            )
        eight = [r for r in mine if r["cell"]["bits"] == 8]
        worst = max(abs(r["texts"][n]["perplexity"] / full["texts"][n]["perplexity"] - 1) for r in eight for n in r["texts"])
        lines.append(f"- {model}, 8 bits: perplexity differs from full precision by at most {worst:.3%} on any text, with any method.")
    return lines


def markdown_row(values: list[str]) -> str:
    return "| " + " | ".join(values) + " |"


def main() -> None:
    run_protocol(str(__doc__), "protocol.yaml", "quality.md", lambda results, protocol, name: table(results, protocol))


def run_protocol(
    doc: str,
    protocol_name: str,
    result_name: str,
    document: Callable[[list[dict[str, Any]], dict[str, Any], str], str],
    prepared: Callable[[dict[str, Any]], dict[str, Any]] = lambda protocol: protocol,
    measure: Measure = evaluated,
) -> None:
    """The command line of a benchmark of cells: run those of a protocol, and write its document if all of them were."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", type=Path, default=ROOT / "benchmarks" / protocol_name)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / result_name)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--model", help="only this one's cells, and no table: for running models side by side")
    parser.add_argument("--only", help="only rows with this in their name, and no table")
    parser.add_argument("--kept", action="store_true", help="run nothing: the table of the cells that are kept, which names the others")
    args = parser.parse_args()
    protocol = prepared(yaml.safe_load(args.protocol.read_text()))
    missing: list[str] = []
    if args.kept:
        results, missing = kept_cells(protocol, args.cache, measure)
    else:
        results = run_all(protocol, args.cache, args.model, args.only, measure)
    if args.model is None and args.only is None:
        left = ["", "## Not measured yet", "", *(f"- {name}" for name in missing), ""] if missing else []
        args.out.write_text(document(results, protocol, args.protocol.name) + "\n".join(left))
        print(f"written to {args.out}")


def kept_cells(protocol: dict[str, Any], cache: Path, measure: Measure = evaluated) -> tuple[list[dict[str, Any]], list[str]]:
    """The cells that were run before, and the names of the others."""
    code, results, missing = digest(*numeric_code()), [], []
    for cell in cells(protocol):
        if (cache / f"{key_of(cell, protocol, code, measure)}.json").exists():
            results.append(run(cell, protocol, cache, code, measure))
        else:
            missing.append(f"{cell['model']}, {cell['bits']}, {cell['row']}, seed {cell['seed']}")
    return results, missing


def run_all(
    protocol: dict[str, Any], cache: Path, model: str | None, only: str | None, measure: Measure = evaluated
) -> list[dict[str, Any]]:
    """Every cell, or those of one model and of rows with `only` in their name."""
    cache.mkdir(parents=True, exist_ok=True)
    code = digest(*numeric_code())
    todo = [cell for cell in cells(protocol) if model in (None, cell["model"]) and (only is None or only in cell["row"])]
    results = []
    for number, cell in enumerate(todo, 1):
        results.append(run(cell, protocol, cache, code, measure))
        print(
            f"{number}/{len(todo)} {cell['model']} {cell['bits']} bits {cell['row']} seed {cell['seed']}: {results[-1]['seconds']:.0f} s",
            flush=True,
        )
    return results


if __name__ == "__main__":
    main()
