"""Which width everything gets, so that the whole meets a size.

Three ways, over items (an expert, one projection of it, a layer's experts, a linear) that take one width each:

- `fuzzy` (MoQa, 2503.21135): fuzzy c-means (m = 2, centres begin at quantiles) on the experts' significance J within a layer, one
  cluster per width of the ladder, the highest centre with the most bits. The largest membership decides, the lower width where the two
  largest differ by less than 0.1 ("low precision first"). To meet the size: memberships tilted by exp(-lambda * bits), one lambda for
  the model. Departures: the paper does not say how it meets a size; the tilt, with it the low-first rule on tilted memberships, and
  that a layer's widths are handed out in the order of J (`in_order`), are this project's.
- `knapsack`: least sum of measured errors under the size, by Lagrangian bisection; by dynamic programming where items are so large (the
  experts of a layer as one) that the bisection stops short of its own bound.
- `frequency`: the same with `share of tokens * 4^-bits` for an error: what counting tokens alone would do.

After the bisection what is left of the size is given out greedily, cheapest first. Shape suffixes: L layers, E experts, K widths,
N items.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

import torch
from torch import Tensor

LOW_FIRST = 0.1  # difference of the two largest memberships below which the lower width is taken
CLOSENESS = 1e-9  # relative change of the centres at which the clustering has settled
ROUNDS = 500
BISECTIONS = 200
SLACK = 0.01  # of the bound on the least error, above which a choice is looked for exactly
STATES = 2**16  # sizes that the exact search tells apart; with more of them, steps are rounded up
EXACT_ITEMS = 2048  # up to which it is worth its time


def fuzzy_memberships(x_LE: Tensor, clusters: int, fuzziness: float = 2.0) -> tuple[Tensor, Tensor]:
    """Fuzzy c-means in one dimension, every row by itself.

    Alternates `u_ek = 1 / sum_j (|x_e - c_k| / |x_e - c_j|)^(2 / (m - 1))` and `c_k = sum_e u_ek^m x_e / sum_e u_ek^m` from centres at
    the (k + 1/2) / K quantiles until they settle (Bezdek, 1981).

    Args:
        x_LE: values, for example J of the experts of each layer.

    Returns:
        (u [L, E, K], centres [L, K]) in float64, centres rising. Values that lie on a centre belong to it alone; where centres coincide
        they share.
    """
    x = x_LE.double()
    places = (torch.arange(clusters, dtype=torch.float64) + 0.5) / clusters
    centres = torch.quantile(x, places, dim=1).T.contiguous()
    spread = (x.amax(1) - x.amin(1)).clamp(min=1e-300)
    for _ in range(ROUNDS):
        weights = _memberships(x, centres, fuzziness).pow(fuzziness)
        total = weights.sum(1)
        moved = torch.where(total > 0, (weights * x.unsqueeze(2)).sum(1) / total.clamp(min=1e-300), centres)
        settled = bool(((moved - centres).abs().amax(1) <= CLOSENESS * spread).all())
        centres = moved
        if settled:
            break
    centres = centres.sort(1).values
    return _memberships(x, centres, fuzziness), centres


def _memberships(x_LE: Tensor, centres_LK: Tensor, fuzziness: float) -> Tensor:
    distance = (x_LE.unsqueeze(2) - centres_LK.unsqueeze(1)).abs()
    nearest = distance.amin(2, keepdim=True)
    on_centre = (distance == 0).double()
    # Relative to the nearest centre, so that no power overflows.
    near = (nearest / distance.clamp(min=1e-300)).pow(2 / (fuzziness - 1))
    return torch.where(nearest > 0, near / near.sum(2, keepdim=True), on_centre / on_centre.sum(2, keepdim=True).clamp(min=1))


def low_first(memberships_NK: Tensor) -> Tensor:
    """int64 [N]: the cluster of the largest membership; the lower of the two largest where they differ by less than `LOW_FIRST`."""
    if memberships_NK.shape[1] == 1:
        return torch.zeros(len(memberships_NK), dtype=torch.int64)
    # Rounded, so that clusters that share alike tie in order.
    values, index = memberships_NK.double().round(decimals=9).sort(dim=1, descending=True, stable=True)
    close = values[:, 0] - values[:, 1] < LOW_FIRST
    return torch.where(close, index[:, :2].amin(1), index[:, 0])


def fuzzy_choice(memberships_NK: Tensor, sizes_NK: Tensor, weights_N: Tensor, budget: int) -> Tensor:
    """int64 [N] width of every expert under a size: memberships tilted by bits, low precision first.

    Args:
        memberships_NK: rising widths. sizes_NK: bytes on disk of each item at each width. weights_N: how many weights an item has.
        budget: bytes for all.

    Raises:
        ValueError: not even the lowest widths fit.
    """
    logs = memberships_NK.double().clamp(min=1e-30).log()
    bits_NK = 8 * sizes_NK.double() / weights_N.double().unsqueeze(1)

    def pick(strength: float) -> Tensor:
        return low_first((logs - strength * bits_NK).softmax(1))

    return _meet(pick, -logs, sizes_NK, budget, float(logs.abs().max()) + 1.0)


def fuzzy_widths(j_layers: list[Tensor], clusters: int, sizes_NK: Tensor, weights_N: Tensor, budget: int) -> Tensor:
    """int64 [N] width of every expert, layer after layer, from J [E] of each layer: clusters, choice under the size, order.

    Raises:
        ValueError: not even the lowest widths fit.
    """
    memberships = torch.cat([fuzzy_memberships(j.unsqueeze(0), clusters)[0][0] for j in j_layers])
    choice = fuzzy_choice(memberships, sizes_NK, weights_N, budget).split([len(j) for j in j_layers])
    return torch.cat([in_order(c.unsqueeze(0), j.unsqueeze(0))[0] for c, j in zip(choice, j_layers, strict=True)])


def in_order(choice_LE: Tensor, j_LE: Tensor) -> Tensor:
    """The chosen widths, handed out within each layer in the order of J.

    Memberships are not monotone: of an expert beyond the outermost centre all of them grow alike the further it lies, so that a strong
    tilt could pass it over. Ties keep the lower number first.
    """
    result = torch.empty_like(choice_LE)
    return result.scatter_(1, j_LE.argsort(dim=1, stable=True), choice_LE.sort(dim=1).values)


def knapsack_choice(errors_NK: Tensor, sizes_NK: Tensor, budget: int) -> Tensor:
    """int64 [N]: a width for every item with (nearly) the least sum of errors under the size.

    For a strength `lambda`, every item takes `argmin_k error + lambda * bytes`; bisection finds the smallest lambda that fits, whose
    choice is optimal for the size it has. The rest of the size is filled greedily, so that the result is at most one item's step from
    the optimum. Where that step is large (layers as items) the same relaxation says so, by its lower bound: then the choice is searched
    for exactly. A negative lambda spends what is left where no error tells items apart (experts without tokens).

    Args:
        errors_NK: rising widths; sizes_NK: bytes on disk. budget: bytes for all.

    Raises:
        ValueError: not even the lowest widths fit.
    """
    errors, sizes = errors_NK.double(), sizes_NK.double()

    def pick(strength: float) -> Tensor:
        return (errors + strength * sizes).argmin(1)

    step = (sizes[:, 1:] - sizes[:, :-1]).clamp(min=1) if sizes.shape[1] > 1 else torch.ones(len(sizes), 1)
    steepest = float((errors.amax(1) - errors.amin(1)).max() / step.min()) + 1e-300
    choice = _meet(pick, errors, sizes_NK, budget, 2 * steepest)
    if len(errors) > EXACT_ITEMS or _total(errors, choice) <= (1 + SLACK) * _least_error(errors, sizes, budget, 2 * steepest):
        return choice
    searched = _searched(errors, sizes_NK.to(torch.int64), budget)
    return searched if _total(errors, searched) < _total(errors, choice) else choice


def _total(values_NK: Tensor, choice_N: Tensor) -> float:
    return float(values_NK.gather(1, choice_N.unsqueeze(1)).sum())


def _least_error(errors_NK: Tensor, sizes_NK: Tensor, budget: int, strongest: float) -> float:
    """A bound that no choice of that size is below: the largest of `sum_n min_k (error + lambda size) - lambda budget` over lambda >= 0.

    It is concave in lambda: thirds are cut off (ternary search).
    """

    def bound(strength: float) -> float:
        return float((errors_NK + strength * sizes_NK).amin(1).sum()) - strength * budget

    low, high = 0.0, strongest
    for _ in range(BISECTIONS):
        third = (high - low) / 3
        low, high = (low + third, high) if bound(low + third) < bound(high - third) else (low, high - third)
    return bound((low + high) / 2)


def _searched(errors_NK: Tensor, sizes_NK: Tensor, budget: int) -> Tensor:
    """int64 [N]: the least sum of errors by dynamic programming over the bytes above everybody's lowest width (rounded up to `STATES`)."""
    above_NK = sizes_NK - sizes_NK.amin(1, keepdim=True)
    left = budget - int(sizes_NK.amin(1).sum())
    unit = max(1, math.gcd(*above_NK.flatten().tolist()), -(-left // STATES))
    steps_NK = (-(-above_NK // unit)).tolist()
    states = left // unit + 1
    least = torch.zeros(states, dtype=torch.float64)  # the least error with so many units or fewer, of the items so far
    taken = torch.empty(len(errors_NK), states, dtype=torch.uint8)
    for item, steps in enumerate(steps_NK):
        ways = torch.full((len(steps), states), math.inf, dtype=torch.float64)
        for k, step in enumerate(steps):
            if step < states:
                ways[k, step:] = least[: states - step] + errors_NK[item, k]
        least, best = ways.min(0)
        taken[item] = best.to(torch.uint8)
    choice, at = [], states - 1
    for item in reversed(range(len(steps_NK))):
        choice.append(int(taken[item, at]))
        at -= steps_NK[item][choice[-1]]
    chosen = torch.tensor(choice[::-1], dtype=torch.int64)
    return _filled(chosen, errors_NK, sizes_NK, budget - int(_total(sizes_NK, chosen)))


def frequency_errors(shares_N: Tensor, widths: list[int]) -> Tensor:
    """float64 [N, K]: what an item's error would be if it went with its tokens and a factor of four a bit."""
    return shares_N.double().unsqueeze(1) * torch.tensor([4.0**-b for b in widths], dtype=torch.float64)


def _meet(pick: Callable[[float], Tensor], costs_NK: Tensor, sizes_NK: Tensor, budget: int, strongest: float) -> Tensor:
    """The choice of the weakest strength that fits, and what is left given out."""
    sizes = sizes_NK.to(torch.int64)
    least = int(sizes.amin(1).sum())
    if least > budget:
        raise ValueError(f"the lowest widths take {least} bytes, {budget} are allowed")

    def total(choice: Tensor) -> int:
        return int(sizes.gather(1, choice.unsqueeze(1)).sum())

    low, high = -strongest, strongest
    choice = pick(low)
    if total(choice) > budget:
        while total(pick(high)) > budget and high < 1e300:
            low, high = high, high * 4
        choice = pick(high)
        if total(choice) > budget:  # rules beside the cost (low precision first) never raise a width, so this is the lowest
            choice = sizes.argmin(1)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if middle in (low, high):
                break
            tried = pick(middle)
            if total(tried) <= budget:
                high, choice = middle, tried
            else:
                low = middle
    return _filled(choice, costs_NK, sizes, budget - total(choice))


def _filled(choice_N: Tensor, costs_NK: Tensor, sizes_NK: Tensor, left: int) -> Tensor:
    """Give `left` bytes out, the upgrade with the largest gain (or least loss) per byte first."""
    chosen, costs, sizes = choice_N.tolist(), costs_NK.tolist(), sizes_NK.tolist()

    def upgrade(item: int) -> tuple[float, int, int] | None:
        now = chosen[item]
        ways = [
            ((costs[item][k] - costs[item][now]) / (size - sizes[item][now]), item, k)
            for k, size in enumerate(sizes[item])
            if sizes[item][now] < size <= sizes[item][now] + left
        ]
        return min(ways) if ways else None

    heap = [way for item in range(len(chosen)) if (way := upgrade(item))]
    heapq.heapify(heap)
    while heap:
        slope, item, k = heapq.heappop(heap)
        again = upgrade(item)
        if again is None:
            continue
        if again != (slope, item, k):
            heapq.heappush(heap, again)
            continue
        left -= sizes[item][k] - sizes[item][chosen[item]]
        chosen[item] = k
        if way := upgrade(item):
            heapq.heappush(heap, way)
    return torch.tensor(chosen, dtype=torch.int64)
