"""How many tokens keep their experts: routers of few bits, aligned or not, and routers that are realigned behind weights of few bits.

    make quality-routers        (or: .venv/bin/python benchmarks/routers.py)

The cells of benchmarks/protocol-routers.yaml, run and kept as those of quality.py, as benchmarks/results/routers.md. Every row is compared
with the row that leaves the routers alone, window by window. `--model` and `--only` run a part of the cells, without a table.

Shape suffixes: L layers, N windows.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from moequant import groups_of
from quality import TEXTS, markdown_row, run_protocol
from scipy.stats import t as student
from torch import Tensor

from moebit.calibration.text import consecutive_windows, load_tokenizer, tokenize
from moebit.formats.opening import open_checkpoint
from moebit.model.structure import find_structure
from moebit.streaming.store import ActivationStore
from moebit.streaming.stream import Stream

Result = dict[str, Any]


def stream_of(model: Path, windows_NL: Tensor) -> Stream:
    """Windows in front of a model's first layer."""
    checkpoint = open_checkpoint(model)
    return Stream(checkpoint, find_structure(checkpoint.model), windows_NL, ActivationStore(Path(tempfile.gettempdir()), 2**28, 2**31))


def routed(stream: Stream) -> list[Tensor]:
    """Advance through all layers; the chosen experts [N L, k] of those that have any."""
    layers = stream.structure.layers
    steps = [stream.step(index, sites.moe.layout.experts if sites.moe else 1) for index, sites in enumerate(layers)]
    return [ids for ids in steps if ids is not None]


@cache
def full_precision(model: Path, names: tuple[str, ...], split: str, window: int, most: int) -> tuple[Stream, list[Tensor]]:
    """A model's windows of all texts behind its last layer, and the experts that it chose on the way."""
    tokenizer, checkpoint = load_tokenizer(model), open_checkpoint(model)
    vocabulary = int(checkpoint.config.get_text_config().vocab_size)
    texts = [tokenize(name, TEXTS / f"{name}.{split}.txt", tokenizer, vocabulary) for name in names]
    stream = stream_of(model, torch.cat([consecutive_windows(text, window, most) for text in texts]))
    return stream, routed(stream)


def routing(out: Path, model: Path, texts: dict[str, Any]) -> Result:
    """By layer and window, the share of tokens with the set of experts that full precision has; by window, the mean KL to it in nats."""
    names = (*texts["known"], *texts["novel"])
    reference, wanted = full_precision(model, names, texts["split"], texts["window"], texts["max_tokens"])
    stream = stream_of(out, reference.windows)
    exact = [unchanged(ids, chosen, texts["window"]).tolist() for ids, chosen in zip(routed(stream), wanted, strict=True)]
    kl = []
    for (_, mine), (_, theirs) in zip(stream.logits(), reference.logits(), strict=True):
        p, q = theirs[:, :-1].log_softmax(-1), mine[:, :-1].log_softmax(-1)  # as `moebit evaluate` scores: all tokens that have a next one
        kl += (p.exp() * (p - q)).sum(-1).double().mean(1).tolist()
    return {"exact": exact, "kl": kl}


def unchanged(ids_Tk: Tensor, wanted_Tk: Tensor, window: int) -> Tensor:
    """[N] share of a window's tokens whose set of experts is the wanted one."""
    return (ids_Tk.sort(1).values == wanted_Tk.sort(1).values).all(1).double().view(-1, window).mean(1)


@dataclass(frozen=True)
class Interval:
    """A mean over windows and how far it may be off."""

    mean: float
    low: float
    high: float

    def text(self, scale: float, digits: int) -> str:
        return f"{scale * self.mean:+.{digits}f} [{scale * self.low:+.{digits}f}, {scale * self.high:+.{digits}f}]"


def interval(difference_N: Tensor, texts: int, level: float) -> Interval:
    """Student's t interval of a mean over windows that lie text by text: the texts are as they are, windows are a sample of each."""
    by_text = difference_N.view(texts, -1)
    error = float((by_text.var(1).mean() / by_text.numel()).sqrt())
    reach, mean = error * float(student.ppf((1 + level) / 2, by_text.numel() - texts)), float(difference_N.mean())
    return Interval(mean, mean - reach, mean + reach)


@dataclass(frozen=True)
class Row:
    """What a row of the table says.

    Attributes:
        share, kl: mean over windows (and layers). change: of the share, against the row it is compared with, by layer; `overall` over all
            layers, `kl_change` of the KL; None in the row that others are compared with.
    """

    share: float
    kl: float
    change: tuple[Interval, ...] = ()
    overall: Interval | None = None
    kl_change: Interval | None = None


def rows_of(results: list[Result], protocol: dict[str, Any], model: str, bits: str) -> dict[str, Row]:
    """The rows of one model and width."""
    found, texts = groups_of(results, model, bits), len(protocol["texts"]["known"]) + len(protocol["texts"]["novel"])
    numbers = {row: [torch.tensor(same[0][key], dtype=torch.float64) for key in ("exact", "kl")] for row, same in found.items()}
    base, rows = protocol["compared_with"][bits.split()[0]], {}
    for name, (exact_LN, kl_N) in numbers.items():
        row = Row(float(exact_LN.mean()), float(kl_N.mean()))
        if name != base:
            change_LN, kl_change_N = exact_LN - numbers[base][0], kl_N - numbers[base][1]
            intervals = [interval(values, texts, protocol["interval"]) for values in (*change_LN, change_LN.mean(0), kl_change_N)]
            row = Row(row.share, row.kl, tuple(intervals[:-2]), intervals[-2], intervals[-1])
        rows[name] = row
    return rows


def table(results: list[Result], protocol: dict[str, Any], name: str) -> str:
    """The Markdown document."""
    texts = protocol["texts"]
    lines = [
        "# Routers: aligned, and realigned",
        "",
        f"Made by `make quality-routers`; the protocol is [{name}](../{name}). The first number is the share of tokens whose set of",
        "experts is that of full precision, mean over layers, on held-out text. Changes are in percentage points, against the first row",
        "of the same width; over all layers and by layer. KL is that of the full-precision distribution from the quantized one,",
        "nats × 1000, mean per token.",
        f"In brackets: {protocol['interval']:.0%} intervals of the difference, paired by windows of {texts['window']} tokens",
        f"({texts['max_tokens'] // texts['window']} of each of {len(texts['known']) + len(texts['novel'])} texts; Student's t, variances",
        "within texts). They cover which windows of these texts were looked at: not other texts, models or calibration seeds.",
        "",
        "`router n`: routers in n bits; all that they see is in full precision. `RTN Wn`, `GPTQ Wn`: all linears but routers in n bits,",
        "inputs as they are.",
        "",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads.",
        "",
    ]
    for model in protocol["models"]:
        layers = len(groups_of(results, model, 16)["full precision"][0]["exact"])
        heads = ["width", "routers", "same experts", "change", *(f"layer {layer}" for layer in range(layers)), "KL", "change"]
        lines += [f"## {model}", "", markdown_row(heads), markdown_row(["---"] * 2 + ["---:"] * (len(heads) - 2))]
        for bits in protocol["bits"]:
            for row, found in rows_of(results, protocol, model, bits).items():
                lines.append(markdown_row([bits, row, f"{found.share:.1%}", *_changes(found, layers)]))
        lines.append("")
    return "\n".join([*lines, *findings(results, protocol)]) + "\n"


def _changes(row: Row, layers: int) -> list[str]:
    kl = f"{1000 * row.kl:.2f}"
    if row.overall is None or row.kl_change is None:
        return [""] * (1 + layers) + [kl, ""]
    return [*(value.text(100, 2) for value in (row.overall, *row.change)), kl, row.kl_change.text(1000, 2)]


def findings(results: list[Result], protocol: dict[str, Any]) -> list[str]:
    """What the table is asked to show, computed from it."""
    lines = ["## What it shows", ""]
    for model in protocol["models"]:
        for asked in protocol["expected"]:
            for bits in asked["bits"]:
                rows = rows_of(results, protocol, model, bits)
                found = rows[asked["row"]].overall
                assert found is not None
                reached = "reached" if found.low > 0 else "missed"
                best = max(rows, key=lambda row: rows[row].share)
                lines.append(
                    f"- {model}, {bits}, {asked['row']}: {found.text(100, 2)} points; expected above zero: {reached}. "
                    f"Most unchanged sets: {best} ({rows[best].share:.1%})."
                )
    better, worse, both = _counts(results, protocol)
    lines += ["", f"Of {both} comparisons (without layers), the interval of the share lies above zero in {better}, below zero in {worse}."]
    return lines


def _counts(results: list[Result], protocol: dict[str, Any]) -> tuple[int, int, int]:
    found = [
        row.overall
        for model in protocol["models"]
        for bits in protocol["bits"]
        for row in rows_of(results, protocol, model, bits).values()
        if row.overall is not None
    ]
    return sum(value.low > 0 for value in found), sum(value.high < 0 for value in found), len(found)


def main() -> None:
    run_protocol(str(__doc__), "protocol-routers.yaml", "routers.md", table, measure=routing)


if __name__ == "__main__":
    main()
