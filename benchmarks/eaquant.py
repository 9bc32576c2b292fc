"""EAQuant, its parts and its baselines on the reference models, as they are and with the outliers of large models:
benchmarks/protocol-eaquant.yaml, as benchmarks/results/eaquant.md.

    make quality-eaquant        (or: .venv/bin/python benchmarks/eaquant.py)

Cells are run and kept as those of quality.py. `--model` and `--only` run a part of them, without a table.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from moequant import groups_of
from outliers import inject
from quality import kl_cells, markdown_row, mean_over, run_protocol, with_copies

Result = dict[str, Any]
LEAST_GAP = 0.05  # bits per byte between RTN and full precision, below which shares of it say nothing
LEVEL = 0.05  # relative difference of divergences that seeds alone make


def with_outliers(protocol: dict[str, Any]) -> dict[str, Any]:
    """The protocol with the copies among its models."""
    seed = protocol["outliers"]["seed"]
    fewer = {row: spec["bits_of_copies"] for row, spec in protocol["cells"].items() if "bits_of_copies" in spec}
    return with_copies(protocol, "outliers", lambda model, copy: f"logits moved by {inject(model, copy, seed):.1e} of their norm", fewer)


def table(results: list[Result], protocol: dict[str, Any], name: str) -> str:
    """The Markdown document."""
    known, novel = protocol["texts"]["known"], protocol["texts"]["novel"]
    lines = [
        "# EAQuant on the reference models",
        "",
        f"The protocol is [{name}](../{name}). KL is that of the full-precision distribution from the quantized one, nats × 1000, mean",
        "per token of held-out text; lower is better; ± is the standard deviation over calibration seeds of the mean over the known",
        "domains. WxAy: weights in x bits, one scale per output channel; inputs of linears, query, key and value in y bits, per token.",
        "Models under runs/outliers are copies with the outliers of large models ([outliers.py](../outliers.py)). `s` is the time to",
        "quantize, on one thread and beside whatever else ran: an order of magnitude.",
        "",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads.",
        "",
    ]
    heads = ["method", *known, *novel, "known, mean", "novel, mean", "bits per byte", "wiki perplexity", "same experts", "size, MB", "s"]
    for model in protocol["models"]:
        full = groups_of(results, model, 16)["full precision"]
        lines += [
            f"## {model}",
            "",
            f"Full precision: {_bits_per_byte(full, [*known, *novel]):.4f} bits per byte, mean over all domains.",
            "",
        ]
        for bits in protocol["bits"]:
            lines += [f"### {bits}", "", markdown_row(heads), markdown_row(["---"] + ["---:"] * (len(heads) - 1))]
            lines += [markdown_row(_cells(row, same, known, novel)) for row, same in groups_of(results, model, bits).items()]
            lines.append("")
    return "\n".join([*lines, *findings(results, protocol)]) + "\n"


def _bits_per_byte(same: list[Result], names: list[str]) -> float:
    return mean_over(same, names, "bits_per_byte")[0]


def _cells(row: str, same: list[Result], known: list[str], novel: list[str]) -> list[str]:
    every = [*known, *novel]
    return [
        row,
        *kl_cells(same, known, novel, 1),
        f"{_bits_per_byte(same, every):.4f}",
        f"{mean_over(same, ['wiki'], 'perplexity')[0]:.3f}",
        f"{mean_over(same, every, 'routing_exact')[0]:.1%}",
        f"{same[0]['size_bytes'] / 1e6:.1f}",
        f"{statistics.fmean(r['quantize_seconds'] for r in same):.0f}",
    ]


def findings(results: list[Result], protocol: dict[str, Any]) -> list[str]:
    """What the table is asked to show, computed from it."""
    every, expected = [*protocol["texts"]["known"], *protocol["texts"]["novel"]], protocol["expected"]
    lines = ["## What it shows", ""]
    for model in protocol["models"]:
        full = _bits_per_byte(groups_of(results, model, 16)["full precision"], every)
        for bits in protocol["bits"]:
            rows = groups_of(results, model, bits)
            gap = {row: _bits_per_byte(same, every) - full for row, same in rows.items()}
            if not {"EAQuant", "RTN", *expected["ahead_of"], "Hadamard"} <= set(gap):
                continue
            kl = {row: 1000 * mean_over(same, every, "kl")[0] for row, same in rows.items()}
            named = ", ".join(f"{row} {kl[row]:.1f}" for row in ("RTN", "SmoothQuant", "DuQuant", "Hadamard", "EAQuant"))
            lines.append(f"- {model}, {bits}: KL × 1000 over all domains: {named}. Lowest: {min(kl, key=lambda row: kl[row])}.")
            if gap["RTN"] < LEAST_GAP:  # of models as trained: some rows are ahead of full precision by chance
                continue
            best = min(gap, key=lambda row: gap[row])
            recovered = 1 - gap["EAQuant"] / gap["RTN"]
            others = ", ".join(f"{row} {1 - gap[row] / gap['RTN']:.1%}" for row in ("SmoothQuant", "DuQuant", "Hadamard"))
            line = f"  - of RTN's gap to full precision ({gap['RTN']:.4f} bits per byte) EAQuant recovers {recovered:.1%}"
            lines.append(f"{line}; {others}. Smallest gap: {best}.")
            if bits == "W4A4" and model.startswith("runs/"):
                reached = "reached" if recovered >= expected["recovered"] else "missed"
                beside = ", ".join(f"{_beside(kl['EAQuant'], kl[row])} {row}" for row in expected["ahead_of"])
                wanted = f"{expected['recovered']:.0%}, {reached}; and ahead of {' and '.join(expected['ahead_of'])}"
                lines.append(f"  - expected: {wanted}: by KL {beside}.")
    return lines


def _beside(mine: float, other: float) -> str:
    """How two divergences compare; what differs by less than `LEVEL` is not told apart."""
    if abs(mine / other - 1) < LEVEL:
        return "level with"
    return "ahead of" if mine < other else "behind"


def main() -> None:
    run_protocol(str(__doc__), "protocol-eaquant.yaml", "eaquant.md", table, with_outliers)


if __name__ == "__main__":
    main()
