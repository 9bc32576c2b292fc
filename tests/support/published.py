"""Models that people have, as data: which type each is, and what its config.json sets that decides how it computes; made small.

Sizes are those of tests/support/architectures.py (hidden states of 64, eight experts), everything that is neither named there nor here is
the default of transformers' own configuration class, which for most types is the published model's. What is named here are settings that
the published models are known for and that differ from the tests' own variants; they were written down without the files at hand.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM, PreTrainedModel

import moebit
from moebit.errors import BadInputError
from tests.support.architectures import TINY, Tiny
from tests.support.in_full import build, difference, load, logits_of, streamed_logits
from tests.support.models import quiet, windows
from tests.support.outputs import token_file

TOLERANCE = 1e-3  # of the largest logit
ROUNDED = 0.05  # where inputs are rounded to a few bits, a last digit may move one to the next step
RECIPES = ("rtn-w4", "gptq-w4", "best-w4", "awq-w4", "moequant-w4", "eaquant-w4a4")
HEADS = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
SMALL: dict[str, Any] = {"weights.group_size": -1, "calibration.samples": 4, "calibration.seq_len": 24}


@dataclass(frozen=True)
class Published:
    """A published model. `settings` are those of its config.json beside what `TINY[model_type]` has."""

    name: str
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def tiny(self) -> Tiny:
        base = TINY[self.model_type]
        return replace(base, config={**base.config, **self.settings})


ONE_GROUP = {"n_group": 1, "topk_group": 1}
GREEDY = {**ONE_GROUP, "topk_method": "greedy"}
PUBLISHED = {
    each.name: each
    for each in (
        Published("Qwen3-30B-A3B", "qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1}),
        Published("Qwen3-Next-80B-A3B", "qwen3_next"),
        Published("Qwen3.5 MoE", "qwen3_5_moe"),
        Published("Qwen3-VL-30B-A3B", "qwen3_vl_moe", {"mlp_only_layers": []}),
        Published("GLM-4.5-Air", "glm4_moe", {**ONE_GROUP, "routed_scaling_factor": 1.0, "norm_topk_prob": True}),
        Published("GLM-4.7-Flash", "glm4_moe_lite"),
        Published("GLM-5", "glm_moe_dsa"),
        Published(
            "DeepSeek-V2-Lite", "deepseek_v2", {**ONE_GROUP, "topk_method": "greedy", "q_lora_rank": None, "routed_scaling_factor": 1.0}
        ),
        Published("DeepSeek-V3", "deepseek_v3"),
        Published("DeepSeek-V3.2", "deepseek_v32"),
        Published("Kimi-K2", "deepseek_v3", {**ONE_GROUP, "routed_scaling_factor": 2.827, "norm_topk_prob": True}),
        Published("Kimi-Linear-48B-A3B", "kimi_linear"),
        Published("gpt-oss-20b", "gpt_oss"),
        Published("MiniMax-M2", "minimax_m2"),
        Published("Llama-4-Scout", "llama4"),
        Published("Granite-4.0-H-Small", "granitemoehybrid"),
        Published("ERNIE-4.5-21B-A3B", "ernie4_5_moe"),
        Published("Hunyuan-A13B", "hunyuan_v1_moe"),
        Published("LFM2-8B-A1B", "lfm2_moe"),
        Published("Ling 2.5", "bailing_hybrid"),
        Published("dots.llm1", "dots1", ONE_GROUP),
        Published("OLMoE-1B-7B", "olmoe", {"clip_qkv": None}),
        Published("Phi-3.5-MoE", "phimoe"),
        Published("Jamba-1.5-Mini", "jamba"),
        Published("Nemotron-3-Nano", "nemotron_h"),
        Published("Gemma 4 26B-A4B", "gemma4"),
        Published("Mixtral-8x7B", "mixtral", {"router_jitter_noise": 0.0}),
        Published("Step-3.7", "step3p7"),
    )
}


@dataclass(frozen=True)
class Tried:
    """What came out of one recipe and format: `difference` of the logits where it ran, else why it was refused."""

    difference: float | None = None
    refused: str = ""


def trials(published: Published, work: Path, recipes: tuple[str, ...] = RECIPES) -> dict[str, Tried]:
    """Every recipe in the native format, and round-to-nearest as compressed-tensors, each loaded with every auto class that knows the type.

    A native output in transformers is compared with moebit's own streaming of the same files; a compressed-tensors output with the native
    one of the same codes, and every further class with the first.
    """
    tiny = published.tiny
    try:
        source = build(tiny, work / "source")
        text = token_file(work / "text.jsonl", 400, vocabulary=100)
        moebit.inspect(source)
        result = {recipe: _tried(lambda recipe=recipe: _native(tiny, source, work / recipe, recipe, text)) for recipe in recipes}
        result["compressed-tensors"] = _tried(lambda: _compressed(tiny, source, work))
        return result
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _tried(run: Callable[[], float]) -> Tried:
    try:
        return Tried(run())
    except BadInputError as error:
        return Tried(refused=str(error).split(";")[0])


def _native(tiny: Tiny, source: Path, out: Path, recipe: str, text: Path) -> float:
    with quiet():
        moebit.quantize(source, out, recipe=recipe, overrides=SMALL, text=[text], accept_unquantized=True)
    whole = logits_of(load(tiny, out))
    return max(difference(whole, streamed_logits(out)), *_other_classes(out, whole))


def _compressed(tiny: Tiny, source: Path, work: Path) -> float:
    changes = {"weights.group_size": -1, "solver.clip_search": False}
    for format in ("compressed-tensors", "native"):
        moebit.quantize(source, work / format, recipe="rtn-w8", overrides=changes, format=format, engine="transformers")
    packed, native = (logits_of(load(tiny, work / format)) for format in ("compressed-tensors", "native"))
    return max(difference(packed, native), *_other_classes(work / "compressed-tensors", packed))


def _other_classes(directory: Path, wanted: Tensor) -> list[float]:
    """The differences of the logits by every auto class that knows this configuration; without a head, nothing must be missing."""
    config = AutoConfig.from_pretrained(directory)
    found = [0.0]
    for kind in HEADS:
        if type(config) in kind._model_mapping:
            found.append(difference(logits_of(_complete(kind, directory)), wanted))
    if type(config) in AutoModel._model_mapping:
        with torch.no_grad():
            assert _complete(AutoModel, directory)(windows()[:1], use_cache=False).last_hidden_state.isfinite().all()
    return found


def _complete(kind: Any, directory: Path) -> PreTrainedModel:
    with quiet():
        model, info = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"], (kind.__name__, sorted(info["missing_keys"])[:3])
    return model.eval()  # type: ignore[no-any-return]
