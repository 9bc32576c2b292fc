"""The experts' second moments against loops over single tokens in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moebit.calibration.statistics import LAYER_SAMPLE, ExpertMoments, down_layer_hessians, layer_sample, output_sensitivity
from moebit.model.experts import ExpertWeights, layout_of
from tests.support import reference
from tests.support.models import ARCHITECTURES, Checkpoints

N, BOUNDS = 6, [0, 9, 9, 10, 40]  # four experts with 9, 0, 1 and 30 tokens


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [S, N], affinities [S] and the layer's mean second moment [N, N]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BOUNDS[-1], N, generator=generator)
    layer = torch.randn(200, N, generator=generator)
    return x, torch.rand(BOUNDS[-1], generator=generator) + 0.05, layer.T @ layer / 200


def expert_hessians(x: Tensor, affinity: Tensor, bounds: list[int], power: float, h_layer: Tensor) -> Tensor:
    """[C, N, N] by the code under test, in one piece."""
    moments = ExpertMoments.zeros(len(bounds) - 1, x.shape[1], power)
    moments.add(x, affinity, bounds)
    return moments.shrunk(h_layer)


def naive(x: Tensor, affinity: Tensor, bounds: list[int], power: float, h_layer: Tensor) -> np.ndarray:
    result = []
    for expert, (low, high) in enumerate(itertools.pairwise(bounds)):
        weights = np.array([abs(float(g)) ** power for g in affinity[low:high]])
        own = h_layer if h_layer.ndim == 2 else h_layer[expert]
        result.append(reference.shrink(*reference.weighted_hessian(x[low:high].double().numpy(), weights), own.double().numpy()))
    return np.stack(result)


@pytest.mark.parametrize("power", [0, 0.5, 1, 2])
def test_against_loops(power: float) -> None:
    x, affinity, h_layer = problem()
    found = expert_hessians(x, affinity, BOUNDS, power, h_layer)
    assert found.shape == (4, N, N)
    np.testing.assert_allclose(found.numpy(), naive(x, affinity, BOUNDS, power, h_layer), rtol=1e-4, atol=1e-5)


def test_a_layer_moment_for_each_expert() -> None:
    x, affinity, h_layer = problem()
    each = torch.stack([h_layer * (expert + 1) for expert in range(4)])
    found = expert_hessians(x, affinity, BOUNDS, 1.0, each)
    np.testing.assert_allclose(found.numpy(), naive(x, affinity, BOUNDS, 1.0, each), rtol=1e-4, atol=1e-5)


def test_negative_affinities_count_by_their_size() -> None:
    x, affinity, h_layer = problem()
    signs = torch.where(torch.arange(len(affinity)) % 3 == 0, -1.0, 1.0)
    assert torch.equal(expert_hessians(x, affinity * signs, BOUNDS, 1.0, h_layer), expert_hessians(x, affinity, BOUNDS, 1.0, h_layer))


def test_no_tokens_take_the_layers() -> None:
    x, affinity, h_layer = problem()
    for power in (0, 1):
        assert torch.equal(expert_hessians(x, affinity, BOUNDS, power, h_layer)[1], h_layer)
    nothing = expert_hessians(x[:0], affinity[:0], [0, 0, 0], 1.0, h_layer)
    assert torch.equal(nothing, torch.stack([h_layer, h_layer]))


def test_affinities_of_zero_are_no_tokens() -> None:
    x, affinity, h_layer = problem()
    affinity[:9] = 0
    assert torch.equal(expert_hessians(x, affinity, BOUNDS, 1.0, h_layer)[0], h_layer)


def test_shrinkage_fades_with_tokens() -> None:
    """c = N / (N + n_eff): one token keeps 1/7 of its own, a thousand all but 6/1006."""
    x = torch.zeros(1001, N)
    x[:, 0] = 1.0
    h_layer = torch.diag(torch.tensor([0.0] + [1.0] * (N - 1)))
    found = expert_hessians(x, torch.full((1001,), 0.3), [0, 1, 1001], 1.0, h_layer)
    assert float(found[0, 0, 0]) == pytest.approx(1 / 7, rel=1e-5)
    assert float(found[0, 1, 1]) == pytest.approx(6 / 7, rel=1e-5)
    assert float(found[1, 0, 0]) == pytest.approx(1000 / 1006, rel=1e-5)


def test_equal_gates_are_no_gates() -> None:
    """Power 1 with every affinity 1 is power 0; so is any constant, the rule being scale-free."""
    x, affinity, h_layer = problem()
    plain = expert_hessians(x, affinity, BOUNDS, 0, h_layer)
    for constant in (1.0, 0.25):
        weighted = expert_hessians(x, torch.full_like(affinity, constant), BOUNDS, 1.0, h_layer)
        torch.testing.assert_close(weighted, plain, rtol=1e-5, atol=1e-6)


def test_doubling_an_affinity_is_repeating_the_token_in_the_sum() -> None:
    """In sum g x x^T / sum g, but not in the number of tokens: a token twice as important is still one observation."""
    x, _, h_layer = problem()
    x = x[:5]
    doubled, repeated = torch.tensor([1.0, 1, 2, 1, 1]), torch.cat([x, x[2:3]])
    weighted = expert_hessians(x, doubled, [0, 5], 1.0, h_layer)[0]
    twice = expert_hessians(repeated, torch.ones(6), [0, 6], 1.0, h_layer)[0]

    def own(shrunk: Tensor, effective: float) -> Tensor:
        c = N / (N + effective)
        return (shrunk - c * h_layer) / (1 - c)

    torch.testing.assert_close(own(weighted, 36 / 8), own(twice, 6.0), rtol=1e-4, atol=1e-5)  # n_eff = (sum w)^2 / sum w^2
    assert not torch.allclose(weighted, twice, rtol=1e-2)


def test_layer_sample_is_even() -> None:
    assert layer_sample(7).tolist() == list(range(7))
    many = layer_sample(10 * LAYER_SAMPLE + 3)
    assert len(many) == LAYER_SAMPLE
    assert many[0] == 0
    assert set(many.diff().tolist()) == {10, 11}
    assert int(many[-1]) < 10 * LAYER_SAMPLE + 3
    assert len(layer_sample(0)) == 0


class Gated(nn.Module):
    """An experts module as far as `intermediate` looks at one: gate rows first, then up, and SiLU."""

    has_gate = True

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up


def test_down_sees_the_layer_through_each_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    experts, width, tokens = 3, 4, 11
    x = torch.randn(tokens, N, generator=generator)
    weights = ExpertWeights(torch.randn(experts, 2 * width, N, generator=generator), torch.zeros(experts, N, width))
    found = down_layer_hessians(Gated(), x, weights).double().numpy()
    for e in range(experts):
        wanted = np.zeros((width, width))
        for token in x.double().numpy():
            a, u = (weights.first[e, part].double().numpy() @ token for part in (slice(0, width), slice(width, None)))
            h = a / (1 + np.exp(-a)) * u
            wanted += np.outer(h, h) / tokens
        np.testing.assert_allclose(found[e], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_what_an_error_costs_in_the_output(checkpoints: Checkpoints, name: str) -> None:
    """The slot's weight by definition: push each output of gate and up a little, see how far the expert's output goes.

    SwiGLU, gpt-oss's own gating with rows that alternate, and squared ReLU without a gate.
    """
    architecture = ARCHITECTURES[name]
    model = checkpoints.reference(architecture).model
    experts = next(module for path, module in model.named_modules() if path.endswith(f"{architecture.block}.experts"))
    layout = layout_of(experts, name)
    first, down = (layout.stacked(experts.get_parameter(p).detach().double()) for p in (layout.first, "down_proj"))
    biases = [experts.get_parameter(f"{p}_bias").detach().double() for p in (layout.first, "down_proj")] if layout.bias else []
    weights = ExpertWeights(first[:2], down[:2], *(bias[:2] for bias in biases))
    generator = torch.Generator().manual_seed(0)
    x, affinity = torch.randn(5, layout.hidden, generator=generator).double(), torch.rand(5, generator=generator)
    found = output_sensitivity(experts, layout, x, affinity, weights, [0, 3, 5])

    def output(expert: int, pushed: Tensor) -> Tensor:
        h = experts._apply_gate(pushed) if layout.gated else experts.act_fn(pushed)
        return h @ down[expert].T

    for slot, expert in enumerate([0, 0, 0, 1, 1]):
        out = x[slot] @ first[expert].T + (biases[0][expert] if biases else 0)
        total, step = 0.0, 1e-5
        for j in range(len(out)):
            push = torch.zeros_like(out)
            push[j] = step
            change = output(expert, (out + push).unsqueeze(0)) - output(expert, (out - push).unsqueeze(0))
            total += float((change / (2 * step)).square().sum())
        assert float(found[slot]) == pytest.approx(float(affinity[slot]) ** 2 * total, rel=1e-3)
