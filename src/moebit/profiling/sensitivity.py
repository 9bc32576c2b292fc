"""How much a change of a layer's output changes what the model predicts: gradients of the log-likelihood, layer by layer.

For labels y drawn from the model's own distribution, the gradients g_t of log p(y) with respect to a layer's outputs make the Fisher
information, and the divergence that a small change D_t of these outputs brings is, to second order,

    KL = 1/2 E[ sum_t (g_t . D_t)^2 ]   (Amari, 1998; used for pruning and quantization since Optimal Brain Damage, LeCun et al., 1990),

the effect of a token on all later ones included. The mean over tokens is in nats per token, the unit that `moebit evaluate` reports.

The model streams forward over a small sample, keeping the input of every layer, then backward, one layer and a chunk of experts at a
time. Shape suffixes: T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from moebit.device import here
from moebit.model.expert_gradients import experts_output
from moebit.model.experts import dispatch, read_experts
from moebit.model.replay import head
from moebit.model.seam import ExpertsHandler
from moebit.model.skeleton import dematerialize, materialize
from moebit.model.structure import LayerSites
from moebit.streaming.stream import Stream

SEED = 0  # of the labels that are drawn


def layer_gradients(stream: Stream, chunks: dict[int, int]) -> dict[int, Tensor]:
    """Return layer -> [T, H] gradients of the log-likelihood of drawn labels, with respect to the layer's output.

    The stream is at the model's first layer, and behind its last one afterwards.

    Args:
        stream: a small sample of windows.
        chunks: how many experts of a layer are in memory at a time.

    Returns:
        Nothing for a model whose layers hand on more than hidden states, through which gradients would be lost.
    """
    if stream.hands_on or stream.hidden.ndim != 3:
        return {}
    layers, entered = stream.structure.layers, []
    for sites in layers:
        kept = stream.store.allocate(tuple(stream.hidden.shape), stream.dtype)
        kept.copy_(stream.hidden)
        entered.append(kept)
        stream.step(sites.index, chunks.get(sites.index, 1))
    gradient, found = _head_gradient(stream), {}
    for sites in reversed(layers):
        found[sites.index] = gradient.flatten(0, 1)
        if sites.index:
            with stream.loaded(sites.index) as layer:
                answer = _differentiable(stream, sites, layer, chunks.get(sites.index, 1)) if sites.moe else None
                gradient = stream.pull_back(sites.index, entered[sites.index], gradient, answer)
    return found


def predicted_kl(gradient_TH: Tensor, change_TH: Tensor) -> float:
    """Return 1/2 mean_t (g_t . D_t)^2, nats per token."""
    return 0.5 * float((gradient_TH.double() * change_TH.double()).sum(1).square().mean())


def _head_gradient(stream: Stream) -> Tensor:
    """Return [N, L, H] with respect to the last layer's output, one window at a time."""
    model, generator = stream.checkpoint.model, torch.Generator().manual_seed(SEED)
    behind = [(name, model.get_submodule(name)) for name in stream.structure.back]
    gradient = torch.empty(stream.hidden.shape, dtype=torch.float32)
    try:
        for name, module in behind:
            materialize(module, name, stream.checkpoint.weights, recurse=False)
        for row in range(len(stream.hidden)):
            with torch.enable_grad():
                hidden = stream.hidden[row : row + 1].detach().clone().requires_grad_()
                log_prob = head(model, stream.structure.list_name, hidden, stream.structure.returns).float().log_softmax(-1)
                labels = here(torch.multinomial(log_prob.detach()[0].exp().cpu(), 1, generator=generator))
                (mine,) = torch.autograd.grad(log_prob[0].gather(1, labels).sum(), hidden)
            gradient[row] = mine[0].float()
    finally:
        for _, module in behind:
            dematerialize(module, recurse=False)
    return gradient


def _differentiable(stream: Stream, sites: LayerSites, layer: nn.Module, chunk: int) -> Callable[[slice], ExpertsHandler]:
    """A handler through which gradients flow; its experts are read again for the backward, a chunk at a time."""
    moe = sites.moe
    assert moe is not None
    name, layout, experts = f"{sites.name}.{moe.experts}", moe.layout, layer.get_submodule(moe.experts)

    def some(x_TH: Tensor, ids_Tk: Tensor, affinity_Tk: Tensor, start: int, stop: int) -> Tensor:
        slots = dispatch(ids_Tk, affinity_Tk, layout.experts).chunk(start, stop)
        weights = read_experts(stream.checkpoint.weights, name, layout, start, stop, x_TH.dtype)
        y = experts_output(experts, x_TH[slots.tokens], slots.affinity.to(x_TH.dtype), weights, slots.bounds)
        return torch.zeros_like(x_TH).index_add(0, slots.tokens, y)

    def handler(module: nn.Module, states: Tensor, ids: Tensor, affinity: Tensor) -> Tensor:
        total = torch.zeros_like(states)
        for start in range(0, layout.experts, chunk):
            piece = recomputed(some, states, ids, affinity, start, min(start + chunk, layout.experts), use_reentrant=False)
            total = total + piece
        return total

    return lambda rows: handler
