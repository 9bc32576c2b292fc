"""Text that the reference models write themselves, against windows of text: the `sampling` part of benchmarks/protocol-moequant.yaml.

    make bench-ebss        (or: .venv/bin/python benchmarks/ebss.py)

Every row is kept in runs/quality under a hash of everything it depends on, so that an interrupted run goes on where it was; what models
write here is what `make quality-moequant` calibrates on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from moequant import BALANCED, with_balanced
from quality import ROOT, TEXTS, digest, markdown_row, written
from transformers import AutoModelForCausalLM

import moebit
from moebit.calibration.sampling import describe_text

KEYS = ("sigma", "std", "unseen", "perplexity", "distinct_4grams")
PLAIN = "self"
WIKI = "wiki windows"


def run(model: str, row: dict[str, Any], seed: int, sampling: dict[str, Any], cache: Path, code: str) -> dict[str, Any]:
    """What one row's text means to one model, from the cache where it is there."""
    path, sizes = ROOT / model, {"sequences": sampling["sequences"], "length": sampling["length"], "seed": seed}
    if "text" not in row:
        return written(path, row, **sizes, cache=cache)[1]
    key = digest(row, sizes, code, path / "config.json", path / "model.safetensors", TEXTS)
    file = cache / f"windows-{key}.json"
    if not file.exists():
        file.write_text(json.dumps(describe_text(path, {name: TEXTS / f"{name}.calib.txt" for name in row["text"]}, **sizes)))
    return dict(json.loads(file.read_text()))


def throughput(model: str, settings: dict[str, Any], cache: Path) -> dict[str, float]:
    """Tokens per second of rows of the model: ours and transformers', plain and as a beam, one after the other in one process."""
    path, n, length, width = ROOT / model, settings["sequences"], settings["length"], settings["width"]
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    loaded.generation_config.eos_token_id = None  # every row becomes as long as it may
    result = {}
    for name, rows, beams in (("plain", n * width, 1), ("beam", n, width)):
        ids = torch.randint(1, loaded.config.vocab_size, (rows, 1), generator=torch.Generator().manual_seed(0))
        how = {"do_sample": True, "top_k": 0} if beams == 1 else {"num_beams": beams}
        began = time.perf_counter()
        loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length - 1, pad_token_id=0, **how)
        result[f"transformers, {name}"] = n * width * length / (time.perf_counter() - began)
        kind = (
            {"kind": "self"}
            if beams == 1
            else {"kind": "ebss", "extend": "likeliest", "width": width, "repetition_penalty": 1.0, "no_repeat_ngram": 0}
        )
        ours = moebit.sample(path, cache / "throughput.jsonl", sequences=rows, length=length, overwrite=True, **kind)
        result[f"moebit, {name}"] = ours["tokens_per_second"] * beams
    return result


def table(results: dict[str, dict[str, list[dict[str, Any]]]], speeds: dict[str, dict[str, float]], sampling: dict[str, Any]) -> str:
    """The Markdown document."""
    tokens = sampling["sequences"] * sampling["length"]
    lines = [
        "# Text that a model writes itself, against windows of text",
        "",
        "Made by `make bench-ebss`; the protocol is the `sampling` part of [protocol-moequant.yaml](../protocol-moequant.yaml): "
        f"{tokens:,} tokens a row where it says nothing else, means over the seeds that it names.",
        "Imbalance sigma is 0 where all experts of a layer get as many tokens, 1 where one gets all; std = sigma / sqrt(experts) is what",
        "the paper's table has. `below wiki` says how many times lower it is than that of random windows of wiki.",
        BALANCED,
        "",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads.",
        "",
    ]
    for model, rows in results.items():
        heads = ["text", "sigma", "std", "below wiki", "fewest tokens of an expert", "unseen", "perplexity", "distinct 4-grams", "tokens/s"]
        lines += [f"## {model}", "", markdown_row(heads), markdown_row(["---"] + ["---:"] * (len(heads) - 1))]
        for name, found in rows.items():
            mean = {key: statistics.fmean(r[key] for r in found) for key in KEYS}
            wiki = statistics.fmean(r["sigma"] for r in rows[WIKI]) if WIKI in rows else float("nan")
            fewest = min(r["tokens_per_expert"]["min"] for r in found)
            speed = [r["tokens_per_second"] for r in found if r.get("tokens_per_second")]
            cells = [
                name,
                f"{mean['sigma']:.4f}",
                f"{mean['std']:.4f}",
                f"{wiki / mean['sigma']:.1f}",
                f"{fewest:,}",
                f"{mean['unseen']:.1f}",
            ]
            cells += [f"{mean['perplexity']:.2f}", f"{mean['distinct_4grams']:.1%}", f"{statistics.fmean(speed):,.0f}" if speed else ""]
            lines.append(markdown_row(cells))
        lines.append("")
    if speeds:
        size = sampling["throughput"]
        lines += [
            "## Speed",
            "",
            f"Tokens per second of {size['sequences'] * size['width']} rows of {size['length']} tokens, in one run:",
            "",
        ]
        heads = ["model", "rows", "moebit", "transformers' `generate`", "ratio"]
        lines += [markdown_row(heads), markdown_row(["---", "---", "---:", "---:", "---:"])]
        for model, speed in speeds.items():
            for name in ("plain", "beam"):
                ours, theirs = speed[f"moebit, {name}"], speed[f"transformers, {name}"]
                lines.append(markdown_row([model, name, f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.2f}"]))
        lines.append("")
    lines += ["## What it shows", ""]
    for model, rows in results.items():
        if {PLAIN, WIKI} <= set(rows):
            lines += [finding(model, rows, name, sampling["expected"]) for name in sampling["judged"] if name in rows]
    return "\n".join(lines) + "\n"


def finding(model: str, rows: dict[str, list[dict[str, Any]]], judged: str, expected: dict[str, Any]) -> str:
    """What a row is asked to show, computed from the table."""
    mean = {name: {key: statistics.fmean(r[key] for r in rows[name]) for key in KEYS} for name in (judged, PLAIN, WIKI)}
    below = mean[WIKI]["sigma"] / mean[judged]["sigma"]
    ratio, distinct = (mean[judged][key] / mean[PLAIN][key] for key in ("perplexity", "distinct_4grams"))
    checks = [
        (f"{below:.1f} times less imbalance than wiki windows", below >= expected["imbalance_below_wiki"]),
        (f"{mean[judged]['unseen']:.1f} experts unseen", mean[judged]["unseen"] <= expected["unseen"]),
        (f"perplexity {ratio:.2f} of plain sampling's", ratio <= expected["perplexity_of_self"]),
        (f"distinct 4-grams {distinct:.2f} of plain sampling's", distinct >= expected["distinct_of_self"]),
    ]
    return f"- {model}, {judged}: " + "; ".join(f"{what} ({'as expected' if good else 'missed'})" for what, good in checks) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", type=Path, default=ROOT / "benchmarks" / "protocol-moequant.yaml")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ebss.md")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--model", help="only this one")
    parser.add_argument("--only", help="only rows with this in their name")
    parser.add_argument("--seeds", type=int, help="only so many seeds")
    parser.add_argument("--no-speed", action="store_true", help="leave the comparison with transformers' generate out")
    args = parser.parse_args()
    protocol = with_balanced(yaml.safe_load(args.protocol.read_text()))
    sampling = protocol["sampling"]
    sampling["seeds"] = sampling["seeds"][: args.seeds]
    args.cache.mkdir(parents=True, exist_ok=True)
    code = digest(*(Path(moebit.__file__).parent / room for room in ("calibration", "model", "streaming", "storage")))
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for model in (m for m in protocol["models"] if args.model in (None, m)):
        for name, row in sampling["rows"].items():
            if args.only is None or args.only in name:
                how = {key: value for key, value in row.items() if key not in ("seeds", "sequences")}
                size = {**sampling, "sequences": row.get("sequences", sampling["sequences"])}
                found = [run(model, how, seed, size, args.cache, code) for seed in row.get("seeds", sampling["seeds"])]
                results.setdefault(model, {})[name] = found
                print(f"{model} {name}: sigma {statistics.fmean(r['sigma'] for r in found):.4f}", flush=True)
    speeds = {} if args.no_speed else {model: throughput(model, sampling["throughput"], args.cache) for model in results}
    args.out.write_text(table(results, speeds, sampling))
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
