"""Which format of which architecture runs where, as logits: benchmarks/results/formats.md.

    make formats        (or: .venv/bin/python -m benchmarks.formats [ARCHITECTURE ...])

Every architecture of tests/support/models.py, tiny and random, is quantized into every format. What transformers is said to run is run,
packed formats of others in a process without moebit, and compared with the original architecture holding the weights that the
compressed-tensors library (or the naive reader of tests/support/outputs.py) finds in the files. What is decoded by others' code, or
by a reader written from the description of the format (GPTQ, AWQ, MLX), is compared with the original, matrix by matrix. The columns
of vLLM and SGLang are what moebit's rules say; what of vLLM's was executed is in vllm-cpu.md. The command fails when something that
is said to run does not, or computes something else, or when a decoded matrix is further from the original than the grid allows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import moebit
from tests.formats.library import by_the_library, plain_transformers, reference_logits
from tests.formats.older import as_checkpoint
from tests.formats.test_mlx import everything
from tests.formats.test_mlx import original as original_weights
from tests.support.models import ARCHITECTURES, Architecture, quiet, random_model, save, windows
from tests.support.outputs import read_config, stored_tensors, with_weights

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "formats.md"
DONE = ROOT / "runs" / "formats"  # rows by architecture: naming some runs those alone, the others' are taken from here
EXACT, ROUNDING = 1e-5, 0.05
# Sizes that kernels for real models take, in place of the tests' smallest ones.
SIZES = {"hidden_size": 128}
HEADS = {"phimoe": {"num_attention_heads": 8}}  # its rotary factors are for heads of 16

FORMATS: dict[str, dict[str, Any]] = {
    "native, 4 bits": {"weights": {"bits": 4, "group_size": -1}, "format": "native"},
    "dense, 4 bits": {"weights": {"bits": 4, "group_size": -1}, "format": "dense"},
    "compressed-tensors, 4 bits": {"weights": {"bits": 4, "group_size": -1}, "format": "compressed-tensors"},
    "compressed-tensors, experts 3 bits": {
        "weights": {"bits": 3, "group_size": 32, "scope": "experts"},
        "format": "compressed-tensors",
    },
    "compressed-tensors, W8A8 int8": {
        "weights": {"bits": 8, "group_size": -1},
        "activations": {"bits": 8, "symmetric": True},
        "format": "compressed-tensors",
    },
    "compressed-tensors, FP8": {
        "weights": {"type": "fp8", "bits": 8, "group_size": -1},
        "activations": {"bits": 8, "symmetric": True},
        "format": "compressed-tensors",
    },
    "compressed-tensors, 4 bits, zero points": {
        "weights": {"bits": 4, "group_size": 32, "symmetric": False},
        "format": "compressed-tensors",
    },
    "compressed-tensors, NVFP4": {"weights": {"type": "nvfp4"}, "format": "compressed-tensors"},
    "compressed-tensors, MXFP4": {"weights": {"type": "mxfp4"}, "format": "compressed-tensors"},
    "compressed-tensors, FP8 blocks": {
        "weights": {"type": "fp8-block"},
        "activations": {"bits": 8, "symmetric": True},
        "format": "compressed-tensors",
    },
    "gptq, 4 bits": {"weights": {"bits": 4, "group_size": 32}, "format": "gptq"},
    "awq, 4 bits": {"weights": {"bits": 4, "group_size": 32, "symmetric": False}, "format": "awq"},
    "mlx, 4 bits": {"weights": {"bits": 4, "group_size": 32}, "format": "mlx"},
}
TYPES = {"compressed-tensors, MXFP4": torch.bfloat16}  # the type in which transformers dequantizes it, where that is not the model's
LARGEST_ERROR = {2: 0.8, 3: 0.3, 4: 0.25, 8: 0.05}  # of a decoded matrix, by bits, relative to its norm; exchanged experts are at 1.4


@dataclass
class Row:
    architecture: str
    format: str
    transformers: str
    vllm: str
    sglang: str
    weights: str


def quantize(architecture: Architecture, checkpoint: Path, output: Path, recipe: dict[str, Any]) -> moebit.Result | str:
    """The output, or why there is none."""
    try:
        result = moebit.quantize(checkpoint, output, recipe={"solver": {"method": "rtn", "clip_search": False}, **recipe})
    except moebit.BadInputError as error:
        return str(error)
    assert isinstance(result, moebit.Result)
    return result


@torch.no_grad()
def with_moebit(output: Path) -> Tensor:
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    return model(input_ids=windows(), use_cache=False).logits.float()  # type: ignore[no-any-return]


@torch.no_grad()
def naive(architecture: Architecture, checkpoint: Path, output: Path) -> Tensor:
    return with_weights(architecture, checkpoint, output)(input_ids=windows(), use_cache=False).logits.float()  # type: ignore[no-any-return]


def judged(found: Tensor | None, wanted: Tensor, error: str) -> str:
    if found is None:
        return f"**fails**: {error.splitlines()[0][:120]}"
    away = float((found - wanted).norm() / wanted.norm())
    return "exact" if away < EXACT else f"within rounding ({away:.3f})" if away < ROUNDING else f"**wrong** ({away:.3f})"


def rows(architecture: Architecture, scratch: Path) -> list[Row]:
    checkpoint = save(random_model(architecture, **SIZES, **HEADS.get(architecture.name, {})).float(), scratch / "checkpoint")
    made = {name: quantize(architecture, checkpoint, scratch / f"out{i}", recipe) for i, (name, recipe) in enumerate(FORMATS.items())}
    done = {name: result for name, result in made.items() if not isinstance(result, str)}
    runs = {name: r for name, r in done.items() if not name.startswith(("native", "gptq", "awq")) and r.plan.engines["transformers"].runs}
    alone = {name: (r.path, "bfloat16" if name in TYPES else "float32") for name, r in runs.items()}
    logits, errors = plain_transformers(scratch, alone)
    return [_row(architecture, checkpoint, name, output, logits, errors, scratch) for name, output in made.items()]


def _row(
    architecture: Architecture,
    checkpoint: Path,
    name: str,
    output: moebit.Result | str,
    logits: dict[str, Tensor],
    errors: dict[str, str],
    scratch: Path,
) -> Row:
    if isinstance(output, str):
        return Row(architecture.name, name, *[f"refused: {short(output)}"] * 3, "")
    engines = output.plan.engines
    if not engines["transformers"].runs:
        measured = f"refused: {engines['transformers'].reasons[0]}"
    elif name.startswith("native"):
        measured = judged(with_moebit(output.path), naive(architecture, checkpoint, output.path), "")
    else:
        again, dtype = scratch / "reference", TYPES.get(name, torch.float32)
        again.mkdir(exist_ok=True)
        wanted = reference_logits(checkpoint, output.path, again, dtype)
        measured = judged(logits.get(name), wanted, errors.get(name, ""))
    others = ["by the rules" if engines[one].runs else f"refused: {engines[one].reasons[0]}" for one in ("vllm", "sglang")]
    return Row(architecture.name, name, measured, *others, decoded(checkpoint, output.path, FORMATS[name]))


def decoded(checkpoint: Path, output: Path, recipe: dict[str, Any]) -> str:
    """How far the matrices that others' code (or a reader of the description) finds in the files are from the original's."""
    form, original = recipe["format"], stored_tensors(checkpoint)
    if form in ("gptq", "awq"):
        read = {key: torch.from_numpy(value) for key, value in as_checkpoint(stored_tensors(output), read_config(output)).items()}
    elif form == "mlx":
        read = everything(output)
    elif form == "compressed-tensors":
        stored = stored_tensors(output)
        read = {key: value for key, value in by_the_library(output).items() if f"{key}_scale" in stored}
    else:
        return ""
    worst = 0.0
    for key, value in read.items():
        wanted = original_weights(checkpoint, key) if form == "mlx" else original[key].double()
        worst = max(worst, float((value.double() - wanted).norm() / wanted.norm()))
    most = LARGEST_ERROR[recipe["weights"].get("bits", 8 if "fp8" in recipe["weights"].get("type", "") else 4)]
    return f"{len(read)} within rounding ({worst:.3f})" if worst < most else f"**wrong** ({worst:.3f})"


def short(message: str) -> str:
    return message.split(": ", 1)[-1].split(";")[0] if message.startswith("format ") else message


def table(found: list[Row]) -> str:
    lines = [
        "# What runs where",
        "",
        "Made by `make formats`, with tiny random models of each architecture: logits in transformers against the original architecture",
        "with the weights that are in the files (relative distance; *exact* is below 1e-5 in float32), for FP8 with the inputs of linears",
        "rounded as transformers rounds them. *refused*: `moebit quantize --engine transformers` (or `vllm`) says so before the",
        "work. For vLLM, *by the rules* is what `formats/engines.py` has from its sources; what was executed is in",
        "[vllm-cpu.md](vllm-cpu.md). The native format needs `import moebit`. *Decoded weights*: what the compressed-tensors library, or",
        "a reader written from the description of GPTQ's, AWQ's and MLX's layouts, finds in the files, against the original: how many",
        "matrices, and the largest relative distance.",
        "",
        "| architecture | format | transformers | vLLM | SGLang | decoded weights |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [f"| {' | '.join(asdict(r).values())} |" for r in found]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="*", metavar="ARCHITECTURE")
    only = parser.parse_args().only
    found: list[Row] = []
    DONE.mkdir(parents=True, exist_ok=True)
    for name, architecture in ARCHITECTURES.items():
        done = DONE / f"{name}.json"
        if not only or name in only:
            with tempfile.TemporaryDirectory() as scratch:
                done.write_text(json.dumps([asdict(row) for row in rows(architecture, Path(scratch))], indent=1))
            print(done.read_text(), flush=True)
        found += [Row(**row) for row in json.loads(done.read_text())] if done.exists() else []
    RESULT.write_text(table(found))
    if any("**" in row.transformers + row.weights for row in found):
        raise SystemExit("something that should run does not: see the rows with **")


if __name__ == "__main__":
    main()
