"""What a model is made of, found by watching one tiny forward of its skeleton on the meta device.

Nothing here knows an architecture: decoder layers are the entries of the module list that holds experts; linears that are called
with the same tensor share an input; the router is the module that produced what the experts are called with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moebit.errors import BadInputError
from moebit.model.capture import Call, observed
from moebit.model.experts import ExpertsLayout, layout_of
from moebit.model.layer_call import LayerReturn
from moebit.model.replay import zeros_outside
from moebit.model.seam import experts_handler, is_experts
from moebit.model.trial import behind_layers, check_arguments, trial

PROBE_TOKENS = 8


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a decoder layer that are called with the same tensor, in the order of execution.

    Attributes:
        names: module names inside the layer.
        moe_input: the shared input is also what the routed experts get.
        behind_experts: its input may depend on what the experts put out, so that it has to wait for them.
        replay: a submodule of the layer which, called alone with the input of group `replay_of`, calls this group; lets the
            input of a down projection be computed without running attention again. None where there is no such module.
    """

    names: tuple[str, ...]
    in_features: int
    moe_input: bool
    behind_experts: bool = False
    replay: str | None = None
    replay_of: int | None = None


@dataclass(frozen=True)
class MoESite:
    """The routed experts of one decoder layer.

    Attributes:
        experts: name of the experts module inside the layer.
        router: name of the module that holds the router's weight, None where it isn't recognised.
        top_k: experts per token.
        shared: names of linears that work beside the experts on the same input or behind it (shared experts, their gates).
    """

    experts: str
    layout: ExpertsLayout
    router: str | None
    router_kind: str
    top_k: int
    shared: tuple[str, ...]


@dataclass(frozen=True)
class LayerSites:
    """What can be quantized in one decoder layer.

    Attributes:
        groups: linears by shared input; routers and their like are not among them.
        kept: linears that are never quantized (routers, gates of shared experts), with the reason.
    """

    index: int
    name: str
    groups: tuple[LinearGroup, ...]
    moe: MoESite | None
    kept: dict[str, str]

    @property
    def experts(self) -> str:
        """Full name of the routed experts' module.

        Raises:
            ValueError: a layer without routed experts.
        """
        if self.moe is None:
            raise ValueError(f"{self.name} has no routed experts")
        return f"{self.name}.{self.moe.experts}"


@dataclass(frozen=True)
class Structure:
    """The decoder layers of a model, in order.

    Attributes:
        list_name: the module list that holds them.
        returns: what each of them returns.
        front, back: modules with tensors of their own that run before the first and after the last layer.
    """

    layers: tuple[LayerSites, ...]
    list_name: str
    returns: tuple[LayerReturn, ...] = ()
    front: tuple[str, ...] = ()
    back: tuple[str, ...] = ()

    @property
    def moe_layers(self) -> list[LayerSites]:
        return [layer for layer in self.layers if layer.moe]


def decoder_list(model: PreTrainedModel) -> str:
    """Name of the module list whose entries are the decoder layers.

    Raises:
        BadInputError: no experts behind the interface (a dense model), or experts outside of a list of layers.
    """
    found = [name for name, module in model.named_modules() if is_experts(module)]
    if not found:
        raise BadInputError(
            f"{type(model).__name__} has no routed experts behind transformers' experts interface: it is a dense model, "
            "or one whose experts moebit does not understand; a quantizer for dense models will serve you better"
        )
    language_model = model.get_decoder()  # a wrapper's towers may have experts, too
    inside = {id(module) for module in language_model.modules()} if isinstance(language_model, nn.Module) else set()
    found = [name for name in found if not inside or id(model.get_submodule(name)) in inside]
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name in sorted(lists, key=len):
        if found and all(path.startswith(f"{name}.") for path in found):
            return name
    raise BadInputError(
        f"{type(model).__name__}: its experts are not inside one list of decoder layers of its language model; "
        "moebit does not understand this model"
    )


@dataclass(frozen=True)
class _Call:
    """A module was called: with which tensor first, and whether with nothing else."""

    module: str
    storage: Any
    order: int
    alone: bool
    keep: Tensor  # holds the storage alive, so that its identity is not given to another tensor


@dataclass(frozen=True)
class _Experts:
    """Where and when a layer's experts were called."""

    name: str
    order: int


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel())


def find_structure(model: PreTrainedModel) -> Structure:
    """Run the skeleton's layers once on the meta device and note who is called with what.

    Raises:
        BadInputError: a dense model, or a forward that cannot be followed.
    """
    list_name = decoder_list(model)
    layers = model.get_submodule(list_name)
    calls: list[_Call] = []
    routed: dict[str, tuple[Tensor, Tensor, int]] = {}
    names = {module: name for name, module in model.named_modules()}

    def on_call(call: Call) -> None:
        if call.tensors:
            x, alone = call.tensors[0], len(call.args) + len(call.kwargs) == 1
            calls.append(_Call(call.name, _identity(x), len(calls), alone, x))

    def forget(index: int) -> None:
        prefix = f"{list_name}.{index}."
        calls[:] = [call for call in calls if not call.module.startswith(prefix)]
        for name in [name for name in routed if name.startswith(prefix)]:
            del routed[name]

    def on_experts(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        routed[names[module]] = (x, ids, len(calls))
        return torch.zeros_like(x)

    tokens = torch.zeros(1, PROBE_TOKENS, dtype=torch.int64)
    try:
        with ExitStack() as stack:
            # In front of what an output does to inputs: linears that share one are called with the same tensor.
            stack.enter_context(observed({names[module]: module for module in layers.modules()}, on_call, first=True))
            stack.enter_context(experts_handler(on_experts))
            returns, front = trial(model, list_name, tokens, forget)
        with zeros_outside(model, list_name):
            check_arguments(model, list_name, returns, tokens)
        back = behind_layers(model, list_name, returns, tokens)
    except BadInputError:
        raise
    except Exception as error:
        raise BadInputError(
            f"{type(model).__name__}: a trial forward failed ({type(error).__name__}: {error}); moebit does not understand this model"
        ) from error
    sites = tuple(_layer_sites(model, list_name, i, calls, routed) for i in range(len(layers)))
    return Structure(sites, list_name, returns, front, back)


def _layer_sites(
    model: PreTrainedModel, list_name: str, index: int, calls: list[_Call], routed: dict[str, tuple[Tensor, Tensor, int]]
) -> LayerSites:
    prefix = f"{list_name}.{index}."
    layer = model.get_submodule(prefix[:-1])
    own = [call for call in calls if call.module.startswith(prefix)]
    experts = [path for path in routed if path.startswith(prefix)]
    if len(experts) > 1:
        raise BadInputError(f"{prefix[:-1]}: {len(experts)} blocks of experts in one decoder layer; moebit does not understand this layer")

    moe_storage, moe, router, kept, order = None, None, None, {}, 0
    if experts:
        x, ids, order = routed[experts[0]]
        moe_storage = _identity(x)
        layout = layout_of(model.get_submodule(experts[0]), experts[0])
        router = _router(model, own, moe_storage, experts[0], layout)
        if router:
            kept[router.removeprefix(prefix)] = "router"
        kind = type(model.get_submodule(router)).__name__ if router else "not recognised"
        moe = MoESite(
            experts[0].removeprefix(prefix), layout, router.removeprefix(prefix) if router else None, kind, int(ids.shape[-1]), ()
        )

    groups: dict[Any, list[_Call]] = {}
    grouped: set[str] = set()
    for call in own:
        name = call.module.removeprefix(prefix)
        module = layer.get_submodule(name)
        # A linear that is called again (on a start state of zeros, say) belongs to what it was called with first.
        if not isinstance(module, nn.Linear) or name in kept or name in grouped or (router and call.module.startswith(router + ".")):
            continue
        if type(module).forward is not nn.Linear.forward:
            kept[name] = f"{type(module).__name__} computes something else than a linear"
            continue
        if module.out_features == 1 or (moe and module.out_features == moe.layout.experts and call.storage == moe_storage):
            kept[name] = "gate"  # scalar gates of shared experts, further routing heads
            continue
        grouped.add(name)
        groups.setdefault(call.storage, []).append(call)
    never = [
        n for n, m in layer.named_modules() if isinstance(m, nn.Linear) and n not in kept and not any(prefix + n == c.module for c in own)
    ]
    kept.update(dict.fromkeys(never, "not called"))
    linear_groups = _with_replays(layer, prefix, own, list(groups.items()), moe_storage, _Experts(experts[0], order) if experts else None)
    if moe:
        parent = moe.experts.rpartition(".")[0]
        shared = tuple(n for g in linear_groups for n in g.names if parent and "." in n.removeprefix(parent + ".") != n)
        moe = MoESite(moe.experts, moe.layout, moe.router, moe.router_kind, moe.top_k, shared)
    return LayerSites(index, prefix[:-1], linear_groups, moe, kept)


def _router(model: PreTrainedModel, own: list[_Call], moe_storage: Any, experts: str, layout: ExpertsLayout) -> str | None:
    """The module with a weight [E, H] beside the experts or called with their input; siblings of the experts come first.

    Where experts work in a latent space, the router is as wide as the block's input and not as the experts'.
    """
    parent = experts.rpartition(".")[0] + "."
    candidates = []
    for call in own:
        weight = getattr(model.get_submodule(call.module), "weight", None)
        beside, same_input = call.module.startswith(parent), call.storage == moe_storage
        if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] == layout.experts and (beside or same_input):
            candidates.append((not beside, not same_input, call.order, call.module))
    return min(candidates)[3] if candidates else None


def _with_replays(
    layer: nn.Module, prefix: str, own: list[_Call], groups: list[tuple[Any, list[_Call]]], moe_storage: Any, experts: _Experts | None
) -> tuple[LinearGroup, ...]:
    result: list[LinearGroup] = []
    storage_to_group = {storage: number for number, (storage, _) in enumerate(groups)}
    first_seen: dict[Any, int] = {}
    for call in own:
        first_seen.setdefault(call.storage, call.order)
    for storage, members in groups:
        names = tuple(dict.fromkeys(call.module.removeprefix(prefix) for call in members))
        replay, replay_of = None, None
        for parent, parent_storage in _ancestors(names[0], own, prefix):
            origin = storage_to_group.get(parent_storage)
            inside = all(name.startswith(parent + ".") for name in names)
            runs_experts = experts is not None and experts.name.startswith(f"{prefix}{parent}.")
            known = parent_storage == moe_storage or (origin is not None and origin < len(result))
            if inside and parent_storage != storage and known and not runs_experts:
                replay, replay_of = parent, origin
                break
        behind = experts is not None and replay is None and first_seen[storage] >= experts.order
        first: Any = layer.get_submodule(names[0])
        result.append(LinearGroup(names, int(first.in_features), storage == moe_storage, behind, replay, replay_of))
    return tuple(result)


def _ancestors(name: str, own: list[_Call], prefix: str) -> Iterator[tuple[str, Any]]:
    """The modules around a linear that were called with one tensor and nothing else, innermost first, with that tensor's identity."""
    called = {call.module.removeprefix(prefix): call.storage for call in own if call.alone}
    while "." in name:
        name = name.rpartition(".")[0]
        if name in called:
            yield name, called[name]
