"""What the outputs are made from: tiny random models of six architectures, one of them stored in FP8 too, and pieces of the shipped texts.

The configurations are copies on purpose: what a revision is compared on must not change with the other tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY, EXPERTS, INTERMEDIATE = 128, 8, 32
TEXTS, TEXT_BYTES = ("wiki", "python", "german"), 30_000
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
    "num_experts_per_tok": 2,
}
# What the models differ in: shared experts, dense layers, latent attention, linear attention, Mamba, biases, storage, tied heads, types.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "num_hidden_layers": 3},
    "qwen2_moe": {
        "intermediate_size": 64,
        "moe_intermediate_size": INTERMEDIATE,
        "shared_expert_intermediate_size": 96,
        "num_experts": EXPERTS,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "intermediate_size": 64,
        "moe_intermediate_size": INTERMEDIATE,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "dtype": "bfloat16",
    },
    "gpt_oss": {
        "intermediate_size": INTERMEDIATE,
        "num_local_experts": EXPERTS,
        "head_dim": 16,
        "sliding_window": 8,
        "dtype": "bfloat16",
    },
    "qwen3_next": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mlp_only_layers": [2],
        "intermediate_size": 64,
        "moe_intermediate_size": INTERMEDIATE,
        "shared_expert_intermediate_size": 64,
        "num_experts": EXPERTS,
        "head_dim": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "intermediate_size": 64,
        "moe_intermediate_size": INTERMEDIATE,
        "moe_shared_expert_intermediate_size": 64,
        "moe_latent_size": 32,
        "n_routed_experts": EXPERTS,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "head_dim": 16,
        "use_mamba_kernels": False,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 16,
    },
}
FP8 = "deepseek_v3_fp8"
KEPT = ("A_log", "D", "dt_bias", "inv_freq", "original_inv_freq")  # decays, steps and frequencies: random ones would overflow


def built_inputs(work: Path, root: Path) -> Path:
    """The directory with `MODEL/` and `NAME.txt`, made under `work` unless it is there; named by what it is made from."""
    texts = {name: _characters(root / "reference" / "text" / f"{name}.calib.txt") for name in TEXTS}
    made_from = [Path(__file__).read_text(), torch.__version__, *texts.values()]
    directory = work / f"inputs-{hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]}"
    if directory.is_dir():
        return directory
    partial = work / f"{directory.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, text in texts.items():
        (partial / f"{name}.txt").write_text(text)
    for name in ARCHITECTURES:
        _save_model(name, partial / name)
    _save_in_fp8(partial / "deepseek_v3", partial / FP8)
    os.replace(partial, directory)
    return directory


def shipped_models(root: Path) -> dict[str, Path]:
    """The reference models of the checkout by model type."""
    configurations = sorted((root / "reference").glob("*/config.json"), reverse=True)
    return {json.loads(file.read_text())["model_type"]: file.parent for file in configurations}


def _characters(file: Path) -> str:
    """The ASCII characters of the beginning of a text: the tokens that the tiny models know."""
    return file.read_bytes()[:TEXT_BYTES].decode("ascii", errors="ignore")


def _save_model(model_type: str, directory: Path) -> None:
    """A model with random weights, in the type that its configuration names, and a tokenizer of characters."""
    config = AutoConfig.for_model(model_type, **{**COMMON, **ARCHITECTURES[model_type]})
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            owner, _, leaf = name.rpartition(".")
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in owner.rpartition(".")[2] and leaf == "weight":
                tensor.add_(0.1 * noise)
            elif leaf not in KEPT:
                tensor.copy_(_spread(name) * noise)
    dtype = torch.bfloat16 if ARCHITECTURES[model_type].get("dtype") == "bfloat16" else torch.float32
    model.to(dtype).save_pretrained(directory)
    _tokenizer().save_pretrained(directory)


def _spread(name: str) -> float:
    """The standard deviation of a tensor's values: routers decide clearly, so that no choice of experts hangs on a rounding."""
    if "e_score_correction_bias" in name:
        return 0.2
    return 0.5 if name.endswith(("gate.weight", "router.weight")) else 0.3 if "conv" in name else 0.05


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token for every ASCII character; token 0 ends a text."""
    tokenizer = Tokenizer(models.WordLevel({chr(code): code for code in range(VOCABULARY)}, unk_token=chr(1)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=chr(0), unk_token=chr(1))


def _save_in_fp8(source: Path, directory: Path, block: int = 32) -> None:
    """The same model as a checkpoint that is shipped in FP8: every matrix of the decoder layers with a scale for each block."""
    shutil.copytree(source, directory)
    stored = load_file(source / "model.safetensors")
    result = {}
    for name, tensor in stored.items():
        if not name.endswith("proj.weight"):
            result[name] = tensor
            continue
        rows, columns = (-(-size // block) for size in tensor.shape)
        padded = torch.zeros(rows * block, columns * block)
        padded[: tensor.shape[0], : tensor.shape[1]] = tensor.float()
        blocks = padded.reshape(rows, block, columns, block)
        scale = blocks.abs().amax(dim=(1, 3)) / 448.0
        codes = (blocks / scale[:, None, :, None]).reshape(padded.shape)[: tensor.shape[0], : tensor.shape[1]]
        result[name] = codes.to(torch.float8_e4m3fn).contiguous()
        result[f"{name}_scale_inv"] = scale
    save_file(result, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
