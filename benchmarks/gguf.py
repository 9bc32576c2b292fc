"""GGUF files of the same types and bytes: rounded by ggml, rounded by ggml with an importance matrix, solved by moebit: make bench-gguf.

    python -m benchmarks.gguf [--models DIR ...] [--types q4_k ...] [--pre gpt-2]

Protocol, fixed before the first run:

- Models: reference/olmoe, whose attention, gate and up have rows of 256 weights and whose down projections have 128, so that types with
  blocks of 256 take llama.cpp's fallback there; further checkpoints by --models.
- For each of ggml's types that moebit solves, and for the mixtures that have a preset, three files have the same type for every tensor
  (the one of moebit's plan), so the same bytes: `ggml` (`ggml_quantize_chunk` without importance), `imatrix` (the same function with the
  means of the file that `moebit imatrix` writes; embeddings and head have none, as with llama-quantize), `moebit` (the preset's solver).
- Calibration: SAMPLES windows of LENGTH tokens, a quarter from each known domain's calibration text, for the importance matrix and for
  the solver alike.
- Judged: KL divergence per token in nats, of llama.cpp's logits with the file from transformers' in float32 with the checkpoint, over
  windows of WINDOW tokens whose first token does not count: TOKENS tokens of the evaluation text of every domain; `known` and `novel` are
  means over four domains each. llama.cpp rounds the inputs of products to 8 bits whatever the file: the row q8_0 shows what that costs.
- Speed is not measured: files of the same types do not differ in it.
- Expected: at most 0.5 of the imatrix row at q4_k, q3_k, q4_0 and iq4_xs, and 0.6 at q2_k, on known texts.

Rows that are there are not measured again (runs/gguf); results go to benchmarks/results/gguf-quality.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import moebit
from benchmarks.machine import facts
from moebit.evaluate.llama import open_llama
from moebit.formats.gguf.converter import GgufData, find_converter
from moebit.formats.gguf.imatrix import Importance, read_imatrix
from moebit.formats.gguf.target import GgufPlan
from moebit.formats.gguf.write import write_gguf
from moebit.recipe.weights import GGML_TYPES
from moebit.storage.files import read_index
from moebit.tensor.grids.ggml import GRIDS
from tests.support import ggml

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gguf-quality.md"
DONE = ROOT / "runs" / "gguf"
TEXTS = ROOT / "reference" / "text"
KNOWN, NOVEL = ("wiki", "novels", "python", "speeches"), ("shakespeare", "c", "german", "french")
SAMPLES, LENGTH = 128, 256
WINDOW, TOKENS = 256, 1024
MIXTURES = ("q2_k", "q3_k_m", "q4_k_m", "iq4_xs")
SIZES = {"calibration.samples": SAMPLES, "calibration.seq_len": LENGTH, "calibration.kind": "text"}
CALIBRATION = {name: TEXTS / f"{name}.calib.txt" for name in KNOWN}
EXPECTED = {"q4_k": 0.5, "q3_k": 0.5, "q4_0": 0.5, "iq4_xs": 0.5, "q2_k": 0.6}
WAYS = ("ggml", "imatrix", "moebit")


@dataclass(frozen=True)
class Row:
    """One file: its size, and its divergence x 1000 on known and on novel texts."""

    bytes: int
    known: float
    novel: float


@dataclass(frozen=True)
class Judge:
    """What files are compared with.

    Attributes:
        ids: domain -> int64 [N, WINDOW]. wanted: domain -> [N, WINDOW, V] log-probabilities of the checkpoint in float32.
    """

    ids: dict[str, Tensor]
    wanted: dict[str, Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, directory: Path) -> Judge:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False).eval()
        ids, wanted = {}, {}
        for name in (*KNOWN, *NOVEL):
            text = (TEXTS / f"{name}.eval.txt").read_text(encoding="utf-8")[: 8 * TOKENS]
            ids[name] = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS]).view(-1, WINDOW)
            wanted[name] = torch.cat([model(input_ids=row[None], use_cache=False).logits.log_softmax(-1) for row in ids[name]])
        return cls(ids, wanted)

    def row(self, file: Path) -> Row:
        divergence = {}
        with open_llama(file, WINDOW, 1) as llama:
            for name, windows in self.ids.items():
                total = 0.0
                for window, wanted in zip(windows, self.wanted[name], strict=True):
                    found = llama.logits(window)[:, : wanted.shape[1]].log_softmax(-1)
                    total += float((wanted.exp() * (wanted - found)).sum(-1)[:-1].double().mean())
                divergence[name] = 1000 * total / len(windows)
        known, novel = (sum(divergence[name] for name in names) / len(names) for names in (KNOWN, NOVEL))
        return Row(file.stat().st_size, known, novel)


@dataclass(frozen=True)
class Bench:
    """A model and its importance matrix."""

    directory: Path
    pre: str | None
    importance: dict[str, Importance]
    judge: Judge
    scratch: Path

    def plan(self, recipe: str, changes: dict[str, Any]) -> GgufPlan:
        plan: Any = moebit.quantize(
            self.directory, self.scratch / "plan", recipe=recipe, text=CALIBRATION, overrides=changes, gguf_pre=self.pre, dry_run=True
        )
        found: GgufPlan = plan.gguf
        return found

    def solved(self, recipe: str, changes: dict[str, Any]) -> Path:
        out = self.scratch / "x"
        moebit.quantize(self.directory, out, recipe=recipe, text=CALIBRATION, overrides=changes, gguf_pre=self.pre, overwrite=True)
        return out / "x.gguf"

    def rounded(self, plan: GgufPlan, weighed: bool) -> Path:
        """The plan's types, rounded by ggml itself."""
        target, file = plan.target, self.scratch / "rounded.gguf"
        exact = target.converter.prepare(self.directory, pre=target.pre)
        tensors = {name: self._packed(exact.tensors[name], kind, name, weighed) for name, kind in plan.types.items()}
        prepared = target.prepare({name: entry.read for name, entry in read_index(self.directory).items()})
        write_gguf(target.converter.gguf, file, prepared, tensors, plan.file_type)
        return file

    def _packed(self, data: GgufData, kind: str, name: str, weighed: bool) -> GgufData:
        def load() -> np.ndarray:
            w = torch.from_numpy(np.asarray(data.load(), dtype=np.float32)).view(-1, *data.shape[-2:])
            found = self.importance.get(name) if weighed else None
            packed = ggml.quantize(GRIDS[kind], w, None if found is None else found.mean)
            return packed.view(*data.shape[:-1], -1).numpy()

        return GgufData(kind.upper(), data.shape, load)

    def file(self, way: str, recipe: str, changes: dict[str, Any]) -> Path:
        """The file of one of `WAYS`."""
        return self.solved(recipe, changes) if way == "moebit" else self.rounded(self.plan(recipe, changes), way == "imatrix")


def measured(bench: Callable[[], Bench], label: str, recipe: str, changes: dict[str, Any], done: Path) -> dict[str, Row]:
    """The three rows of a type, from `done` where they are there."""
    rows = {}
    for way in WAYS:
        kept = done / f"{label}-{way}.json"
        if not kept.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            made = bench()
            kept.write_text(json.dumps(asdict(made.judge.row(made.file(way, recipe, changes)))))
        rows[way] = Row(**json.loads(kept.read_text()))
        print(label, way, rows[way], flush=True)
    if len({row.bytes for row in rows.values()}) > 1:
        print(f"{label}: sizes differ: {[row.bytes for row in rows.values()]}", flush=True)
    return rows


def table(title: str, found: dict[str, dict[str, Row]]) -> list[str]:
    head = ["types", "MB", *WAYS, "moebit / imatrix", "expected", *(f"{way}, novel" for way in WAYS), "ratio, novel"]
    lines = [f"## {title}", "", "| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for label, rows in found.items():
        known, novel = [rows[way].known for way in WAYS], [rows[way].novel for way in WAYS]
        cells = [label, f"{rows['moebit'].bytes / 1e6:.2f}", *(f"{kl:.2f}" for kl in known), f"{known[2] / known[1]:.2f}"]
        cells += [f"{EXPECTED[label]}" if label in EXPECTED else "", *(f"{kl:.2f}" for kl in novel), f"{novel[2] / novel[1]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def bench_model(directory: Path, pre: str | None, types: list[str]) -> dict[str, dict[str, Row]]:
    with tempfile.TemporaryDirectory() as scratch:

        @functools.cache
        def bench() -> Bench:
            file = Path(scratch) / "imatrix.gguf"
            moebit.imatrix(directory, file, text=CALIBRATION, samples=SAMPLES // len(KNOWN), length=LENGTH)
            importance = read_imatrix(find_converter().gguf, file).tensors
            return Bench(directory, pre, importance, Judge.of(directory), Path(scratch))

        found = {}
        for kind in types:
            mixture = kind.startswith("gguf-")
            changes = {**SIZES, **({} if mixture else {"weights.type": kind, "weights.mixture": "none"})}
            found[kind] = measured(bench, kind, kind if mixture else "gguf-q4_k_m", changes, DONE / directory.name)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", type=Path, default=[ROOT / "reference" / "olmoe"])
    parser.add_argument("--types", nargs="+", default=[*GGML_TYPES, *(f"gguf-{name}" for name in MIXTURES)])
    parser.add_argument("--pre", default="gpt-2", help="the models' pre-tokenizer in llama.cpp")
    asked = parser.parse_args()
    lines = [
        "# GGUF: rounded and solved codes in the same blocks", "",
        "KL divergence × 1000 of llama.cpp's logits from those of the checkpoint in transformers; first on texts of the calibrated",
        "domains, then on texts of others. Files of a row have the same types for all tensors. Protocol: benchmarks/gguf.py.", "",
    ]  # fmt: skip
    for directory in asked.models:
        lines += table(directory.name, bench_model(directory.resolve(), asked.pre, asked.types))
    RESULTS.write_text("\n".join([*lines, facts(torch.get_num_threads(), sys.argv[1:]), ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
