"""What is seen of the input of a group of linears: second moments, a sample, and how far it has drifted from full precision's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from moebit.calibration.statistics import layer_sample, shared_affinity
from moebit.errors import BadInputError
from moebit.methods.input_drift import InputDriftMoments
from moebit.model.capture import observed
from moebit.model.seam import silent
from moebit.model.structure import LayerSites, LinearGroup
from moebit.quantize.context import LayerContext, LayerState
from moebit.quantize.groups import last_before_experts, quantized
from moebit.quantize.reference import input_of
from moebit.ranks import ALONE, Ranks
from moebit.streaming.shortcut import KeptInput
from moebit.streaming.stream import Stream
from moebit.tensor import add_second_moment, mirror_
from moebit.tensor.linalg import moment_strips

ROWS = 4096  # tokens that are looked at together where nothing else sets a limit
NOT_COMPARED = "its input is not delivered once for every token"
Affinity = Callable[[Tensor], Tensor]


@dataclass
class Statistics:
    """Statistics of a group's input, added up while it passes by.

    Attributes:
        total: [N, N] second moments, complete above the diagonal only; None where nothing is solved from them, or where drift has them.
            Every rank adds up some strips of it, until `complete`.
        positions: tokens that are kept as a sample, in order. kept: them. seen: tokens so far.
        drift, exact: sums of what arrives and should arrive; what full precision delivers, [T, N].
    """

    total: Tensor | None
    positions: Tensor
    ranks: Ranks = ALONE
    kept: list[Tensor] = field(default_factory=list)
    seen: int = 0
    drift: InputDriftMoments | None = None
    exact: Tensor | None = None

    def add(self, x_TN: Tensor, weight_T: Tensor | None = None) -> None:
        """Add the next tokens, weighted or all alike."""
        if self.drift is not None and self.exact is not None:
            tokens = torch.arange(self.seen, self.seen + len(x_TN))
            self.drift.add(x_TN, self.exact[tokens], weight_T, tokens, [0, len(x_TN)])
        if self.total is not None:
            add_second_moment(self.total, x_TN, weight_T, own_strips(len(self.total), self.ranks))
        inside = self.positions[(self.positions >= self.seen) & (self.positions < self.seen + len(x_TN))]
        if len(inside):
            self.kept.append(x_TN[inside - self.seen].float())
        self.seen += len(x_TN)

    def complete(self) -> None:
        """Exchange the strips that the ranks have added up."""
        if self.total is not None:
            exchange_strips(self.total, self.ranks)

    @property
    def hessian(self) -> Tensor | None:
        """[N, N]."""
        if self.drift is not None:
            return self.drift.hessian[0]
        return None if self.total is None else mirror_(self.total)

    @property
    def sample(self) -> Tensor:
        """[S, N] float32."""
        return torch.cat(self.kept)


def own_strips(size: int, ranks: Ranks) -> list[tuple[int, int]]:
    """The strips of a second moment that a rank adds up: all ranks have about as much to do, though strips become shorter."""
    return _strips_of(ranks.rank, size, ranks.size)


def _strips_of(rank: int, size: int, ranks: int) -> list[tuple[int, int]]:
    turns = (min(number % (2 * ranks), 2 * ranks - 1 - number % (2 * ranks)) for number in range(size))
    return [strip for strip, owner in zip(moment_strips(size), turns, strict=False) if owner == rank]


def exchange_strips(h_NN: Tensor, ranks: Ranks) -> None:
    """Give every rank the strips of the others."""
    mine = {f"{low}": h_NN[low:high, low:] for low, high in own_strips(len(h_NN), ranks)}
    for rank, found in enumerate(ranks.everyone(mine)):
        if rank != ranks.rank:
            for low, high in _strips_of(rank, len(h_NN), ranks.size):
                h_NN[low:high, low:] = found[f"{low}"]


def group_statistics(context: LayerContext, state: LayerState, number: int) -> tuple[Statistics | None, LayerState]:
    """Statistics of a group's input: from a stored input where there is one, else by running the layer up to it.

    Returns:
        The statistics, None where the recipe needs none, and the state with whatever was stored for later on the way.
    """
    recipe, stream, group = context.recipe, state.stream, context.sites.groups[number]
    if stream is None or not (recipe.needs_hessians or recipe.rotation.online == "duquant"):
        return None, state
    seen, state = _empty(context, state, stream, group)
    stored = _stored_input(context, state, group)
    if stored is None:
        state = _by_running(context, state, stream, number, seen)
    else:
        _from_stored(context, stream, group, stored, seen)
    seen.complete()
    return seen, state


def _from_stored(context: LayerContext, stream: Stream, group: LinearGroup, stored: tuple[Tensor, bool], seen: Statistics) -> None:
    """Add what a stored input makes of the group's."""
    x, from_block = stored
    affinity = _affinity(context, group) if from_block else None
    if from_block and group.moe_input:
        _over_stored(seen, stream, x, affinity)
    else:
        _replayed(seen, context, stream, group, x, affinity)


def _empty(context: LayerContext, state: LayerState, stream: Stream, group: LinearGroup) -> tuple[Statistics, LayerState]:
    """Statistics to be added up; where the recipe corrects for drift and full precision's input is not known, that is noted."""
    positions = layer_sample(stream.windows.numel())
    if context.recipe.solver.drift != "none":
        exact = state.reference.inputs.get(input_of(context.sites, group))
        if exact is not None:
            return Statistics(None, positions, drift=drift_moments(stream, 1, group.in_features), exact=exact), state
        state = state.noting(drift={name: {"skipped": NOT_COMPARED} for name in quantized(context, group)})
    total = torch.zeros(group.in_features, group.in_features) if context.recipe.needs_hessians else None
    return Statistics(total, positions, stream.ranks), state


def drift_moments(stream: Stream, matrices: int, size: int) -> InputDriftMoments:
    """Sums over a stream's tokens for matrices with `size` inputs."""
    return InputDriftMoments.zeros(matrices, size, stream.windows.numel(), stream.windows.shape[1])


def _stored_input(context: LayerContext, state: LayerState, group: LinearGroup) -> tuple[Tensor, bool] | None:
    """What a group can be computed from without running the layer, and whether that is the input of the experts' block."""
    routed = None if group.behind_experts or state.routed is None else state.routed.tokens.x
    if routed is not None and group.moe_input:
        return routed, True
    if group.replay is None:
        return None
    origin = context.sites.groups[group.replay_of] if group.replay_of is not None else None
    if routed is not None and (origin is None or origin.moe_input):
        return routed, True
    kept = None if group.replay_of is None else state.inputs.get(group.replay_of)
    return None if kept is None else (kept, False)


def _by_running(context: LayerContext, state: LayerState, stream: Stream, number: int, seen: Statistics) -> LayerState:
    """Run the layer up to a group. Its input is stored where later groups or the experts are computed from it."""
    sites, group = context.sites, context.sites.groups[number]
    replayed, last = any(other.replay_of == number for other in sites.groups), last_before_experts(sites, number, stream)
    kept = stream.store.allocate((stream.windows.numel(), group.in_features), stream.dtype) if replayed or last else None

    def on_input(x: Tensor) -> None:
        begin, flat = seen.seen, x.reshape(-1, x.shape[-1])
        seen.add(flat)
        if kept is not None and seen.seen <= len(kept):
            kept[begin : seen.seen] = flat

    before = _no_experts(sites) if group.behind_experts else silent  # what experts put out doesn't reach this group
    experts = stream.replay(state.outputs) if state.outputs is not None else lambda rows: before
    stream.run(sites.index, inputs={group.names[0]: on_input}, experts=experts)
    if kept is None or seen.seen != len(kept):
        return state
    inputs: Mapping[int, Tensor] = {**state.inputs, number: kept} if replayed else state.inputs
    return replace(state, inputs=inputs, kept=KeptInput(group.names[0], kept) if last else state.kept)


def _over_stored(seen: Statistics, stream: Stream, x_TN: Tensor, affinity: Affinity | None) -> None:
    """Add stored inputs, which may lie in a file."""
    for piece in x_TN.split(ROWS):
        seen.add(piece, affinity(piece) if affinity else None)
        stream.store.release()


def _replayed(seen: Statistics, context: LayerContext, stream: Stream, group: LinearGroup, x_TN: Tensor, affinity: Affinity | None) -> None:
    """Add the inputs of a group behind a quantized one, by running only the module around it (a shared expert, a dense MLP)."""
    assert context.layer is not None
    assert group.replay is not None
    module = context.layer.get_submodule(group.replay)
    weights: Tensor | None = None

    linear = context.layer.get_submodule(group.names[0])
    with observed({group.names[0]: linear}, lambda call: seen.add(call.rows, weights)), torch.no_grad():
        for piece in x_TN.split(stream.batch_tokens):
            weights = affinity(piece) if affinity else None
            module(piece.unsqueeze(0))
            stream.store.release()


def moment(stream: Stream, x_TN: Tensor) -> Tensor:
    """[N, N] second moment of stored inputs, which may lie in a file."""
    total = torch.zeros(x_TN.shape[1], x_TN.shape[1])
    for piece in x_TN.split(ROWS):
        add_second_moment(total, piece, strips=own_strips(len(total), stream.ranks))
        stream.store.release()
    exchange_strips(total, stream.ranks)
    return mirror_(total)


def _affinity(context: LayerContext, group: LinearGroup) -> Affinity | None:
    """How much inputs [T, H] of the experts' block count for shared experts behind a gate: sigmoid(gate x)^p; None for no such gate.

    It is MoEQuant's affinity (2505.03804, section 3.3), which routed experts get from the router.
    """
    moe, power = context.sites.moe, context.recipe.solver.affinity_power
    gate = shared_gate(context.sites, context.layer) if context.layer is not None else None
    if not power or gate is None or moe is None or not set(group.names) <= set(moe.shared):
        return None
    return lambda x: shared_affinity(gate, x, power)


def shared_gate(sites: LayerSites, layer: nn.Module) -> nn.Module | None:
    """The linear [1, H] beside a layer's experts that scales its shared experts, behind a sigmoid; None where there is none."""
    if sites.moe is None or not sites.moe.shared:
        return None
    block = sites.moe.experts.rpartition(".")[0] + "."
    gates = [layer.get_submodule(name) for name, why in sites.kept.items() if why == "gate" and name.startswith(block)]
    scalar = [gate for gate in gates if isinstance(gate, nn.Linear) and gate.out_features == 1]
    return scalar[0] if len(scalar) == 1 else None


def _no_experts(sites: LayerSites) -> Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]:
    def handler(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        raise BadInputError(
            f"{sites.name}: a linear that runs behind the experts cannot be calibrated before them; keep it with weights.ignore"
        )

    return handler
