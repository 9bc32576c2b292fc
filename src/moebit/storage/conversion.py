"""How stored tensors become parameters: the steps of transformers' own weight conversion, for some rows at a time.

transformers' loading internals (key renaming, converters) are used here and nowhere else.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key, revert_weight_conversion

from moebit.storage.files import Entry, TensorSpec

INSIDE = "language_model"  # what transformers calls the language model inside a wrapper


@dataclass
class Source:
    """The stored tensors that make up one or more parameters.

    Attributes:
        parts: (pattern, entry) in transformers' order.
        unchanged: one stored tensor is the parameter as it stands, although there is a converter. Some converters look at shapes to see
            whether there is anything to do, which they could not tell from a part of the experts.
    """

    converter: WeightConverter | None
    first_target: str
    parts: list[tuple[str, Entry]] = field(default_factory=list)
    unchanged: bool = False

    def convert(self, model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        if self.converter is None or self.unchanged:
            return {self.first_target: next(iter(tensors))[1]}
        converter = copy.deepcopy(self.converter)
        for pattern, tensor in tensors:
            converter.add_tensor(self.first_target, self.first_target, pattern, tensor)
        result = converter.convert(self.first_target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in result.items()}

    @property
    def as_it_is(self) -> bool:
        """Whether one stored tensor is the parameter, value by value."""
        return self.converter is None or self.unchanged

    def by_pattern(self) -> dict[str, list[Entry]]:
        """The stored tensors by the pattern that their names match."""
        result: dict[str, list[Entry]] = defaultdict(list)
        for pattern, entry in self.parts:
            result[pattern].append(entry)
        return result

    def on_meta(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """What a conversion of tensors without values gives; sets `unchanged` if it does nothing."""
        tensors = [(pattern, torch.empty(e.shape, dtype=e.dtype, device="meta")) for pattern, e in self.parts]
        result = self.convert(model, tensors)
        if len(tensors) == len(result) == 1:
            (_, before), (after,) = tensors[0], result.values()
            self.unchanged = after.untyped_storage()._cdata == before.untyped_storage()._cdata and after.stride() == before.stride()
        return result


def match(model: PreTrainedModel, entries: Mapping[str, Entry]) -> tuple[list[Source], list[str]]:
    """Stored names to parameters, by the steps of transformers' `convert_and_load_state_dict_in_model`.

    Returns:
        What makes up the model's parameters, and the names that the model class does not use.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected, prefix = model.state_dict(), model.base_model_prefix
    sources: dict[str, Source] = {}
    unused = []
    for stored in sorted(entries, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, expected)
        if name not in expected and stored in expected:
            name, pattern = rename_source_key(stored, [], [], base_model_prefix=prefix, meta_state_dict=expected)
        if name not in expected:
            unused.append(stored)
            continue
        source = sources.setdefault(name, Source(by_pattern[pattern] if pattern else None, name))
        source.parts.append((pattern or stored, entries[stored]))
    return list(sources.values()), unused


def checkpoint_specs(model: PreTrainedModel) -> dict[str, TensorSpec]:
    """The tensors that a checkpoint of a model has, by the names under which transformers stores them; tied ones once."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    own = {
        name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in model.state_dict().items() if name not in tied
    }
    found = revert_weight_conversion(model, own)
    return {name: TensorSpec(value.dtype, tuple(value.shape)) for name, value in found.items()}


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that are one parameter under two names, each -> the other; a checkpoint stores one of them."""
    pairs = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return {**{second: first for first, second in pairs.items()}, **pairs}


def without_wrapper() -> WeightRenaming:
    """The rule by which transformers loads a wrapper's language model by itself."""
    return WeightRenaming(rf"(^|\.){INSIDE}\.", r"\1")
