"""Query, key and value on their way into attention: transformers' attention interface with a step in front.

transformers calls attention through `ALL_ATTENTION_FUNCTIONS`, by the name in a module's configuration. Registered here is a twin of each
plain implementation, `moebit-sdpa` and `moebit-eager`: it does what the module asks for with `moebit_attention` (nothing, where there is
no such attribute) and hands on to the plain one, whose masks it shares. Whether a model's attention goes through the interface, and
that what goes through it are queries, keys and values, is found out and proved by running its layers (`find_attention`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moebit.errors import BadInputError
from moebit.model.capture import put_in_front
from moebit.model.layer_call import LayerCall, swapped
from moebit.model.replay import record, zeros_outside
from moebit.model.seam import experts_handler
from moebit.model.structure import LayerSites, Structure
from moebit.tensor.blocks import block_size, hadamard, rotate_blocks
from moebit.tensor.row_rounding import Rounding

PREFIX = "moebit-"
PLAIN = ("sdpa", "eager")
PROBE_TOKENS = 12
CHANGE = 1e-4  # how much a rotation of queries and keys may change a layer's output, relative, in float32
Watcher = Callable[[nn.Module, Tensor, Tensor, Tensor], None]
_watcher: ContextVar[Watcher | None] = ContextVar("moebit_attention_watcher", default=None)


@dataclass(frozen=True)
class AttentionStep:
    """Rotate queries and keys by the same Hadamard blocks, which leaves their products alone, then round; values are only rounded.

    Rows are those of one token and head (EAQuant, setting). `rounding` None: rotate only.
    """

    rounding: Rounding | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if query.is_meta:
            return query, key, value
        block = hadamard(block_size(query.shape[-1])).to(query.device)
        rotated = [rotate_blocks(x.float(), block) for x in (query, key)]
        if self.rounding is not None:
            rotated, value = [self.rounding(x) for x in rotated], self.rounding(value)
        return rotated[0].to(query.dtype), rotated[1].to(key.dtype), value


def _attend(plain: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    watcher, step = _watcher.get(), getattr(module, "moebit_attention", None)
    if watcher is not None:
        watcher(module, query, key, value)
    if step is not None:
        query, key, value = step(query, key, value)
    # What stands beside an attention class under this name is its plain form: transformers' own convention for the interface's default.
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(plain, own)(module, query, key, value, *args, **kwargs)


for _plain in PLAIN:  # beside the experts' seam, the other thing that importing moebit tells transformers
    ALL_ATTENTION_FUNCTIONS.register(PREFIX + _plain, partial(_attend, _plain))
    ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + _plain, ALL_MASK_ATTENTION_FUNCTIONS[_plain])


def round_attention(module: Any, rounding: Rounding | None) -> None:
    """Have an attention module round what it attends with, in place; its configuration is switched to the registered twin.

    Raises:
        BadInputError: an attention implementation without a twin, now or when the module is called.
    """
    module.moebit_attention = AttentionStep(rounding)
    if not str(module.config._attn_implementation).startswith(PREFIX):
        _check_plain(module.config._attn_implementation)
        module.config._attn_implementation_internal = PREFIX + module.config._attn_implementation
    put_in_front(module, _still_rounding)


def _check_plain(implementation: str | None) -> None:
    if implementation not in PLAIN:
        raise BadInputError(
            f"this output rounds query, key and value, which moebit does in front of {' and '.join(PLAIN)} attention, not of "
            f"{implementation!r}; load it with attn_implementation='sdpa' or 'eager'"
        )


def _still_rounding(module: Any, args: tuple[Any, ...]) -> None:
    """Somebody may have chosen another implementation since, which would leave the rounding out without a word."""
    if not str(module.config._attn_implementation).startswith(PREFIX):
        _check_plain(module.config._attn_implementation)
        raise BadInputError(
            f"this output rounds query, key and value: use attn_implementation='{PREFIX}{module.config._attn_implementation}' "
            "instead of the plain one"
        )


# --- finding it


@dataclass(frozen=True)
class AttentionSites:
    """Where query, key and value can be rounded.

    Attributes:
        modules: full names. inputs_only: layer -> why there is no such place in it.
    """

    modules: tuple[str, ...]
    inputs_only: dict[str, str]


def find_attention(model: PreTrainedModel, structure: Structure) -> AttentionSites:
    """Prove on random values which modules hand queries, keys and values to the interface, one layer of each kind.

    A layer's output must be the same bit for bit through the registered twin, and all but the same (float32) when queries and keys are
    rotated together there; everything else gives the layer up, with the reason. Needs the memory of one layer without its experts.
    """
    configs = _configs(model, structure)
    plain = {str(config._attn_implementation) for config in configs}
    if len(plain) != 1 or not plain <= set(PLAIN):
        why = f"its attention runs as {', '.join(sorted(plain)) or 'nothing known'}"
        return AttentionSites((), {layer.name: why for layer in structure.layers})
    tokens = torch.arange(PROBE_TOKENS).unsqueeze(0) % 7
    with zeros_outside(model, structure.list_name):
        first, calls = record(model, structure.list_name, structure.returns, input_ids=tokens)
        with _twins(configs):
            _, twin_calls = record(model, structure.list_name, structure.returns, input_ids=tokens)
    hidden = torch.randn(first.shape, generator=torch.Generator().manual_seed(0))
    kinds: dict[tuple[Any, ...], tuple[tuple[str, ...], str]] = {}
    modules: list[str] = []
    inputs_only: dict[str, str] = {}
    for sites in structure.layers:
        layer = model.get_submodule(sites.name)
        kind = tuple((name, type(module)) for name, module in layer.named_modules())
        if kind not in kinds:
            kinds[kind] = _prove(layer, sites, hidden, _in_float32(calls[sites.index]), _in_float32(twin_calls[sites.index]), configs)
        names, why = kinds[kind]
        modules += [f"{sites.name}.{name}" for name in names]
        if why:
            inputs_only[sites.name] = why
    return AttentionSites(tuple(modules), inputs_only)


def _prove(
    layer: nn.Module, sites: LayerSites, hidden: Tensor, call: LayerCall, twin_call: LayerCall, configs: list[Any]
) -> tuple[tuple[str, ...], str]:
    """(names of the modules inside the layer, "") or ((), why not)."""
    names = {module: name for name, module in layer.named_modules()}
    seen: list[nn.Module] = []
    experts = [layer.get_submodule(sites.moe.experts)] if sites.moe else []
    try:
        with _random_instead(layer, experts), experts_handler(lambda module, x, ids, weights: torch.zeros_like(x)), torch.no_grad():
            wanted = call.run(layer, hidden)
            with _twins(configs):
                with _watching(lambda module, query, key, value: seen.append(module)):
                    same = twin_call.run(layer, hidden)
                if not seen:
                    return (), "no attention that goes through transformers' interface"
                if len(set(seen)) != len(seen) or not all(module in names for module in seen):
                    return (), "its attention calls the interface in a way that is not understood"
                with _steps(seen):
                    rotated = twin_call.run(layer, hidden)
    except Exception as error:  # a model's own code may fail in any way outside of its usual course
        return (), f"its attention cannot be followed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    if not torch.equal(wanted, same):
        return (), "its attention computes something else through the interface's twin"
    if not float((rotated - wanted).norm()) <= CHANGE * float(wanted.norm()):
        return (), "rotating its queries and keys together changes what it computes"
    return tuple(names[module] for module in seen), ""


def _in_float32(call: LayerCall) -> LayerCall:
    """A layer's call with arguments in float32, whatever the model will be computed in: the proof needs the digits."""

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    return replace(call, args=swapped(call.args, wide), kwargs=swapped(call.kwargs, wide))


def _configs(model: PreTrainedModel, structure: Structure) -> list[Any]:
    """The configurations in which the decoder layers' modules, and the model that makes their masks, look attention up."""
    owners: list[Any] = [model.get_submodule(structure.list_name.rpartition(".")[0])]
    owners += [module for layer in structure.layers for module in model.get_submodule(layer.name).modules()]
    found = [owner.config for owner in owners if hasattr(getattr(owner, "config", None), "_attn_implementation_internal")]
    return list({id(config): config for config in found}.values())


@contextmanager
def _twins(configs: list[Any]) -> Iterator[None]:
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config, plain in zip(configs, before, strict=True):
            config._attn_implementation_internal = PREFIX + plain
        yield
    finally:
        for config, plain in zip(configs, before, strict=True):
            config._attn_implementation_internal = plain


@contextmanager
def _watching(watcher: Watcher) -> Iterator[None]:
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextmanager
def _steps(modules: list[Any]) -> Iterator[None]:
    """Rotation without rounding in these modules."""
    try:
        for module in modules:
            module.moebit_attention = AttentionStep(None)
        yield
    finally:
        for module in modules:
            del module.moebit_attention


@contextmanager
def _random_instead(layer: nn.Module, skip: list[nn.Module]) -> Iterator[None]:
    """Random float32 values in place of a layer's meta tensors, of the size that trained ones have; those of `skip` stay on meta."""
    generator, saved = torch.Generator().manual_seed(0), []
    skipped = {id(module) for module in skip}
    try:
        for module in layer.modules():
            if id(module) in skipped:
                continue
            for table in (module._parameters, module._buffers):
                entries: dict[str, Any] = table
                for leaf, value in list(entries.items()):
                    if value is None or value.device.type != "meta":
                        continue
                    saved.append((entries, leaf, value))
                    entries[leaf] = _random_like(value, generator)
        yield
    finally:
        for entries, leaf, value in saved:
            entries[leaf] = value


def _random_like(value: Tensor, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        filled = torch.zeros(value.shape, dtype=value.dtype)
    elif value.ndim < 2:
        filled = 1 + 0.1 * torch.randn(value.shape, generator=generator)
    else:
        filled = torch.randn(value.shape, generator=generator) / value.shape[-1] ** 0.5
    return nn.Parameter(filled, requires_grad=False) if isinstance(value, nn.Parameter) else filled
