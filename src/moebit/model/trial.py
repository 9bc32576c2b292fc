"""A trial forward of a skeleton, which shows what its layers return and what runs before and behind them.

The decoder layers run on the meta device, the rest on zeros on the CPU, where masks and positions have values that can be looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from moebit.errors import BadInputError
from moebit.model.capture import observed
from moebit.model.layer_call import LayerCall, LayerReturn, StopForward
from moebit.model.replay import outside, record, stubs, zeros_instead, zeros_outside


def trial(
    model: PreTrainedModel, list_name: str, tokens: Tensor, forget: Callable[[int], None]
) -> tuple[tuple[LayerReturn, ...], tuple[str, ...]]:
    """Run the skeleton's own forward up to its last layer: the decoder layers on the meta device, the rest on zeros on the CPU.

    Masks and positions are computed on the CPU, where their values can be looked at. A layer that meta tensors don't get through (its
    course depends on values, or it makes tensors elsewhere) runs on zeros on the CPU too.

    Args:
        forget: called with a layer's index when the layer starts again.

    Returns:
        What each layer returns, and the modules outside the layers, with tensors of their own, that run before or among them.

    Raises:
        BadInputError: a layer whose output is not understood.
    """
    layers: Any = model.get_submodule(list_name)
    originals = list(layers)
    returns: list[LayerReturn] = []
    on_meta = _MetaTwins()

    def on_call(index: int, hidden: Tensor, call: LayerCall) -> Any:
        x, layer = on_meta(hidden), originals[index]
        moved = LayerCall(on_meta(call.args), on_meta(call.kwargs), call.by_name)
        try:
            with _buffers_on_meta(layer):
                out = moved.apply(layer, x)
        except (NotImplementedError, RuntimeError):  # its course depends on values, which meta has none of: once more, with zeros
            forget(index)
            with zeros_instead(layer.modules()):
                out = call.apply(layer, hidden)
        returns.append(LayerReturn.of(layer, out, x))
        if len(returns) == len(originals):
            raise StopForward
        return returns[-1].filled(torch.zeros(x.shape, dtype=x.dtype))

    with _names_of_called(model, list_name) as called, zeros_outside(model, list_name), stubs(model, list_name, on_call), torch.no_grad():
        try:
            model(input_ids=tokens, use_cache=False)
        except StopForward:
            return tuple(returns), tuple(dict.fromkeys(called))
    raise BadInputError(
        f"{type(model).__name__} called {len(returns)} of its {len(originals)} decoder layers; moebit does not understand this model"
    )


@contextmanager
def _buffers_on_meta(module: nn.Module) -> Iterator[None]:
    """Computed buffers go to meta and come back."""
    saved = [(owner, leaf, buffer) for owner in module.modules() for leaf, buffer in owner._buffers.items() if buffer is not None]
    try:
        for owner, leaf, buffer in saved:
            owner._buffers[leaf] = buffer.to("meta")
        yield
    finally:
        for owner, leaf, buffer in saved:
            owner._buffers[leaf] = buffer


class _MetaTwins:
    """Values moved to meta; the same dict always becomes the same twin, so that what a layer writes into it reaches the next."""

    def __init__(self) -> None:
        self._twins: dict[int, tuple[Any, dict[Any, Any]]] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to("meta")
        if isinstance(value, tuple | list):
            items = [self(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, dict):
            _, twin = self._twins.setdefault(id(value), (value, type(value)()))
            for key, item in value.items():
                if key not in twin:
                    twin[key] = self(item)
            return twin
        return value


def check_arguments(model: PreTrainedModel, list_name: str, returns: Sequence[LayerReturn], tokens: Tensor) -> None:
    """Recorded arguments must not be computed from what layers return: they would be wrong when the layers run for real.

    Raises:
        BadInputError: naming the layer and the argument.
    """
    _, zeros = record(model, list_name, returns, 0.0, input_ids=tokens)
    _, ones = record(model, list_name, returns, 1.0, input_ids=tokens)
    for a, b in zip(zeros, ones, strict=True):
        named = [(f"argument {i + 1}", x, y) for i, (x, y) in enumerate(zip(a.args, b.args, strict=True))]
        named += [(key, value, b.kwargs[key]) for key, value in a.kwargs.items()]
        for name, x, y in named:
            if not _equal(x, y):
                raise BadInputError(
                    f"{type(model).__name__} computes {name!r} of layer {a.index} from what the layers before it return; "
                    "moebit does not understand this model"
                )


def _equal(a: Any, b: Any) -> bool:
    mine, theirs = tree_leaves(a), tree_leaves(b)
    if len(mine) != len(theirs):
        return False
    pairs = [(x, y) for x, y in zip(mine, theirs, strict=True) if isinstance(x, Tensor) and isinstance(y, Tensor)]
    return all(x.shape == y.shape and (x.is_meta or torch.equal(x, y)) for x, y in pairs)


def behind_layers(model: PreTrainedModel, list_name: str, returns: Sequence[LayerReturn], tokens: Tensor) -> tuple[str, ...]:
    """The modules outside the layers, with tensors of their own, that run after the last layer, or around all of them.

    Raises:
        BadInputError: a head that takes more than what the last layer returns.
    """
    around = [name for name, _ in outside(model, list_name) if f"{list_name}.".startswith(f"{name}." if name else "")]
    with _names_of_called(model, list_name) as called, zeros_outside(model, list_name) as restore, torch.no_grad():

        def on_call(index: int, hidden: Tensor, call: LayerCall) -> Any:
            if index < len(returns) - 1:
                return returns[index].filled(torch.zeros(hidden.shape, dtype=hidden.dtype))
            called.clear()
            restore()  # the head on meta: its product over the whole vocabulary costs nothing there
            return returns[index].filled(hidden.to("meta"))

        with stubs(model, list_name, on_call):
            try:
                model(input_ids=tokens, use_cache=False)
            except RuntimeError as error:  # tensors of two devices met
                raise BadInputError(
                    f"{type(model).__name__}: what comes after the layers takes more than the last one's hidden states ({error}); "
                    "moebit does not understand this model"
                ) from error
    return tuple(dict.fromkeys([*around, *called]))


@contextmanager
def _names_of_called(model: nn.Module, list_name: str) -> Iterator[list[str]]:
    """The modules outside the layers with tensors of their own, as they are called."""
    called: list[str] = []
    with observed(dict(outside(model, list_name)), lambda call: called.append(call.name)):
        yield called
