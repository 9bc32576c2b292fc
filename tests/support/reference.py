"""The oracle: the maths of `moebit.tensor` once more, as naive float64 loops over single matrices.

Nothing here is shared with moebit and nothing is fast: plain Python and numpy, one matrix at a time, written from the papers' formulas
(GPTQ: arXiv 2210.17323) with an explicit inverse, no blocks, no batching. Where moebit and this file disagree, one of them is wrong.
Shape suffixes: O output rows, I (also J) input channels, G groups of input channels, T tokens.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

ScaleDtype = Literal["float64", "float32", "float16", "bfloat16"]
CLIP_RATIOS = [1.0 - 0.05 * step for step in range(14)]  # 1.00, 0.95 … 0.35


@dataclass(frozen=True)
class Grid:
    """What a weight may become, apart from its scale: the oracle's own copy of the scheme, for one matrix of one width."""

    bits: int
    group_size: int = -1
    symmetric: bool = False
    signed: bool = False
    scale_dtype: ScaleDtype = "float64"

    @property
    def half(self) -> int:
        return 2 ** (self.bits - 1)


@dataclass(frozen=True)
class Quantized:
    """One quantized matrix. Symmetric codes are stored with 2^(b-1) added, so that every stored code is in [0, 2^b - 1]."""

    codes_OI: np.ndarray
    scale_OG: np.ndarray
    zero_point_OG: np.ndarray
    weight_OI: np.ndarray  # dequantized
    target_OI: np.ndarray  # what was rounded: the weights as they stood when their turn came
    loss: float = math.nan
    damping: float = math.nan


def round_scale(scale: float, dtype: ScaleDtype) -> float:
    """Round a scale as a tensor library stores it. Narrow types go through float32, as `Tensor.to` does."""
    if dtype == "float64":
        return float(scale)
    single = np.float32(scale)
    if dtype == "float32":
        return float(single)
    if dtype == "float16":
        return float(np.float16(single))
    word = int(single.view(np.uint32))
    word += 0x7FFF + ((word >> 16) & 1)  # round half to even on the upper 16 bits
    return float(np.uint32(word & 0xFFFF0000).view(np.float32))


def group_grid(values: list[float], grid: Grid, ratio: float = 1.0) -> tuple[float, int]:
    """Scale and zero point of one group, its range shrunk to `ratio`. The scale is rounded to its storage type first of all."""
    if grid.symmetric:
        zero_point = grid.half
        peak = max(values, key=abs)
        scale = -peak * ratio / grid.half if grid.signed else abs(peak) * ratio / (grid.half - 1)
    else:
        low, high = min(min(values), 0.0) * ratio, max(max(values), 0.0) * ratio
        scale = (high - low) / (2**grid.bits - 1)
    scale = round_scale(scale, grid.scale_dtype)
    if scale == 0.0:  # all zero, or too small for the storage type: every code means zero
        return 1.0, zero_point if grid.symmetric else 0
    if not grid.symmetric:
        zero_point = min(max(round(-low / scale), 0), 2**grid.bits - 1)
    return scale, zero_point


def encode(value: float, scale: float, zero_point: int, bits: int) -> int:
    """The stored code of one weight. Python's `round` is half to even."""
    return min(max(round(value / scale) + zero_point, 0), 2**bits - 1)


def decode(code: int, scale: float, zero_point: int) -> float:
    return scale * (code - zero_point)


def search_group_grid(values: list[float], importance: list[float], grid: Grid) -> tuple[float, int]:
    """The clipping ratio with the least weighted squared error; the largest ratio wins a tie."""
    best_error, best = math.inf, (1.0, 0)
    for ratio in CLIP_RATIOS:
        scale, zero_point = group_grid(values, grid, ratio)
        error = 0.0
        for value, weight in zip(values, importance, strict=True):
            error += weight * (decode(encode(value, scale, zero_point, grid.bits), scale, zero_point) - value) ** 2
        if error < best_error:
            best_error, best = error, (scale, zero_point)
    return best


def group_slices(in_features: int, group_size: int) -> list[slice]:
    size = in_features if group_size == -1 else group_size
    return [slice(start, start + size) for start in range(0, in_features, size)]


def matrix_grid(
    w_OI: np.ndarray, grid: Grid, importance_I: np.ndarray | None = None, clip_search: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points [O, G] of every row and group, from the matrix as it is."""
    slices = group_slices(w_OI.shape[1], grid.group_size)
    importance_I = np.ones(w_OI.shape[1]) if importance_I is None else importance_I
    scale_OG = np.empty((len(w_OI), len(slices)))
    zero_point_OG = np.empty((len(w_OI), len(slices)), dtype=np.int64)
    for row, w_I in enumerate(w_OI):
        for group, part in enumerate(slices):
            values = [float(value) for value in w_I[part]]
            if clip_search:
                pair = search_group_grid(values, [float(value) for value in importance_I[part]], grid)
            else:
                pair = group_grid(values, grid)
            scale_OG[row, group], zero_point_OG[row, group] = pair
    return scale_OG, zero_point_OG


def quantize_matrix(w_OI: np.ndarray, grid: Grid, scale_OG: np.ndarray, zero_point_OG: np.ndarray) -> Quantized:
    """Round to nearest on a given grid."""
    codes_OI = np.empty(w_OI.shape, dtype=np.int64)
    weight_OI = np.empty(w_OI.shape)
    for group, part in enumerate(group_slices(w_OI.shape[1], grid.group_size)):
        for row in range(len(w_OI)):
            for column in range(part.start, part.stop):
                scale, zero_point = float(scale_OG[row, group]), int(zero_point_OG[row, group])
                codes_OI[row, column] = encode(float(w_OI[row, column]), scale, zero_point, grid.bits)
                weight_OI[row, column] = decode(int(codes_OI[row, column]), scale, zero_point)
    return Quantized(codes_OI, scale_OG, zero_point_OG, weight_OI, w_OI)


def rtn(w_OI: np.ndarray, grid: Grid, importance_I: np.ndarray | None = None, clip_search: bool = True) -> Quantized:
    return quantize_matrix(w_OI, grid, *matrix_grid(w_OI, grid, importance_I, clip_search))


def hessian_loss(w_OI: np.ndarray, quantized_OI: np.ndarray, h_II: np.ndarray) -> float:
    """tr(dW H dW^T), row by row."""
    return float(sum(d_I @ h_II @ d_I for d_I in quantized_OI - w_OI))


def fill_dead(h_II: np.ndarray) -> np.ndarray:
    """Inputs that never fire (zero diagonal) get the mean of the live diagonal; without any live input the identity is all we know."""
    h_II = h_II.copy()
    dead = [channel for channel in range(len(h_II)) if h_II[channel, channel] == 0]
    live = [h_II[channel, channel] for channel in range(len(h_II)) if channel not in dead]
    if not live:
        return np.eye(len(h_II))
    for channel in dead:
        h_II[channel, channel] = sum(live) / len(live)
    return h_II


def damped(h_II: np.ndarray, damping: float) -> np.ndarray:
    """Dead inputs filled, plus `damping` times the mean diagonal (filling leaves that mean what it was for the live ones)."""
    filled_II = fill_dead(h_II)
    return filled_II + damping * float(np.mean(np.diag(filled_II))) * np.eye(len(h_II))


def column_order(h_II: np.ndarray, act_order: bool) -> np.ndarray:
    """Columns by falling diagonal, ties in their old order."""
    return np.argsort(-np.diag(fill_dead(h_II)), kind="stable") if act_order else np.arange(len(h_II))


def gptq(
    w_OI: np.ndarray,
    h_II: np.ndarray,
    grid: Grid,
    *,
    scales: Literal["static", "dynamic"] = "static",
    act_order: bool = True,
    damping: float = 0.01,
    clip_search: bool = True,
) -> Quantized:
    """Textbook GPTQ of one matrix: U = chol(H^-1)^T from an explicit inverse, then column by column with a full update of the rest.

    static: scales from W as given, importance diag(H). dynamic: a group's scales from its columns as they stand when the group begins
    (columns in their own order). Raises numpy's LinAlgError where the damped H is not positive definite.
    """
    assert scales == "static" or not act_order
    rows, columns = w_OI.shape
    importance_I = np.diag(fill_dead(h_II))
    order = column_order(h_II, act_order)
    hd_II = damped(h_II, damping)[np.ix_(order, order)]
    np.linalg.cholesky(hd_II)  # an indefinite H can have an inverse; it has no GPTQ
    u_II = np.linalg.cholesky(np.linalg.inv(hd_II)).T  # H^-1 = U^T U

    slices = group_slices(columns, grid.group_size)
    group_of = [group for group, part in enumerate(slices) for _ in range(part.start, part.stop)]
    scale_OG, zero_point_OG = matrix_grid(w_OI, grid, importance_I, clip_search)

    work_OI = w_OI[:, order].astype(np.float64)
    codes_OI = np.empty(w_OI.shape, dtype=np.int64)
    weight_OI, target_OI = np.empty(w_OI.shape), np.empty(w_OI.shape)
    for step in range(columns):
        column = int(order[step])
        group = group_of[column]
        part = slices[group]
        if scales == "dynamic" and column == part.start:
            one_group = Grid(grid.bits, -1, grid.symmetric, grid.signed, grid.scale_dtype)
            pair = matrix_grid(work_OI[:, part], one_group, importance_I[part], clip_search)
            scale_OG[:, group], zero_point_OG[:, group] = pair[0][:, 0], pair[1][:, 0]
        for row in range(rows):
            scale, zero_point = float(scale_OG[row, group]), int(zero_point_OG[row, group])
            codes_OI[row, column] = encode(float(work_OI[row, step]), scale, zero_point, grid.bits)
            weight_OI[row, column] = decode(int(codes_OI[row, column]), scale, zero_point)
        target_OI[:, column] = work_OI[:, step]
        error_O = (work_OI[:, step] - weight_OI[:, column]) / u_II[step, step]
        work_OI[:, step + 1 :] -= np.outer(error_O, u_II[step, step + 1 :])
    return Quantized(codes_OI, scale_OG, zero_point_OG, weight_OI, target_OI, hessian_loss(w_OI, weight_OI, h_II), damping)


def unit_upper(h_II: np.ndarray) -> np.ndarray:
    """F, unit upper triangular, with H = F D F^T: columns eliminated from the last to the first, no library factorisation."""
    rest_II, f_II = h_II.astype(np.float64), np.eye(len(h_II))
    for k in reversed(range(len(h_II))):
        f_II[:k, k] = rest_II[:k, k] / rest_II[k, k]
        rest_II[:k, :k] -= np.outer(f_II[:k, k], f_II[:k, k]) * rest_II[k, k]
    return f_II


def gptq_ldl(
    w_OI: np.ndarray, h_II: np.ndarray, grid: Grid, *, act_order: bool = True, damping: float = 0.01, clip_search: bool = True
) -> Quantized:
    """The same algorithm as a feedback loop without any inverse (QuIP, arXiv 2307.13304), static scales: a second opinion on `gptq`."""
    order = column_order(h_II, act_order)
    f_II = unit_upper(damped(h_II, damping)[np.ix_(order, order)])
    scale_OG, zero_point_OG = matrix_grid(w_OI, grid, np.diag(fill_dead(h_II)), clip_search)
    size = w_OI.shape[1] if grid.group_size == -1 else grid.group_size
    codes_OI, weight_OI, target_OI = np.empty(w_OI.shape, dtype=np.int64), np.empty(w_OI.shape), np.empty(w_OI.shape)
    for row in range(len(w_OI)):
        for k, column in enumerate(order):
            target = float(w_OI[row, column])
            for i, earlier in enumerate(order[:k]):
                target += (w_OI[row, earlier] - weight_OI[row, earlier]) * f_II[i, k]
            scale, zero_point = float(scale_OG[row, column // size]), int(zero_point_OG[row, column // size])
            target_OI[row, column] = target
            codes_OI[row, column] = encode(target, scale, zero_point, grid.bits)
            weight_OI[row, column] = decode(int(codes_OI[row, column]), scale, zero_point)
    return Quantized(codes_OI, scale_OG, zero_point_OG, weight_OI, target_OI, hessian_loss(w_OI, weight_OI, h_II), damping)


def refit(
    w_OI: np.ndarray, codes_OI: np.ndarray, scale_OG: np.ndarray, zero_point_OG: np.ndarray, h_II: np.ndarray, grid: Grid
) -> np.ndarray:
    """Scales [O, G] fitted to fixed codes, one row and group after the other; a candidate's error is computed by its definition."""
    result = scale_OG.astype(np.float64).copy()
    slices = group_slices(w_OI.shape[1], grid.group_size)
    for row, w_I in enumerate(w_OI):
        q_GI = np.zeros((len(slices), len(w_I)))
        for group, part in enumerate(slices):
            q_GI[group, part] = codes_OI[row, part].astype(np.float64) - zero_point_OG[row, group]
        for group, q_I in enumerate(q_GI):
            missed = w_I - result[row] @ q_GI
            if q_I @ h_II @ q_I <= 0:
                continue
            candidate = result[row].copy()
            candidate[group] = round_scale(candidate[group] + (missed @ h_II @ q_I) / (q_I @ h_II @ q_I), grid.scale_dtype)
            left = w_I - candidate @ q_GI
            same_sign = np.isfinite(candidate[group]) and candidate[group] * result[row, group] > 0
            if same_sign and left @ h_II @ left < missed @ h_II @ missed:
                result[row] = candidate
    return result


def weighted_hessian(x_TI: np.ndarray, weight_T: np.ndarray) -> tuple[np.ndarray, float, float]:
    """sum w x x^T, sum w, sum w^2 over an expert's tokens, one token at a time."""
    h_II, total, squares = np.zeros((x_TI.shape[1], x_TI.shape[1])), 0.0, 0.0
    for x_I, weight in zip(x_TI, weight_T, strict=True):
        h_II += float(weight) * np.outer(x_I, x_I)
        total += float(weight)
        squares += float(weight) ** 2
    return h_II, total, squares


def shrink(h_sum_II: np.ndarray, weight_sum: float, weight_sq_sum: float, h_layer_II: np.ndarray) -> np.ndarray:
    """An expert's mean Hessian, drawn towards the layer's in proportion to how few tokens it has had; no tokens: the layer's."""
    if weight_sum == 0:
        return h_layer_II.copy()
    effective = weight_sum**2 / weight_sq_sum
    c = len(h_sum_II) / (len(h_sum_II) + effective)
    return (1 - c) * h_sum_II / weight_sum + c * h_layer_II


def pack_row(values: list[int], bits: int) -> bytes:
    """One row as one big number: value i at bits [i b, (i + 1) b), least significant first; zeros up to a multiple of 8 values."""
    number = sum(value << (index * bits) for index, value in enumerate(values))
    return number.to_bytes(math.ceil(len(values) / 8) * bits, "little")


def unpack_row(row: bytes, bits: int, count: int) -> list[int]:
    number = int.from_bytes(row, "little")
    return [(number >> (index * bits)) & (2**bits - 1) for index in range(count)]


def naive_round_row(row: list[float], bits: int, symmetric: bool, clip: float) -> list[float]:
    """One token's activations on their grid. Python rounds halves to even, as IEEE does."""
    if symmetric:
        scale = clip * max(abs(v) for v in row) / (2 ** (bits - 1) - 1)
        if scale == 0:
            return [0.0] * len(row)
        return [scale * min(max(round(v / scale), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) for v in row]
    low, high = clip * min(0.0, *row), clip * max(0.0, *row)
    scale = (high - low) / (2**bits - 1)
    if scale == 0:
        return [0.0] * len(row)
    zero = round(-low / scale)
    return [scale * (min(max(round(v / scale) + zero, 0), 2**bits - 1) - zero) for v in row]
