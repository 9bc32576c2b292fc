"""What a GGUF file of a checkpoint will be: llama.cpp's converter, what it does to rows, and which tensor gets which type."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moebit.errors import BadInputError
from moebit.formats.gguf.converter import Converter, LazyTensor, Prepared, find_converter
from moebit.formats.gguf.rows import Rows, exchanged_experts, find_rows
from moebit.storage.files import TensorSpec
from moebit.tensor.grids.ggml import GRIDS

KEPT = "MOSTLY_F16"  # the converter's type of what is not quantized: norms, routers and biases in float32, matrices in float16


@dataclass(frozen=True)
class GgufTarget:
    """A converter and a checkpoint.

    Attributes:
        checkpoint: its directory. specs: its tensors as they are read.
        pre: llama.cpp's name of the pre-tokenizer, where the converter does not recognise it.
        shard_bytes: what the tensors of one file may take, where there are to be several; 0: one file.
    """

    converter: Converter
    checkpoint: Path
    specs: Mapping[str, TensorSpec]
    rows: Rows
    pre: str | None = None
    shard_bytes: int = 0

    @classmethod
    def find(
        cls,
        checkpoint: Path,
        specs: Mapping[str, TensorSpec],
        llama_cpp: Path | None = None,
        pre: str | None = None,
        shard_bytes: int = 0,
    ) -> GgufTarget:
        """Ask the converter of a clone of llama.cpp, or the installed one, what it does to these tensors.

        Raises:
            BadInputError: no converter, an architecture or a pre-tokenizer that it does not know, experts that it exchanges.
        """
        converter = find_converter(llama_cpp)
        if pre is not None:
            converter.check_pre_tokenizer(pre)
        rows = find_rows(converter, checkpoint, specs)
        if wrong := exchanged_experts(rows):
            raise BadInputError(f"llama.cpp's converter in {converter.root} exchanges experts: {wrong[0]}; use another llama.cpp")
        return cls(converter, checkpoint, dict(specs), rows, pre, shard_bytes)

    def prepare(self, load: Mapping[str, Callable[[], Tensor]]) -> Prepared:
        """Metadata, tokenizer and tensors as the converter writes them.

        Args:
            load: how each tensor of the checkpoint is read; one that is left out must not be asked for.

        Raises:
            BadInputError: a tokenizer that the converter does not know.
        """
        tensors = {name: LazyTensor(spec, load.get(name, _never(name))) for name, spec in self.specs.items()}
        return self.converter.prepare(self.checkpoint, tensors, self.pre, KEPT)

    def check_tokenizer(self) -> None:
        """Refuse a tokenizer that the converter does not know, before the work."""
        self.prepare({})


def _never(name: str) -> Callable[[], Tensor]:
    def load() -> Tensor:
        raise AssertionError(f"{name} is written quantized, and its values were asked for")

    return load


@dataclass(frozen=True)
class GgufPlan:
    """Which tensors of a GGUF file get which block type.

    Attributes:
        types: GGUF name -> type, of what is quantized, embeddings and head included.
        instead: GGUF name -> the type that was wanted and does not fit its rows.
        file_type: llama.cpp's name of the mixture; "" for what follows from the types. notes: what the recipe asks for and is not done.
    """

    target: GgufTarget
    types: Mapping[str, str]
    instead: Mapping[str, str]
    file_type: str = ""
    notes: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """About the bytes of the file's tensors."""
        total = 0
        for name, found in self.target.rows.maps.items():
            plain = 2 if len(found.shape) > 1 else 4
            kind = self.types.get(name)
            total += block_bytes(kind, found.shape) if kind else plain * math.prod(found.shape)
        return total + sum(2 * math.prod(self.target.specs[source].shape) for source in self._computed_sources())

    def _computed_sources(self) -> set[str]:
        return {source for one in self.target.rows.computed.values() for source in one.sources}

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        computed = {name: f"{one.why}; kept in f16 or f32" for name, one in self.target.rows.computed.items()}
        return {"types": dict(self.types), "wanted": dict(self.instead), "computed": computed, "notes": list(self.notes)}


def block_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of a block type."""
    layout = GRIDS[kind].layout
    return math.prod(shape) // layout.width * layout.size
