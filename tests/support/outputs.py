"""Reading what moebit wrote without moebit: the native format once more, value by value, from its description.

A linear NAME is stored as NAME.codes [out, row bytes] and NAME.scale [out, groups], an experts module as NAME.PROJECTION.codes (flat,
expert after expert), .scale [E, out, groups] and .bits [E]; asymmetric grids add .zero_point. A row of codes is a bitstream, least
significant bit first, padded to a multiple of 8 values; the zero points of one matrix are one such row of out x groups values.
A weight is scale * (code - zero point); without stored zero points it is 2^(b-1).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import moebit
from moebit.plan.bitplan import BitPlan
from moebit.plan.plan import Plan
from tests.support.models import VOCABULARY, Architecture, Checkpoints, Reference, quiet
from tests.support.reference import unpack_row

REPORTS = {"report.json", "report.html"}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
WIDTHS = (2, 3, 4, 5, 6, 8)
# A width for each of the 8 experts, all of them in every projection, gate and up not alike.
MIXED = {
    "gate_proj": (2, 3, 4, 5, 6, 8, 2, 4),
    "up_proj": (8, 3, 2, 5, 4, 6, 3, 4),
    "down_proj": (4, 8, 6, 2, 3, 5, 8, 2),
}


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    """Everything in the directory's safetensors files, as the safetensors library reads it."""
    result: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                assert name not in result, name
                result[name] = tensors.get_tensor(name)
    return result


def read_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())  # type: ignore[no-any-return]


def quantization(directory: Path) -> dict[str, dict[str, Any]]:
    """The quantized modules of config.json."""
    config = read_config(directory)["quantization_config"]
    assert config["quant_method"] == "moebit"
    return config["modules"]  # type: ignore[no-any-return]


def row_bytes(values: int, bits: int) -> int:
    return math.ceil(values / 8) * bits


def read_matrix(codes: bytes, zeros: bytes | None, scale_OG: np.ndarray, bits: int, shape: tuple[int, int]) -> np.ndarray:
    """One matrix [out, in] in float64."""
    (out, inputs), groups = shape, scale_OG.shape[1]
    size = row_bytes(inputs, bits)
    assert len(codes) == out * size
    code_OI = np.array([unpack_row(codes[row * size : (row + 1) * size], bits, inputs) for row in range(out)], dtype=np.float64)
    if zeros is None:
        zero_OG = np.full((out, groups), 2.0 ** (bits - 1))
    else:
        assert len(zeros) == row_bytes(out * groups, bits)
        zero_OG = np.array(unpack_row(zeros, bits, out * groups), dtype=np.float64).reshape(out, groups)
    width = inputs // groups
    return np.repeat(scale_OG, width, axis=1) * (code_OI - np.repeat(zero_OG, width, axis=1))


def read_stack(tensors: dict[str, Tensor], name: str, bits: list[int], shape: tuple[int, int], symmetric: bool) -> np.ndarray:
    """Matrices [E, out, in] in float64, one after the other."""
    codes = bytes(tensors[f"{name}.codes"].flatten().tolist())
    zeros = None if symmetric else bytes(tensors[f"{name}.zero_point"].tolist())
    scale = tensors[f"{name}.scale"].double().numpy().reshape(len(bits), shape[0], -1)
    matrices, code_at, zero_at = [], 0, 0
    for expert, width in enumerate(bits):
        code_size, zero_size = shape[0] * row_bytes(shape[1], width), row_bytes(shape[0] * scale.shape[2], width)
        own = None if zeros is None else zeros[zero_at : zero_at + zero_size]
        matrices.append(read_matrix(codes[code_at : code_at + code_size], own, scale[expert], width, shape))
        code_at, zero_at = code_at + code_size, zero_at + zero_size
    assert code_at == len(codes)
    assert zeros is None or zero_at == len(zeros)
    return np.stack(matrices)


def dequantized(directory: Path) -> dict[str, np.ndarray]:
    """Every quantized matrix of a native output in float64: linear name -> [out, in], experts.projection -> [E, out, in]."""
    tensors, result = stored_tensors(directory), {}
    for name, entry in quantization(directory).items():
        if "projections" not in entry:
            result[name] = read_stack(tensors, name, [entry["bits"]], tuple(entry["shape"]), entry["symmetric"])[0]
            continue
        for projection, part in entry["projections"].items():
            bits = part["bits"] if isinstance(part["bits"], list) else [part["bits"]] * entry["experts"]
            assert tensors[f"{name}.{projection}.bits"].tolist() == bits
            result[f"{name}.{projection}"] = read_stack(tensors, f"{name}.{projection}", bits, tuple(part["shape"]), entry["symmetric"])
    return result


def as_parameters(architecture: Architecture, matrices: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The same under the names and in the storage of the transformers model, float32 (rounded once)."""
    result: dict[str, Tensor] = {}
    for name, matrix in matrices.items():
        value = torch.from_numpy(matrix).float()
        owner, _, leaf = name.rpartition(".")
        if value.ndim == 2:
            result[f"{name}.weight"] = value
        elif leaf == "gate_proj":
            up = torch.from_numpy(matrices[f"{owner}.up_proj"]).float()
            both = torch.stack([value, up], 2).flatten(1, 2) if architecture.interleaved else torch.cat([value, up], 1)
            result[f"{owner}.gate_up_proj"] = both.transpose(1, 2) if architecture.transposed else both
        elif leaf == "down_proj" or not architecture.gated:
            result[name] = value.transpose(1, 2) if architecture.transposed else value
    return result


def with_weights(architecture: Architecture, original: Path, directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The original checkpoint in transformers, its quantized weights replaced by what `directory` holds; everything else is its own."""
    with quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(original, dtype=dtype, experts_implementation="eager").eval()
    replace_weights(model, as_parameters(architecture, dequantized(directory)))
    return model


def replace_weights(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            assert parameters[name].shape == value.shape, name
            parameters[name].copy_(value)


def file_bytes(directory: Path, but: set[str] = REPORTS) -> dict[str, bytes]:
    """Every file of a directory, apart from the reports."""
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file() and f.name not in but}


def token_file(path: Path, tokens: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Path:
    """A .jsonl of random token ids: a text for a model without a tokenizer."""
    ids = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    path.write_text(json.dumps({"input_ids": ids}) + "\n")
    return path


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, 1 to 256, and 0 for the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<end>": 0, **{letter: number for number, letter in enumerate(alphabet, 1)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", model_max_length=4096)


def small_recipe(
    method: str = "gptq",
    *,
    weights: dict[str, Any] | None = None,
    solver: dict[str, Any] | None = None,
    samples: int = 6,
    seq_len: int = 24,
) -> dict[str, Any]:
    """A recipe that fits every tiny checkpoint: one scale per output channel, `samples` windows of `seq_len` tokens."""
    return {
        "weights": {"bits": 4, "group_size": -1, **(weights or {})},
        "solver": {"method": method, "clip_search": method == "gptq", **(solver or {})},
        "calibration": {"samples": samples, "seq_len": seq_len},
    }


def mixed_plan(architecture: Architecture, checkpoint: Path, reference: Reference) -> BitPlan:
    """Every expert, projection and linear with a width of its own (a plan for all widths at once)."""
    plan = moebit.quantize(checkpoint, "unused", recipe=small_recipe("rtn"), dry_run=True)
    assert isinstance(plan, Plan)
    experts = [f"{reference.layers_name}.{index}.{architecture.block}.experts" for index, moe in enumerate(architecture.moe) if moe]
    projections = PROJECTIONS if architecture.gated else PROJECTIONS[1:]
    return BitPlan(
        {name: {projection: list(MIXED[projection]) for projection in projections} for name in experts},
        {name: WIDTHS[number % len(WIDTHS)] for number, name in enumerate(sorted(plan.linears))},
    )


@dataclass
class Outputs:
    """Quantized tiny checkpoints, each made once in a session when first asked for; nobody writes into them."""

    directory: Path
    checkpoints: Checkpoints
    _made: dict[str, Path] = field(default_factory=dict)

    def rtn(
        self, architecture: Architecture, *, bits: int = 4, symmetric: bool = True, mixed: bool = False, format: str = "native"
    ) -> Path:
        """Rounded to nearest, one scale per output channel; `mixed`: every expert and linear has its own width."""
        key = f"{architecture}-{'mixed' if mixed else bits}-{'symmetric' if symmetric else 'asymmetric'}-{format}"
        if key not in self._made:
            recipe = small_recipe("rtn", weights={"bits": bits, "symmetric": symmetric})
            path, reference = self.checkpoints.path(architecture), self.checkpoints.reference(architecture)
            plan = mixed_plan(architecture, path, reference) if mixed else None
            moebit.quantize(path, self.directory / key, recipe=recipe, format=format, plan=plan)
            self._made[key] = self.directory / key
        return self._made[key]
