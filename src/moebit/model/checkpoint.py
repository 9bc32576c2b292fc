"""A Hugging Face checkpoint, read lazily through transformers' own weight conversion into a skeleton on the meta device.

transformers' loading internals (key renaming, converters) are used here and nowhere else.
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils import logging as transformers_logging

from moebit.errors import BadInputError
from moebit.model.files import TensorEntry, TensorSpec, read_index
from moebit.model.seam import SEAM


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """The local directory of a checkpoint: a path, or a hub id that is downloaded (safetensors, configuration, tokenizer).

    Raises:
        BadInputError: neither a directory with a config.json nor a hub id that can be fetched.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise BadInputError(f"{path}: no config.json here; give the directory of a Hugging Face checkpoint")
        return path
    if str(model).count("/") != 1 or str(model).startswith((".", "/")):
        raise BadInputError(f"{model}: no such directory; give a checkpoint directory or a hub id like org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(model), revision=revision, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"])
        )
    except Exception as error:
        raise BadInputError(f"{model}: no such directory, and the hub could not provide it ({type(error).__name__}: {error})") from error


class Weights(ABC):
    """Where the parameters of a model come from, under the names and in the storage layout of its transformers module."""

    @abstractmethod
    def parameter(self, name: str) -> Tensor:
        """A whole parameter or persistent buffer."""

    @abstractmethod
    def expert_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a parameter whose first axis is the expert."""

    @abstractmethod
    def available(self) -> set[str]:
        """Names that can be read."""


@dataclass
class _Source:
    """The stored tensors that make up one or more parameters: (pattern, entry) in transformers' order."""

    converter: WeightConverter | None
    first_target: str
    parts: list[tuple[str, TensorEntry]] = field(default_factory=list)

    def convert(self, model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        if self.converter is None:
            return {self.first_target: next(iter(tensors))[1]}
        converter = copy.deepcopy(self.converter)
        for pattern, tensor in tensors:
            converter.add_tensor(self.first_target, self.first_target, pattern, tensor)
        result = converter.convert(self.first_target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in result.items()}

    def on_meta(self, model: PreTrainedModel) -> dict[str, Tensor]:
        return self.convert(model, ((pattern, torch.empty(e.shape, dtype=e.dtype, device="meta")) for pattern, e in self.parts))


class HubWeights(Weights):
    """Full-precision weights as the model's authors stored them."""

    def __init__(self, model: PreTrainedModel, entries: Mapping[str, TensorEntry]) -> None:
        self.model, self.entries = model, dict(entries)
        self._sources, self.unused = self._match()
        self._of: dict[str, _Source] = {}
        self.specs: dict[str, TensorSpec] = {}
        for source in self._sources:
            try:
                converted = source.on_meta(model)
            except Exception as error:
                names = [entry.name for _, entry in source.parts]
                raise BadInputError(
                    f"the tensors of {source.first_target!r} do not fit together ({error}); stored: {names[0]} … {len(names)} tensors"
                ) from error
            for name, meta in converted.items():
                self._of[name] = source
                self.specs[name] = TensorSpec(meta.dtype, tuple(meta.shape))
        self._check()

    def _match(self) -> tuple[list[_Source], list[str]]:
        """Stored names to parameters, by the steps of transformers' `convert_and_load_state_dict_in_model`."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        expected, prefix = self.model.state_dict(), self.model.base_model_prefix
        sources: dict[str, _Source] = {}
        unused = []
        for stored in sorted(self.entries, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, expected)
            if name not in expected and stored in expected:
                name, pattern = rename_source_key(stored, [], [], base_model_prefix=prefix, meta_state_dict=expected)
            if name not in expected:
                unused.append(stored)
                continue
            source = sources.setdefault(name, _Source(by_pattern[pattern] if pattern else None, name))
            source.parts.append((pattern or stored, self.entries[stored]))
        return list(sources.values()), unused

    def _check(self) -> None:
        expected = self.model.state_dict()
        tied = {name for name, other in tied_names(self.model).items() if other in self._of}
        missing = sorted(set(expected) - set(self._of) - tied, key=dot_natural_key)
        if missing:
            raise BadInputError(
                f"the checkpoint lacks {len(missing)} tensors of {type(self.model).__name__}, "
                f"first {missing[0]!r}; is a shard or the right config.json missing?"
            )
        for name, spec in self.specs.items():
            if name in expected and spec.shape != tuple(expected[name].shape):
                raise BadInputError(
                    f"tensor {name!r} has shape {list(spec.shape)}, "
                    f"the configuration says {list(expected[name].shape)}; config.json and weights do not belong together"
                )

    def available(self) -> set[str]:
        return set(self._of)

    def stored_together(self) -> dict[str, list[str]]:
        """Parameters that share stored tensors with others, and with which."""
        by_source: dict[int, list[str]] = defaultdict(list)
        for name, source in self._of.items():
            by_source[id(source)].append(name)
        return {name: [other for other in names if other != name] for names in by_source.values() if len(names) > 1 for name in names}

    def stored_names(self, name: str) -> list[str]:
        """The checkpoint's own names of what makes up a parameter."""
        return [entry.name for _, entry in self._of[name].parts]

    def stored_by_pattern(self, name: str) -> dict[str, list[str]]:
        """The same by the pattern of transformers' conversion that they match (one pattern per projection, in order of the experts)."""
        return {pattern: [entry.name for entry in entries] for pattern, entries in self._parts_by_pattern(self._of[name]).items()}

    def merged(self) -> set[str]:
        """Parameters that transformers puts together from stored tensors called *.weight."""
        return {
            name
            for name, source in self._of.items()
            if source.converter is not None and all(pattern.endswith(".weight") for pattern, _ in source.parts)
        }

    def parameter(self, name: str) -> Tensor:
        if name not in self._of:
            name = tied_names(self.model)[name]
        source = self._of[name]
        return source.convert(self.model, ((pattern, entry.read()) for pattern, entry in source.parts))[name]

    def expert_rows(self, name: str, start: int, stop: int) -> Tensor:
        """As `Weights.expert_rows`; reads just these experts, be they stored one by one or stacked."""
        source, experts = self._of[name], self.specs[name].shape[0]
        by_pattern = self._parts_by_pattern(source)
        if all(len(entries) == experts for entries in by_pattern.values()):
            chosen = [(pattern, entry.read()) for pattern, entries in by_pattern.items() for entry in entries[start:stop]]
        elif all(len(entries) == 1 and entries[0].shape[0] == experts for entries in by_pattern.values()):
            chosen = [(pattern, entries[0].read(start, stop)) for pattern, entries in by_pattern.items()]
        else:
            raise BadInputError(
                f"{name}: {len(source.parts)} stored tensors do not fall apart into {experts} experts; "
                "moebit does not understand how this layer is stored"
            )
        rows = source.convert(self.model, chosen)[name]
        if rows.shape[0] != stop - start:
            raise BadInputError(
                f"{name}: reading experts {start} to {stop} gave {tuple(rows.shape)}; moebit does not understand how this layer is stored"
            )
        return rows

    def stored_form(self, name: str, tensor: Tensor, start: int = 0) -> dict[str, Tensor]:
        """A parameter, or its experts from `start` on, back under the checkpoint's own names and shapes (for `dense` output)."""
        source = self._of[name]
        if source.converter is None:
            return {source.parts[0][1].name: tensor}
        reverse = source.converter.reverse_transform()
        reverse.add_tensor(name, name, reverse.source_patterns[0], tensor)
        tensors = reverse.convert(name, model=self.model, config=self.model.config)
        return {
            self._stored_name(source, produced, start): value[0] if isinstance(value, list) else value
            for produced, value in tensors.items()
        }

    def _stored_name(self, source: _Source, produced: str, start: int) -> str:
        """The stored tensor that a name produced by the reversed converter stands for; expert numbers count from `start`."""
        for pattern, entries in self._parts_by_pattern(source).items():
            prefix, _, suffix = pattern.replace("\\.", ".").partition("*")
            if prefix in produced and (suffix in produced if "*" in pattern else True):
                if "*" not in pattern:
                    return entries[0].name
                number = produced.split(prefix, 1)[1].split(suffix, 1)[0]
                if number.isdigit() and produced.split(prefix, 1)[1].startswith(number + suffix):
                    return entries[start + int(number)].name
        raise BadInputError(f"{produced}: no stored tensor of this checkpoint goes by this name; write the `native` format instead")

    @staticmethod
    def _parts_by_pattern(source: _Source) -> dict[str, list[TensorEntry]]:
        result: dict[str, list[TensorEntry]] = defaultdict(list)
        for pattern, entry in source.parts:
            result[pattern].append(entry)
        return result


def read_config(path: Path) -> dict[str, Any]:
    """config.json as it stands.

    Raises:
        BadInputError: not a JSON object.
    """
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInputError(f"{path / 'config.json'}: not valid JSON ({error}); copy it again") from error
    if not isinstance(raw, dict):
        raise BadInputError(f"{path / 'config.json'}: expected a JSON object, got {type(raw).__name__}")
    return raw


def _short(error: Exception) -> str:
    """The first line of a message; transformers' own go on with lists and advice."""
    lines = str(error).splitlines() or [""]
    return lines[0] if len(lines[0]) <= 200 else lines[0][:200] + " …"


def load_config(path: Path) -> Any:
    """The transformers configuration of a checkpoint directory.

    Raises:
        BadInputError: unreadable, or an architecture that the installed transformers does not know.
    """
    raw = read_config(path)
    try:
        config = AutoConfig.from_pretrained(path)
    except (ValueError, KeyError) as error:
        raise BadInputError(
            f"{path}: transformers does not know the architecture {raw.get('model_type')!r} ({_short(error)}); a newer transformers may"
        ) from error
    return config


def skeleton(config: Any) -> PreTrainedModel:
    """The causal language model with every parameter on the meta device and its experts behind moebit's seam.

    Raises:
        BadInputError: no causal language model for this configuration; a computed buffer that stays undefined.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, experts_implementation=SEAM)
    except ValueError as error:
        raise BadInputError(f"no causal language model for {config.model_type!r} in this transformers") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    model.float().eval().requires_grad_(False)  # the type in which moebit runs layers, whatever is stored
    _compute_buffers(model)
    return model


def _compute_buffers(model: PreTrainedModel) -> None:
    """Buffers that are computed rather than stored (rotary frequencies): filled by the model's own initialisation."""
    owners: dict[str, nn.Module] = {}
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner = model.get_submodule(name.rpartition(".")[0])
        value = torch.empty_like(buffer, device="cpu")
        owner._buffers[name.rpartition(".")[2]] = value.fill_(float("nan")) if value.is_floating_point() else value
        owners[name] = owner
    with torch.no_grad():
        for owner in {id(o): o for o in owners.values()}.values():
            model._init_weights(owner)
    for name in owners:
        value = model.get_buffer(name)
        if value.is_floating_point() and bool(torch.isnan(value).any()):
            raise BadInputError(f"buffer {name!r} of {type(model).__name__} is computed in a way that moebit cannot repeat")


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that are one parameter under two names, each -> the other; a checkpoint stores one of them."""
    pairs = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return {**{second: first for first, second in pairs.items()}, **pairs}


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its configuration, its skeleton and where its weights come from."""

    path: Path
    config: Any
    model: PreTrainedModel
    weights: Weights
    entries: dict[str, TensorEntry]

    @property
    def size_bytes(self) -> int:
        return sum(file.stat().st_size for file in {entry.file for entry in self.entries.values()})


def open_hub_checkpoint(path: Path) -> Checkpoint:
    """A full-precision checkpoint directory.

    Raises:
        BadInputError: whatever is wrong with it, by name; one that is already quantized.
    """
    config = load_config(path)
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", None)
        raise BadInputError(f"{path}: already quantized ({method}); give the full-precision checkpoint")
    model = skeleton(config)
    entries = read_index(path)
    return Checkpoint(path, config, model, HubWeights(model, entries), entries)


def materialize(
    module: nn.Module, prefix: str, weights: Weights, dtype: torch.dtype | None = torch.float32, skip: Iterable[nn.Module] = ()
) -> None:
    """Fill a skeleton module's parameters and buffers; floating-point ones are converted to `dtype` (None keeps the stored type).

    Submodules in `skip` (the experts) stay on meta, except for their own submodules' parameters (a norm after the experts).
    """
    skipped = {id(parameter) for other in skip for parameter in other.parameters(recurse=False)}
    for name, owner in module.named_modules():
        for table in (owner._parameters, owner._buffers):
            for leaf, value in table.items():
                if value is None or id(value) in skipped or value.device.type != "meta":
                    continue
                full = ".".join(part for part in (prefix, name, leaf) if part)
                read = weights.parameter(full)
                read = read.to(dtype) if dtype and read.is_floating_point() else read
                table[leaf] = nn.Parameter(read, requires_grad=False) if table is owner._parameters else read


def dematerialize(module: nn.Module) -> None:
    """Free a module's parameters and persistent buffers: back to meta."""
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                owner._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and leaf not in owner._non_persistent_buffers_set:
                owner._buffers[leaf] = buffer.to("meta")
