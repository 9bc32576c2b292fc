"""Names that other classes of the same architecture have for the same modules: every class loads the same model out of one output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

import moebit
from moebit.formats.class_names import in_every_class
from moebit.plan.bitplan import BitPlan
from moebit.plan.plan import Plan
from tests.support.architectures import TINY
from tests.support.in_full import build
from tests.support.models import ARCHITECTURES, Checkpoints, quiet, windows
from tests.support.outputs import small_recipe

CLASSES = {"wrapper": (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModel), "plain": (AutoModelForCausalLM, AutoModel)}


def hidden(directory: Path, kind: Any) -> Tensor:
    """What comes out of the last layer, with nothing missing and nothing left to chance."""
    with quiet():
        model, info = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"], kind
    with torch.no_grad():
        return model.eval()(windows()[:1], output_hidden_states=True, use_cache=False).hidden_states[-1]  # type: ignore[no-any-return]


def check(directory: Path, kinds: tuple[Any, ...]) -> None:
    wanted, *others = (hidden(directory, kind) for kind in kinds)
    for kind, found in zip(kinds[1:], others, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=lambda text, kind=kind: f"{kind.__name__}: {text}")


@pytest.mark.parametrize("format", ["compressed-tensors", "native"])
def test_plain_architectures(format: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Qwen2-MoE's gate of the shared expert stays as it is, under a name that begins otherwise without the head."""
    source = checkpoints.path(ARCHITECTURES["qwen2_moe"])
    moebit.quantize(source, tmp_path / "out", recipe=small_recipe("rtn", weights={"bits": 8}), format=format)
    check(tmp_path / "out", CLASSES["plain"])


WRAPPERS = [("qwen3_5_moe", "compressed-tensors"), ("qwen3_5_moe", "native"), ("qwen3_vl_moe", "native")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "format"), WRAPPERS)
def test_wrappers(name: str, format: str, tmp_path: Path) -> None:
    source = build(TINY[name], tmp_path / "source")
    moebit.quantize(source, tmp_path / "out", recipe=small_recipe("rtn", weights={"bits": 8}), format=format)
    config = AutoConfig.from_pretrained(source)
    check(tmp_path / "out", tuple(kind for kind in CLASSES["wrapper"] if type(config) in kind._model_mapping))


@pytest.mark.slow
def test_groups_of_several_kinds(tmp_path: Path) -> None:
    """Where linears and experts differ in width, config.json has a list of targets each, which has to match in every class as well."""
    source = build(TINY["qwen3_5_moe"], tmp_path / "source")
    planned = moebit.quantize(source, "unused", recipe=small_recipe("rtn"), dry_run=True)
    assert isinstance(planned, Plan)
    wide = BitPlan({}, {name: 8 for name in planned.linears if "self_attn" in name})
    moebit.quantize(source, tmp_path / "out", recipe=small_recipe("rtn"), format="compressed-tensors", plan=wide)
    check(tmp_path / "out", CLASSES["wrapper"])


def test_names() -> None:
    assert in_every_class("model.language_model.layers.0.mlp.gate") == [
        "model.language_model.layers.0.mlp.gate",
        "model.layers.0.mlp.gate",
        "language_model.layers.0.mlp.gate",
        "layers.0.mlp.gate",
    ]
    assert in_every_class("lm_head") == ["lm_head"]
    assert in_every_class("language_model.model.layers.0.x") == ["language_model.model.layers.0.x", "model.layers.0.x", "layers.0.x"]
