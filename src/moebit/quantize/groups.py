"""Groups of linears that share an input: which of them are quantized, and when they can be."""

from __future__ import annotations

from dataclasses import dataclass

from moebit.model.structure import LayerSites, LinearGroup
from moebit.quantize.context import LayerContext
from moebit.streaming.stream import Stream


@dataclass(frozen=True)
class GroupOrder:
    """Numbers of a layer's groups by when they can be solved.

    Attributes:
        before: before the experts. beside: from the experts' own input. behind: from what the experts put out.
    """

    before: list[int]
    beside: list[int]
    behind: list[int]


def in_order(sites: LayerSites) -> GroupOrder:
    """When each group of a layer can be solved."""
    order = GroupOrder([], [], [])
    for number, group in enumerate(sites.groups):
        replayed = group.replay and (group.replay_of is None or group.replay_of in order.beside)
        if group.behind_experts:
            order.behind.append(number)
        elif sites.moe and (group.moe_input or replayed):
            order.beside.append(number)
        else:
            order.before.append(number)
    return order


def quantized(context: LayerContext, group: LinearGroup) -> list[str]:
    """Names in the layer of those linears of a group that are quantized."""
    return [name for name in group.names if context.full(name) in context.plan.linears]


def last_before_experts(sites: LayerSites, number: int, stream: Stream) -> bool:
    """Whether a group is one linear, the last that runs before the experts, and what enters it can be kept until they are asked.

    It can be kept where it needs no file, and no more memory than the experts' outputs, which come when it has gone.
    """
    group, moe = sites.groups[number], sites.moe
    run = [n for n in in_order(sites).before if sites.groups[n].replay is None]
    if moe is None or run[-1:] != [number] or len(group.names) > 1 or "." not in group.names[0]:
        return False
    size = stream.windows.numel() * group.in_features * stream.dtype.itemsize
    return size <= 4 * stream.windows.numel() * moe.layout.hidden and stream.store.in_memory(size)
