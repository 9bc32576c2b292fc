"""Scales and offsets of ggml's blocks, searched against a weight per column, and chosen as they will be stored.

A group's scale and offset are searched first: from several shares of its range, each followed by weighted least squares given the codes
(the idea of `make_qx_quants` and `make_qkx3_quants` in llama.cpp's `ggml-quants.c`), the best of them refined by rounding and least squares
in turns. Super-blocks then need one divisor for all their groups' scales, and one for their offsets: many divisors are tried on the
quadratic model of each group's error, integers next to the model's choice are tried on the real error, and the divisors are fitted again.

Shapes: E experts, G groups of a row, S super-blocks of a row, N groups of a super-block, R rows. Weights lie as `Piece` describes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moebit.tensor.grids.ggml_moments import Moments, Piece, inverse, moments

LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Attributes:
        steps: how many codes further than the last one the end of the range is put, negative ones less far; one scale is made from each.
        rounds: turns of rounding and least squares, for groups and for super-blocks.
    """

    steps: tuple[float, ...]
    rounds: int


def half(value: Tensor) -> Tensor:
    """The nearest float16, at most the largest finite one, as float32."""
    result: Tensor = value.clamp(-LARGEST_HALF, LARGEST_HALF).to(torch.float16).to(torch.float32)
    return result


def scale_only(piece: Piece, effort: Effort) -> Tensor:
    """float32 [E, G, R]: signed scales of groups without an offset."""
    high, low = piece.x.amax(2), piece.x.amin(2)
    extreme = torch.where(high >= -low, high, low)
    best, least = extreme / piece.low, torch.full_like(extreme, torch.inf)
    for step in effort.steps:
        for end in (piece.low, piece.high):
            best, least = _better_scale(piece, extreme / (end * (1 + 2 * step / piece.codes)), best, least)
    for _ in range(effort.rounds):
        best, least = _better_scale(piece, best, best, least)
    return best


def _better_scale(piece: Piece, scale: Tensor, best: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    sums = moments(piece, scale, None)
    step = _ratio(sums.rq, sums.qq)
    error = sums.rr - step * sums.rq
    better = error < least
    return torch.where(better, scale + step, best), torch.where(better, error, least)


def scale_and_offset(piece: Piece, effort: Effort, nonpositive: bool) -> tuple[Tensor, Tensor]:
    """float32 [E, G, R] each: scales and offsets of groups; offsets at most 0 where `nonpositive`."""
    high, low = piece.x.amax(2), piece.x.amin(2)
    if nonpositive:
        low = low.clamp(max=0)
    extent, top = high - low, piece.high
    state = (extent / top, low, torch.full_like(low, torch.inf))
    for step in effort.steps:
        scale = extent / (top + step)
        for share in (0.0, 0.5, 1.0) if step > 0 else (0.5,):
            state = _better_pair(piece, scale, low + share * step * scale, state, nonpositive)
    for _ in range(effort.rounds):
        state = _better_pair(piece, state[0], state[1], state, nonpositive)
    return state[0], state[1]


def _better_pair(
    piece: Piece, scale: Tensor, offset: Tensor, state: tuple[Tensor, Tensor, Tensor], nonpositive: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if nonpositive:
        offset = offset.clamp(max=0)
    sums, total = moments(piece, scale, offset), piece.total
    determinant = sums.qq * total - sums.q.square()
    sound = determinant > 1e-6 * sums.qq * total
    by = inverse(torch.where(sound, determinant, 0.0))
    ds, do = (sums.rq * total - sums.r * sums.q) * by, (sums.qq * sums.r - sums.q * sums.rq) * by
    if nonpositive:
        over = offset + do > 0
        do = torch.where(over, -offset, do)
        ds = torch.where(over, _ratio(sums.rq - sums.q * do, sums.qq), ds)
    error = sums.rr - 2 * (ds * sums.rq + do * sums.r) + ds * (ds * sums.qq + 2 * do * sums.q) + do.square() * total
    better = error < state[2]
    return tuple(torch.where(better, new, old) for new, old in zip((scale + ds, offset + do, error), state, strict=True))  # type: ignore[return-value]


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return a * inverse(b)


def divisor(value_ESNR: Tensor, weight_ESNR: Tensor, low: int, high: int) -> Tensor:
    """[E, S, 1, R]: the d for which integers low … high times d come nearest to the values of a super-block, by weighted least squares.

    Tried are those that put the value of largest magnitude on, or a little beside, an integer of the outer third of the range.
    """
    top, bottom = value_ESNR.amax(2, keepdim=True), value_ESNR.amin(2, keepdim=True)
    extreme = torch.where(top >= -bottom, top, bottom)
    best: Tensor = torch.zeros_like(extreme)
    least = torch.full_like(extreme, torch.inf)
    for end in _ends(low, high):
        d = extreme / end
        for _ in range(2):
            code = (value_ESNR * inverse(d)).round_().clamp_(low, high)
            d = _ratio((weight_ESNR * code * value_ESNR).sum(2, keepdim=True), (weight_ESNR * code * code).sum(2, keepdim=True))
        error = (weight_ESNR * (value_ESNR - d * code).square()).sum(2, keepdim=True)
        best, least = torch.where(error < least, d, best), torch.minimum(error, least)
    return best


def _ends(low: int, high: int) -> list[float]:
    sides = [high] if low >= 0 else [low, high]
    return [side * (1.03 - 0.4 * step / 12) for side in sides for step in range(13)]


def _as_super(value_EGR: Tensor, n: int) -> Tensor:
    result: Tensor = value_EGR.unflatten(1, (-1, n))
    return result


@dataclass(frozen=True)
class Super:
    """A super-block's numbers as they are stored: d and dmin [E, S, 1, R] float16 values, integers [E, S, N, R], all held as float32."""

    d: Tensor
    scale: Tensor
    dmin: Tensor | None = None
    minimum: Tensor | None = None

    def pair(self) -> tuple[Tensor, Tensor | None]:
        """Scale and offset of every group, [E, G, R]."""
        offset = None if self.dmin is None or self.minimum is None else -(self.dmin * self.minimum).flatten(1, 2)
        return (self.d * self.scale).flatten(1, 2), offset


def super_scales(piece: Piece, effort: Effort, n: int, low: int, high: int) -> Super:
    """Super-blocks without offsets: integer scales low … high of n groups, times d."""
    scale = scale_only(piece, effort)
    curvature = moments(piece, scale, None).qq
    d = half(divisor(_as_super(scale, n), _as_super(curvature, n), low, high))
    state = Super(d, (_as_super(scale, n) * inverse(d)).round().clamp(low, high))
    for _ in range(effort.rounds):
        state, sums = _best_neighbours(piece, state, n, (low, high), (0, 0))
        rq, qq = _as_super(sums.rq, n), _as_super(sums.qq, n)
        step = _ratio((state.scale * rq).sum(2, keepdim=True), (state.scale.square() * qq).sum(2, keepdim=True))
        state = _kept(piece, state, Super(half(state.d + step), state.scale), sums, n)
    return state


def super_pairs(piece: Piece, effort: Effort, n: int, high: int) -> Super:
    """Super-blocks with offsets: integer scales and mins 0 … high of n groups, times d and -dmin."""
    scale, offset = scale_and_offset(piece, effort, nonpositive=True)
    sums, total = moments(piece, scale, offset), _as_super(piece.total.expand_as(scale), n)
    mean = _as_super(sums.q, n) / total
    scale, offset = _as_super(scale, n), _as_super(offset, n)
    d = half(divisor(scale, _as_super(sums.qq, n), 0, high))
    codes = (scale * inverse(d)).round().clamp(0, high)
    wanted = (mean * (d * codes - scale) - offset).clamp(min=0)  # a scale that was rounded asks for another offset
    dmin = half(divisor(wanted, total, 0, high))
    state = Super(d, codes, dmin, (wanted * inverse(dmin)).round().clamp(0, high))
    for _ in range(effort.rounds):
        state, sums = _best_neighbours(piece, state, n, (0, high), (0, high))
        state = _kept(piece, state, _refitted(state, sums, n, total), sums, n)
    return state


def _refitted(state: Super, sums: Moments, n: int, total: Tensor) -> Super:
    """d and dmin by least squares, given all integers."""
    assert state.dmin is not None
    assert state.minimum is not None
    sc, m = state.scale, state.minimum
    q, qq, r, rq = (_as_super(value, n) for value in (sums.q, sums.qq, sums.r, sums.rq))
    a, b, c = ((sc * sc * qq).sum(2, keepdim=True), -(sc * m * q).sum(2, keepdim=True), (m * m * total).sum(2, keepdim=True))
    u, v = (sc * rq).sum(2, keepdim=True), -(m * r).sum(2, keepdim=True)
    determinant = a * c - b * b
    by = inverse(torch.where(determinant > 1e-6 * a * c, determinant, 0.0))
    return Super(half(state.d + (u * c - v * b) * by), sc, half(state.dmin + (v * a - u * b) * by), m)


def _kept(piece: Piece, old: Super, new: Super, old_sums: Moments, n: int) -> Super:
    """The better of both, super-block by super-block."""
    before, after = (_as_super(sums.rr, n).sum(2, keepdim=True) for sums in (old_sums, moments(piece, *new.pair())))
    better = after < before
    dmin = None if new.dmin is None or old.dmin is None else torch.where(better, new.dmin, old.dmin)
    return Super(torch.where(better, new.d, old.d), old.scale, dmin, old.minimum)


def _best_neighbours(piece: Piece, state: Super, n: int, scales: tuple[int, int], mins: tuple[int, int]) -> tuple[Super, Moments]:
    """Choose for every group the neighbouring integers (one up or down in each) with the least real error; also return their sums."""
    best, sums = state, moments(piece, *state.pair())
    for up, more in _NEIGHBOURS if state.minimum is not None else _NEIGHBOURS[:2]:
        scale = (state.scale + up).clamp(*scales)
        minimum = None if state.minimum is None else (state.minimum + more).clamp(*mins)
        trial = Super(state.d, scale, state.dmin, minimum)
        found = moments(piece, *trial.pair())
        better = found.rr < sums.rr
        apart = _as_super(better, n)
        if best.minimum is not None and minimum is not None:
            minimum = torch.where(apart, minimum, best.minimum)
        best = Super(state.d, torch.where(apart, scale, best.scale), state.dmin, minimum)
        sums = Moments(*(torch.where(better, new, old) for new, old in zip(_values(found), _values(sums), strict=True)))
    return best, sums


_NEIGHBOURS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1))


def _values(sums: Moments) -> Iterator[Tensor]:
    return iter((sums.q, sums.qq, sums.r, sums.rq, sums.rr))
