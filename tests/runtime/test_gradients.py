"""Gradients through packed weights against those of the original model with the weights that a naive reader finds in the files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import moebit
from moebit.runtime.packed import PackedModule
from moebit.tensor.row_rounding import Rounding
from tests.support.models import ARCHITECTURES, Architecture, Checkpoints, quiet, windows
from tests.support.outputs import Outputs, small_recipe, with_weights

NAMED = [ARCHITECTURES[name] for name in ("olmoe", "gpt_oss", "deepseek_v3")]
OTHERS = [architecture for architecture in ARCHITECTURES.values() if architecture not in NAMED]


def load(directory: Path) -> PreTrainedModel:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()  # type: ignore[no-any-return]


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Of every parameter that has one, from the loss of a language model on some windows."""
    ids = windows()[:2]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def check(architecture: Architecture, checkpoints: Checkpoints, output: Path) -> None:
    loaded, original = load(output), with_weights(architecture, checkpoints.path(architecture), output)
    found, wanted = gradients(loaded), gradients(original)
    own = set(dict(loaded.named_parameters())) & set(wanted)
    assert own <= set(found)
    assert any("norm" in name for name in own)  # they lie in front of experts and behind them
    for name in own:
        torch.testing.assert_close(found[name], wanted[name], rtol=2e-3, atol=2e-5 * float(wanted[name].abs().max().clamp(min=1e-3)))


@pytest.mark.parametrize("architecture", NAMED, ids=str)
def test_gradients_of_the_function_that_is_computed(architecture: Architecture, checkpoints: Checkpoints, outputs: Outputs) -> None:
    """Everything that is not packed: norms, embeddings, routers and, where there are some, the experts' biases."""
    check(architecture, checkpoints, outputs.rtn(architecture, symmetric=False, mixed=True))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", OTHERS, ids=str)
def test_gradients_elsewhere(architecture: Architecture, checkpoints: Checkpoints, outputs: Outputs) -> None:
    check(architecture, checkpoints, outputs.rtn(architecture, symmetric=False, mixed=True))


def test_experts_that_stay_in_full_precision(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """One layer's experts are packed and the other's are parameters, which have gradients of their own."""
    architecture = ARCHITECTURES["olmoe"]
    recipe = small_recipe("rtn", weights={"ignore": ["*layers.0.mlp.experts"]})
    moebit.quantize(checkpoints.path(architecture), tmp_path / "out", recipe=recipe)
    check(architecture, checkpoints, tmp_path / "out")


def test_only_what_leads_to_a_parameter_is_kept(outputs: Outputs) -> None:
    """No dequantized weight waits for the backward pass: what is kept is far smaller than the weights."""
    loaded = load(outputs.rtn(NAMED[0], mixed=True))
    loaded.requires_grad_(False)
    loaded.get_input_embeddings().weight.requires_grad_(True)
    shapes = {module.spec.shape for module in loaded.modules() if isinstance(module, PackedModule)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        loaded(input_ids=windows()[:1], use_cache=False).logits.sum().backward()
    assert kept
    assert not [t for t in kept if tuple(t.shape) in shapes or tuple(reversed(t.shape)) in shapes]


def test_checkpointing_changes_nothing(outputs: Outputs) -> None:
    loaded = load(outputs.rtn(NAMED[0], mixed=True))
    experts = next(module for name, module in loaded.named_modules() if name.endswith("mlp.experts"))
    x = torch.randn(12, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    ids, weights = torch.arange(24).reshape(12, 2) % 8, torch.full((12, 2), 0.5)
    (plain,) = torch.autograd.grad(experts(x, ids, weights).sum(), x)
    (again,) = torch.autograd.grad(checkpoint(experts, x, ids, weights, use_reentrant=False).sum(), x)
    assert torch.equal(plain, again)


@pytest.mark.parametrize("rounding", [Rounding(4, symmetric=False), Rounding(8, symmetric=True), Rounding(8, True, float8=True)])
def test_rounded_inputs_pass_gradients_on(rounding: Rounding) -> None:
    """The derivative of a staircase is zero; what is taken is that of the line which it follows."""
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    weight = torch.arange(16.0)
    (gradient,) = torch.autograd.grad((rounding(x) * weight).sum(), x)
    assert torch.equal(gradient, weight.expand(3, 16))
    assert torch.equal(rounding(x).detach(), rounding(x.detach()))


# --- other ways to load and run


def test_without_the_head(outputs: Outputs) -> None:
    output = outputs.rtn(NAMED[0], mixed=True)
    with quiet():
        inside = AutoModel.from_pretrained(output, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = inside(windows()).last_hidden_state
        wanted = load(output)(windows(), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [ARCHITECTURES["olmoe"], ARCHITECTURES["gpt_oss"]], ids=str)
def test_compiled(architecture: Architecture, outputs: Outputs) -> None:
    """Products with packed weights stay outside of what torch.compile makes; everything around them is compiled."""
    model = load(outputs.rtn(architecture, mixed=True))
    with torch.no_grad():
        wanted = model(windows()[:1], use_cache=False).logits
        found = torch.compile(model, backend="eager")(windows()[:1], use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
