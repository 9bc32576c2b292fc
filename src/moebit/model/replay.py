"""Decoder layers run by hand: how the model calls them is recorded once, then each layer runs alone with what it was given.

The decoder layers are replaced by stubs and the model's own forward is run: embeddings, masks, position embeddings and whatever else an
architecture passes to its layers are its own doing. No layer's forward is rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from moebit.errors import BadInputError
from moebit.model.layer_call import Carried, Handed, LayerCall, LayerReturn, StopForward, swapped


class StandIn(nn.Module):
    """Stands where another module stood, and has its attributes, for code around it that asks for them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._stood_for = [module]  # in a list, so that the module is no submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stood_for"][0], name)


class _Stub(StandIn):
    """Stands where a decoder layer stood: hands its call to `on_call` and returns what that returns."""

    def __init__(self, layer: nn.Module, index: int, on_call: Callable[[int, Tensor, LayerCall], Any]) -> None:
        super().__init__(layer)
        self._index, self._on_call = index, on_call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if "hidden_states" in kwargs:
            hidden = kwargs.pop("hidden_states")
            return self._on_call(self._index, hidden, LayerCall(args, kwargs, True, self._index))
        return self._on_call(self._index, args[0], LayerCall(args[1:], kwargs, False, self._index))


@contextmanager
def stubs(model: PreTrainedModel, list_name: str, on_call: Callable[[int, Tensor, LayerCall], Any]) -> Iterator[None]:
    """The decoder layers replaced by `on_call(index, hidden, call)` inside this context."""
    layers: Any = model.get_submodule(list_name)
    originals = list(layers)
    try:
        for index, layer in enumerate(originals):
            layers[index] = _Stub(layer, index, on_call)
        yield
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


def outside(model: nn.Module, list_name: str) -> list[tuple[str, nn.Module]]:
    """The modules with parameters or buffers of their own that are not inside the decoder layers."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if not f"{name}.".startswith(f"{list_name}.") and (module._parameters or module._buffers)
    ]


@contextmanager
def zeros_instead(modules: Iterable[nn.Module]) -> Iterator[Callable[[], None]]:
    """Zeros that take no memory in place of the modules' meta tensors, so that they run on the CPU.

    Yields a function that puts the meta tensors back early.
    """
    saved: list[tuple[dict[str, Any], str, Any]] = []

    def restore() -> None:
        while saved:
            table, leaf, value = saved.pop()
            table[leaf] = value

    for module in modules:
        tables: Iterable[dict[str, Any]] = (module._parameters, module._buffers)
        for table in tables:
            for leaf, value in list(table.items()):
                if value is not None and value.device.type == "meta":
                    saved.append((table, leaf, value))
                    zeros = torch.zeros((), dtype=value.dtype).expand(value.shape)
                    table[leaf] = nn.Parameter(zeros, requires_grad=False) if isinstance(value, nn.Parameter) else zeros
    try:
        yield restore
    finally:
        restore()


def zeros_outside(model: nn.Module, list_name: str) -> AbstractContextManager[Callable[[], None]]:
    """`zeros_instead` for everything outside the decoder layers: the model's own forward runs up to them and behind them."""
    return zeros_instead(module for _, module in outside(model, list_name))


def record(
    model: PreTrainedModel, list_name: str, returns: Sequence[LayerReturn] = (), fill: float = 0.0, **inputs: Tensor
) -> tuple[Tensor, list[LayerCall]]:
    """What enters the first decoder layer, and how every layer is called, for `input_ids` or `inputs_embeds`.

    Needs what the model computes before its layers (the embeddings) but none of the layers' weights.

    Args:
        returns: the layers' outputs, as `find_structure` found them; one tensor each where nothing is given.
        fill: the value that stands for what layers return.

    Raises:
        BadInputError: a model that does not call its layers one after the other, each with what the one before returned.
    """
    recorder = _Recorder(type(model).__name__, len(model.get_submodule(list_name)), returns, fill)
    with stubs(model, list_name, recorder.on_call), torch.no_grad():
        try:
            model(**inputs, use_cache=False)
        except StopForward:
            return recorder.first[0], recorder.calls
    raise BadInputError(
        f"{type(model).__name__} called {len(recorder.calls)} of its {recorder.count} decoder layers; moebit does not understand this model"
    )


class _Recorder:
    """Notes the calls of one forward, layer after layer.

    Args:
        model: its name, for messages. count: layers. returns, fill: as for `record`.

    Attributes:
        first: what entered the first layer. calls: how every layer was called.
    """

    def __init__(self, model: str, count: int, returns: Sequence[LayerReturn], fill: float) -> None:
        self.count, self.first, self.calls = count, list[Tensor](), list[LayerCall]()
        self._model, self._returns, self._fill, self._carried = model, returns, fill, Carried()
        self._expected: Tensor | None = None  # what the layer before put out
        self._known: dict[int, tuple[Handed, Tensor]] = {}

    def on_call(self, index: int, hidden: Tensor, call: LayerCall) -> Any:
        """The stand-in for layer `index`."""
        self._check(index, hidden)
        if not self.first:
            self.first.append(hidden)
        form = self._returns[index] if self._returns else None
        for value in (*call.args, *call.kwargs.values()):
            self._carried.note(value)
        args, kwargs = swapped(call.args, self._handed_on), swapped(call.kwargs, self._handed_on)
        self.calls.append(LayerCall(args, kwargs, call.by_name, index, form, self._carried))
        if len(self.calls) == self.count:
            raise StopForward
        self._expected = torch.full((), self._fill, dtype=hidden.dtype).expand(hidden.shape)
        return self._expected if form is None else self._filled(form, index, self._expected)

    def _check(self, index: int, hidden: Tensor) -> None:
        if index != len(self.calls):
            raise BadInputError(f"{self._model} calls layer {index} after {len(self.calls)} others; moebit does not understand this model")
        if self._expected is not None and hidden is not self._expected:
            raise BadInputError(
                f"{self._model} changes the hidden states between layers {index - 1} and {index}; moebit does not understand this model"
            )

    def _filled(self, form: LayerReturn, index: int, passed: Tensor) -> Any:
        """A layer's output, whose other tensors are known again when a later layer gets them."""
        out = form.filled(passed, self._fill)
        for leaf, value in enumerate(tree_leaves(out)):
            if isinstance(value, Tensor) and leaf != form.hidden:
                self._known[id(value)] = (Handed(index, leaf), value)  # the tensor is kept, so that its identity is not given away
        return out

    def _handed_on(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) not in self._known:
            return value
        key = self._known[id(value)][0]
        self.calls[key.layer].wanted.add(key)
        self._carried.last_use[key] = len(self.calls)  # the layer whose call is being noted
        return key


def head(model: PreTrainedModel, list_name: str, hidden: Tensor, returns: Sequence[LayerReturn] = ()) -> Tensor:
    """Logits [B, L, V] from the last layer's output, through the model's own final norm, head and scaling.

    What the model computes before its layers is not needed: nothing of it reaches the head.
    """
    last = len(model.get_submodule(list_name)) - 1

    def on_call(index: int, passed: Tensor, call: LayerCall) -> Any:
        value = hidden if index == last else passed
        return returns[index].filled(value) if returns else value

    tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64)
    following = torch.set_grad_enabled(hidden.requires_grad)
    with stubs(model, list_name, on_call), zeros_outside(model, list_name), following:
        return model(input_ids=tokens, use_cache=False).logits
