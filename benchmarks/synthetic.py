"""Random checkpoints of real shapes, written piece by piece, and random calibration tokens: what speed.py and memory.py run on.

The writer keeps one piece of a tensor in memory, so that a checkpoint of any size can be made. Weights are normal with standard
deviation 0.02, norms are one. Expert after expert is stored under the names that the models' own checkpoints have; there is no tokenizer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PIECE = 2**22  # values made at a time
SPREAD = 0.02
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Model:
    """A configuration, and the shapes of its tensors shard by shard.

    Attributes:
        shards: file after file, tensor name -> shape; all bfloat16 but what `float32` names.
    """

    config: dict[str, Any]
    shards: tuple[Shapes, ...]
    float32: frozenset[str] = frozenset()

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) * self.width(name) for shard in self.shards for name, shape in shard.items())

    def width(self, name: str) -> int:
        return 4 if name in self.float32 else 2


def qwen3_moe(
    *, layers: int, experts: int, top_k: int, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, vocabulary: int
) -> Model:
    """Qwen3-MoE, every layer with routed experts."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "moe_intermediate_size": intermediate,
        "norm_topk_prob": True,
        "num_attention_heads": heads,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "vocab_size": vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }

    def layer(number: int) -> Shapes:
        name, q, kv = f"model.layers.{number}", heads * head_dim, kv_heads * head_dim
        return {
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.post_attention_layernorm.weight": (hidden,),
            f"{name}.self_attn.q_norm.weight": (head_dim,),
            f"{name}.self_attn.k_norm.weight": (head_dim,),
            f"{name}.self_attn.q_proj.weight": (q, hidden),
            f"{name}.self_attn.k_proj.weight": (kv, hidden),
            f"{name}.self_attn.v_proj.weight": (kv, hidden),
            f"{name}.self_attn.o_proj.weight": (hidden, q),
            f"{name}.mlp.gate.weight": (experts, hidden),
            **_experts(f"{name}.mlp.experts", experts, hidden, intermediate),
        }

    return Model(config, (_ends(vocabulary, hidden), *(layer(number) for number in range(layers))))


def deepseek_v3(
    *, layers: int, experts: int, top_k: int, hidden: int, intermediate: int, heads: int, vocabulary: int, groups: int, top_groups: int,
    q_rank: int, kv_rank: int, rope_dim: int, nope_dim: int, v_dim: int,
) -> Model:  # fmt: skip
    """DeepSeek-V3: latent attention, grouped sigmoid routing with a correction bias, one shared expert; every layer has routed experts."""
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "dtype": "bfloat16",
        "attention_bias": False,
        "first_k_dense_replace": 0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 18432,
        "kv_lora_rank": kv_rank,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": intermediate,
        "n_group": groups,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": heads,
        "num_experts_per_tok": top_k,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "q_lora_rank": q_rank,
        "qk_nope_head_dim": nope_dim,
        "qk_rope_head_dim": rope_dim,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "routed_scaling_factor": 2.5,
        "tie_word_embeddings": False,
        "topk_group": top_groups,
        "v_head_dim": v_dim,
        "vocab_size": vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }

    def layer(number: int) -> Shapes:
        name = f"model.layers.{number}"
        return {
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.post_attention_layernorm.weight": (hidden,),
            f"{name}.self_attn.q_a_proj.weight": (q_rank, hidden),
            f"{name}.self_attn.q_a_layernorm.weight": (q_rank,),
            f"{name}.self_attn.q_b_proj.weight": (heads * (nope_dim + rope_dim), q_rank),
            f"{name}.self_attn.kv_a_proj_with_mqa.weight": (kv_rank + rope_dim, hidden),
            f"{name}.self_attn.kv_a_layernorm.weight": (kv_rank,),
            f"{name}.self_attn.kv_b_proj.weight": (heads * (nope_dim + v_dim), kv_rank),
            f"{name}.self_attn.o_proj.weight": (hidden, heads * v_dim),
            f"{name}.mlp.gate.weight": (experts, hidden),
            f"{name}.mlp.gate.e_score_correction_bias": (experts,),
            **_mlp(f"{name}.mlp.shared_experts", hidden, intermediate),
            **_experts(f"{name}.mlp.experts", experts, hidden, intermediate),
        }

    biases = frozenset(f"model.layers.{number}.mlp.gate.e_score_correction_bias" for number in range(layers))
    return Model(config, (_ends(vocabulary, hidden), *(layer(number) for number in range(layers))), biases)


def write_checkpoint(model: Model, directory: Path, seed: int = 0) -> None:
    """config.json comes last: a directory that has one is complete."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    index: dict[str, str] = {}
    for number, shapes in enumerate(model.shards, 1):
        file = f"model-{number:05d}-of-{len(model.shards):05d}.safetensors"
        _write_shard(model, shapes, directory / file, generator)
        index |= dict.fromkeys(shapes, file)
    listing = {"metadata": {"total_size": model.bytes}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(listing, indent=1))
    (directory / "config.json").write_text(json.dumps(model.config, indent=1))


def write_tokens(file: Path, windows: int, length: int, vocabulary: int, seed: int = 1) -> None:
    """A .jsonl with one window of random token ids a line."""
    ids = torch.randint(0, vocabulary, (windows, length), generator=torch.Generator().manual_seed(seed)).tolist()
    file.write_text("".join(json.dumps({"input_ids": window}) + "\n" for window in ids))


def _ends(vocabulary: int, hidden: int) -> Shapes:
    return {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def _mlp(name: str, hidden: int, intermediate: int) -> Shapes:
    return {
        f"{name}.gate_proj.weight": (intermediate, hidden),
        f"{name}.up_proj.weight": (intermediate, hidden),
        f"{name}.down_proj.weight": (hidden, intermediate),
    }


def _experts(name: str, experts: int, hidden: int, intermediate: int) -> Shapes:
    return {key: shape for expert in range(experts) for key, shape in _mlp(f"{name}.{expert}", hidden, intermediate).items()}


def _write_shard(model: Model, shapes: Shapes, path: Path, generator: torch.Generator) -> None:
    """The safetensors format: the header's length, the header, the tensors' bytes one after the other."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * model.width(name)
        dtype = "F32" if name in model.float32 else "BF16"
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, offset + size)}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for piece in _values(name, math.prod(shape), generator):
                stored = piece if name in model.float32 else piece.bfloat16()
                file.write(stored.view(torch.uint8).numpy().data)


def _values(name: str, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    for start in range(0, count, PIECE):
        size = min(PIECE, count - start)
        if name.endswith("norm.weight"):
            yield torch.ones(size)
        elif name.endswith("bias"):
            yield torch.zeros(size)
        else:
            yield torch.empty(size).normal_(0.0, SPREAD, generator=generator)
