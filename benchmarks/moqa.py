"""What widths by significance and by measured errors give, and what switching channels gives: benchmarks/results/moqa.md.

    make quality-moqa        (or: .venv/bin/python -m benchmarks.moqa)

The cells of benchmarks/protocol-moqa.yaml, kept in runs/moqa under a hash of everything they depend on, as in benchmarks/quality.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

import moebit
from benchmarks.quality import ROOT, TEXTS, digest, markdown_row, numeric_code
from moebit.plan.bitplan import BitPlan

Cell = dict[str, Any]


def cells(protocol: dict[str, Any]) -> Iterator[Cell]:
    """Every combination of model, size, row and seed; then those of switching."""
    for model in protocol["models"]:
        for size, spec in protocol["sizes"].items():
            for row, how in protocol["rows"].items():
                if size not in how.get("sizes", [size]):
                    continue
                seeds = spec["seeds"] if row in spec.get("seeded", []) else spec["seeds"][:1]
                for seed in seeds:
                    yield {"kind": "widths", "model": model, "size": size, "row": row, "seed": seed, **how}
    for model in protocol["models"]:
        for share in protocol["switching"]["shares"]:
            for moved in protocol["switching"]["moved"][: 1 if share != protocol["switching"]["shares"][0] else None]:
                yield {
                    "kind": "switching",
                    "model": model,
                    "moved": moved,
                    "share": share,
                    "row": f"{moved}, {share:.0%}",
                    "size": "3",
                    "seed": 0,
                }


def kept(cache: Path, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A cell's result, from the cache where it is there."""
    file = cache / f"{key}.json"
    if not file.exists():
        file.write_text(json.dumps(make()))
    return dict(json.loads(file.read_text()))


def evaluate(out: Path, model: Path, protocol: dict[str, Any], names: list[str]) -> dict[str, Any]:
    texts = protocol["texts"]
    files = {name: TEXTS / f"{name}.eval.txt" for name in names}
    result = moebit.evaluate(out, against=model, text=files, window=texts["window"], max_tokens=texts["max_tokens"])
    for row in result["texts"].values():
        row.pop("per_layer", None)
    return result


def profile_of(cell: Cell, protocol: dict[str, Any], cache: Path, code: str) -> Path:
    """The profile that a cell's widths are chosen from, one per model, seed and solver."""
    settings, model = protocol["profile"], ROOT / cell["model"]
    solver = cell.get("solver", "rtn")
    key = digest(
        "profile", cell["model"], cell["seed"], solver, settings, protocol["calibration"], code, model / "model.safetensors", TEXTS
    )
    path = cache / f"profile-{key}"
    texts = {name: TEXTS / f"{name}.calib.txt" for name in protocol["calibration"]["sets"]}
    moebit.profile(
        model, path, text=texts, recipe=settings["recipe"], samples=settings["samples"], length=settings["length"],
        widths=protocol["ladder"], solver=solver, seed=cell["seed"],
    )  # fmt: skip
    return path


def run_widths(cell: Cell, protocol: dict[str, Any], cache: Path, code: str) -> dict[str, Any]:
    """Choose widths, quantize, evaluate."""
    began = time.perf_counter()
    spec, model, calibration = protocol["sizes"][cell["size"]], ROOT / cell["model"], protocol["calibration"]
    plan: BitPlan | None = None
    if cell["method"] != "uniform":
        found = moebit.allocate(
            profile_of(cell, protocol, cache, code), target_bits=spec["target"], method=cell["method"], granularity=cell.get("granularity"),
            ladder=cell.get("ladder", protocol["ladder"]), significance=cell.get("significance", "mean"),
            linear_bits=int(spec["recipe"][-1]),
        )  # fmt: skip
        plan = found.plan
    chosen = time.perf_counter() - began
    texts = {name: TEXTS / f"{name}.calib.txt" for name in calibration["sets"]}
    sizes = {"calibration.samples": calibration["samples"], "calibration.seq_len": calibration["seq_len"]}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        moebit.quantize(model, out, recipe=spec["recipe"], plan=plan, text=texts, overrides=sizes, seed=cell["seed"])
        result = evaluate(out, model, protocol, [*protocol["texts"]["known"], *protocol["texts"]["novel"]])
    widths: dict[int, int] = {}
    if plan is not None:
        for counts in found.counts.values():
            for width, count in counts.items():
                widths[width] = widths.get(width, 0) + count
    return result | {"cell": cell, "widths": dict(sorted(widths.items())), "choose_seconds": chosen, "seconds": time.perf_counter() - began}


def run_switching(cell: Cell, protocol: dict[str, Any], cache: Path, code: str) -> dict[str, Any]:
    """One output for the first domains; on another one before and after `adapt`, and made anew for that."""
    began, model, how = time.perf_counter(), ROOT / cell["model"], protocol["switching"]
    names = [*how["calibrated"], cell["moved"]]
    text, sizes = {cell["moved"]: TEXTS / f"{cell['moved']}.calib.txt"}, {"calibration.samples": how["samples"]}
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        out, anew = Path(scratch) / "out", Path(scratch) / "anew"
        first = {name: TEXTS / f"{name}.calib.txt" for name in how["calibrated"]}
        start = time.perf_counter()
        moebit.quantize(model, out, recipe=how["recipe"], text=first, overrides={**sizes, "switching.share": cell["share"]})
        drift = moebit.drift(out, text=text, **how["adapt"])["texts"][cell["moved"]]
        rows["nothing"] = {"bytes": 0, "seconds": 0.0, **evaluate(out, model, protocol, names)}
        for row, keep in (("adapt", False), ("adapt --keep", True)):
            done = moebit.adapt(out, text=text, in_place=True, keep=keep, **how["adapt"])
            rows[row] = {
                "bytes": done.bytes_written,
                "seconds": done.seconds,
                "channels": done.channels,
                **evaluate(out, model, protocol, names),
            }
            moebit.adapt(out, undo=True)
        start = time.perf_counter()
        moebit.quantize(model, anew, recipe=how["recipe"], text=text, overrides={**sizes, "switching.share": 0})
        took = time.perf_counter() - start
        rows["made anew"] = {
            "bytes": sum(f.stat().st_size for f in anew.glob("*.safetensors")), "seconds": took, **evaluate(anew, model, protocol, names),
        }  # fmt: skip
        side = (out / "switch.safetensors").stat().st_size
    return {"cell": cell, "rows": rows, "drift": drift, "side_bytes": side, "seconds": time.perf_counter() - began}


def mean_kl(results: list[dict[str, Any]], names: list[str]) -> tuple[float, float | None]:
    """(mean over domains and seeds, standard deviation over seeds of the mean over domains), nats x 1000."""
    each = [1000 * statistics.fmean(r["texts"][name]["kl"] for name in names) for r in results]
    return statistics.fmean(each), statistics.stdev(each) if len(each) > 1 else None


def table(results: list[dict[str, Any]], protocol: dict[str, Any]) -> str:
    """The Markdown document."""
    lines = [
        "# Widths from data, and switching channels",
        "",
        "Made by `make quality-moqa`; the protocol is [protocol-moqa.yaml](../protocol-moqa.yaml). KL to full precision, nats × 1000, mean",
        "per token of held-out text (lower is better). GPTQ throughout, one grid (symmetric, groups of 128), calibrated on the four known",
        "domains; rows differ in the widths alone. `bits` is the average on disk, codes and scales of everything quantized; ± is the",
        "standard deviation over three seeds.",
        "",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads.",
        "",
    ]
    for model in protocol["models"]:
        mine = [r for r in results if r["cell"]["model"] == model]
        lines += _widths_table(model, [r for r in mine if r["cell"]["kind"] == "widths"], protocol)
        lines += _switching_table(model, [r for r in mine if r["cell"]["kind"] == "switching"], protocol)
    return "\n".join([*lines, *findings(results, protocol)]) + "\n"


def _widths_table(model: str, results: list[dict[str, Any]], protocol: dict[str, Any]) -> list[str]:
    known, novel = protocol["texts"]["known"], protocol["texts"]["novel"]
    heads = [
        "size",
        "widths by",
        *known,
        *novel,
        "known, mean",
        "novel, mean",
        "perplexity, known",
        "same experts",
        "bits",
        "matrices by width",
    ]
    lines = [f"## {model}", "", markdown_row(heads), markdown_row(["---"] * 2 + ["---:"] * (len(heads) - 3) + ["---"])]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in results:
        groups.setdefault((r["cell"]["size"], r["cell"]["row"]), []).append(r)
    for (size, row), same in groups.items():
        spread = mean_kl(same, known)[1]
        perplexity = statistics.fmean(r["texts"][n]["perplexity"] for r in same for n in known)
        exact = statistics.fmean(r["texts"][n]["routing_exact"] for r in same for n in [*known, *novel])
        widths = ", ".join(f"{width}: {count}" for width, count in same[0]["widths"].items()) or "all alike"
        cells_ = [f"{mean_kl(same, [name])[0]:.2f}" for name in [*known, *novel]]
        cells_ += [f"{mean_kl(same, known)[0]:.2f}" + (f" ± {spread:.2f}" if spread is not None else ""), f"{mean_kl(same, novel)[0]:.2f}"]
        lines.append(markdown_row([size, row, *cells_, f"{perplexity:.3f}", f"{exact:.1%}", f"{same[0]['average_bits']:.4f}", widths]))
    return [*lines, ""]


def _switching_table(model: str, results: list[dict[str, Any]], protocol: dict[str, Any]) -> list[str]:
    how = protocol["switching"]
    if not results:
        return []
    made = ", ".join(how["calibrated"])
    heads = ["to", "channels kept", "drift", "done", "KL there", f"KL on {made}", "bits", "bytes written", "seconds"]
    lines = [
        f"### Switching: {how['recipe']} made for {made}, moved",
        "",
        markdown_row(heads),
        markdown_row(["---"] * 4 + ["---:"] * (len(heads) - 4)),
    ]
    for r in results:
        moved = r["cell"]["moved"]
        for name, row in r["rows"].items():
            there, before = mean_kl([row], [moved])[0], mean_kl([row], how["calibrated"])[0]
            share = f"{r['cell']['share']:.0%} ({r['side_bytes'] / 1e6:.2f} MB)"
            lines.append(
                markdown_row([moved, share, f"{r['drift']['distance']:.2f}", name, f"{there:.2f}", f"{before:.2f}",
                              f"{row['average_bits']:.4f}", f"{row['bytes']:,}", f"{row['seconds']:.1f}"])
            )  # fmt: skip
    return [*lines, ""]


def findings(results: list[dict[str, Any]], protocol: dict[str, Any]) -> list[str]:
    """What the table is asked to show, computed from it."""
    domains = [*protocol["texts"]["known"], *protocol["texts"]["novel"]]
    lines = ["## What it shows", ""]
    for model in protocol["models"]:
        for size, spec in protocol["sizes"].items():
            mine = [r for r in results if r["cell"]["kind"] == "widths" and (r["cell"]["model"], r["cell"]["size"]) == (model, size)]
            uniform = [r for r in mine if r["cell"]["row"] == "uniform"]
            if not uniform or len(mine) == len(uniform):
                continue
            limit, whole = max(r["average_bits"] for r in uniform), mean_kl(uniform, domains)[0]
            for row in dict.fromkeys(r["cell"]["row"] for r in mine if r["cell"]["row"] != "uniform"):
                same = [r for r in mine if r["cell"]["row"] == row]
                ratio, fits = mean_kl(same, domains)[0] / whole, max(r["average_bits"] for r in same) <= limit
                lines.append(
                    f"- {model}, {spec['target']} bits, {row}: {ratio:.3f} of the KL of uniform GPTQ on the mean over the eight domains"
                    f"{'' if fits else ', with more bits on disk'}."
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", type=Path, default=ROOT / "benchmarks" / "protocol-moqa.yaml")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "moqa.md")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "moqa")
    parser.add_argument("--model", help="only this one's cells, and no table: for running models side by side")
    args = parser.parse_args()
    protocol = yaml.safe_load(args.protocol.read_text())
    args.cache.mkdir(parents=True, exist_ok=True)
    code = digest(*numeric_code(), Path(moebit.__file__).parent / "recipe" / "presets")
    todo = [cell for cell in cells(protocol) if args.model in (None, cell["model"])]
    results = []
    for number, cell in enumerate(todo, 1):
        model = ROOT / cell["model"]
        key = digest(cell, protocol, code, model / "config.json", model / "model.safetensors", TEXTS)
        run = run_widths if cell["kind"] == "widths" else run_switching
        results.append(kept(args.cache, key, lambda run=run, cell=cell: run(cell, protocol, args.cache, code)))  # type: ignore[misc]
        done = results[-1]
        print(
            f"{number}/{len(todo)} {cell['model']} {cell['size']} bits {cell['row']} seed {cell['seed']}: {done['seconds']:.0f} s",
            flush=True,
        )
    if args.model is None:
        args.out.write_text(table(results, protocol))
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
