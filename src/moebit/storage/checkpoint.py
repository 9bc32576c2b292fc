"""A Hugging Face checkpoint, read lazily through transformers' own weight conversion into a skeleton on the meta device.

transformers' loading internals (key renaming, converters) are used here and nowhere else.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)
from transformers.utils import logging as transformers_logging

from moebit.errors import BadInputError
from moebit.model.adapters import adapt
from moebit.model.seam import SEAM
from moebit.recipe.reading import is_there, read_object
from moebit.storage.documents import check_config, check_layers, understood
from moebit.storage.files import PIECE, Entry, TensorEntry, TensorSpec, pieces, read_header, read_index
from moebit.storage.places import check_links
from moebit.storage.shipped import Shipped, check_plain, read_shipped, shipped_config

INSIDE = "language_model"  # what transformers calls the language model inside a wrapper


def resolve(model: str | Path, revision: str | None = None, *, follow_links: bool = False) -> Path:
    """The local directory of a checkpoint: a path, or a hub id that is downloaded (safetensors, configuration, tokenizer).

    Args:
        follow_links: read files that are links out of the checkpoint's folder, too.

    Raises:
        BadInputError: neither a directory with a config.json nor a hub id that can be fetched; a link that leads out of the folder.
    """
    path = Path(model)
    if is_there(path) and path.is_dir():
        if not (path / "config.json").exists():
            raise BadInputError(f"{path}: no config.json here; give the directory of a Hugging Face checkpoint")
        if not follow_links:
            check_links(path)
        return path
    if str(model).count("/") != 1 or str(model).startswith((".", "/")):
        raise BadInputError(f"{model}: no such directory; give a checkpoint directory or a hub id like org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(model),
                revision=revision,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"],
                ignore_patterns=["*/*"],  # further copies of the weights in other forms
            )
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

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a parameter's first axis."""
        return self.parameter(name)[start:stop]

    def expect(self, names: Iterable[str], start: int, stop: int) -> None:  # noqa: B027 - a hint; nothing to do is an answer
        """Experts [start, stop) of these parameters are wanted soon: let the system read them while something else is computed."""

    @abstractmethod
    def available(self) -> set[str]:
        """Names that can be read."""


@dataclass
class _Source:
    """The stored tensors that make up one or more parameters: (pattern, entry) in transformers' order.

    `unchanged`: one stored tensor is the parameter as it stands, although there is a converter. Some converters look at shapes to see
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

    def on_meta(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """What a conversion of tensors without values gives; finds out whether it does anything."""
        tensors = [(pattern, torch.empty(e.shape, dtype=e.dtype, device="meta")) for pattern, e in self.parts]
        result = self.convert(model, tensors)
        if len(tensors) == len(result) == 1:
            (_, before), (after,) = tensors[0], result.values()
            self.unchanged = after.untyped_storage()._cdata == before.untyped_storage()._cdata and after.stride() == before.stride()
        return result


class HubWeights(Weights):
    """Full-precision weights as the model's authors stored them; what they stored quantized is dequantized as it is read.

    Attributes:
        entries: every tensor under its plain name. unused: those that the model class does not use, as they are stored.
    """

    def __init__(self, model: PreTrainedModel, entries: Mapping[str, Entry]) -> None:
        self.model, self.entries = model, dict(entries)
        self._sources, unused = self._match()
        as_stored = [part for name in unused for part in self.entries.pop(name).stored]
        self.entries |= {part.name: part for part in as_stored}
        self.unused = [part.name for part in as_stored]
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

    def edited(self, name: str) -> bool:
        """Whether a parameter differs from what is stored (`model/edits.py`)."""
        return False

    def with_own(self, name: str) -> HubWeights:
        """The same checkpoint, but a parameter that was tied to another one is one of its own, which begins as a copy."""
        other = tied_names(self.model)[name]
        part = replace(self._of[other].parts[0][1], name=name)  # type: ignore[type-var]
        result = copy.copy(self)
        result.entries = {**self.entries, name: part}
        result._of = {**self._of, name: _Source(None, name, [(name, part)])}
        result.specs = {**self.specs, name: self.specs[other]}
        return result

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

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """As `Weights.rows`; reads just these rows where the parameter is stored as it is."""
        source = self._of.get(name) or self._of[tied_names(self.model)[name]]
        if source.converter is not None:
            return self.parameter(name)[start:stop]
        return source.parts[0][1].read(start, stop)

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(byte at which it begins, tensor) of a parameter's rows, some after the other where it is stored as it is."""
        source, spec = self._of[name], self.specs[name]
        if source.converter is None or source.unchanged:
            yield from pieces(source.parts[0][1])
        elif len(spec.shape) == 3 and self._by_expert(name):
            row = spec.nbytes // spec.shape[0]
            step = max(1, PIECE // row)
            for start in range(0, spec.shape[0], step):
                yield start * row, self.expert_rows(name, start, min(start + step, spec.shape[0])).contiguous()
        else:
            yield 0, self.parameter(name)

    def _by_expert(self, name: str) -> bool:
        """Whether a stacked parameter is stored so that some experts can be read without the others."""
        try:
            return bool(self._stored_rows(name, 0, 1))
        except BadInputError:
            return False

    def expert_rows(self, name: str, start: int, stop: int) -> Tensor:
        """As `Weights.expert_rows`; reads just these experts, be they stored one by one or stacked."""
        source = self._of[name]
        chosen = [(pattern, entry.read(*rows)) for pattern, entry, rows in self._stored_rows(name, start, stop)]
        rows = source.convert(self.model, chosen)[name]
        if rows.shape[0] != stop - start:
            raise BadInputError(
                f"{name}: reading experts {start} to {stop} gave {tuple(rows.shape)}; moebit does not understand how this layer is stored"
            )
        return rows

    def expect(self, names: Iterable[str], start: int, stop: int) -> None:
        if start < stop:
            for name in names:
                for _, entry, rows in self._stored_rows(name, start, stop):
                    entry.expect(*rows)

    def _stored_rows(self, name: str, start: int, stop: int) -> list[tuple[str, Entry, tuple[int, int | None]]]:
        """(pattern, stored tensor, its rows) that hold experts [start, stop) of a parameter."""
        experts, by_pattern = self.specs[name].shape[0], self._parts_by_pattern(self._of[name])
        if all(len(entries) % experts == 0 for entries in by_pattern.values()):
            # More tensors than experts: several parameters lie in one numbering, one after the other.
            return [
                (pattern, entry, (0, None))
                for pattern, entries in by_pattern.items()
                for first in range(0, len(entries), experts)
                for entry in entries[first + start : first + stop]
            ]
        if all(len(entries) == 1 and entries[0].shape[0] == experts for entries in by_pattern.values()):
            return [(pattern, entries[0], (start, stop)) for pattern, entries in by_pattern.items()]
        raise BadInputError(
            f"{name}: {len(self._of[name].parts)} stored tensors do not fall apart into {experts} experts; "
            "moebit does not understand how this layer is stored"
        )

    def stored_form(self, name: str, tensor: Tensor, start: int = 0) -> dict[str, Tensor]:
        """A parameter, or its experts from `start` on, back under the checkpoint's own names and shapes (for `dense` output)."""
        source = self._of[name]
        if source.converter is None or source.unchanged:
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
    def _parts_by_pattern(source: _Source) -> dict[str, list[Entry]]:
        result: dict[str, list[Entry]] = defaultdict(list)
        for pattern, entry in source.parts:
            result[pattern].append(entry)
        return result


def without_wrapper() -> WeightRenaming:
    """The rule by which transformers loads a wrapper's language model by itself."""
    return WeightRenaming(rf"(^|\.){INSIDE}\.", r"\1")


def read_config(path: Path) -> dict[str, Any]:
    """config.json as it stands.

    Raises:
        BadInputError: not a JSON object.
    """
    raw = read_object(path / "config.json", remedy="copy it again", infinite=True)
    check_config(raw, path / "config.json")
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
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise BadInputError(
            f"{path}: transformers does not know the architecture {raw.get('model_type')!r} ({_short(error)}); a newer transformers may"
        ) from error
    except Exception as error:  # a configuration's own checks raise what they like
        raise BadInputError(f"{path / 'config.json'}: transformers refuses it ({_short(error)}); copy it again") from error
    return config


def model_class(config: Any) -> type[PreTrainedModel]:
    """The transformers class that a configuration stands for: the one it names, if that is a language model; else the causal one.

    A wrapper around a language model (with towers for pictures or sound) is taken whole, so that its other weights are carried along.

    Raises:
        BadInputError: no language model for this configuration.
    """
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    known = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    known = [entry for entries in known for entry in (entries if isinstance(entries, tuple) else (entries,))]
    if not known:
        raise BadInputError(f"no causal language model for {config.model_type!r} in this transformers")
    named = getattr(config, "architectures", None) or []
    return next((entry for entry in known if entry.__name__ in named), known[0])


def skeleton(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The language model with every parameter on the meta device and its experts behind moebit's seam.

    Args:
        dtype: what layers will be computed in, whatever is stored. Parameters that the architecture insists on keeping in float32 stay so.

    Raises:
        BadInputError: no language model for this configuration; a computed buffer that stays undefined.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    chosen = model_class(config)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            model = chosen._from_config(config, experts_implementation=SEAM, dtype=dtype)
    except Exception as error:  # a model's own code fails on a wrong configuration in any way
        raise BadInputError(f"{chosen.__name__} cannot be built from this config.json ({type(error).__name__}: {_short(error)})") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    model.eval().requires_grad_(False)
    adapt(model)
    _keep_in_float32(model)
    _compute_buffers(model)
    return model


def _keep_in_float32(model: PreTrainedModel) -> None:
    """The parameters and stored buffers for which transformers insists on float32, whatever the model is loaded in."""
    kept = [re.compile(rf"(^|\.){pattern}(\.|$)".replace("*", ".*")) for pattern in model._keep_in_fp32_modules_strict or ()]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if tensor.dtype == torch.float32 or not tensor.is_floating_point() or not any(pattern.search(name) for pattern in kept):
            continue
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor.float(), requires_grad=False)
        else:
            owner._buffers[leaf] = tensor.float()


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
    """A model on disk: its configuration, its skeleton and where its weights come from.

    Attributes:
        entries: the tensors as they are stored. shipped: how, where the authors stored them quantized.
    """

    path: Path
    config: Any
    model: PreTrainedModel
    weights: Weights
    entries: dict[str, TensorEntry]
    shipped: Shipped | None = None

    @property
    def size_bytes(self) -> int:
        return sum(file.stat().st_size for file in {entry.file for entry in self.entries.values()})

    @property
    def plain_bytes(self) -> int:
        """Bytes of the tensors as they are read: more than are stored where they are shipped quantized."""
        entries: Iterable[Entry] = (self.weights if isinstance(self.weights, HubWeights) else self).entries.values()
        return sum(entry.spec.nbytes for entry in entries)


def checkpoint_fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 over the configuration and every shard's name, size and header."""
    fingerprint = hashlib.sha256((checkpoint.path / "config.json").read_bytes())
    for file in sorted({entry.file for entry in checkpoint.entries.values()}):
        header = sorted((e.name, str(e.dtype), e.shape, e.offset) for e in read_header(file).values())
        fingerprint.update(json.dumps([file.name, file.stat().st_size, header]).encode())
    return fingerprint.hexdigest()


FAST_BF16_WIDTH = 512  # hidden size from which on bf16 products are faster than float32 ones on a CPU that has instructions for them


def fast_compute_type(config: Any, entries: Mapping[str, Entry]) -> torch.dtype:
    """bf16 for checkpoints stored so, where the CPU multiplies bf16 matrices natively and they are wide enough to gain; else float32.

    Depends on the model and the kind of CPU alone, not on a measurement, so that runs can be repeated.
    """
    stored = sum(e.spec.nbytes for e in entries.values() if e.dtype == torch.bfloat16)
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    wide = config.get_text_config().hidden_size >= FAST_BF16_WIDTH
    mostly = 2 * stored > sum(e.spec.nbytes for e in entries.values())
    return torch.bfloat16 if native and wide and mostly else torch.float32


def open_hub_checkpoint(path: Path, dtype: torch.dtype | None = torch.float32) -> Checkpoint:
    """A checkpoint directory in full precision, or shipped quantized in a way that moebit reads (model/shipped.py).

    Args:
        dtype: what its layers are computed in; None takes `fast_compute_type`.

    Raises:
        BadInputError: whatever is wrong with it, by name; one that is quantized in another way.
    """
    config = load_config(path)
    quantization = shipped_config(read_config(path))
    stored = read_index(path)
    check_layers(config, len(stored), path)
    with understood(path / "config.json", "copy it again"):
        shipped = read_shipped(path, stored, quantization) if quantization else None
    if shipped is None:
        check_plain(path, stored)
    entries: Mapping[str, Entry] = shipped.entries if shipped else stored
    model = skeleton(config, dtype or fast_compute_type(config, entries))
    return Checkpoint(path, config, model, HubWeights(model, entries), stored, shipped)


def materialize(module: nn.Module, prefix: str, weights: Weights, skip: Iterable[nn.Module] = (), recurse: bool = True) -> None:
    """Fill a skeleton module's parameters and buffers, in the types that the skeleton has.

    Submodules in `skip` (the experts) stay on meta, except for their own submodules' parameters (a norm after the experts). Without
    `recurse`, only the module's own tensors are filled.
    """
    skipped = {id(parameter) for other in skip for parameter in other.parameters(recurse=False)}
    for name, owner in module.named_modules() if recurse else [("", module)]:
        tables: Iterable[dict[str, Any]] = (owner._parameters, owner._buffers)
        for table in tables:
            for leaf, value in table.items():
                if value is None or id(value) in skipped or value.device.type != "meta":
                    continue
                full = ".".join(part for part in (prefix, name, leaf) if part)
                read = weights.parameter(full)
                read = read.to(value.dtype) if read.is_floating_point() else read
                table[leaf] = nn.Parameter(read, requires_grad=False) if table is owner._parameters else read


def dematerialize(module: nn.Module, recurse: bool = True) -> None:
    """Free a module's parameters and persistent buffers: back to meta."""
    for owner in module.modules() if recurse else [module]:
        for leaf, parameter in owner._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                owner._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and leaf not in owner._non_persistent_buffers_set:
                owner._buffers[leaf] = buffer.to("meta")
