"""Decoder layers run by hand: how the model calls them is recorded once, then each layer runs alone with what it was given.

The decoder layers are replaced by stubs and the model's own forward is run: embeddings, masks, position embeddings and whatever else an
architecture passes to its layers are its own doing. No layer's forward is rewritten. What a layer hands on beside the hidden states (a
router's memory, tokens that an indexer selected, shared keys and values) reaches the later layers as the model's forward passes it on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from transformers import PreTrainedModel

from moebit.errors import BadInputError


class StopForward(Exception):
    """Raised inside a forward that has delivered what it was run for."""


@dataclass(frozen=True)
class LayerReturn:
    """The form of what a decoder layer returns.

    Attributes:
        spec: the nesting of its output. hidden: which leaf of it holds the hidden states.
        kinds: (shape, dtype) of every leaf in the trial forward, None for what is no tensor.
    """

    spec: TreeSpec
    hidden: int
    kinds: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]

    @classmethod
    def of(cls, layer: nn.Module, out: Any, hidden: Tensor) -> LayerReturn:
        """Read off one call, whose hidden states went in as `hidden`.

        Raises:
            BadInputError: nothing in the output looks like hidden states.
        """
        leaves, spec = tree_flatten(out)
        place = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.shape == hidden.shape), None)
        if place is None:
            raise BadInputError(
                f"{type(layer).__name__} returns {type(out).__name__} without a tensor of the hidden states' shape {list(hidden.shape)}; "
                "moebit does not understand this layer"
            )
        return cls(spec, place, tuple((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else None for leaf in leaves))

    def filled(self, hidden: Tensor, others: float = 0.0) -> Any:
        """An output with these hidden states and stand-ins for everything else."""
        leaves = [None if kind is None else torch.full(kind[0], others).to(kind[1]) for kind in self.kinds]
        leaves[self.hidden] = hidden
        return tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class Handed:
    """Stands in a recorded argument for what an earlier layer returns beside its hidden states."""

    layer: int
    leaf: int


@dataclass
class Carried:
    """What the layers of one batch hand to later ones beside the hidden states.

    Attributes:
        values: of layers that ran with `keep`, until the last layer that takes them has run. last_use: that layer.
        written: mappings that the model passes empty to its layers, for them to write into and read from.
    """

    values: dict[Handed, Any] = field(default_factory=dict)
    last_use: dict[Handed, int] = field(default_factory=dict)
    written: list[MutableMapping[Any, Any]] = field(default_factory=list)

    def note(self, value: Any) -> None:
        """Remember an argument if it is a mapping to be written into."""
        if isinstance(value, MutableMapping) and not value and not any(value is known for known in self.written):
            self.written.append(value)

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors, for a file."""
        result = {f"handed.{key.layer}.{key.leaf}": value for key, value in self.values.items() if isinstance(value, Tensor)}
        for number, entries in enumerate(self.written):
            for key, value in entries.items():
                for place, item in enumerate(value if isinstance(value, tuple | list) else [value]):
                    several = place if isinstance(value, tuple | list) else ""
                    result[f"written.{number}.{several}.{json.dumps(key)}"] = item
        return result

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        for name, tensor in tensors.items():
            kind, first, second, *key = name.split(".", 3)
            if kind == "handed":
                self.values[Handed(int(first), int(second))] = tensor
            elif second == "":
                self.written[int(first)][json.loads(key[0])] = tensor
            else:
                entries, entry = self.written[int(first)], json.loads(key[0])
                entries[entry] = (*entries.get(entry, ()), tensor)


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one decoder layer for one batch; the hidden states (first positional or `hidden_states`) are left out.

    Attributes:
        index: of the layer. returns: what it returns, None for one tensor.
        carried: of this batch; shared by its calls.
        wanted: what later layers want of this one's output.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool
    index: int = 0
    returns: LayerReturn | None = None
    carried: Carried = field(default_factory=Carried)
    wanted: set[Handed] = field(default_factory=set)

    def run(self, layer: nn.Module, hidden: Tensor, keep: bool = False) -> Tensor:
        """The layer's output hidden states.

        Args:
            keep: this run counts: what the layer hands on beside the hidden states is kept for the layers after it.

        Raises:
            BadInputError: a layer whose output is not what it was in the trial forward.
        """
        args, kwargs = swapped(self.args, self._taken), swapped(self.kwargs, self._taken)
        out = LayerCall(args, kwargs, self.by_name).apply(layer, hidden)
        leaves, spec = tree_flatten(out)
        place = self.returns.hidden if self.returns else 0
        if len(leaves) <= place or not isinstance(leaves[place], Tensor) or (self.returns is not None and spec != self.returns.spec):
            raise BadInputError(
                f"{type(layer).__name__} returns {type(out).__name__}, not hidden states as in the trial forward; "
                "moebit does not understand this layer"
            )
        if keep:
            self.carried.values.update({key: leaves[key.leaf] for key in self.wanted})
            for key in [key for key in self.carried.values if self.carried.last_use[key] <= self.index]:
                del self.carried.values[key]
        return leaves[place]

    @property
    def hands_on(self) -> bool:
        """Whether this batch's layers hand on, or write into, anything beside the hidden states."""
        return bool(self.wanted or self.carried.last_use or self.carried.written)

    def apply(self, layer: nn.Module, hidden: Tensor) -> Any:
        """The layer's whole output."""
        if self.by_name:
            return layer(*self.args, hidden_states=hidden, **self.kwargs)
        return layer(hidden, *self.args, **self.kwargs)

    def _taken(self, value: Any) -> Any:
        return self.carried.values[value] if isinstance(value, Handed) else value


def swapped(value: Any, swap: Callable[[Any], Any]) -> Any:
    """`value` with its leaves replaced; containers in which nothing changes stay the same objects (layers may write into them)."""
    if isinstance(value, tuple | list):
        items = [swapped(item, swap) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        entries = {key: swapped(item, swap) for key, item in value.items()}
        return value if all(entries[key] is value[key] for key in value) else entries
    return swap(value)


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
    count = len(model.get_submodule(list_name))
    first: list[Tensor] = []
    calls: list[LayerCall] = []
    expected: list[Tensor] = []
    known: dict[int, tuple[Handed, Tensor]] = {}
    carried = Carried()

    def handed_on(value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) not in known:
            return value
        key = known[id(value)][0]
        calls[key.layer].wanted.add(key)
        carried.last_use[key] = len(calls)  # the layer whose call is being noted
        return key

    def on_call(index: int, hidden: Tensor, call: LayerCall) -> Any:
        name = type(model).__name__
        if index != len(calls):
            raise BadInputError(f"{name} calls layer {index} after {len(calls)} others; moebit does not understand this model")
        if expected and hidden is not expected[0]:
            raise BadInputError(
                f"{name} changes the hidden states between layers {index - 1} and {index}; moebit does not understand this model"
            )
        first.append(hidden) if not first else None
        form = returns[index] if returns else None
        for value in (*call.args, *call.kwargs.values()):
            carried.note(value)
        args, kwargs = swapped(call.args, handed_on), swapped(call.kwargs, handed_on)
        calls.append(LayerCall(args, kwargs, call.by_name, index, form, carried))
        if len(calls) == count:
            raise StopForward
        passed = torch.full((), fill, dtype=hidden.dtype).expand(hidden.shape)
        expected[:] = [passed]
        if form is None:
            return passed
        out = form.filled(passed, fill)
        for leaf, value in enumerate(tree_leaves(out)):
            if isinstance(value, Tensor) and leaf != form.hidden:
                known[id(value)] = (Handed(index, leaf), value)  # the tensor is kept, so that its identity is not given away
        return out

    with stubs(model, list_name, on_call), torch.no_grad():
        try:
            model(**inputs, use_cache=False)
        except StopForward:
            return first[0], calls
    raise BadInputError(f"{type(model).__name__} called {len(calls)} of its {count} decoder layers; moebit does not understand this model")


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
    hooks = [module.register_forward_pre_hook(lambda m, args, name=name: called.append(name)) for name, module in outside(model, list_name)]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


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


def same_arguments(call: LayerCall, known: LayerCall, same: Callable[[Any, Any], Any]) -> LayerCall:
    """The call with arguments that equal those of another batch's stored once."""
    kwargs: Mapping[str, Any] = {key: same(value, known.kwargs.get(key)) for key, value in call.kwargs.items()}
    args = tuple(same(a, b) for a, b in zip(call.args, known.args, strict=True))
    return LayerCall(args, dict(kwargs), call.by_name, call.index, call.returns, call.carried, call.wanted)
