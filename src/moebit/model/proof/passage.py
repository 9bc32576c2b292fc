"""A few tokens on their way through the layers of a model with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moebit.model.embeddings import materialize_embeddings, named_tokens
from moebit.model.layer_call import LayerCall
from moebit.model.replay import head, record
from moebit.model.seam import ExpertsHandler, experts_handler
from moebit.model.skeleton import dematerialize, materialize
from moebit.model.structure import Structure
from moebit.storage.weights import Weights


class Passage:
    """One batch of windows between two decoder layers, all of it in memory.

    Args:
        model: a skeleton. tokens: int64 [N, L].

    Attributes:
        weights: of the model. hidden: [N, L, ...] states in front of the next layer.
    """

    def __init__(self, model: PreTrainedModel, structure: Structure, weights: Weights, tokens: Tensor) -> None:
        self._model, self._structure, self.weights = model, structure, weights
        front, watch = [(name, model.get_submodule(name)) for name in structure.front], None
        for name, module in front:
            if module is model.get_input_embeddings():
                watch = materialize_embeddings(module, name, weights, tokens, named_tokens(model.config))
            else:
                materialize(module, name, weights, recurse=False)
        self.hidden, self._calls = record(model, structure.list_name, structure.returns, input_ids=tokens)
        if watch is not None:
            watch.remove()
        for _, module in front:
            dematerialize(module, recurse=False)

    @property
    def hands_on(self) -> bool:
        """Whether layers hand on anything beside the hidden states."""
        return any(call.hands_on for call in self._calls)

    def call(self, index: int) -> LayerCall:
        """How a layer is called."""
        return self._calls[index]

    @contextmanager
    def loaded(self, index: int, weights: Weights | None = None) -> Iterator[nn.Module]:
        """A layer with its values outside of the experts, which may be those of other weights; freed afterwards."""
        sites = self._structure.layers[index]
        layer = self._model.get_submodule(sites.name)
        experts = [layer.get_submodule(sites.moe.experts)] if sites.moe else []
        materialize(layer, sites.name, weights or self.weights, skip=experts)
        try:
            yield layer
        finally:
            dematerialize(layer)

    @torch.no_grad()
    def output(self, index: int, layer: nn.Module, experts: ExpertsHandler | None, keep: bool = False) -> Tensor:
        """What a loaded layer makes of the hidden states.

        Args:
            experts: what stands for its experts. keep: this run counts, so that what the layer hands on is kept for later ones.
        """
        with experts_handler(experts) if experts else nullcontext():
            return self._calls[index].run(layer, self.hidden, keep=keep)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """[N, L, V] behind the last layer."""
        behind = [(name, self._model.get_submodule(name)) for name in self._structure.back]
        try:
            for name, module in behind:
                materialize(module, name, self.weights, recurse=False)
            return head(self._model, self._structure.list_name, self.hidden, self._structure.returns)
        finally:
            for _, module in behind:
                dematerialize(module, recurse=False)
