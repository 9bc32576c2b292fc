"""Linears outside of the routed experts whose rounding is learned on what the layer puts out, once they are solved.

The routed experts are silent meanwhile (they put out zero), so that what is compared is the residual stream behind attention and, where
there are shared experts or a dense MLP, behind them. The target is what full precision's layer puts out on full precision's own stream:
the error that came in with the stream is part of what is made up for, as far as these linears can.

Every token counts by its error relative to the size of its own state: the norm in front of the next layer divides by that size, and a few
tokens of huge states would decide alone otherwise.

Shape suffixes: N windows of L tokens, H hidden.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moebit.methods.held_out import held_out_rows
from moebit.methods.learned_rounding import Learned, Objective, learn_rounding
from moebit.methods.online import site_generator
from moebit.model.capture import put_in_front
from moebit.model.expert_gradients import past_rounding
from moebit.model.seam import silent
from moebit.quantize.context import LayerContext
from moebit.quantize.online import on_plain_inputs
from moebit.quantize.refine import Report, learning, report_of
from moebit.streaming.stream import Stream
from moebit.tensor import QTensor, SolveInfo
from moebit.tensor.blocks import BlockTransform
from moebit.tensor.row_rounding import Rounding

HANDS_ON = "the model's layers hand on more than hidden states"
NOT_KNOWN = "what full precision's layer puts out without its routed experts is not known"
IN_BATCHES = "the layer puts out something else for some windows of a batch alone"


@dataclass(frozen=True)
class SolvedLinear:
    """A linear as the solver left it.

    Attributes:
        matrix: [O, I] its weight. weight: the same for transformed inputs, from which it was rounded.
        quantized: one matrix. info: what the solver says of it. transform: of its input.
    """

    matrix: Tensor
    weight: Tensor
    quantized: QTensor
    info: SolveInfo | None
    transform: BlockTransform | None = None


def refine_linears(
    context: LayerContext, stream: Stream, target: Tensor | None, solved: Mapping[str, SolvedLinear]
) -> tuple[dict[str, QTensor], dict[str, Report]]:
    """Learn the rounding of linears of a layer together.

    Args:
        stream: in front of the layer, which is loaded with the solved linears in place. It holds others than these afterwards; the caller
            puts what is returned into place.
        target: [N, L, H] what full precision's layer puts out while its routed experts are silent; None where that is not known.
        solved: by name in the layer.

    Returns:
        (the linears, by the first one's name what happened: lists of one entry for the report)
    """
    plain = {name: one.quantized for name, one in solved.items()}
    where = next(iter(solved))
    outputs = None if target is None or stream.hands_on else _outputs(context, stream, target, solved)
    if outputs is None:
        return plain, {where: {"skipped": [HANDS_ON if stream.hands_on else NOT_KNOWN]}}
    if not outputs.windows_are_alike():
        return plain, {where: {"skipped": [IN_BATCHES]}}
    weights = {name: one.weight.unsqueeze(0) for name, one in solved.items()}

    def progress(done: int, total: int) -> None:
        context.progress("learning", done, total)

    sys.audit("moebit.learn", plain, weights, outputs)
    learned: Learned = learn_rounding(plain, weights, outputs, learning(context.recipe.refine, context.seed), progress)
    return learned.matrices, {where: {"linears": [list(solved)], **report_of(learned)}}


@dataclass(frozen=True)
class LayerOutputs(Objective):
    """What a layer puts out while its routed experts are silent, against what it should.

    Losses are means over tokens of the squared error relative to the squared size of what should come out.

    Attributes:
        layer: loaded. solved: the linears whose weights are given. target: [N, L, ...]. size: windows of a batch.
        held: bool [N, L], tokens that are held back. seed, site: of the batches' random order. rounding: of what enters the linears.
    """

    stream: Stream
    index: int
    layer: nn.Module
    solved: Mapping[str, SolvedLinear]
    target: Tensor
    held: Tensor
    size: int
    seed: int
    site: str
    rounding: Rounding | None

    @torch.no_grad()
    def windows_are_alike(self) -> bool:
        """Whether the layer puts out the same for one window alone as for it among its batch."""
        first = torch.arange(min(self.stream.batch_windows, len(self.target)))
        together = self.stream.some(self.index, first, silent)[-1:].float()
        alone = self.stream.some(self.index, first[-1:], silent).float()
        # Kernels for other shapes add up in another order.
        return bool((together - alone).norm() <= 100 * torch.finfo(self.stream.dtype).eps * together.norm())

    @torch.no_grad()
    def held_back(self, values: Mapping[str, Tensor]) -> float:
        self._put(values)
        windows = self.held.any(1).nonzero()[:, 0]
        total = sum(float(self._missed(part, self.held).double().sum()) for part in self._parts(windows, self.size))
        return total / float(self.held.sum())

    def gradients(self, values: Mapping[str, Tensor], step: int) -> tuple[float, dict[str, Tensor]]:
        placed = self._put(values)
        windows = self._batch(step)
        with torch.enable_grad():
            for weight in placed.values():
                weight.requires_grad_()
            loss = self._missed(windows, ~self.held).sum() / float((~self.held[windows]).sum())
            found = torch.autograd.grad(loss, list(placed.values()))
        slopes = {name: gradient.to(values[name].device, torch.float32) for name, gradient in zip(placed, found, strict=True)}
        return float(loss.detach()), {name: self._transformed(name, slope.unsqueeze(0)) for name, slope in slopes.items()}

    def _put(self, values: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        """Put weights into the layer as they act on inputs as they are."""
        placed = dict[str, nn.Parameter]()
        for name, value in values.items():
            plain = on_plain_inputs(value, self.solved[name].transform)[0].to(self.stream.hidden.device, self.stream.dtype)
            placed[name] = nn.Parameter(plain, requires_grad=False)
            self.layer.get_submodule(name).weight = placed[name]
        return placed

    def _transformed(self, name: str, gradient_1OI: Tensor) -> Tensor:
        """The gradient in the weights for transformed inputs: transforms are orthogonal, it turns as the weights do."""
        transform = self.solved[name].transform
        return gradient_1OI if transform is None else transform.apply(gradient_1OI)

    def _missed(self, windows: Tensor, counted_NL: Tensor) -> Tensor:
        """[n, L] relative squared errors of some windows of one batch, zero where they don't count."""
        with ExitStack() as stack:
            for name in self.solved if self.rounding is not None else ():
                stack.callback(put_in_front(self.layer.get_submodule(name), self._rounded).remove)
            y = self.stream.some(self.index, windows, silent).float().flatten(2)
        should = self.target[windows].float().flatten(2)
        missed = (y - should).square().sum(2) / should.square().sum(2).clamp(min=1e-30)
        return missed * counted_NL[windows]

    def _rounded(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A linear's input as it is rounded at run time."""
        assert self.rounding is not None
        return (past_rounding(args[0], self.rounding), *args[1:])

    def _parts(self, windows: Tensor, size: int) -> list[Tensor]:
        """Windows, at most `size` at a time and from one batch of the stream, in order."""
        batch = windows // self.stream.batch_windows
        return [part for b in batch.unique() for part in windows[batch == b].split(size)]

    @cached_property
    def _train(self) -> Tensor:
        return (~self.held).any(1).nonzero()[:, 0]

    def _batch(self, step: int) -> Tensor:
        """The windows of a step: those that are learned from, in another random order for every pass through them."""
        turn, number = divmod(step, len(self._parts(self._train, self.size)))
        generator = site_generator(self.seed, f"{self.site} {turn}")
        mixed = self._train[torch.randperm(len(self._train), generator=generator)]
        parts = self._parts(mixed, self.size)
        chosen = torch.randperm(len(parts), generator=generator)[number]
        return parts[int(chosen)].sort().values


def _outputs(context: LayerContext, stream: Stream, target: Tensor, solved: Mapping[str, SolvedLinear]) -> LayerOutputs | None:
    """What is compared; None where all tokens are held back, or none."""
    assert context.layer is not None
    recipe, windows = context.recipe.refine, stream.windows
    held = held_out_rows(windows.numel(), windows.shape[1], recipe.held_out_every).view(windows.shape)
    if bool(held.all()) or not bool(held.any()):
        return None
    size = max(1, min(recipe.tokens // windows.shape[1], stream.batch_windows))
    where = f"{context.sites.name} {next(iter(solved))}"
    rounding = context.plan.activations.inputs
    return LayerOutputs(stream, context.sites.index, context.layer, solved, target, held, size, context.seed, where, rounding)
