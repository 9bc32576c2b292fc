"""Gradients of layers' outputs against transformers and autograd, and what they predict against a measured divergence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moebit.model.expert_gradients import GroupedLinear
from moebit.model.opening import open_hub_checkpoint
from moebit.model.structure import find_structure
from moebit.profiling.sensitivity import SEED, layer_gradients, predicted_kl
from moebit.streaming.stream import Stream
from tests.support.models import ARCHITECTURES, Checkpoints, windows


def test_grouped_products_have_the_gradients_of_plain_ones() -> None:
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(7, 5, generator=draw, dtype=torch.float64), torch.randn(3, 4, 5, generator=draw, dtype=torch.float64)
    bias, bounds = torch.randn(3, 4, generator=draw, dtype=torch.float64), [0, 3, 3, 7]  # the second expert has no rows
    leaves = [tensor.requires_grad_() for tensor in (x, w, bias)]
    assert torch.autograd.gradcheck(lambda *given: GroupedLinear.apply(*given, bounds), leaves)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("chunk", [1, 99])
def test_gradients_are_autograds(name: str, chunk: int, checkpoints: Checkpoints) -> None:
    """The whole model in transformers, the same labels, one backward: routers and affinities included, however few experts fit."""
    architecture = ARCHITECTURES[name]
    reference = checkpoints.reference(architecture)
    seen: list[torch.Tensor] = []

    def note(module: Any, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(note) for layer in reference.layers]
    try:
        logits = reference.model(input_ids=windows(), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    log_prob, generator = logits.float().log_softmax(-1), torch.Generator().manual_seed(SEED)
    labels = torch.stack([torch.multinomial(row.detach().exp(), 1, generator=generator) for row in log_prob])
    wanted = torch.autograd.grad(log_prob.gather(2, labels).sum(), seen)

    checkpoint = open_hub_checkpoint(checkpoints.path(architecture))
    structure = find_structure(checkpoint.model)
    found = layer_gradients(Stream(checkpoint, structure, windows()), {layer.index: chunk for layer in structure.layers})
    for index, gradient in enumerate(wanted):
        torch.testing.assert_close(found[index], gradient.flatten(0, 1).float(), rtol=2e-3, atol=2e-4)


def test_the_prediction_is_the_divergence_of_a_softmax() -> None:
    """One token whose output is the logits themselves: exact Fisher information, drawn labels, a small change."""
    draw = torch.Generator().manual_seed(1)
    logits, change = torch.randn(5, generator=draw, dtype=torch.float64), 0.01 * torch.randn(5, generator=draw, dtype=torch.float64)
    p = logits.softmax(0)
    labels = torch.multinomial(p, 200_000, replacement=True, generator=draw)
    gradients = torch.nn.functional.one_hot(labels, 5).double() - p
    measured = float((p * (logits.log_softmax(0) - (logits + change).log_softmax(0))).sum())
    assert predicted_kl(gradients, change.expand(len(labels), 5)) == pytest.approx(measured, rel=0.02)
