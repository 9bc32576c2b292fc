"""Where query, key and value can be rounded, against what transformers itself calls."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moebit.errors import BadInputError
from moebit.formats.opening import open_checkpoint
from moebit.model.attention import PREFIX, AttentionStep, find_attention, round_attention
from moebit.model.structure import find_structure
from moebit.tensor.row_rounding import Rounding
from tests.support.models import ARCHITECTURES, Architecture, Checkpoints, windows
from tests.support.reference import naive_round_row

QUICK = [ARCHITECTURES[name] for name in ("olmoe", "gpt_oss", "deepseek_v3", "qwen3_next", "jamba")]
OTHERS = [architecture for architecture in ARCHITECTURES.values() if architecture not in QUICK]
_called: list[Any] = []


def _recorder(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    _called.append(module)
    return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, *args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register("recorder", _recorder)
ALL_MASK_ATTENTION_FUNCTIONS.register("recorder", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def called(architecture: Architecture, checkpoints: Checkpoints) -> list[str]:
    """The modules that call attention through the interface in a whole forward."""
    model: Any = checkpoints.reference(architecture).model
    before = model.config._attn_implementation
    _called.clear()
    try:
        model.set_attn_implementation("recorder")
        with torch.no_grad():
            model(input_ids=windows()[:1], use_cache=False)
    finally:
        model.set_attn_implementation(before)
    names = {module: name for name, module in model.named_modules()}
    return [names[module] for module in _called]


def check(architecture: Architecture, checkpoints: Checkpoints, compute: torch.dtype = torch.float32) -> None:
    checkpoint = open_checkpoint(checkpoints.path(architecture), compute)
    structure = find_structure(checkpoint.model)
    found = find_attention(checkpoint.model, structure)
    assert list(found.modules) == called(architecture, checkpoints)
    with_some = {layer.name for layer in structure.layers if any(name.startswith(f"{layer.name}.") for name in found.modules)}
    assert set(found.inputs_only) == {layer.name for layer in structure.layers} - with_some
    implementation = checkpoint.model.config.get_text_config()._attn_implementation
    assert not implementation.startswith(PREFIX)  # looking leaves no trace
    assert all(p.device.type == "meta" for p in checkpoint.model.get_submodule(structure.list_name).parameters())


@pytest.mark.parametrize("architecture", QUICK, ids=str)
def test_found_where_transformers_calls_it(architecture: Architecture, checkpoints: Checkpoints) -> None:
    check(architecture, checkpoints)


@pytest.mark.parametrize("architecture", QUICK[:2], ids=str)
def test_found_whatever_it_is_computed_in(architecture: Architecture, checkpoints: Checkpoints) -> None:
    check(architecture, checkpoints, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", OTHERS, ids=str)
def test_found_elsewhere(architecture: Architecture, checkpoints: Checkpoints) -> None:
    check(architecture, checkpoints)


def test_a_step() -> None:
    """Rows are one token's of one head; queries and keys are turned first, values are not."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 3, 8, generator=g) for heads in (4, 2, 2))
    got = AttentionStep(Rounding(4, False, 0.9))(query, key, value)
    walsh = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(8)] for i in range(8)]) / 8**0.5
    for before, after in zip((query @ walsh, key @ walsh, value), got, strict=True):
        wanted = torch.tensor([naive_round_row(row.double().tolist(), 4, False, 0.9) for row in before.reshape(-1, 8)]).view(before.shape)
        torch.testing.assert_close(after, wanted.float(), rtol=1e-5, atol=1e-5)
    turned = AttentionStep(None)(query, key, value)
    torch.testing.assert_close(turned[0][:, :2] @ turned[1].mT, query[:, :2] @ key.mT, rtol=1e-5, atol=1e-5)
    assert turned[2] is value


def test_towers_and_others_are_left_alone(checkpoints: Checkpoints) -> None:
    """A module without a step attends as ever through the twin."""
    model: Any = checkpoints.reference(ARCHITECTURES["olmoe"]).model
    wanted = checkpoints.reference(ARCHITECTURES["olmoe"]).logits
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(PREFIX + before)
        with torch.no_grad():
            assert torch.equal(model(input_ids=windows(), use_cache=False).logits, wanted)
    finally:
        model.set_attn_implementation(before)


def test_round_attention_keeps_one_prefix() -> None:
    class Attention(torch.nn.Module):
        config: Any

    @dataclass
    class Config:
        _attn_implementation_internal: str

        @property
        def _attn_implementation(self) -> str:
            return self._attn_implementation_internal

    config, modules = Config("eager"), [Attention(), Attention(), Attention()]
    for module in modules[:2]:
        module.config = config
        round_attention(module, Rounding(4, True))
    assert config._attn_implementation == "moebit-eager"
    modules[2].config = Config("flex_attention")
    with pytest.raises(BadInputError, match=r"'flex_attention'.*attn_implementation='sdpa' or 'eager'"):
        round_attention(modules[2], Rounding(4, True))
