"""A chunk of experts whose rounding is learned on what they put out, once they are solved.

The target is what the same experts in full precision put out, on the inputs that full precision delivers, weighed as the quantized layers
route: per token the sum over the experts of the chunk. So the error of the layers before is part of what is made up for.

Shape suffixes: C experts of a chunk, T tokens, N tokens that are routed to the chunk, S routed slots, H hidden.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moebit.methods.held_out import held_out_rows
from moebit.methods.learned_rounding import Learned, Learning, Objective, learn_rounding
from moebit.methods.online import site_generator
from moebit.model.expert_gradients import experts_output
from moebit.model.experts import ExpertWeights, Slots, finish
from moebit.quantize.chunk import ExpertChunk, ExpertInputs
from moebit.quantize.context import LayerContext
from moebit.recipe import RefineSection
from moebit.tensor import QTensor

NOT_KNOWN = "what full precision delivers to these experts is not known"
NO_TOKENS = "none of the tokens that are held back is routed to these experts, or none of the others"

Report = dict[str, list[Any]]


def refine_chunk(
    context: LayerContext, inputs: ExpertInputs | None, stored: ExpertChunk, quantized: dict[str, QTensor]
) -> tuple[dict[str, QTensor], Report]:
    """Learn the rounding of a chunk of experts, where the recipe asks for it.

    Args:
        stored: the experts in full precision. quantized: by projection, as the solver left them.

    Returns:
        (the projections, what happened: lists of one entry for the report)
    """
    recipe, chunk = context.recipe.refine, {"first_expert": [stored.start]}
    if not recipe.active or inputs is None:
        return quantized, {}
    if inputs.exact is None:
        return quantized, {**chunk, "skipped": [NOT_KNOWN]}
    outputs = _outputs(context, recipe, inputs, stored, quantized["down_proj"].codes.device)
    if outputs is None:
        return quantized, {**chunk, "skipped": [NO_TOKENS]}
    how = Learning(recipe.kind, recipe.steps, recipe.rates, "codes" in recipe.tune, "scales" in recipe.tune)  # type: ignore[arg-type]
    weights = {p: stored.projection(p) for p in stored.layout.projections}

    def progress(done: int, total: int) -> None:
        context.progress("learning", done, total)

    sys.audit("moebit.learn", quantized, weights, outputs)
    learned = learn_rounding(quantized, weights, outputs, how, progress)
    return learned.matrices, {**chunk, **_report(learned)}


def _report(learned: Learned) -> Report:
    tries = [{"rate": t.rate, "steps": t.at, "held_back": t.held_back, "train": t.train} for t in learned.tries]
    begun = learned.tries[0].held_back[0]
    kept = learned.tries[learned.best]
    left = kept.held_back[kept.at.index(learned.step)]
    return {"rate": [kept.rate], "step": [learned.step], "before": [begun], "after": [left], "tries": [tries]}


@dataclass(frozen=True)
class _Batches:
    """Tokens of a chunk, by their number among its tokens, that are learned from, in a random order for every pass through them.

    Attributes:
        train: int64. size: of a batch. seed, site: of the random order.
    """

    train: Tensor
    size: int
    seed: int
    site: str

    def of(self, step: int) -> Tensor:
        """The batch of a step, in order."""
        per_pass = max(1, len(self.train) // self.size)
        turn, number = divmod(step, per_pass)
        order = torch.randperm(len(self.train), generator=site_generator(self.seed, f"{self.site} {turn}"))
        return self.train[order[number * self.size : (number + 1) * self.size]].sort().values


@dataclass(frozen=True)
class ChunkOutputs(Objective):
    """What a chunk of experts puts out, against what it should.

    Losses are relative to the mean square of what it should put out.

    Attributes:
        chunk: the experts as stored, with float32 biases, for their gating. inputs: what arrives. slots: routed slots of the chunk.
        tokens: int64 [N], sorted. place: int64 [S], each slot's token by its number in `tokens`.
        target: [N, H] float32. batches: of training tokens. held: int64, numbers of tokens that are held back.
        limit: slots that run through at a time. device: where products are computed.
    """

    chunk: ExpertChunk
    inputs: ExpertInputs
    slots: Slots
    tokens: Tensor
    place: Tensor
    target: Tensor
    batches: _Batches
    held: Tensor
    limit: int
    device: torch.device

    @cached_property
    def power(self) -> float:
        """Mean square of the target per token."""
        total = sum(float(rows.double().square().sum()) for rows in self.target.split(4096))
        return max(total / len(self.target), 1e-30)

    @torch.no_grad()
    def held_back(self, values: Mapping[str, Tensor]) -> float:
        weights = self._weights(values)
        total = sum(float(self._missed(part, weights).double().square().sum()) for part in self._parts(self.held))
        return total / (len(self.held) * self.power)

    def gradients(self, values: Mapping[str, Tensor], step: int) -> tuple[float, dict[str, Tensor]]:
        batch, weights, total = self.batches.of(step), self._weights(values), 0.0
        weights.first.requires_grad_()
        weights.down.requires_grad_()
        with torch.enable_grad():
            for part in self._parts(batch):
                loss = self._missed(part, weights).square().sum() / (len(batch) * self.power)
                loss.backward()
                total += float(loss.detach())
        assert weights.first.grad is not None
        assert weights.down.grad is not None
        found = replace(self.chunk, weights=ExpertWeights(weights.first.grad, weights.down.grad))
        return total, {p: found.projection(p) for p in self.chunk.layout.projections}

    def _weights(self, values: Mapping[str, Tensor]) -> ExpertWeights:
        """The experts with other projections; biases stay."""
        own, layout = self.chunk.weights, self.chunk.layout
        first = torch.empty(own.first.shape, device=self.device)
        for projection in layout.projections[:-1]:
            first[:, layout.rows(projection)] = values[projection]
        return replace(own, first=first, down=values["down_proj"].detach())

    def _parts(self, numbers: Tensor) -> Iterator[Tensor]:
        """Tokens, as many at a time as the limit of slots takes, were they evenly routed."""
        slots = max(1, -(-len(self.place) * len(numbers) // len(self.tokens)))
        yield from numbers.split(max(1, self.limit * len(numbers) // slots))

    def _missed(self, numbers: Tensor, weights: ExpertWeights) -> Tensor:
        """[n, H] what is put out for some tokens, sorted by their number, minus what should be."""
        chosen = torch.zeros(len(self.tokens), dtype=torch.bool)
        chosen[numbers] = True
        own = chosen[self.place].nonzero()[:, 0]  # still sorted by expert
        bounds = torch.searchsorted(own, torch.tensor(self.slots.bounds)).tolist()
        x = self.inputs.x[self.tokens[self.place[own]]].to(self.device, torch.float32)
        affinity = self.slots.affinity[own].to(self.device, torch.float32)
        y = experts_output(self.chunk.module, x, affinity, weights, bounds)
        rows = torch.searchsorted(numbers, self.place[own]).to(self.device)
        return torch.zeros(len(numbers), y.shape[1], device=self.device).index_add(0, rows, y) - self.target[numbers].to(self.device)


def _outputs(
    context: LayerContext, recipe: RefineSection, inputs: ExpertInputs, stored: ExpertChunk, device: torch.device
) -> ChunkOutputs | None:
    """What the chunk is to put out; None where there are no tokens to learn from, or none to judge by."""
    slots = inputs.slots.chunk(stored.start, stored.stop)
    tokens = slots.tokens.unique()
    held = held_out_rows(len(inputs.x), inputs.stream.windows.shape[1], recipe.held_out_every)[tokens]
    if not bool(held.any()) or bool(held.all()):
        return None
    place = torch.searchsorted(tokens, slots.tokens)
    train = (~held).nonzero()[:, 0]
    size = max(1, min(len(train), round(recipe.tokens * len(tokens) / len(inputs.x))))
    batches = _Batches(train, size, context.seed, f"{context.full('experts')} {stored.start}")
    target = _target(inputs, stored.to(torch.float32), slots, place, len(tokens))
    held_back, gating = held.nonzero()[:, 0], replace(stored, weights=_with_biases(stored.weights, device))
    return ChunkOutputs(gating, inputs, slots, tokens, place, target, batches, held_back, inputs.stream.slots, device)


def _with_biases(weights: ExpertWeights, device: torch.device) -> ExpertWeights:
    """Weights whose biases are what is computed with."""
    first_bias = None if weights.first_bias is None else weights.first_bias.to(device, torch.float32)
    down_bias = None if weights.down_bias is None else weights.down_bias.to(device, torch.float32)
    return replace(weights, first_bias=first_bias, down_bias=down_bias)


def _target(inputs: ExpertInputs, chunk: ExpertChunk, slots: Slots, place: Tensor, tokens: int) -> Tensor:
    """[N, H] what the experts in full precision put out for their tokens, on full precision's own inputs."""
    assert inputs.exact is not None
    target = inputs.stream.store.allocate((tokens, inputs.x.shape[1]), torch.float32).zero_()
    for piece in inputs.slots.pieces(chunk.start, chunk.stop, inputs.stream.slots):
        h = chunk.intermediate(inputs.exact[piece.tokens].float(), piece.bounds)
        y = finish(chunk.module, h, piece.affinity.float(), chunk.weights, piece.bounds)
        target.index_add_(0, place[piece.place], y)
        inputs.stream.store.release()
    return target
