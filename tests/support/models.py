"""Tiny random checkpoints of many architectures, as transformers writes them, and what transformers itself computes with them.

Nothing of moebit is used here: this is what moebit is compared with. Every architecture has the quirks that its real models
have (groups of experts, correction biases, dense layers in between, sliding windows, scaled rotary embeddings, tied heads).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, VOCABULARY = 8, 2, 64, 32, 128
WINDOWS, LENGTH = 5, 24
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
    "num_experts_per_tok": TOP_K,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
}
MLA = {"num_key_value_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}


@dataclass(frozen=True)
class Architecture:
    """A tiny model of one architecture and what a reader of its modelling code knows about it.

    Attributes:
        name: the id of the tests; `model_type` with a suffix for a variant.
        config: what differs from `COMMON`.
        moe: for every decoder layer, whether it has routed experts.
        block: the MoE block inside a decoder layer, which holds `experts`.
        router: the module inside the block that returns (logits, weights, ids).
        weight: the module that holds the router's weight, where it isn't `router` itself.
        shared: the shared experts inside the block.
        expert_hidden: H of the experts where it isn't the model's (a latent space).
        dtype: what the weights are stored in.
    """

    name: str
    model_type: str
    config: dict[str, Any]
    moe: tuple[bool, ...] = (True, True)
    block: str = "mlp"
    router: str = "gate"
    weight: str = ""
    shared: str = ""
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    bias: bool = False
    expert_hidden: int = HIDDEN
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name

    @property
    def first_moe(self) -> int:
        return self.moe.index(True)

    @property
    def router_name(self) -> str:
        """The module with the router's weight, inside a decoder layer."""
        return f"{self.block}.{self.weight or self.router}"

    def make_config(self, **changes: Any) -> Any:
        return AutoConfig.for_model(self.model_type, **{**COMMON, **self.config, **changes})


_ALL = [
    Architecture("mixtral", "mixtral", {"intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "router_jitter_noise": 0.1}),
    Architecture(
        "qwen2_moe",
        "qwen2_moe",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": INTERMEDIATE,
            "shared_expert_intermediate_size": 40,
            "num_experts": EXPERTS,
            "use_sliding_window": True,
            "sliding_window": 8,
            "tie_word_embeddings": True,
        },
        shared="shared_expert",
        dtype=torch.bfloat16,
    ),
    Architecture(
        "qwen3_moe",
        "qwen3_moe",
        {
            "num_hidden_layers": 3,
            "intermediate_size": 48,
            "moe_intermediate_size": INTERMEDIATE,
            "num_experts": EXPERTS,
            "head_dim": 16,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
        moe=(True, False, True),
    ),
    Architecture("olmoe", "olmoe", {"intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "clip_qkv": 0.3, "norm_topk_prob": False}),
    Architecture(
        "deepseek_v2",
        "deepseek_v2",
        {
            **MLA,
            "intermediate_size": 48,
            "moe_intermediate_size": INTERMEDIATE,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 2,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 4.0,
            "q_lora_rank": None,
            "rope_parameters": YARN,
        },
        moe=(False, True),
        shared="shared_experts",
    ),
    Architecture(
        "deepseek_v3",
        "deepseek_v3",
        {
            **MLA,
            "intermediate_size": 48,
            "moe_intermediate_size": INTERMEDIATE,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5,
            "q_lora_rank": 32,
            "rope_parameters": YARN,
        },
        moe=(False, True),
        shared="shared_experts",
        dtype=torch.bfloat16,
    ),
    Architecture(
        "gpt_oss",
        "gpt_oss",
        {"intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "head_dim": 16, "sliding_window": 8, "swiglu_limit": 0.5},
        router="router",
        interleaved=True,
        transposed=True,
        bias=True,
        dtype=torch.bfloat16,
    ),
    Architecture(
        "granitemoe",
        "granitemoe",
        {
            "intermediate_size": INTERMEDIATE,
            "num_local_experts": EXPERTS,
            "embedding_multiplier": 12.0,
            "logits_scaling": 6.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
            "tie_word_embeddings": True,
        },
        block="block_sparse_moe",
        router="router",
    ),
    Architecture(
        "phimoe",
        "phimoe",
        {
            "intermediate_size": INTERMEDIATE,
            "num_local_experts": EXPERTS,
            "attention_bias": True,
            "lm_head_bias": True,
            "sliding_window": 64,
            # The windows are longer than the original maximum, so the long factors count.
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [1.0 + i / 4 for i in range(8)],
                "short_mscale": 1.1,
                "long_mscale": 1.2,
                "original_max_position_embeddings": 16,
            },
        },
        router="router",
    ),
    Architecture(
        "qwen3_next",
        "qwen3_next",
        {
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mlp_only_layers": [2],
            "intermediate_size": 48,
            "moe_intermediate_size": INTERMEDIATE,
            "shared_expert_intermediate_size": 40,
            "num_experts": EXPERTS,
            "head_dim": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        moe=(True, True, False),
        shared="shared_expert",
    ),
    Architecture(
        "glm4_moe",
        "glm4_moe",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": INTERMEDIATE,
            "n_routed_experts": EXPERTS,
            "head_dim": 16,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "attention_bias": True,
            "use_qk_norm": True,
        },
        moe=(False, True),
        shared="shared_experts",
    ),
    Architecture(
        "ernie4_5_moe",
        "ernie4_5_moe",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": INTERMEDIATE,
            "moe_num_experts": EXPERTS,
            "moe_k": TOP_K,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "use_bias": True,
            "tie_word_embeddings": True,
        },
        moe=(False, True),
        shared="shared_experts",
    ),
    Architecture(
        "minimax",
        "minimax",
        {
            "intermediate_size": INTERMEDIATE,
            "num_local_experts": EXPERTS,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 16,
            "linear_attn_alpha_factor": 1.5,
            "full_attn_beta_factor": 0.8,
            "mlp_alpha_factor": 1.2,
        },
        dtype=torch.bfloat16,
    ),
    Architecture(
        "hunyuan_v1_moe",
        "hunyuan_v1_moe",
        {
            "intermediate_size": INTERMEDIATE,
            "num_experts": EXPERTS,
            "moe_topk": TOP_K,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0},
        },
        weight="gate.wg",
        shared="shared_mlp",
    ),
    Architecture(
        "jamba",
        "jamba",
        {
            "num_hidden_layers": 3,
            "intermediate_size": INTERMEDIATE,
            "num_experts": EXPERTS,
            # attention with experts, Mamba without, Mamba with experts
            "attn_layer_period": 3,
            "attn_layer_offset": 0,
            "expert_layer_period": 2,
            "expert_layer_offset": 0,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
        moe=(True, False, True),
        block="feed_forward",
        router="router",
        dtype=torch.bfloat16,
    ),
]
_ALL.append(
    Architecture(
        "kimi_linear",
        "kimi_linear",
        {
            **MLA,
            "intermediate_size": 48,
            "moe_intermediate_size": INTERMEDIATE,
            "num_local_experts": EXPERTS,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 2.446,
            "layer_types": ["full_attention", "linear_attention"],
            "mlp_layer_types": ["dense", "sparse"],
            "linear_head_dim": 16,
            "linear_num_heads": 4,
        },
        moe=(False, True),
        shared="shared_experts",
    )
)
_NEMOTRON_H = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    "intermediate_size": 48,
    "moe_intermediate_size": INTERMEDIATE,
    "moe_shared_expert_intermediate_size": 40,
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
}
_BLOCK_PER_LAYER = (False, True, False, False)
_ALL += [
    Architecture(
        "nemotron_h",
        "nemotron_h",
        _NEMOTRON_H,
        moe=_BLOCK_PER_LAYER,
        block="mixer",
        shared="shared_experts",
        gated=False,
        dtype=torch.bfloat16,
    ),
    Architecture(
        "nemotron_h_latent",
        "nemotron_h",
        {**_NEMOTRON_H, "moe_latent_size": 48},
        moe=_BLOCK_PER_LAYER,
        block="mixer",
        shared="shared_experts",
        gated=False,
        expert_hidden=48,
    ),
]
ARCHITECTURES = {architecture.name: architecture for architecture in _ALL}


def windows() -> Tensor:
    """int64 [WINDOWS, LENGTH] random tokens."""
    return torch.randint(0, VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its warnings about random weights, missing kernels and progress."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def random_model(architecture: Architecture, **changes: Any) -> PreTrainedModel:
    """The model with random weights in its dtype; `changes` go into the configuration."""
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(architecture.make_config(**changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            _randomize(name, tensor, architecture, generator)
    return model.to(architecture.dtype).eval()


MEANT = ("A_log", "D", "dt_bias", "slope_rate", "query_decay", "key_decay", "diagonal_decay", "inv_freq", "original_inv_freq")


def _randomize(name: str, tensor: Tensor, architecture: Architecture, generator: torch.Generator) -> None:
    owner, _, leaf = name.rpartition(".")
    noise = torch.randn(tensor.shape, generator=generator)
    if leaf in MEANT:
        return  # decays, steps and frequencies are no random numbers
    if leaf == "e_score_correction_bias":
        tensor.copy_(0.2 * noise)
    elif leaf == "weight" and owner.endswith(architecture.router_name):
        tensor.copy_(0.5 * noise)  # so that no routing is decided by rounding
    elif leaf == "weight" and "norm" in owner.rpartition(".")[2]:
        tensor.add_(0.1 * noise)
    elif "conv" in owner:
        tensor.copy_(0.3 * noise)
    else:
        tensor.copy_(0.05 * noise)


def save(model: PreTrainedModel, directory: Path, **options: Any) -> Path:
    with quiet():
        model.save_pretrained(directory, **options)
    return directory


@dataclass(frozen=True)
class Routed:
    """What a router and its experts were called with over all windows: x and router_x [T, H], ids and weights [T, k]."""

    x: Tensor
    router_x: Tensor
    ids: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Reference:
    """A checkpoint as transformers loads and runs it, in float32."""

    architecture: Architecture
    model: PreTrainedModel
    layers_name: str
    _linear_inputs: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)

    @property
    def layers(self) -> nn.ModuleList:
        layers = self.model.get_submodule(self.layers_name)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def experts(self, index: int) -> nn.Module:
        return self.layers[index].get_submodule(f"{self.architecture.block}.experts")

    @cached_property
    def run(self) -> tuple[Tensor, dict[int, Routed]]:
        """(logits [N, L, V], what was routed per MoE layer) of one full forward."""
        seen: dict[int, dict[str, Any]] = {index: {} for index, moe in enumerate(self.architecture.moe) if moe}
        with ExitStack() as stack, torch.no_grad():
            for index, noted in seen.items():
                router = self.layers[index].get_submodule(f"{self.architecture.block}.{self.architecture.router}")
                after = router.register_forward_hook(
                    lambda m, args, out, noted=noted: noted.update(router_x=args[0].reshape(-1, HIDDEN), weights=out[1], ids=out[2])
                )
                before = self.experts(index).register_forward_pre_hook(lambda m, args, noted=noted: noted.update(x=args[0]))
                stack.callback(after.remove)
                stack.callback(before.remove)
            logits = self.model(input_ids=windows(), use_cache=False).logits
        return logits, {index: Routed(**noted) for index, noted in seen.items()}

    def linear_inputs(self, index: int, count: int = 1) -> dict[str, Tensor]:
        """The input [N*L, in] of every nn.Linear that decoder layer `index` calls, by its name there, in the order of the calls.

        From a forward of the first `count` windows.
        """
        if (index, count) in self._linear_inputs:
            return self._linear_inputs[index, count]
        seen: dict[str, Tensor] = self._linear_inputs.setdefault((index, count), {})

        def note(name: str, x: Tensor) -> None:
            seen[name] = x.clone().reshape(-1, x.shape[-1])

        with ExitStack() as stack, torch.no_grad():
            for name, module in self.layers[index].named_modules():
                if isinstance(module, nn.Linear):
                    stack.callback(module.register_forward_pre_hook(lambda m, args, name=name: note(name, args[0])).remove)
            self.model(input_ids=windows()[:count], use_cache=False)
        return seen

    @property
    def logits(self) -> Tensor:
        return self.run[0]

    @property
    def routed(self) -> dict[int, Routed]:
        return self.run[1]


def load_reference(architecture: Architecture, directory: Path) -> Reference:
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager").eval()
    count = len(architecture.moe)
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n.endswith("layers") and len(m) == count)
    return Reference(architecture, model, name)


@dataclass
class Checkpoints:
    """One checkpoint per architecture, built when first asked for; nobody writes into it."""

    directory: Path
    _references: dict[str, Reference] = field(default_factory=dict)

    def path(self, architecture: Architecture) -> Path:
        path = self.directory / architecture.name
        if not path.exists():
            save(random_model(architecture), path)
        return path

    def reference(self, architecture: Architecture) -> Reference:
        if architecture.name not in self._references:
            self._references[architecture.name] = load_reference(architecture, self.path(architecture))
        return self._references[architecture.name]
