"""A native output whose inputs are rotated and rounded, run naively: the original model in transformers, step by step from docs/format.md.

Weights are those that `tests/support/outputs.py` reads from the files, transforms are dense matrices, rounding is numpy, experts are a loop
over
tokens. Nothing of moebit runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.support.models import Architecture, quiet
from tests.support.outputs import as_parameters, dequantized, read_config, replace_weights, stored_tensors

ORACLE = "oracle"


def rounded(x: Tensor, said: dict[str, Any] | None) -> Tensor:
    """Rows of the last axis on their grids, in float32 as the format has it: where a model clips its values, there are ties."""
    if said is None:
        return x
    if said.get("float8"):
        return torch.from_numpy(rounded_to_float8(x.detach().float().numpy())).to(x.dtype)
    rows, bits, clip = x.detach().float().numpy(), said["bits"], np.float32(said["clip"])
    if said["symmetric"]:
        scale = clip * np.abs(rows).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
        scale = np.where(scale == 0, 1.0, scale)
        codes = np.clip(np.rint(rows / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    else:
        low, high = clip * np.minimum(rows.min(-1, keepdims=True), 0), clip * np.maximum(rows.max(-1, keepdims=True), 0)
        scale = (high - low) / (2**bits - 1)
        scale = np.where(scale == 0, 1.0, scale)
        zero = np.rint(-low / scale)
        codes = np.clip(np.rint(rows / scale) + zero, 0, 2**bits - 1) - zero
    return torch.from_numpy(codes * scale).to(x.dtype)


# The positive numbers of float8 e4m3: three bits of mantissa under four of exponent, the first eight without the leading one.
E4M3 = np.array([(8 + m) * 2.0 ** (e - 10) if e else m * 2.0**-9 for e in range(16) for m in range(8)][:-1])


def rounded_to_float8(rows: np.ndarray) -> np.ndarray:
    """Each row's largest magnitude on 448, every number on the nearest of `E4M3`, of two as near on the one with an even mantissa."""
    scale = np.maximum(np.abs(rows).max(-1, keepdims=True) / np.float32(448), np.float32(1 / (448 * 512)))
    position = np.abs(rows / scale)[..., None]
    away = np.abs(position - E4M3) + np.where(np.arange(len(E4M3)) % 2, 1e-9 * position, 0)
    return (np.sign(rows) * E4M3[away.argmin(-1)]).astype(np.float32) * scale


def walsh(size: int) -> np.ndarray:
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]) / size**0.5


def transform_matrices(tensors: dict[str, Tensor], name: str, said: dict[str, Any]) -> list[Tensor]:
    """[N, N] of every transform called `name`, from what is stored."""
    n, result = said["channels"], []
    for m in range(said["count"]):
        if said["kind"] == "hadamard":
            signs = tensors[f"{name}.signs"][m].double().numpy()
            dense = np.diag(signs) @ np.kron(np.eye(n // said["block"]), walsh(said["block"]))
        else:
            first, second = (torch.block_diag(*tensors[f"{name}.{leaf}"][m].double()).numpy() for leaf in ("first", "second"))
            dense = first[:, tensors[f"{name}.permutation"][m].numpy()] @ second
        result.append(torch.from_numpy(dense))
    return result


def _oracle_experts(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """One token and one of its experts after the other."""
    first, downs, said = module.oracle
    outputs = torch.zeros_like(x)
    for t in range(len(x)):
        inside = rounded((x[t : t + 1].double() @ first).to(x.dtype), said)
        for e, g in zip(ids[t].tolist(), weights[t], strict=True):
            if e >= len(module.down_proj):
                continue
            w_first = module.gate_up_proj[e] if module.has_gate else module.up_proj[e]
            w_down = module.down_proj[e]
            if module.is_transposed:
                w_first, w_down = w_first.T, w_down.T
            bias = getattr(module, "gate_up_proj_bias", None)
            a = inside @ w_first.T + (0 if bias is None else bias[e])
            h = module._apply_gate(a) if module.has_gate else module.act_fn(a)
            h = rounded((h.double() @ downs[min(e, len(downs) - 1)]).to(x.dtype), said)
            y = h @ w_down.T + (0 if bias is None else module.down_proj_bias[e])
            outputs[t] += (y * g)[0]
    return outputs


def _oracle_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    said = getattr(module, "oracle_attention", None)
    if said is not None:
        size = query.shape[-1] & -query.shape[-1]
        turn = torch.from_numpy(np.kron(np.eye(query.shape[-1] // min(size, 128)), walsh(min(size, 128))))
        query, key = (rounded(x.double() @ turn, said).to(value.dtype) for x in (query, key))
        value = rounded(value, said)
    return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, *args, **kwargs)


ALL_EXPERTS_FUNCTIONS.register(ORACLE, _oracle_experts)
ALL_ATTENTION_FUNCTIONS.register(ORACLE, _oracle_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ORACLE, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def oracle(architecture: Architecture, original: Path, output: Path) -> PreTrainedModel:
    """The model that a native output stands for."""
    with quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            original, dtype=torch.float32, experts_implementation=ORACLE, attn_implementation=ORACLE
        ).eval()
    replace_weights(model, as_parameters(architecture, dequantized(output)))
    quantization, tensors = read_config(output)["quantization_config"], stored_tensors(output)
    said = quantization.get("activations", {})
    inputs, transforms = said.get("inputs"), said.get("transforms", {})
    matrices = {name: transform_matrices(tensors, name, entry) for name, entry in transforms.items()}
    reads = {linear: name for name, entry in transforms.items() for linear in entry["linears"]}
    for name, entry in quantization["modules"].items():
        module: Any = model.get_submodule(name)
        if "projections" in entry:
            first, down = (matrices.get(f"{name}.{leaf}_transform") for leaf in ("first", "down"))
            shapes = [entry["projections"][p]["shape"][1] for p in ("up_proj", "down_proj")]
            eyes = [torch.eye(size, dtype=torch.float64) for size in shapes]
            module.oracle = (first[0] if first else eyes[0], down or [eyes[1]], inputs)
        else:
            _before(module, matrices[reads[name]][0] if name in reads else None, inputs)
    for name in said.get("attention", {}).get("modules", []):
        module = model.get_submodule(name)
        module.oracle_attention = {key: said["attention"][key] for key in ("bits", "symmetric", "clip")}
    return model


def _before(linear: nn.Module, matrix: Tensor | None, said: dict[str, Any] | None) -> None:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        x = args[0] if matrix is None else (args[0].double() @ matrix).to(args[0].dtype)
        return rounded(x, said)

    linear.register_forward_pre_hook(hook)
