"""MoEQuant, its parts and its baselines on the reference models: benchmarks/protocol-moequant.yaml, as benchmarks/results/moequant.md.

    make quality-moequant        (or: .venv/bin/python benchmarks/moequant.py)

Cells are run and kept as those of quality.py. `--model` and `--only` run a part of them, without a table.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from balanced import described, train_on
from quality import ROOT, TEXTS, digest, kl_cells, markdown_row, mean_over, numeric_code, run_protocol, with_copies
from speed import Shape

import moebit

Result = dict[str, Any]
BALANCED = (
    "Models under runs/balanced are copies of the reference models, trained on until their experts are used about evenly\n"
    "([balanced.py](../balanced.py)), as those of large models are."
)


def with_balanced(protocol: dict[str, Any]) -> dict[str, Any]:
    """The protocol with copies that were trained on until their experts are used evenly, at some of its widths and rows."""
    how = protocol["balanced"]

    def make(model: Path, copy: Path) -> str:
        train_on(model, copy, steps=how["steps"], coefficient=how["coefficient"])
        return f"before {described(model, 'tune')}, after {described(copy, 'tune')}"

    fewer = {row: how["bits"] if row in how["rows"] else [] for row in protocol["cells"]}
    return with_copies(protocol, "balanced", make, fewer)


def groups_of(results: list[Result], model: str, bits: int | str) -> dict[str, list[Result]]:
    """Rows of a table, each with its seeds."""
    found: dict[str, list[Result]] = {}
    for result in results:
        if (result["cell"]["model"], result["cell"]["bits"]) == (model, bits):
            found.setdefault(result["cell"]["row"], []).append(result)
    return found


def table(results: list[Result], protocol: dict[str, Any], name: str) -> str:
    """The Markdown document."""
    known, novel = protocol["texts"]["known"], protocol["texts"]["novel"]
    lines = [
        "# MoEQuant on the reference models",
        "",
        f"The protocol is [{name}](../{name}). KL is that of the full-precision distribution from the quantized one, nats × 1000,",
        f"mean per token of text that was held out (`{protocol['texts'].get('split', 'eval')}`); lower is better; ± is the standard",
        "deviation over calibration seeds of the mean over the known domains. All calibration sets have as many tokens, windows of",
        "text and what the model wrote itself alike.",
        BALANCED,
        "",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads.",
        "",
    ]
    heads = ["method", *known, *novel, "known, mean", "novel, mean", "all, mean", "wiki perplexity", "same experts", "overlap", "bits", "s"]
    for model in protocol["models"]:
        full = groups_of(results, model, 16)["full precision"][0]
        lines += [f"## {model}", "", f"Full precision: wiki perplexity {full['texts']['wiki']['perplexity']:.3f}.", ""]
        for bits in (b for b in protocol["bits"] if groups_of(results, model, b)):
            lines += [f"### {bits} bits", "", markdown_row(heads), markdown_row(["---"] + ["---:"] * (len(heads) - 1))]
            lines += [markdown_row(_cells(row, same, known, novel)) for row, same in groups_of(results, model, bits).items()]
            lines.append("")
    return "\n".join([*lines, *findings(results, protocol)]) + "\n"


def _cells(row: str, same: list[Result], known: list[str], novel: list[str]) -> list[str]:
    every = [*known, *novel]
    return [
        row,
        *kl_cells(same, known, novel),
        f"{1000 * mean_over(same, every, 'kl')[0]:.2f}",
        f"{mean_over(same, ['wiki'], 'perplexity')[0]:.3f}",
        f"{mean_over(same, every, 'routing_exact')[0]:.1%}",
        f"{mean_over(same, every, 'routing_overlap')[0]:.1%}",
        f"{same[0]['average_bits']:.3f}",
        f"{statistics.fmean(r['quantize_seconds'] for r in same):.0f}",
    ]


def findings(results: list[Result], protocol: dict[str, Any]) -> list[str]:
    """What the table is asked to show, computed from it."""
    every, expected = [*protocol["texts"]["known"], *protocol["texts"]["novel"]], protocol.get("expected", {})
    lines = ["## What it shows", ""]
    for model in protocol["models"]:
        for bits in (b for b in protocol["bits"] if groups_of(results, model, b)):
            kl = {row: 1000 * mean_over(same, every, "kl")[0] for row, same in groups_of(results, model, bits).items()}
            best = min(kl, key=lambda row: kl[row])
            lines.append(f"- {model}, {bits} bits: lowest mean over all domains: {best} ({kl[best]:.2f}).")
            order = [row for row in expected.get("ordering", []) if row in kl]
            if len(order) > 1:
                falling = all(kl[a] > kl[b] for a, b in itertools.pairwise(order))
                chain = " > ".join(f"{row} {kl[row]:.2f}" for row in order)
                lines.append(f"  - the paper's ordering, {'as expected' if falling else 'not so here'}: {chain}.")
            for method in ("GPTQ", "MoEQuant++"):
                plain, beam = kl.get(f"{method}, self"), kl.get("GPTQ, EBSS" if method == "GPTQ" else "MoEQuant++ (rotation, GPTQ), EBSS")
                if plain is not None and beam is not None:
                    word = "lower" if beam < plain else "no lower"
                    lines.append(f"  - {method}: calibrated by EBSS {beam:.2f}, by plain self-sampling {plain:.2f}: EBSS is {word}.")
    return lines + _agq_time(protocol)


def affinity_time(how: dict[str, Any], cache: Path) -> dict[str, float]:
    """Seconds that GPTQ takes with and without affinity in its Hessians, by turns in one process: the least of each."""
    file = cache / f"time-{digest(how, *numeric_code())}.json"
    if not file.exists():
        best: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as scratch:
            model, text = ROOT / how["model"], {name: TEXTS / f"{name}.calib.txt" for name in how.get("text", ())}
            sizes = {}
            if how["model"] == "random":
                shape = Shape()
                shape.write(Path(scratch))
                model, text = Path(scratch) / "model", {"random": Path(scratch) / "tokens.jsonl"}
                sizes = {"calibration.samples": shape.windows, "calibration.seq_len": shape.length}
            for number in range(how["rounds"] + 1):
                for power in (0, 1):
                    began = time.perf_counter()
                    moebit.quantize(
                        model, Path(scratch) / "out", recipe=how["recipe"], overwrite=True, text=text,
                        overrides={**sizes, "solver.affinity_power": power},
                    )  # fmt: skip
                    if number:  # the first round compiles and fills caches
                        best[str(power)] = min(best.get(str(power), math.inf), time.perf_counter() - began)
        file.write_text(json.dumps({**best, "threads": torch.get_num_threads()}))
    return dict(json.loads(file.read_text()))


def _agq_time(protocol: dict[str, Any]) -> list[str]:
    lines = []
    for how in protocol.get("agq_time", []):
        took = affinity_time(how, ROOT / "runs" / "quality")
        ratio, most = took["1"] / took["0"], how["expected"]
        name = "bench-speed's random model" if how["model"] == "random" else how["model"]
        word = "as expected" if ratio <= most else "missed"
        lines.append(
            f"- affinity in the Hessians takes {ratio:.3f} times GPTQ's time on {name} ({took['1']:.1f} s against {took['0']:.1f} s, the "
            f"least of {how['rounds']} rounds by turns, {took.get('threads', 1)} threads; at most {most} expected: {word})."
        )
    return lines


def main() -> None:
    run_protocol(str(__doc__), "protocol-moequant.yaml", "moequant.md", table, with_balanced)


if __name__ == "__main__":
    main()
