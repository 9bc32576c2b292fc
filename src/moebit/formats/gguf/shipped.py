"""GGUF files as checkpoints: their tensors under the names and in the shapes that transformers stores them in.

A GGUF file has llama.cpp's names and layout. llama.cpp's converter knows the way there; `find_rows` finds out what it does to rows, and
here that way is gone back. config.json and the tokenizer have to lie beside the file. What the converter computes, such as a gain plus one
or a product of two weights, has no way back and is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moebit.errors import BadInputError
from moebit.formats.gguf.converter import Converter, find_converter, without_code
from moebit.formats.gguf.read import GgufFile, GgufTensor, dequantized, line_count, read_gguf, why_missing
from moebit.formats.gguf.rows import RowMap, Rows, find_rows
from moebit.model.skeleton import skeleton
from moebit.storage.checkpoint import Checkpoint, resolve
from moebit.storage.config import load_config
from moebit.storage.conversion import checkpoint_specs
from moebit.storage.documents import check_layers
from moebit.storage.files import PIECE_BYTES, Entry, TensorEntry
from moebit.storage.hub import HubWeights
from moebit.storage.shipped.entries import Shipped, ShippedEntry

METHOD, ENDING = "gguf", ".gguf"
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EXPONENTS = ("MXFP4", "NVFP4")  # whose scales are no float16 numbers


def gguf_source(model: str | Path) -> tuple[Path, Path] | None:
    """(folder, first file) of a GGUF checkpoint: a file beside a config.json, or a folder with a config.json and no other weights.

    Raises:
        BadInputError: a folder with several of them.
    """
    path = Path(model)
    if path.name.endswith(ENDING) and path.is_file():
        return path.parent, path
    if not path.is_dir() or not (path / "config.json").is_file() or any(path.glob("*.safetensors")):
        return None
    files = [file for file in sorted(path.glob(f"*{ENDING}")) if "-of-" not in file.name or "-00001-of-" in file.name]
    if len(files) > 1:
        raise BadInputError(f"{path}: {len(files)} GGUF files ({files[0].name}, {files[1].name}, …); say which one: {path}/{files[0].name}")
    return (path, files[0]) if files else None


def open_gguf_checkpoint(folder: Path, path: Path, compute: torch.dtype | None, *, follow_links: bool = False) -> Checkpoint:
    """A GGUF file as a checkpoint of the model that config.json beside it describes.

    Args:
        follow_links: read files that are links out of the folder, too.

    Raises:
        BadInputError: no config.json; a damaged file, or one of another model; tensors that have no way back.
    """
    if not (folder / "config.json").is_file():
        raise BadInputError(f"{path}: there is no config.json beside it; put the model's own config.json and tokenizer there")
    resolve(folder, follow_links=follow_links)
    converter = find_converter()
    file, config = read_gguf(converter.gguf, path), load_config(folder)
    check_layers(config, len(file.tensors), folder)
    model = skeleton(config, compute or torch.float32)
    entries = _entries(converter, folder, file, model)
    stored = {part.name: part for entry in entries.values() for part in entry.stored}
    kinds = sorted({entry.kind for entry in entries.values() if entry.kind not in PLAIN})
    named: dict[str, Entry] = dict(entries)
    shipped = Shipped(METHOD, f"GGUF {', '.join(kinds) or 'in full precision'}", named)
    return Checkpoint(folder, config, model, HubWeights(model, named), stored, shipped if kinds else None)


def _entries(converter: Converter, folder: Path, file: GgufFile, model: PreTrainedModel) -> dict[str, GgufEntry]:
    specs = checkpoint_specs(model)
    _check_architecture(converter, folder, file)
    rows = find_rows(converter, folder, specs)
    for tensor in file.tensors.values():
        if tensor.offset + tensor.nbytes > tensor.file.stat().st_size:
            raise BadInputError(f"{tensor.file}: truncated: tensor {tensor.name!r} ends behind the end of the file; copy it again")
    places = _places(file, rows)
    entries = {}
    for name, spec in specs.items():
        parts = places.get(name, [])
        if sum(len(part.lines) for part in parts) < line_count(spec.shape, bool(parts) and parts[0].transposed):
            raise BadInputError(
                f"{file.files[0]}: {name} cannot be taken from it: {why_missing(name, rows)}; give the full-precision checkpoint"
            )
        entries[name] = GgufEntry(name, _type(parts), spec.shape, parts[0].bytes, tuple(parts), converter.gguf)
    return entries


def _check_architecture(converter: Converter, folder: Path, file: GgufFile) -> None:
    """The file is of the architecture that the converter gives files of this configuration.

    Raises:
        BadInputError: another one, or one that the converter does not know.
    """
    with without_code(folder, dense=True) as directory, converter.active():
        wanted = converter.gguf.MODEL_ARCH_NAMES[converter.model(directory, {}).model_arch]
    if file.architecture != wanted:
        raise BadInputError(
            f"{file.files[0]}: a file of the architecture {file.architecture!r}; config.json beside it describes a model that llama.cpp "
            f"calls {wanted!r}: put the model's own config.json there"
        )


@dataclass(frozen=True)
class _Part:
    """Lines of a checkpoint's tensor that one GGUF tensor holds.

    Attributes:
        lines: int64, their numbers in the checkpoint's tensor, ascending. rows: int64, where each is in the GGUF tensor.
        bytes: the GGUF tensor as rows of bytes.
    """

    tensor: GgufTensor
    lines: Tensor
    rows: Tensor
    transposed: bool
    bytes: TensorEntry


def _places(file: GgufFile, rows: Rows) -> dict[str, list[_Part]]:
    places: dict[str, list[_Part]] = {}
    for name, found in rows.maps.items():
        tensor = file.tensors.get(name)
        if tensor is None:
            continue
        if tensor.shape != found.shape:
            raise BadInputError(
                f"{file.files[0]}: {name} is {tensor.shape}; config.json beside it describes a model where it is {found.shape}"
            )
        stored = TensorEntry(tensor.file, name, torch.uint8, (tensor.rows, tensor.row_bytes), tensor.offset)
        for source, here in found.positions().items():
            places.setdefault(source, []).append(_part(tensor, found, here, stored))
    return places


def _part(tensor: GgufTensor, found: RowMap, here: Tensor, stored: TensorEntry) -> _Part:
    lines, order = found.row[here].sort()
    return _Part(tensor, lines, here[order], found.transposed, stored)


def _type(parts: list[_Part]) -> torch.dtype:
    """float16 for blocks whose scales are, which holds more digits of them than bfloat16; float32 for a mixture with whole numbers."""
    kinds = {part.tensor.type for part in parts}
    types = {PLAIN.get(kind, torch.bfloat16 if kind in EXPONENTS else torch.float16) for kind in kinds}
    return types.pop() if len(types) == 1 else torch.float32


@dataclass(frozen=True)
class GgufEntry(ShippedEntry):
    """A tensor of a checkpoint whose lines lie in one or more GGUF tensors.

    Attributes:
        parts: where. library: llama.cpp's `gguf`, which decodes.
    """

    parts: tuple[_Part, ...]
    library: Any

    @property
    def kind(self) -> str:
        """ggml's name of the type, of the first part."""
        return self.parts[0].tensor.type

    @property
    def is_quantized(self) -> bool:
        return self.kind not in PLAIN

    @property
    def needed(self) -> tuple[TensorEntry, ...]:
        return tuple(part.bytes for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(len(part.rows) * part.tensor.row_bytes if len(self.shape) > 1 else part.tensor.nbytes for part in self.parts)

    def expect(self, start: int = 0, stop: int | None = None) -> None:
        """Nothing is asked for ahead: where the lines are is known when they are read."""

    def rows(self, start: int, stop: int) -> Tensor:
        if self.parts[0].transposed:
            return self._turned()[start:stop]
        if len(self.shape) < 2:
            return self._lines(start, stop).flatten()
        per = math.prod(self.shape[1:-1])  # lines of one index of the first axis
        return self._lines(start * per, stop * per).view(stop - start, *self.shape[1:])

    def _turned(self) -> Tensor:
        """The whole of a tensor that is stored [.., in, out] and lies here as [.., out, in]."""
        *leading, tall, wide = self.shape
        return self._lines(0, math.prod(leading) * wide).view(*leading, wide, tall).transpose(-1, -2).contiguous()

    def _lines(self, start: int, stop: int) -> Tensor:
        """float32 [stop - start, width]."""
        result = None
        for part in self.parts:
            first, last = torch.searchsorted(part.lines, torch.tensor([start, stop])).tolist()
            if first == last:
                continue
            found = _decoded(self.library, part.tensor, part.rows[first:last])
            result = torch.empty(stop - start, found.shape[1]) if result is None else result
            result[part.lines[first:last] - start] = found
        return torch.empty(0, self.shape[-1] if len(self.shape) > 1 else 1) if result is None else result

    def check(self) -> None:
        for low, high in self._pieces():
            values = self.rows(low, high)
            if not bool(torch.isfinite(values.to(self.dtype)).all()):
                raise BadInputError(
                    f"{self.parts[0].tensor.file}: tensor {self.parts[0].tensor.name!r} holds values that are no finite {self.dtype} "
                    f"numbers (in {self.name}); the file is damaged"
                )

    def _pieces(self) -> Iterator[tuple[int, int]]:
        if self.parts[0].transposed:
            yield 0, self.shape[0]
            return
        step = max(1, PIECE_BYTES // (4 * max(1, math.prod(self.shape[1:]))))
        yield from ((low, min(low + step, self.shape[0])) for low in range(0, self.shape[0], step))


def _decoded(gguf: Any, tensor: GgufTensor, rows: Tensor) -> Tensor:
    """float32 [n, width]: rows of a GGUF tensor in the order that is asked for; a vector's places are rows of one weight."""
    if len(tensor.shape) < 2:
        return dequantized(gguf, tensor).view(-1, 1)[rows]
    start, stop = int(rows.min()), int(rows.max()) + 1
    return dequantized(gguf, tensor, start, stop)[rows - start]
