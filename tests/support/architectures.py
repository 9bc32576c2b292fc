"""One tiny configuration for every model type with routed experts, beside those of tests/support/models.py; data only.

`make architectures` finds out which types the installed transformers has; what stands here is how a small one of each looks, with the
quirks that its real models have. A type without an entry is reported as not tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tests.support.models import ARCHITECTURES, COMMON, EXPERTS, HIDDEN, INTERMEDIATE, MLA, YARN


@dataclass(frozen=True)
class Tiny:
    """A small model of one type.

    Attributes:
        config: what differs from `COMMON`; of the language model where there is one inside (`wrapper`).
        quirks: what is switched on, for the table.
        wrapper: for a type that wraps a language model, the rest of its configuration (towers for pictures and sound).
        inside: the name of the language model's configuration in the wrapper's.
        dtype: what the weights are stored in.
    """

    model_type: str
    quirks: str
    config: dict[str, Any]
    wrapper: dict[str, Any] | None = None
    inside: str = "text_config"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.model_type

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the configuration class."""
        text = {**COMMON, **self.config}
        return text if self.wrapper is None else {**self.wrapper, self.inside: text}


MOE = {"intermediate_size": 48, "moe_intermediate_size": INTERMEDIATE}
ROUTED = {**MOE, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "routed_scaling_factor": 2.5}
GROUPS = {"n_group": 4, "topk_group": 2}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse"]}
INDEXER = {"index_topk": 6, "index_head_dim": 16, "index_n_heads": 2}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
GRANITE = {
    "intermediate_size": INTERMEDIATE,
    "num_local_experts": EXPERTS,
    "embedding_multiplier": 12.0,
    "logits_scaling": 6.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.1,
    "shared_intermediate_size": 40,
    "tie_word_embeddings": True,
}
DELTA_NET = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
QWEN3_5 = {
    **HYBRID,
    **DELTA_NET,
    "moe_intermediate_size": INTERMEDIATE,
    "shared_expert_intermediate_size": 40,
    "num_experts": EXPERTS,
    "head_dim": 16,
}
VISION_QWEN = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 16,
}
TOKENS_QWEN = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
DEEPSEEK_OCR = {**ROUTED, "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "head_dim": 16}
SAM = {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
       "window_size": 2, "global_attn_indexes": [0], "downsample_channels": [8, 16]}  # fmt: skip
LLAMA4_TEXT = {
    "num_hidden_layers": 4,
    "intermediate_size": INTERMEDIATE,
    "intermediate_size_mlp": 48,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "head_dim": 16,
    "attention_chunk_size": 8,
    "no_rope_layers": [1, 1, 1, 0],
    "attn_temperature_tuning": True,
    "floor_scale": 4,
}

_ALL = [
    Tiny(
        "afmoe",
        "dense first layer, shared expert, sigmoid routing with bias, scaling, sliding windows, gated attention, muP",
        {**MOE, **SLIDING, "num_experts": EXPERTS, "num_shared_experts": 1, "num_dense_layers": 1, "route_scale": 2.0, "head_dim": 16,
         "mup_enabled": True},
    ),
    Tiny("aria_text", "experts stored [E, in, out], shared experts", {"intermediate_size": INTERMEDIATE, "moe_num_experts": EXPERTS,
         "moe_topk": 2, "moe_num_shared_experts": 2, "head_dim": 16}),
    Tiny("axk1", "MLA, dense first layer, groups of experts, correction bias, shared expert, scaling, yarn",
         {**MLA, **ROUTED, **GROUPS, **DENSE_FIRST, "q_lora_rank": 32, "rope_parameters": YARN}, dtype=torch.bfloat16),
    Tiny("axk2", "MLA with an indexer that selects tokens, gated norms, dense first layer, shared expert",
         {**MLA, **ROUTED, **DENSE_FIRST, **INDEXER, "q_lora_rank": 32, "gated_norm_rank": 8, "layer_types": ["indexed_attention"] * 2}),
    Tiny("bailing_hybrid", "linear attention and MLA, groups of experts, shared expert, dense first layer",
         {**MLA, **MOE, **HYBRID, **DENSE_FIRST, "num_experts": EXPERTS, "num_experts_per_token": 2, "num_shared_experts": 1,
          "num_expert_group": 4, "topk_group": 2, "linear_head_dim": 16, "linear_num_heads": 4, "first_k_dense_replace": 1,
          "model_max_length": 128}),
    Tiny("beam", "own gating, groups of experts, dense first layer, sliding windows, soft-capped logits",
         {**MOE, **GROUPS, **SLIDING, **DENSE_FIRST, "num_experts": EXPERTS, "head_dim": 16}),
    Tiny("cohere2_moe", "attention and experts beside each other, dense first layer, shared expert, sigmoid routing, sliding windows",
         {"intermediate_size": INTERMEDIATE, **SLIDING, **DENSE_FIRST, "num_experts": EXPERTS, "num_shared_experts": 1,
          "expert_selection_fn": "sigmoid", "head_dim": 16, "prefix_dense_intermediate_size": 48, "tie_word_embeddings": True}),
    Tiny("deepseek_v32", "MLA with an indexer that selects tokens, groups of experts, dense first layer, shared expert",
         {**MLA, **ROUTED, **GROUPS, **DENSE_FIRST, **INDEXER, "q_lora_rank": 32, "layer_types": ["indexed_attention"] * 2,
          "first_k_dense_replace": 1}),
    Tiny("deepseek_v4", "four residual streams, routing by a hash of the token, compressed attention, own gating with a limit",
         {"num_hidden_layers": 3, "num_key_value_heads": 1, "moe_intermediate_size": INTERMEDIATE, "n_routed_experts": EXPERTS,
          "n_shared_experts": 1, "head_dim": 16, "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 16, "swiglu_limit": 0.5,
          "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
          "mlp_layer_types": ["hash_moe", "moe", "moe"], "compress_rates": {"compressed_sparse_attention": 2,
          "heavily_compressed_attention": 4}, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "sliding_window": 8}),
    Tiny("dots1", "dense first layer, groups of experts, correction bias, shared experts, sliding windows",
         {**ROUTED, **GROUPS, **SLIDING, "n_shared_experts": 2, "first_k_dense_replace": 1, "norm_topk_prob": True, "head_dim": 16}),
    Tiny("dots3_note_text", "MLA with an indexer and sliding windows, dense first layer, shared expert",
         {**MLA, **ROUTED, **INDEXER, **DENSE_FIRST, "q_lora_rank": 32, "shared_experts_intermediate_size": 40, "head_dim": 24,
          "layer_types": ["indexed_attention", "sliding_attention"], "sliding_window": 8, "per_layer_config": {}}),
    Tiny("exaone_moe", "dense first layer, groups of experts, correction bias, shared expert, sliding windows",
         {**MOE, **GROUPS, **SLIDING, **DENSE_FIRST, "num_experts": EXPERTS, "num_shared_experts": 1, "first_k_dense_replace": 1,
          "sliding_window_pattern": 2}),
    Tiny("flex_olmo", "norms behind the blocks", {"intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "norm_topk_prob": True}),
    Tiny("flint", "dense first layer, shared expert, sliding windows",
         {**MOE, **SLIDING, "num_experts": EXPERTS, "shared_expert_intermediate_size": 40, "mlp_only_layers": [0], "head_dim": 16}),
    Tiny("gemma4_text", "experts beside a dense MLP, router with a scale, keys that are the values, soft-capped logits, two head sizes",
         {**MOE, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8,
          "enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 2, "head_dim": 16, "hidden_size_per_layer_input": 0,
          "attention_k_eq_v": True, "final_logit_softcapping": 30.0, "tie_word_embeddings": True, "global_head_dim": 32,
          "vocab_size_per_layer_input": 128, "pad_token_id": 0}, dtype=torch.bfloat16),
    Tiny("glm4_moe_lite", "MLA, dense first layer, groups of experts, correction bias, shared expert, scaling",
         {**MLA, **ROUTED, **GROUPS, **DENSE_FIRST, "q_lora_rank": 32}),
    Tiny("glm_moe_dsa", "selected tokens handed from layer to layer, MLA, dense first layer, shared expert",
         {**MLA, **ROUTED, **GROUPS, **INDEXER, "num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"],
          "q_lora_rank": 32, "layer_types": ["indexed_attention"] * 3, "indexer_types": ["full", "shared", "full"],
          "first_k_dense_replace": 1}),
    Tiny("granitemoe_swa", "fused storage, multipliers, sliding windows, layers without positions, shared expert, tied head",
         {**GRANITE, **SLIDING, "layer_rope_theta": [10000.0, 0]}),
    Tiny("granitemoehybrid", "Mamba and attention, fused storage, multipliers, shared expert, tied head",
         {**GRANITE, "layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
          "mamba_chunk_size": 16}),
    Tiny("granitemoeshared", "fused storage, multipliers, shared expert, tied head", GRANITE, dtype=torch.bfloat16),
    Tiny("hy_v3", "dense first layer, correction bias, shared expert, scaling",
         {**MOE, **DENSE_FIRST, "num_experts": EXPERTS, "num_shared_experts": 1, "head_dim": 16}),
    Tiny("hy_v4", "four residual streams, selected tokens handed from layer to layer, MLA, own gating with a limit, shared expert",
         {**MLA, **ROUTED, **GROUPS, **INDEXER, "num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"], "q_lora_rank": 32,
          "head_dim": 16, "layer_types": ["indexed_attention"] * 3, "indexer_types": ["full", "shared", "full"], "swiglu_limit": 0.5}),
    Tiny("inkling_text", "short convolutions, relative positions, shared experts in the router, sliding windows, dense first layer",
         {**MOE, **DENSE_FIRST, "n_routed_experts": EXPERTS, "n_shared_experts": 2, "head_dim": 16, "swa_num_attention_heads": 4,
          "swa_num_key_value_heads": 2, "swa_head_dim": 16, "sliding_window_size": 8, "d_rel": 4, "rel_extent": 16,
          "layer_types": ["hybrid_sliding", "hybrid"], "route_scale": 2.0}),
    Tiny("inkling2_text", "attention over blocks of layers, short convolutions, relative positions, own gating with soft caps",
         {"moe_intermediate_size": INTERMEDIATE, "n_routed_experts": EXPERTS, "head_dim": 16, "swa_num_attention_heads": 4,
          "swa_num_key_value_heads": 2, "swa_head_dim": 16, "sliding_window_size": 8, "d_rel": 4, "rel_extent": 16,
          "num_hidden_layers": 3,
          "layer_types": ["hybrid_sliding", "hybrid", "hybrid"], "n_layers_per_attn_res_block": 1, "unpadded_vocab_size": 120}),
    Tiny("kolibri1", "shared expert, sliding windows, correction bias",
         {**SLIDING, "moe_intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "shared_expert_intermediate_size": 40,
          "head_dim": 16}),
    Tiny("laguna", "heads that differ by layer, gated attention, dense first layer, shared expert, scaling, sliding windows",
         {**MOE, **SLIDING, **DENSE_FIRST, "num_experts": EXPERTS, "shared_expert_intermediate_size": 40, "head_dim": 16,
          "num_attention_heads_per_layer": [4, 2], "moe_routed_scaling_factor": 2.5, "moe_router_logit_softcapping": 5.0}),
    Tiny("lfm2_moe", "convolutions and attention, dense first layer, expert bias, scaling",
         {**MOE, "num_hidden_layers": 3, "num_experts": EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"],
          "routed_scaling_factor": 2.0}),
    Tiny("mellum", "dense first layer, sliding windows with other positions",
         {**MOE, **SLIDING, **DENSE_FIRST, "num_local_experts": EXPERTS, "head_dim": 16}),
    Tiny("mimo_v2_flash", "keys and values of two sizes, sinks, dense first layer, groups of experts, sliding windows",
         {**ROUTED, **GROUPS, **SLIDING, **DENSE_FIRST, "head_dim": 24, "v_head_dim": 16}),
    Tiny("minimax_m2", "sigmoid routing with bias, partial positions, query and key norms",
         {"intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "head_dim": 16, "rotary_dim": 8}),
    Tiny("minimax_m3_vl_text", "own gating with a limit, shared expert, dense first layer, sparse blocks of attention",
         {"intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "head_dim": 16, "rotary_dim": 8, **DENSE_FIRST,
          "dense_intermediate_size": 48, "shared_intermediate_size": 40, "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4,
          "index_topk_blocks": 2, "swiglu_limit": 0.5, "layer_types": ["full_attention", "minimax_m3_sparse"]}),
    Tiny("mistral4", "MLA, groups of experts, dense first layer, shared expert, yarn with temperature",
         {**MLA, **ROUTED, **GROUPS, "q_lora_rank": 32, "first_k_dense_replace": 1,
          "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1, "partial_rotary_factor": 1 / 3}}),
    Tiny("qwen3_5_moe_text", "linear attention, gated attention, gated shared expert", QWEN3_5),
    Tiny("qwen4_exp_text", "several residual streams, linear attention, indexer, n-gram embeddings, gated shared expert",
         {**QWEN3_5, "layer_types": ["linear_attention", "indexed_attention"], "hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [1],
          "ple_embed_dim": 16, "heads_per_ngram": 2, "ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 8,
          "split_ngram_parts": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
          "indexer_compress_ratio": 2}),
    Tiny("solar_open", "groups of experts, correction bias, shared expert, partial positions",
         {**ROUTED, **GROUPS, "head_dim": 16, "norm_topk_prob": True}),
    Tiny("zaya", "router with a memory of the layer before, convolutions in attention, one expert per token",
         {"moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "num_experts_per_tok": 1, "head_dim": 16, "router_hidden_size": 16,
          "layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 8, "tie_word_embeddings": True}),
    # Wrappers: the language model is quantized, the towers are carried along.
    Tiny("aria", "experts stored [E, in, out]; a vision tower", {"intermediate_size": INTERMEDIATE, "moe_num_experts": EXPERTS,
         "moe_topk": 2, "moe_num_shared_experts": 2, "head_dim": 16, "model_type": "aria_text"},
         {"vision_config": {"model_type": "idefics3_vision", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 16, "patch_size": 4}, "projector_patch_to_query_dict": {16: 4}}),
    Tiny("deepseek_ocr2", "grouped top-k, shared experts, dense first layer; two vision towers",
         {**DEEPSEEK_OCR, **DENSE_FIRST}, {"vision_config": {"sam_config": {**SAM, "scale": 16, "mlp_dim": 32}, "encoder_config": {
          "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
          "vocab_size": 8, "layer_types": ["full_attention"]}}}),
    Tiny("dots3_note", "MLA with an indexer; vision with experts and sound towers",
         {**MLA, **ROUTED, **INDEXER, **DENSE_FIRST, "q_lora_rank": 32, "shared_experts_intermediate_size": 40, "head_dim": 24,
          "layer_types": ["indexed_attention", "sliding_attention"], "sliding_window": 8, "per_layer_config": {}},
         {"vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
          "moe_intermediate_size": 16, "mlp_layer_types": ["dense", "sparse"], "num_local_experts": 4, "adapter_in_dim": 32,
          "adapter_out_dim": HIDDEN, "per_layer_config": {}}, "audio_config": {"hidden_size": 32, "intermediate_size": 32,
          "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "feature_size": 16,
          "downsample_hidden_size": 8, "adapter_input_size": 32, "adapter_out_dim": HIDDEN, "conv_output_size": 16}}),
    Tiny("ernie4_5_vl_moe", "two sets of experts a layer, for text and for pictures, shared experts; a vision tower",
         {**DENSE_FIRST, "intermediate_size": 48, "moe_intermediate_size": [INTERMEDIATE, 16], "moe_k": 2, "moe_num_experts": EXPERTS,
          "moe_num_shared_experts": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]}},
         {"vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
          "patch_size": 4}, "image_token_id": 120, "image_start_token_id": 121, "image_end_token_id": 122, "video_token_id": 123,
          "video_start_token_id": 124, "video_end_token_id": 125}),
    Tiny("gemma4", "experts beside a dense MLP, router with a scale; a vision tower",
         {**MOE, "num_hidden_layers": 2, **SLIDING, "enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 2, "head_dim": 16,
          "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
          "vocab_size_per_layer_input": 128, "pad_token_id": 0},
         {"vision_config": {"model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 16},
          "image_token_id": 120, "video_token_id": 121, "audio_token_id": 122, "boi_token_id": 123, "eoi_token_id": 124}),
    Tiny("glm4v_moe", "dense first layer, groups of experts, correction bias, shared expert; a vision tower",
         {**ROUTED, **GROUPS, "first_k_dense_replace": 1, "attention_bias": True,
          "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
         {"vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "image_size": 16, "patch_size": 4,
          "out_hidden_size": HIDDEN}, "image_token_id": 120, "video_token_id": 121}),
    Tiny("glm5_next", "four residual streams, linear attention and MLA with an indexer, own gating with a limit; a vision tower",
         {**MLA, **ROUTED, **GROUPS, **INDEXER, "qk_rope_head_dim": 0, "num_hidden_layers": 3, "q_lora_rank": 32, "head_dim": 0,
          "mlp_layer_types": ["dense", "sparse", "sparse"], "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
          "indexer_types": ["full", "full", "shared"], "linear_head_dim": 16, "linear_num_heads": 4, "index_kpool": 2,
          "swiglu_limit": 0.5},
         {"vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "image_size": 16, "patch_size": 4,
          "out_hidden_size": HIDDEN, "projection_intermediate_size": 32}, "image_token_id": 120, "video_token_id": 121}),
    Tiny("inkling_mm_model", "short convolutions, shared experts in the router; vision and sound towers",
         {**MOE, **DENSE_FIRST, "n_routed_experts": EXPERTS, "n_shared_experts": 2, "head_dim": 16, "swa_num_attention_heads": 4,
          "swa_num_key_value_heads": 2, "swa_head_dim": 16, "sliding_window_size": 8, "d_rel": 4, "rel_extent": 16,
          "layer_types": ["hybrid_sliding", "hybrid"], "route_scale": 2.0},
         {"vision_config": {"text_hidden_size": HIDDEN, "patch_size": 4, "hidden_size": 32, "n_layers": 1, "num_attention_heads": 2},
          "audio_config": {"n_mel_bins": 8, "mel_vocab_size": 8, "text_hidden_size": HIDDEN}}),
    Tiny("inkling2", "attention over blocks of layers, short convolutions; a vision tower",
         {"moe_intermediate_size": INTERMEDIATE, "n_routed_experts": EXPERTS, "head_dim": 16, "swa_num_attention_heads": 4,
          "swa_num_key_value_heads": 2, "swa_head_dim": 16, "sliding_window_size": 8, "d_rel": 4, "rel_extent": 16,
          "num_hidden_layers": 3,
          "layer_types": ["hybrid_sliding", "hybrid", "hybrid"], "n_layers_per_attn_res_block": 1, "unpadded_vocab_size": 120},
         {"vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4,
          "posemb_grid_size": 4, "projection_hidden_dim": 32, "text_hidden_size": HIDDEN}, "image_token_id": 120}),
    Tiny("minimax_m3_vl", "own gating with a limit, shared expert, dense first layer; a vision tower",
         {"intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "head_dim": 16, "rotary_dim": 8, **DENSE_FIRST,
          "dense_intermediate_size": 48, "shared_intermediate_size": 40, "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4,
          "index_topk_blocks": 2, "swiglu_limit": 0.5, "layer_types": ["full_attention", "full_attention"]},
         {"vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
          "patch_size": 4}, "projector_hidden_size": HIDDEN, "merged_hidden_size": 4 * HIDDEN, "image_token_index": 120,
          "video_token_index": 121}),
    Tiny("mistral_large4", "keys and values shared between layers, selected tokens handed on, MLA; a vision tower",
         {**MLA, **ROUTED, **GROUPS, **INDEXER, "num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"],
          "q_lora_rank": 32, "layer_types": ["indexed_attention"] * 3, "indexer_types": ["full", "full", "shared"],
          "no_rope_layers": [0, 1, 0], "kv_source_layers": [0, 1, 0], "first_k_dense_replace": 1, "head_dim": 8},
         {"vision_config": {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2, "head_dim": 16, "image_size": 16, "patch_size": 4}}),
    Tiny("muse_spark", "experts in a latent space with a norm behind them, gated residuals; vision and sound towers",
         {**SLIDING, "intermediate_size": 48, "moe_intermediate_size": INTERMEDIATE, "moe_hidden_size": 48, "num_local_experts": EXPERTS,
          "head_dim": 16, "layer_rope_theta": [10000.0, 0], "mlp_layer_types": ["dense", "sparse"], "routed_scaling_factor": 2.0},
         {"vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4,
          "layer_types": ["full_attention"], "pos_emb_height": 4, "pos_emb_width": 4}, "audio_config": {"patch_sizes": [4, 4],
          "hidden_sizes": [16, 32], "depths": [1, 1], "num_hidden_layers": 2, "out_hidden_size": HIDDEN}}),
    Tiny("qwen3_5_moe", "linear attention, gated attention, gated shared expert; a vision tower",
         {**QWEN3_5, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
          "mrope_section": [2, 1, 1]}}, {"vision_config": VISION_QWEN, **TOKENS_QWEN}),
    Tiny("qwen3_omni_moe_thinker", "dense layer in between; vision and sound towers",
         {**MOE, "num_hidden_layers": 3, "num_experts": EXPERTS, "head_dim": 16, "mlp_only_layers": [1],
          "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}},
         {"vision_config": {**VISION_QWEN, "deepstack_visual_indexes": [0]}, "audio_config": {"num_mel_bins": 16, "encoder_layers": 1,
          "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 32, "downsample_hidden_size": 8, "output_dim": HIDDEN},
          **TOKENS_QWEN}),
    Tiny("qwen3_vl_moe", "dense layer in between, tied head; a vision tower",
         {**MOE, "num_hidden_layers": 3, "num_experts": EXPERTS, "num_local_experts": EXPERTS, "head_dim": 16, "mlp_only_layers": [1],
          "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}},
         {"vision_config": {**VISION_QWEN, "deepstack_visual_indexes": [0]}, **TOKENS_QWEN}, dtype=torch.bfloat16),
    Tiny("qwen4_exp", "several residual streams, linear attention, indexer; a vision tower",
         {**QWEN3_5, "layer_types": ["linear_attention", "indexed_attention"], "hc_count": 2, "hc_lowrank": 8,
          "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2,
          "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
         {"vision_config": VISION_QWEN, **TOKENS_QWEN}),
    Tiny("unlimited_ocr", "grouped top-k, shared experts, dense first layer, windows with references; two vision towers",
         {**DEEPSEEK_OCR, **DENSE_FIRST, "sliding_window": 8, "layer_types": ["reference_sliding_attention"] * 2},
         {"vision_config": {"sam_config": SAM, "encoder_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 16, "patch_size": 4}}}),
    # Experts that do not go through the interface; moebit has an adapter.
    Tiny("llama4_text", "experts stored [E, in, out], scores multiply the input, shared expert, chunked attention, layers without rope",
         LLAMA4_TEXT, dtype=torch.bfloat16),
    Tiny("llama4", "the same; a vision tower", LLAMA4_TEXT, {"vision_config": {"hidden_size": 32, "intermediate_size": 64,
         "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "projector_input_dim": 32,
         "projector_output_dim": 32, "vision_output_dim": 32}, "image_token_index": 120, "boi_token_index": 121, "eoi_token_index": 122}),
    Tiny("step3p7", "own gating with limits, correction bias, gated attention, sliding windows, dense layer, shared expert; a vision tower",
         {**MOE, **DENSE_FIRST, **SLIDING, "n_routed_experts": EXPERTS, "head_dim": 16, "moe_router_scaling_factor": 2.0,
          "share_expert_dim": 40, "swiglu_limits": [0.0, 0.5], "swiglu_limits_shared": [0.0, 0.5], "num_sliding_attention_heads": 4,
          "pad_token_id": 1, "num_experts_per_tok": 2},
         {"vision_config": {"width": 32, "layers": 1, "heads": 2, "image_size": 16, "patch_size": 4, "mlp_ratio": 2.0,
          "max_position_embeddings": 16}, "image_token_id": 120}),
    # Experts that do not go through the interface, without an adapter.
    Tiny("dbrx", "experts in flat matrices", {"d_model": HIDDEN, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
         "ffn_config": {"ffn_hidden_size": INTERMEDIATE, "moe_num_experts": EXPERTS, "moe_top_k": 2},
         "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}}),
    Tiny("doge", "experts as rows of embeddings, looked up by product keys",
         {"intermediate_size": 48, "is_moe": True, "num_experts": 16, "num_experts_per_tok": 2}),
    Tiny("jetmoe", "experts in attention, too", {"intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "kv_channels": 16}),
    Tiny("longcat_flash", "experts that do nothing, two attentions and MLPs a layer, MLA",
         {**MLA, "num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": INTERMEDIATE, "n_routed_experts": EXPERTS,
          "zero_expert_num": 2, "q_lora_rank": 32, "moe_topk": 2, "num_hidden_layers": 4, "head_dim": 8, "routed_scaling_factor": 2.0}),
]  # fmt: skip

QUIRKS = {
    "mixtral": "jitter (off outside of training)",
    "qwen2_moe": "gated shared expert, sliding windows, tied head",
    "qwen3_moe": "renormalised top-k, dense layer in between",
    "olmoe": "clipped queries, keys and values, no renormalisation",
    "deepseek_v2": "MLA, grouped top-k, scaling, two shared experts, dense first layer, yarn",
    "deepseek_v3": "MLA, groups of experts, correction bias, scaling, shared expert, dense first layer, yarn",
    "gpt_oss": "experts stored [E, in, out], gate and up interleaved, biases, own gating with a limit, sinks, sliding windows",
    "granitemoe": "fused storage, multipliers, tied head",
    "phimoe": "sparsemixer routing, LayerNorms with biases, attention and head biases, long rope, sliding windows",
    "qwen3_next": "linear attention, gated attention, gated shared expert, dense layer",
    "glm4_moe": "groups of experts, correction bias, scaling, shared expert, dense first layer, biases, query and key norms",
    "ernie4_5_moe": "correction bias, shared experts, dense first layer, biases, tied head",
    "minimax": "lightning attention, residuals from the norms, multipliers",
    "hunyuan_v1_moe": "shared MLP, query and key norms, dynamic rope",
    "jamba": "Mamba and attention, dense layer in between",
    "kimi_linear": "linear attention and MLA, groups of experts, shared expert, dense first layer",
    "nemotron_h": "experts without gates, one block a layer (Mamba, experts, attention, MLP), groups of experts, shared expert",
}
_KNOWN = [
    Tiny(name, quirks, ARCHITECTURES[name].config, dtype=ARCHITECTURES[name].dtype) for name, quirks in QUIRKS.items()
]  # the detailed tests know more about these
TINY = {tiny.model_type: tiny for tiny in [*_KNOWN, *_ALL]}
# What has to work in full whenever anything changes: `make test` runs these, `make test-all` every one.
ALWAYS = [
    *("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "glm4_moe", "granitemoe"),
    *("phimoe", "ernie4_5_moe", "minimax", "hunyuan_v1_moe", "jamba", "llama4"),
    # layers that hand on more than hidden states, layers that write into their arguments, a wrapper whose storage depends on shapes
    *("zaya", "glm_moe_dsa", "mistral_large4", "qwen3_vl_moe"),
]
# Experts that stay in full precision, for which moebit asks.
PARTLY = {"dots3_note": "outside the language model's layers", "ernie4_5_vl_moe": "text does not reach them"}
# What moebit says no to, and a part of what it says.
REFUSED = {
    "inkling2": "computes 'argument 1' of layer 2 from what the layers before it return",
    "inkling2_text": "computes 'argument 1' of layer 2 from what the layers before it return",
    "dbrx": "has no routed experts behind transformers' experts interface",
    "doge": "has no routed experts behind transformers' experts interface",
    "jetmoe": "has no routed experts behind transformers' experts interface",
    "longcat_flash": "has no routed experts behind transformers' experts interface",
}
# Types without a configuration here, and why.
UNTRIED = {
    "diffusion_gemma": "writes by diffusion over a block of tokens; it has no next-token logits to calibrate or compare",
    "qwen3_omni_moe": "the whole of thinker, talker and speech has no forward of its own; the thinker works as qwen3_omni_moe_thinker",
}
