"""What our own presets are made of: benchmarks/protocol-best.yaml, on text that no evaluation looks at, as benchmarks/results/best.md.

    make quality-best        (or: .venv/bin/python benchmarks/best.py)

Cells are run and kept as those of quality.py. `--model` and `--only` run a part of them, without a table.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from moequant import groups_of
from quality import kl_cells, markdown_row, mean_over, run_protocol

Result = dict[str, Any]


def ratios(results: list[Result], protocol: dict[str, Any]) -> dict[str, dict[str, float]]:
    """KL of every row, mean over all domains, as a share of the first row's: row -> "MODEL, BITS bits" -> share."""
    every, found = [*protocol["texts"]["known"], *protocol["texts"]["novel"]], dict[str, dict[str, float]]()
    for model in protocol["models"]:
        for bits in protocol["bits"]:
            kl = {row: mean_over(same, every, "kl")[0] for row, same in groups_of(results, model, bits).items()}
            for row, value in kl.items():
                found.setdefault(row, {})[f"{model.rpartition('/')[2]}, {bits} bits"] = value / next(iter(kl.values()))
    return found


def table(results: list[Result], protocol: dict[str, Any], name: str) -> str:
    """The Markdown document."""
    known, novel = protocol["texts"]["known"], protocol["texts"]["novel"]
    shares = ratios(results, protocol)
    columns, common = list(next(iter(shares.values()))), list(list(shares.values())[-1])
    lines = [
        "# What our own presets are made of",
        "",
        f"Made by `make quality-best`; the protocol is [{name}](../{name}). A screening to choose by, not a comparison to quote:",
        f"one seed, little text, and `{protocol['texts']['split']}` texts, which no evaluation looks at. KL is that of the full-precision",
        "distribution from the quantized one, nats × 1000, mean per token; lower is better.",
        "",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads.",
        "",
        "## Shares of plain GPTQ's divergence",
        "",
        "KL, mean over all domains, divided by that of the first row; empty where it was not run. The last column is the geometric mean of",
        f"{' and '.join(common)}.",
        "",
        markdown_row(["method", *columns, "mean"]),
        markdown_row(["---"] + ["---:"] * (len(columns) + 1)),
    ]
    for row, cells in shares.items():
        mean = f"{statistics.geometric_mean(cells[c] for c in common):.3f}" if set(common) <= set(cells) else ""
        lines.append(markdown_row([row, *(f"{cells[c]:.3f}" if c in cells else "" for c in columns), mean]))
    heads = ["method", *known, *novel, "known, mean", "novel, mean", "same experts", "bits"]
    for model in protocol["models"]:
        for bits in protocol["bits"]:
            if not groups_of(results, model, bits):
                continue
            lines += ["", f"## {model}, {bits} bits", "", markdown_row(heads), markdown_row(["---"] + ["---:"] * (len(heads) - 1))]
            for row, same in groups_of(results, model, bits).items():
                exact = mean_over(same, [*known, *novel], "routing_exact")[0]
                cells = kl_cells(same, known, novel)
                lines.append(markdown_row([row, *cells, f"{exact:.1%}", f"{same[0]['average_bits']:.3f}"]))
    return "\n".join(lines) + "\n"


def main() -> None:
    run_protocol(str(__doc__), "protocol-best.yaml", "best.md", table)


if __name__ == "__main__":
    main()
