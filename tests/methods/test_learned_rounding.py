"""Learned rounding: the better of two codes is found, what no token reaches stays, and the beginning is never made worse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from moebit.methods.gumbel import GumbelLatent
from moebit.methods.latent import FACTORS, Latent
from moebit.methods.learned_rounding import Learned, Learning, Objective, learn_rounding
from moebit.tensor import QTensor, UniformGrid, solve_rtn
from moebit.tensor.grids.ggml import GRIDS

EXPERTS, ROWS, INPUTS, GROUP = 3, 6, 16, 8
GRID = UniformGrid(GROUP, False, scale_dtype=torch.bfloat16)
STEPS = Learning("straight_through", 40, (0.02,))
KINDS = ["straight_through", "sign", "gumbel"]


class Products(Objective):
    """Each matrix times inputs of its own, against what the weights themselves put out; the batch is all training tokens."""

    def __init__(self, w_EOI: Tensor, x_ETI: Tensor, held_ETI: Tensor) -> None:
        self.x, self.held = x_ETI, held_ETI
        self.target, self.held_target = x_ETI @ w_EOI.mT, held_ETI @ w_EOI.mT
        self.seen: list[float] = []

    def held_back(self, values: Mapping[str, Tensor]) -> float:
        self.seen.append(float((self.held @ values["w"].mT - self.held_target).square().mean()))
        return self.seen[-1]

    def gradients(self, values: Mapping[str, Tensor], step: int) -> tuple[float, dict[str, Tensor]]:
        missed = self.x @ values["w"].mT - self.target
        return float(missed.square().mean()), {"w": 2 * missed.mT @ self.x / missed.numel()}


def problem(seed: int = 0, tokens: int = 64, bits: int = 2) -> tuple[Tensor, QTensor, Products]:
    """Weights, their rounding to nearest, and correlated inputs, for which another rounding is better."""
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(EXPERTS, ROWS, INPUTS, generator=random)
    mixing = torch.randn(EXPERTS, INPUTS, INPUTS, generator=random)
    x, held = (torch.randn(EXPERTS, tokens, INPUTS, generator=random) @ mixing for _ in range(2))
    return w, solve_rtn(w, bits, GRID), Products(w, x, held)


def same(a: QTensor, b: QTensor) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.params.scale, b.params.scale)


def left(learned: Learned) -> float:
    course = learned.tries[learned.best]
    return course.held_back[course.at.index(learned.step)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_better_of_two_codes_is_found(kind: str) -> None:
    """Weights (0.4, 0.2) on inputs that always agree, 1 and 1.2: rounding gives 0, should be 0.64, and 1 x 1 is nearest to that."""
    w = torch.tensor([[[0.4, 0.2, 3.0, 0.0]]])
    q = solve_rtn(w, 2, UniformGrid(4, False), clip_search=False)
    assert q.codes.tolist() == [[[0, 0, 3, 0]]]
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 32, 1, generator=random) * torch.tensor([1.0, 1.2, 0.0, 0.0])
    learned = learn_rounding({"w": q}, {"w": w}, Products(w, x, x), Learning(kind, 100, (0.02,), scales=False))  # type: ignore[arg-type]
    errors = {(a, b): abs(1.0 * (a - 0.4) + 1.2 * (b - 0.2)) for a in range(4) for b in range(4)}
    assert tuple(learned.matrices["w"].codes[0, 0, :2].tolist()) == min(errors, key=lambda codes: errors[codes])
    assert learned.matrices["w"].codes[0, 0, 2:].tolist() == [3, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_ends_better_than_it_began_and_on_the_grid(kind: str, symmetric: bool) -> None:
    w, _, objective = problem()
    grid = UniformGrid(GROUP, symmetric, symmetric, torch.bfloat16)
    q = solve_rtn(w, torch.tensor([2, 3, 4]), grid)
    learned = learn_rounding({"w": q}, {"w": w}, objective, replace(STEPS, kind=kind))  # type: ignore[arg-type]
    result = learned.matrices["w"]
    assert left(learned) < 0.9 * objective.seen[0]
    assert objective.held_back({"w": result.dequantize()}) == pytest.approx(left(learned), rel=1e-6)
    assert (result.codes.amax((1, 2)) <= torch.tensor([3, 7, 15])).all()
    assert result.params.scale.dtype == torch.bfloat16
    ratio = result.params.scale.float() / q.params.scale.float()
    assert float(ratio.min()) > 0.99 * FACTORS[0]
    assert float(ratio.max()) < 1.01 * FACTORS[1]
    assert torch.equal(result.params.zero_point, q.params.zero_point)


def test_at_rate_zero_nothing_moves() -> None:
    w, q, objective = problem()
    learned = learn_rounding({"w": q}, {"w": w}, objective, replace(STEPS, rates=(0.0,)))
    assert same(learned.matrices["w"], q)
    assert learned.step == 0


def test_what_is_not_tuned_stays() -> None:
    w, q, objective = problem()
    codes = learn_rounding({"w": q}, {"w": w}, objective, replace(STEPS, scales=False)).matrices["w"]
    scales = learn_rounding({"w": q}, {"w": w}, objective, replace(STEPS, codes=False)).matrices["w"]
    assert torch.equal(codes.params.scale, q.params.scale)
    assert not torch.equal(codes.codes, q.codes)
    assert torch.equal(scales.codes, q.codes)
    assert not torch.equal(scales.params.scale, q.params.scale)


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_without_tokens_stays(kind: str) -> None:
    w, q, objective = problem()
    objective.x[1] = 0
    objective.target[1] = 0
    learned = learn_rounding({"w": q}, {"w": w}, objective, replace(STEPS, kind=kind)).matrices["w"]  # type: ignore[arg-type]
    assert torch.equal(learned.codes[1], q.codes[1])
    assert torch.equal(learned.params.scale[1], q.params.scale[1])
    assert not torch.equal(learned.codes, q.codes)


def test_held_back_tokens_that_are_another_matter_keep_the_beginning() -> None:
    """What is learned from the training tokens is of no use for the others, whose target is what rounding gives already."""
    w, q, objective = problem()
    objective.held_target = objective.held @ q.dequantize().mT
    learned = learn_rounding({"w": q}, {"w": w}, objective, STEPS)
    assert same(learned.matrices["w"], q)
    assert (learned.step, left(learned)) == (0, objective.seen[0])


def test_of_several_rates_the_best_is_kept() -> None:
    w, q, objective = problem()
    rates = (0.0, 0.02, 0.9)
    learned = learn_rounding({"w": q}, {"w": w}, objective, replace(STEPS, rates=rates))
    assert [course.rate for course in learned.tries] == list(rates)
    assert left(learned) == min(min(course.held_back) for course in learned.tries)
    alone = learn_rounding({"w": q}, {"w": w}, objective, replace(STEPS, rates=(rates[learned.best],)))
    assert same(learned.matrices["w"], alone.matrices["w"])


def test_permuting_matrices_permutes_results() -> None:
    w, q, objective = problem()
    order = torch.tensor([2, 0, 1])
    moved = QTensor(q.codes[order], replace(q.params, scale=q.params.scale[order], zero_point=q.params.zero_point[order]), q.bits, q.grid)
    other = Products(w[order], objective.x[order], objective.held[order])
    a = learn_rounding({"w": q}, {"w": w}, objective, STEPS).matrices["w"]
    b = learn_rounding({"w": moved}, {"w": w[order]}, other, STEPS).matrices["w"]
    assert torch.equal(a.codes[order], b.codes)
    assert torch.equal(a.params.scale[order], b.params.scale)


def test_gradients_past_the_rounding_are_those_of_the_smooth_map() -> None:
    """Of `scale factor (u - zero)`, written down again in float64 and differentiated numerically, at latents that are codes."""
    w, q, objective = problem()
    latent = Latent(q, q.dequantize())
    weight = np.random.default_rng(0).normal(size=w.shape)
    to_u, to_factors = latent.slopes(torch.from_numpy(weight).float())
    codes, scale = q.codes.double().numpy(), q.params.scale.double().numpy()
    zero = q.params.zero_point.double().numpy()

    def smooth(u: np.ndarray, factor: np.ndarray) -> float:
        return float((weight * np.repeat(scale * factor, GROUP, 2) * (u - np.repeat(zero, GROUP, 2))).sum())

    h, ones = 1e-5, np.ones_like(scale)
    for place in [(0, 0, 0), (1, 3, 9), (2, 5, 15)]:
        up, down = codes.copy(), codes.copy()
        up[place] += h
        down[place] -= h
        assert float(to_u.flatten(2)[place]) == pytest.approx((smooth(up, ones) - smooth(down, ones)) / (2 * h), rel=1e-4)
    for place in [(0, 0, 0), (2, 5, 1)]:
        up, down = ones.copy(), ones.copy()
        up[place] += h
        down[place] -= h
        assert float(to_factors["scale"][place]) == pytest.approx((smooth(codes, up) - smooth(codes, down)) / (2 * h), rel=1e-4)
    assert objective.seen == []


GGML = ["q4_0", "q4_1", "q2_k", "q3_k", "q4_k", "iq4_nl", "iq4_xs", "mxfp4", "nvfp4"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GGML)
def test_blocks_of_ggml_and_tables_end_better_and_can_be_stored(name: str, kind: str) -> None:
    """What comes out of the packed bytes is what the loss was taken of, on grids with offsets, integer scales, tables and exponents."""
    grid, random = GRIDS[name], torch.Generator().manual_seed(1)
    w = torch.randn(2, 4, 256, generator=random)
    mixing = torch.randn(2, 256, 256, generator=random)
    x = torch.randn(2, 96, 256, generator=random) @ mixing
    q, objective = solve_rtn(w, grid.bits, grid), Products(w, x, x)
    learned = learn_rounding({"w": q}, {"w": w}, objective, Learning(kind, 40, (0.02,)))  # type: ignore[arg-type]
    result = learned.matrices["w"]
    assert left(learned) < 0.97 * objective.seen[0]
    codes, params = grid.unpack(grid.pack(result.codes, result.params), 256)
    if hasattr(params, "tensor_scale"):
        params = replace(params, tensor_scale=result.params.tensor_scale)
    assert objective.held_back({"w": grid.dequantize(codes, params)}) == pytest.approx(left(learned), rel=1e-5)


@pytest.mark.parametrize("name", ["q4_1", "q2_k", "q3_k", "iq4_xs"])
def test_factors_of_scales_and_offsets_have_the_slope_of_the_grid(name: str) -> None:
    """The grid's own numbers, with d and dmin multiplied by a little in float32 and the codes held still, differentiated numerically."""
    grid, random = GRIDS[name], torch.Generator().manual_seed(2)
    w = torch.randn(1, 3, 256, generator=random)
    q, weight = solve_rtn(w, grid.bits, grid), torch.randn(1, 3, 256, generator=random)
    _, found = Latent(q, w).slopes(weight)
    assert set(found) == {name for name in grid.factored if getattr(q.params, name) is not None}
    for field, gradient in found.items():
        stored = getattr(q.params, field).float()
        for place in [(0, 0, 0), (0, 2, gradient.shape[2] - 1)]:
            sums = []
            for sign in (1, -1):
                moved = stored.clone()
                moved[place] *= 1 + sign * 0.01
                sums.append(float((weight.double() * grid.dequantize(q.codes, replace(q.params, **{field: moved})).double()).sum()))
            assert float(gradient[place]) == pytest.approx((sums[0] - sums[1]) / 0.02, rel=1e-3, abs=1e-4)


def test_drawn_codes_have_the_slope_of_their_mean() -> None:
    """The weights under the same noise, as the logits move a little, written down again in float64."""
    w, q, _ = problem()
    weight = np.random.default_rng(0).normal(size=w.shape)
    noise = -torch.empty(*w.shape[:2], INPUTS // GROUP, GROUP, 3).exponential_(generator=torch.Generator().manual_seed(3)).log().double()
    latent = GumbelLatent(q, w)
    value = latent.tried(0.5, torch.Generator().manual_seed(3))
    to_logits, _ = latent.slopes(torch.from_numpy(weight).float())
    scale, zero = (np.repeat(x.double().numpy(), GROUP, 2).reshape(*w.shape[:2], -1, GROUP) for x in (q.params.scale, q.params.zero_point))
    codes = q.codes.double().numpy().reshape(scale.shape)

    def smooth(logits: Tensor) -> Tensor:
        shares = ((logits + noise) / (0.1 + 0.9 * 0.5)).softmax(-1).numpy()
        numbers = np.clip(codes[..., None] + np.array([-1, 0, 1]), 0, 3) - zero[..., None]
        return torch.from_numpy((numbers * shares).sum(-1) * scale)

    begun = latent.logits.double()
    assert torch.allclose(value.double(), smooth(begun).flatten(-2), atol=1e-5)
    for place in [(0, 0, 0, 0, 1), (1, 3, 1, 2, 1), (2, 5, 1, 7, 1)]:
        up, down = begun.clone(), begun.clone()
        up[place] += 1e-4
        down[place] -= 1e-4
        slope = (torch.from_numpy(weight) * (smooth(up) - smooth(down)).flatten(-2)).sum() / 2e-4
        assert float(to_logits[place]) == pytest.approx(float(slope), rel=1e-3, abs=1e-5)


def test_a_latent_on_a_table_begins_between_its_neighbours() -> None:
    """Among the levels of e2m1, 2.6 lies 0.6 of the way from 2 to 3, to which it is rounded: its latent is 0.4 of a place below."""
    grid = GRIDS["mxfp4"]
    w = torch.zeros(1, 1, 32)
    w[0, 0, :2] = torch.tensor([6.0, 2.6])
    latent = Latent(solve_rtn(w, 4, grid, clip_search=False), w)
    codes = latent.q.codes[0, 0, :2].long()
    assert (latent.levels[codes] / 2).tolist() == [6.0, 3.0]  # type: ignore[index]
    assert (latent.u.flatten()[:2] - codes).tolist() == pytest.approx([0.0, -0.4], abs=1e-6)
