"""Decoder layers run by hand: how the model calls them is recorded once, then each layer runs alone with what it was given.

The decoder layers are replaced by stubs and the model's own forward is run: embeddings, masks, position embeddings and whatever else an
architecture passes to its layers are its own doing. No layer's forward is rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from moebit.errors import BadInputError


class StopForward(Exception):
    """Raised inside a forward that has delivered what it was run for."""


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one decoder layer for one batch; the hidden states (first positional or `hidden_states`) are left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The layer's output hidden states.

        Raises:
            BadInputError: a layer whose output is not one tensor.
        """
        out = layer(*self.args, hidden_states=hidden, **self.kwargs) if self.by_name else layer(hidden, *self.args, **self.kwargs)
        if isinstance(out, tuple) and len(out) == 1:
            out = out[0]
        if not isinstance(out, Tensor):
            raise BadInputError(
                f"{type(layer).__name__} returns {type(out).__name__}, not one tensor of hidden states; "
                "moebit does not understand this layer"
            )
        return out

    def to(self, device: str) -> LayerCall:
        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return LayerCall(tree_map(move, self.args), tree_map(move, self.kwargs), self.by_name)


class _Stub(nn.Module):
    """Stands where a decoder layer stood: hands its call to `on_call` and returns what that returns."""

    def __init__(self, layer: nn.Module, on_call: Callable[[Tensor, LayerCall], Tensor]) -> None:
        super().__init__()
        self._stood_for = [layer]  # in a list, so that the layer is no submodule
        self._on_call = on_call

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stood_for"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if "hidden_states" in kwargs:
            hidden = kwargs.pop("hidden_states")
            return self._on_call(hidden, LayerCall(args, kwargs, True))
        return self._on_call(args[0], LayerCall(args[1:], kwargs, False))


@contextmanager
def _stubs(model: PreTrainedModel, list_name: str, on_call: Callable[[int, Tensor, LayerCall], Tensor]) -> Iterator[None]:
    layers: Any = model.get_submodule(list_name)
    originals = list(layers)
    try:
        for index, layer in enumerate(originals):
            layers[index] = _Stub(layer, lambda hidden, call, index=index: on_call(index, hidden, call))  # type: ignore[misc]
        yield
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


def record(model: PreTrainedModel, list_name: str, **inputs: Tensor) -> tuple[Tensor, list[LayerCall]]:
    """What enters the first decoder layer, and how every layer is called, for `input_ids` or `inputs_embeds`.

    Needs the embeddings (with `input_ids`) but none of the layers' weights.

    Raises:
        BadInputError: a model that does not call its layers one after the other with one tensor of hidden states.
    """
    count = len(model.get_submodule(list_name))
    first: list[Tensor] = []
    calls: list[LayerCall] = []

    def on_call(index: int, hidden: Tensor, call: LayerCall) -> Tensor:
        if index != len(calls):
            raise BadInputError(
                f"{type(model).__name__} calls layer {index} after {len(calls)} others; moebit does not understand this model"
            )
        first.append(hidden) if not first else None
        calls.append(call)
        if len(calls) == count:
            raise StopForward
        return hidden

    with _stubs(model, list_name, on_call), torch.no_grad():
        try:
            model(**inputs, use_cache=False)
        except StopForward:
            return first[0], calls
    raise BadInputError(f"{type(model).__name__} called {len(calls)} of its {count} decoder layers; moebit does not understand this model")


def head(model: PreTrainedModel, list_name: str, hidden: Tensor) -> Tensor:
    """Logits [B, L, V] from the last layer's output, through the model's own final norm, head and scaling."""
    last = len(model.get_submodule(list_name)) - 1

    def on_call(index: int, passed: Tensor, call: LayerCall) -> Tensor:
        return hidden if index == last else passed

    with _stubs(model, list_name, on_call), torch.no_grad():
        return model(inputs_embeds=hidden, use_cache=False).logits
