"""The outputs that two revisions make. `tests/test_golden.py` sees to it that every option of every preset is in one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TINY = {"weights.group_size": 32, "calibration.samples": 4, "calibration.seq_len": 48}
SHIPPED = {"calibration.samples": 4, "calibration.seq_len": 64}
DYNAMIC = {"weights.scope": "experts", "solver.act_order": False, "solver.scales": "dynamic"}
ROWS = {"calibration.samples": 4, "calibration.seq_len": 48}  # for presets with one scale a row
INT8 = {"weights.bits": 8, "activations.bits": 8, "activations.symmetric": True, "format": "compressed-tensors"}
FP8 = {**INT8, "weights.type": "fp8", "weights.symmetric": True, "activations.clip": 1.0, "activations.qkv_bits": 16}
# A bit plan: a width for each of the 8 experts, other ones for gate and up, and linears of their own widths.
WIDTHS: dict[str, Any] = {
    "version": 1,
    "experts": {
        "model.layers.0.mlp.experts": {"gate_proj": [2, 3, 4, 5, 6, 8, 2, 4], "up_proj": [8, 3, 2, 5, 4, 6, 3, 4], "down_proj": 3},
        "model.layers.2.mlp.experts": {"gate_proj": 5, "up_proj": 6, "down_proj": [4, 8, 6, 2, 3, 5, 8, 2]},
    },
    "linears": {"model.layers.0.self_attn.q_proj": 8, "model.layers.1.self_attn.o_proj": 2},
}


@dataclass(frozen=True)
class Case:
    """One output.

    Attributes:
        model: a tiny model of `inputs`, or `reference/TYPE` for the shipped model of this type.
        recipe: a preset. options: what differs from it.
        texts: names of texts; a recipe that writes its own gets none.
        how: `quantized`; `command`: by the command line; `resumed`: interrupted behind the first layer and gone on with; `adapted`: the
            output of `moebit adapt`; `profiled`: a profile and the widths chosen from it.
        plan: a bit plan.
    """

    name: str
    model: str
    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    texts: tuple[str, ...] = ("wiki",)
    how: Literal["quantized", "command", "resumed", "adapted", "profiled"] = "quantized"
    plan: Mapping[str, Any] | None = None


BOTH = ("wiki", "python")
_CASES = [
    # The shipped models, whose experts are specialised and whose groups have 128 values.
    Case("shipped-gptq", "reference/olmoe", "gptq-w4", SHIPPED),
    Case("shipped-eaquant", "reference/olmoe", "eaquant-w4a4", SHIPPED),
    Case("shipped-moqa", "reference/olmoe", "moqa-3bit", SHIPPED, BOTH),
    Case("shipped-awq-dense", "reference/olmoe", "awq-w3", {**SHIPPED, "format": "dense"}),
    Case("shipped-best", "reference/qwen2_moe", "best-w3", SHIPPED, ()),
    Case("shipped-moequant", "reference/qwen2_moe", "moequant-w3-g128", SHIPPED, ()),
    Case("shipped-vllm", "reference/qwen2_moe", "moqa-4bit-vllm", SHIPPED),
    Case("shipped-minmax-dense", "reference/qwen2_moe", "minmax-w4", {"format": "dense"}, ()),
    Case("shipped-best-bits", "reference/qwen2_moe", "best-3bit", SHIPPED, BOTH),
    Case("shipped-fp8", "reference/qwen2_moe", "fp8", {}, ()),
    Case("shipped-fp8-block", "reference/olmoe", "fp8-block", {}, ()),
    Case("shipped-nvfp4", "reference/qwen2_moe", "nvfp4", SHIPPED),
    Case("shipped-mxfp4", "reference/qwen2_moe", "mxfp4", SHIPPED),
    Case("shipped-mlx", "reference/olmoe", "mlx-w4", SHIPPED),
    # Three layers with experts and nothing beside them.
    Case("mixtral-command", "mixtral", "rtn-w4", {"weights.group_size": 32}, (), "command"),
    Case("mixtral-resumed", "mixtral", "gptq-w4", TINY, how="resumed"),
    Case("mixtral-resumed-best", "mixtral", "best-w4", TINY, (), "resumed"),
    Case("mixtral-plan", "mixtral", "gptq-w3", TINY, plan=WIDTHS),
    Case("mixtral-plan-dense", "mixtral", "minmax-w3", {**TINY, "format": "dense"}, (), plan=WIDTHS),
    Case("mixtral-packed", "mixtral", "gptq-w3", {**TINY, "format": "compressed-tensors"}),
    Case("mixtral-quarot", "mixtral", "quarot-gptq-w3", {**ROWS, "rotation.absorbed": "r1r2"}),
    Case("mixtral-adapted", "mixtral", "moqa-2.5bit", {**TINY, "switching.share": 0.05, "allocation.target_bits": 3.5}, BOTH, "adapted"),
    Case("mixtral-profiled", "mixtral", "gptq-w3", TINY, BOTH, "profiled"),
    # Shared experts behind a gate, a tied head.
    Case("qwen2-smoothquant", "qwen2_moe", "smoothquant-w4a4", ROWS),
    Case("qwen2-moequant-awq", "qwen2_moe", "moequant-awq-w3", ROWS, ()),
    Case(
        "qwen2-knapsack",
        "qwen2_moe",
        "gptq-w3",
        {**TINY, "allocation.kind": "knapsack", "allocation.target_bits": 4.0, "allocation.granularity": "projection"},
    ),
    # Latent attention, a dense layer, groups of experts chosen with a bias; the same stored in FP8.
    Case("deepseek-eaquant", "deepseek_v3", "eaquant-w3a3", ROWS),
    Case("deepseek-best-balanced", "deepseek_v3", "best-w2", {**TINY, "calibration.kind": "self-balanced"}, ()),
    Case("deepseek-packed", "deepseek_v3", "gptq-w8", {**TINY, "format": "compressed-tensors"}),
    Case("deepseek-fp8-gptq", "deepseek_v3_fp8", "gptq-w2", TINY),
    # Biases, matrices stored transposed and interleaved.
    Case("gpt-oss-hadamard", "gpt_oss", "hadamard-w4a4", {**ROWS, "rotation.down": "expert"}),
    Case("gpt-oss-eaquant-w8a8", "gpt_oss", "eaquant-w8a8", ROWS),
    Case("gpt-oss-awq", "gpt_oss", "awq-w4", TINY),
    Case("gpt-oss-gptq-dense", "gpt_oss", "gptq-w2", {**TINY, "format": "dense"}),
    # Linear attention, a dense layer.
    Case("qwen3-next-duquant", "qwen3_next", "duquant-w4a4", ROWS),
    Case("qwen3-next-soft", "qwen3_next", "gptq-w3", {**TINY, "calibration.coverage": "soft", "router.realign": "ridge"}),
    Case("qwen3-next-int8", "qwen3_next", "gptq-w8", {**ROWS, **INT8, "weights.group_size": -1}),
    # Experts without a gate in a latent space, Mamba, one block a layer.
    Case("nemotron-rtn-a4", "nemotron_h", "rtn-w4a4", ROWS),
    Case("nemotron-gptq", "nemotron_h", "gptq-w3", {**TINY, **DYNAMIC}),
    Case("nemotron-fp8", "nemotron_h", "rtn-w4a4", {**ROWS, **FP8}),
]  # fmt: skip
CASES = {case.name: case for case in _CASES}
