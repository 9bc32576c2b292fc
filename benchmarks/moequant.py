"""MoEQuant, its parts and its baselines on the reference models: benchmarks/protocol-moequant.yaml, as benchmarks/results/moequant.md.

    make quality-moequant        (or: .venv/bin/python benchmarks/moequant.py)

Cells are run and kept as those of quality.py. `--model` and `--only` run a part of them, without a table.
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import torch
from quality import kl_cells, markdown_row, mean_over, run_protocol

Result = dict[str, Any]


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
        "",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads.",
        "",
    ]
    heads = ["method", *known, *novel, "known, mean", "novel, mean", "all, mean", "wiki perplexity", "same experts", "overlap", "bits", "s"]
    for model in protocol["models"]:
        full = groups_of(results, model, 16)["full precision"][0]
        lines += [f"## {model}", "", f"Full precision: wiki perplexity {full['texts']['wiki']['perplexity']:.3f}.", ""]
        for bits in protocol["bits"]:
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
        for bits in protocol["bits"]:
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
        lines += _agq_time(results, model, expected)
    return lines


def _agq_time(results: list[Result], model: str, expected: dict[str, Any]) -> list[str]:
    rows = groups_of(results, model, 3)
    pair = [rows.get(name) for name in ("EBSS only (p = 0)", "both (EBSS, p = 1)")]
    if not all(pair) or "agq_time" not in expected:
        return []
    without, with_it = (min(r["quantize_seconds"] for r in same) for same in pair if same)
    good = with_it / without <= expected["agq_time"]
    return [f"- {model}: affinity in the Hessians takes {with_it / without:.2f} times GPTQ's time ({'as expected' if good else 'missed'})."]


def main() -> None:
    run_protocol(str(__doc__), "protocol-moequant.yaml", "moequant.md", table)


if __name__ == "__main__":
    main()
