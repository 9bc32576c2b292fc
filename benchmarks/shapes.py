"""Checkpoints of real shapes made fast: their weights are pieces of one block of random numbers, each tensor's from a place of its own.

`synthetic.py` draws every weight; here a checkpoint of many gigabytes costs about as much as writing it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from synthetic import SPREAD, Model, qwen3_moe
from torch import Tensor

POOL, STRIDE = 2**24 + 3, 7_368_787  # random numbers, and how far apart two tensors begin


def olmoe(*, layers: int, experts: int, top_k: int, hidden: int, intermediate: int, heads: int, vocabulary: int) -> Model:
    """OLMoE: Qwen3-MoE's tensors under the same names, but norms as wide as all heads together."""
    model = qwen3_moe(
        layers=layers, experts=experts, top_k=top_k, hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=heads,
        head_dim=hidden // heads, vocabulary=vocabulary,
    )  # fmt: skip
    wide = {".self_attn.q_norm.weight", ".self_attn.k_norm.weight"}
    shards = tuple(
        {name: (hidden,) if any(name.endswith(end) for end in wide) else shape for name, shape in shard.items()} for shard in model.shards
    )
    dropped = {"decoder_sparse_step", "head_dim", "mlp_only_layers", "moe_intermediate_size"}
    config: dict[str, Any] = {key: value for key, value in model.config.items() if key not in dropped}
    config |= {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "intermediate_size": intermediate, "norm_topk_prob": False,
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return Model(config, shards)


def write_fast(model: Model, directory: Path, seed: int = 0) -> None:
    """Write a checkpoint; config.json comes last: a directory that has one is complete."""
    directory.mkdir(parents=True, exist_ok=True)
    pool = torch.empty(POOL).normal_(0.0, SPREAD, generator=torch.Generator().manual_seed(seed)).bfloat16()
    index, number = dict[str, str](), 0
    for place, shapes in enumerate(model.shards, 1):
        file = f"model-{place:05d}-of-{len(model.shards):05d}.safetensors"
        header, offset = {}, 0
        for name, shape in shapes.items():
            size = math.prod(shape) * model.width(name)
            dtype = "F32" if name in model.float32 else "BF16"
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, offset + size)}
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name, shape in shapes.items():
                number += 1
                for piece in _pieces(name, math.prod(shape), pool, number * STRIDE % POOL, model):
                    out.write(piece.contiguous().view(torch.uint8).numpy().data)
        index |= dict.fromkeys(shapes, file)
    listing = {"metadata": {"total_size": model.bytes}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(listing))
    (directory / "config.json").write_text(json.dumps(model.config, indent=1))


def _pieces(name: str, count: int, pool: Tensor, start: int, model: Model) -> list[Tensor]:
    if name.endswith(("norm.weight", "bias")):
        value = torch.full((count,), float(name.endswith("norm.weight")))
        return [value if name in model.float32 else value.bfloat16()]
    pieces, left = [], count
    while left:
        stop = min(start + left, POOL)
        pieces.append(pool[start:stop])
        left, start = left - (stop - start), 0
    return pieces
