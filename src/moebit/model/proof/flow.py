"""Where a layer's norms lead and what is added to the hidden states, followed through the autograd graph of one run.

Nothing is told by its name: a norm's reader is what is called with the norm's output; a writer is a linear whose output reaches the
layer's output by sums, scalings and reshapes alone. What is found here is a candidate, `Rehearsal` decides whether it is true.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moebit.model.capture import Call, observed
from moebit.model.proof.passage import Passage
from moebit.model.proof.rehearsal import InDouble, Rehearsal
from moebit.model.seam import experts_handler

# What a tensor goes through without its numbers changing, and what sums and scalings add to that.
SAME = {"View", "ReshapeAlias", "UnsafeView", "Clone", "ToCopy", "Alias", "Unsqueeze", "Squeeze", "Contiguous"}
SUMS = SAME | {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Sum",
    "Expand",
    "Index",
    "Slice",
    "Select",
    "NativeDropout",
    "Transpose",
    "Permute",
    "Split",
    "Cat",
}
SUMS |= {"IndexAdd", "IndexPut", "CopySlices", "Neg", "Unbind", "Stack", "Where", "MaskedFill", "Repeat"}
PRODUCTS = {"Mm", "Bmm", "Addmm", "Baddbmm", "Dot", "Mv"}
SOFTMAX = {"Softmax", "SafeSoftmax"}


class Followed(TorchFunctionMode):
    """Gradients stay on inside: parts of models switch them off for themselves (indexers that select tokens), and read a norm no less."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:  # what switches them is no computation, and has to have its way when the block ends
            return func(*args, **(kwargs or {}))
        with torch.enable_grad():
            return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class NormSite:
    """A norm and everything that reads its output.

    Attributes:
        norm: full name of the module, with a `weight` [size]. offset: the norm multiplies with offset + weight (0 or 1).
        bias: it adds a bias.
        readers: full names of modules with a `weight` [out, size] that are called with the norm's output.
        experts: full name of the experts module that is, or None.
        of_hidden: the norm reads the hidden states.
    """

    norm: str
    size: int
    offset: float
    bias: bool
    readers: tuple[str, ...]
    experts: str | None
    of_hidden: bool

    def renamed(self, old: str, new: str) -> NormSite:
        """This site in a layer of another name."""

        def moved(name: str) -> str:
            return new + name.removeprefix(old)

        experts = moved(self.experts) if self.experts else None
        return replace(self, norm=moved(self.norm), readers=tuple(map(moved, self.readers)), experts=experts)


@dataclass(frozen=True)
class LayerFlow:
    """How hidden states go through one layer.

    Attributes:
        norms: with what reads them.
        raw: what reads the hidden states without a norm: full names, the experts module among them.
        writers: linears whose output is added to the hidden states. experts_write: the experts' is, too.
        behind: norms whose output is added to the hidden states, or handed on in their place.
        pairs: (linear, linear behind it) where the first's output reaches the second's input by products and sums alone.
        attention: (output linear, operations between it and the linear that makes the values) where values come out of a softmax.
        called: shape of the weight of everything that reads something, by name.
    """

    name: str
    norms: tuple[NormSite, ...]
    raw: tuple[str, ...]
    writers: tuple[str, ...]
    experts_write: bool
    behind: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    attention: tuple[tuple[str, tuple[str, ...]], ...]
    called: dict[str, tuple[int, int]]

    def renamed(self, name: str) -> LayerFlow:
        """The flow of a layer of the same kind."""

        def moved(names: Iterable[str]) -> tuple[str, ...]:
            return tuple(name + other.removeprefix(self.name) for other in names)

        return LayerFlow(
            name,
            tuple(site.renamed(self.name, name) for site in self.norms),
            moved(self.raw),
            moved(self.writers),
            self.experts_write,
            moved(self.behind),
            tuple((moved([a])[0], moved([b])[0]) for a, b in self.pairs),
            tuple((moved([linear])[0], between) for linear, between in self.attention),
            {moved([linear])[0]: shape for linear, shape in self.called.items()},
        )


@dataclass(frozen=True)
class _Called:
    """A module with a weight was called."""

    name: str
    module: Any
    x: Tensor
    out: Tensor | None
    alone: bool


def find_flow(rehearsal: Rehearsal, passage: Passage, index: int) -> LayerFlow:
    """Follow one layer, with a passage in front of it."""
    sites = rehearsal.structure.layers[index]
    called: list[_Called] = []
    routed: list[tuple[Tensor, Tensor]] = []

    def on_call(call: Call) -> None:
        if given := call.tensors:
            out = call.output if isinstance(call.output, Tensor) else None
            called.append(_Called(call.name, call.module, given[0], out, len(given) == 1))

    def on_experts(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = _leaf(torch.zeros_like(x))
        routed.append((x, out))
        return out

    with ExitStack() as stack:
        layer = stack.enter_context(passage.loaded(index))
        weighted = {name: module for name, module in layer.named_modules() if isinstance(module._parameters.get("weight"), Tensor)}
        stack.enter_context(observed({f"{sites.name}.{name}": module for name, module in weighted.items()}, on_call, outputs=True))
        stack.enter_context(experts_handler(on_experts))
        stack.enter_context(InDouble())
        stack.enter_context(Followed())
        stack.enter_context(torch.enable_grad())
        root = _leaf(passage.hidden.clone())
        out = passage.call(index).run(layer, root)
        experts = sites.experts if sites.moe else None
        return _flow(sites.name, root, out, called, routed, experts)


def _leaf(tensor: Tensor) -> Tensor:
    """A tensor with a node of its own in the graph."""
    return tensor.detach().requires_grad_() * 1.0


def _flow(
    name: str, root: Tensor, out: Tensor, called: list[_Called], routed: list[tuple[Tensor, Tensor]], experts: str | None
) -> LayerFlow:
    followed = [(call.out.grad_fn, call) for call in called if call.out is not None and call.out.grad_fn is not None]
    norm_of = {node: call for node, call in followed if call.alone and _is_norm(call)}
    linear_of = {node: call for node, call in followed if isinstance(call.module, nn.Linear)}
    routed_of = {result.grad_fn: result for _, result in routed}
    ends = {*norm_of, *linear_of, *routed_of, root.grad_fn}
    reached = _walk(out.grad_fn, ends, SUMS)[0]
    norms = []
    for node, call in norm_of.items():
        probed = gain_offset(call.module, call.x)
        readers = tuple(dict.fromkeys(c.name for c in called if _reads(c) and _source(c.x, ends) is node))
        by_experts = experts if any(_source(x, ends) is node for x, _ in routed) else None
        if probed is not None and (readers or by_experts):
            hidden = root.grad_fn in _walk(call.x.grad_fn, ends, SUMS)[0]
            bias = isinstance(getattr(call.module, "bias", None), Tensor)
            norms.append(NormSite(call.name, call.module.weight.shape[0], probed, bias, readers, by_experts, hidden))
    sums = {id(c): _walk(c.x.grad_fn, ends, SUMS)[0] for c in called if isinstance(c.module, nn.Linear)}
    raw = [c.name for c in called if _reads(c) and root.grad_fn in _walk(c.x.grad_fn, ends, SUMS)[0]]
    raw += [experts for x, _ in routed if experts and root.grad_fn in _walk(x.grad_fn, ends, SUMS)[0]]
    pairs = [
        (linear_of[node].name, c.name)
        for c in called
        for node in sums.get(id(c), ())
        if node in linear_of and linear_of[node].module.out_features == c.module.in_features
    ]
    attention = []
    for call in (c for c in called if isinstance(c.module, nn.Linear) and not sums[id(c)]):
        products, between = _walk(call.x.grad_fn, set(), SUMS)[1:]
        products = [node for node in products if _softmax_behind(node)]
        for node in products:
            operand = 2 if _kind(node).startswith("ScaledDotProduct") else 1
            between |= _walk(node.next_functions[operand][0], ends, SUMS)[2]
        if products:
            attention.append((call.name, tuple(sorted(between))))
    return LayerFlow(
        name,
        tuple(norms),
        tuple(dict.fromkeys(raw)),
        tuple(dict.fromkeys(linear_of[node].name for node in linear_of if node in reached)),
        any(node in reached for node in routed_of),
        tuple(dict.fromkeys(norm_of[node].name for node in norm_of if node in reached)),
        tuple(sorted(set(pairs))),
        tuple(attention),
        {c.name: tuple(c.module.weight.shape) for c in called if _reads(c)},
    )


def _reads(call: _Called) -> bool:
    weight = call.module.weight
    return weight.ndim == 2 and not isinstance(call.module, nn.Embedding) and weight.shape[1] == call.x.shape[-1]


def _is_norm(call: _Called) -> bool:
    return (
        call.module.weight.ndim == 1
        and len(call.module.weight) == call.x.shape[-1]
        and call.out is not None
        and call.out.shape == call.x.shape
    )


def _kind(node: Any) -> str:
    return type(node).__name__.partition("Backward")[0]


def _source(x: Tensor, ends: set[Any]) -> Any:
    """The known node whose values a tensor holds, if any."""
    found = _walk(x.grad_fn, ends, SAME)[0]
    return next(iter(found)) if len(found) == 1 else None


def _walk(node: Any, ends: set[Any], through: set[str]) -> tuple[set[Any], list[Any], set[str]]:
    """(known nodes that are reached, products that are reached, kinds of the other operations on the way or at its end)."""
    found: set[Any] = set()
    products: list[Any] = []
    kinds: set[str] = set()
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = _kind(node)
        if node in ends:
            found.add(node)
        elif kind in PRODUCTS or kind.startswith("ScaledDotProduct"):
            products.append(node)
        elif kind in through:
            kinds |= {kind} - SAME
            waiting += [other for other, _ in node.next_functions]
        else:
            kinds.add(kind)
    return found, products, kinds


def _softmax_behind(node: Any) -> bool:
    """Whether a product is that of attention weights and values."""
    if _kind(node).startswith("ScaledDotProduct"):
        return True
    waiting, seen = [other for other, _ in node.next_functions], set()
    for _ in range(64):
        if not waiting:
            return False
        other = waiting.pop()
        if other is None or other in seen:
            continue
        seen.add(other)
        if _kind(other) in SOFTMAX:
            return True
        if _kind(other) in SUMS:
            waiting += [more for more, _ in other.next_functions]
    return False


def gain_offset(module: Any, x: Tensor) -> float | None:
    """The offset of a norm's gain: 0 for `weight n(x)`, 1 for `(1 + weight) n(x)`; None for anything else."""
    weight = module.weight
    x = x.detach()[..., :1, :] if x.ndim > 2 else x.detach()[:1]
    own = {"bias": torch.zeros_like(weight)} if isinstance(getattr(module, "bias", None), Tensor) else {}

    def norm(value: float) -> Tensor:
        result: Tensor = torch.func.functional_call(module, {"weight": torch.full_like(weight, value), **own}, (x,))
        return result

    with torch.no_grad():
        zero, one, two = norm(0.0), norm(1.0), norm(2.0)
    plain = one - zero
    if not torch.allclose(two - one, plain, rtol=1e-9, atol=1e-12):
        return None
    offset = next((o for o in (0.0, 1.0) if torch.allclose(zero, o * plain, rtol=1e-9, atol=1e-12)), None)
    return offset
