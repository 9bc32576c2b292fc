"""GGUF files, anyone's: what is in them, read lazily, and back onto the names and shapes of the checkpoint that they were made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.formats.gguf.converter import LazyTensor
from moebit.formats.gguf.rows import RowMap, Rows
from moebit.storage.files import TensorSpec

MAGIC = b"GGUF"
SPLIT_COUNT, ARCHITECTURE = "split.count", "general.architecture"


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        type: ggml's name of its type.
        shape: (.., out, in) in weights.
        offset: of its first byte in the file.
        row_bytes: bytes of one row of `in` weights.
    """

    file: Path
    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    row_bytes: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """uint8 [stop - start, row_bytes]: rows of the flattened [.. × out, in], as they are packed.

        Raises:
            BadInputError: the file ends before them.
        """
        stop = self.rows if stop is None else stop
        count = (stop - start) * self.row_bytes
        found = np.fromfile(self.file, dtype=np.uint8, count=count, offset=self.offset + start * self.row_bytes)
        if len(found) < count:
            raise BadInputError(f"{self.file}: ended while tensor {self.name!r} was read; the file changed or is truncated")
        return found.reshape(stop - start, self.row_bytes)


@dataclass(frozen=True)
class GgufFile:
    """What the headers of a GGUF file, or of all its shards, say.

    Attributes:
        files: the shards, in their order.
        metadata: key → number, text or list, of the first shard.
        tensors: by name, in the order of the files.
    """

    files: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get(ARCHITECTURE, ""))

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def bits_per_weight(self) -> float:
        """Average bits per weight over all tensors, as llama.cpp counts them."""
        return 8 * sum(tensor.nbytes for tensor in self.tensors.values()) / sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def read_gguf(gguf: Any, path: Path) -> GgufFile:
    """The headers of a GGUF file, and of the other shards if it is the first of several.

    Args:
        gguf: llama.cpp's `gguf` library (`Converter.gguf`, or PyPI's, which knows fewer types).

    Raises:
        BadInputError: no GGUF file, a damaged or truncated one, a shard that is missing, or a type that the library does not know.
    """
    first, metadata = _read_one(gguf, path)
    files, tensors = [path], dict(first)
    for other in _other_shards(path, int(metadata.get(SPLIT_COUNT, 1))):
        if not other.is_file():
            raise BadInputError(f"{path}: shard {other.name} is missing beside it")
        tensors.update(_read_one(gguf, other)[0])
        files.append(other)
    if not tensors:
        raise BadInputError(f"{path}: a GGUF file without tensors")
    return GgufFile(tuple(files), metadata, tensors)


def _other_shards(path: Path, count: int) -> list[Path]:
    if count <= 1:
        return []
    ending = f"-00001-of-{count:05d}.gguf"
    if not path.name.endswith(ending):
        raise BadInputError(f"{path}: one of {count} shards; give the first one, …{ending}")
    stem = path.name.removesuffix(ending)
    return [path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(2, count + 1)]


def _read_one(gguf: Any, path: Path) -> tuple[dict[str, GgufTensor], dict[str, Any]]:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read ({error.strerror})") from error
    if magic != MAGIC:
        raise BadInputError(f"{path}: not a GGUF file (it begins with {magic!r})")
    try:
        reader = gguf.GGUFReader(path)
        tensors = {found.name: _tensor(path, found) for found in reader.tensors}
        metadata = {key: value.contents() for key, value in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, UnicodeDecodeError, OSError) as error:
        raise BadInputError(f"{path}: a damaged or truncated GGUF file ({type(error).__name__}: {_short(error)})") from error
    return tensors, metadata


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _tensor(path: Path, found: Any) -> GgufTensor:
    shape = tuple(int(n) for n in reversed(found.shape))
    row_bytes = int(found.n_bytes) // max(1, math.prod(shape[:-1]))
    return GgufTensor(path, found.name, found.tensor_type.name, shape, int(found.data_offset), row_bytes)


def dequantized(gguf: Any, tensor: GgufTensor, start: int = 0, stop: int | None = None) -> Tensor:
    """float32 [stop - start, in]: rows of the flattened [.. × out, in], decoded by the `gguf` library.

    Raises:
        BadInputError: a type that the library cannot decode.
    """
    packed = tensor.read(start, stop)
    kind = gguf.GGMLQuantizationType[tensor.type]
    try:
        values = gguf.quants.dequantize(packed.reshape(-1), kind)
    except NotImplementedError as error:
        raise BadInputError(f"{tensor.file}: tensor {tensor.name!r} is {tensor.type}, which this gguf library cannot decode") from error
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(len(packed), -1)


@dataclass(frozen=True)
class Restored:
    """The tensors of the checkpoint that a GGUF file holds.

    Attributes:
        tensors: name in the checkpoint → float32 in its shape there, decoded when it is read.
        missing: name in the checkpoint → why the file does not give it back (left out, transposed or computed).
    """

    tensors: dict[str, LazyTensor]
    missing: dict[str, str]


def restore(gguf: Any, file: GgufFile, rows: Rows, specs: Mapping[str, TensorSpec]) -> Restored:
    """The file's weights under the checkpoint's names, through the maps of `find_rows`.

    Args:
        specs: the tensors of the checkpoint.

    Raises:
        BadInputError: a tensor of another shape than the checkpoint's would have: the file is of another model.
    """
    for name, found in rows.maps.items():
        if name in file.tensors and file.tensors[name].shape != found.shape:
            raise BadInputError(
                f"{file.files[0]}: {name} is {file.tensors[name].shape}; the checkpoint's would be {found.shape}: another model"
            )
    places: dict[str, list[tuple[RowMap, Tensor]]] = {}
    for name, found in rows.maps.items():
        if name in file.tensors:
            for source, here in found.positions().items():
                places.setdefault(source, []).append((found, here))
    tensors, missing = {}, {}
    for name, spec in specs.items():
        parts = places.get(name, [])
        transposed = bool(parts) and parts[0][0].transposed
        if sum(len(here) for _, here in parts) < line_count(spec.shape, transposed):
            missing[name] = why_missing(name, rows)
        else:
            tensors[name] = LazyTensor(TensorSpec(torch.float32, spec.shape), _restorer(gguf, file, parts, spec.shape))
    return Restored(tensors, missing)


def line_count(shape: tuple[int, ...], transposed: bool) -> int:
    """Rows of a parameter that the converter moves as a whole; columns where it transposes it."""
    if len(shape) < 2:
        return max(1, math.prod(shape))
    return math.prod(shape[:-2]) * shape[-1 if transposed else -2]


def why_missing(name: str, rows: Rows) -> str:
    """Why a parameter cannot be put together from a file."""
    if name in rows.unread:
        return f"the converter failed on numbered rows: {rows.unread[name]}"
    return next((found.why for found in rows.computed.values() if name in found.sources), "the file does not hold it")


def _restorer(gguf: Any, file: GgufFile, parts: list[tuple[RowMap, Tensor]], shape: tuple[int, ...]) -> Callable[[], Tensor]:
    transposed = parts[0][0].transposed
    *leading, tall, wide = (1, *shape) if len(shape) > 1 else (1, *shape, 1)
    stacked = (*leading, wide, tall) if transposed else (*leading, tall, wide)

    def load() -> Tensor:
        lines = torch.empty(math.prod(stacked[:-1]), stacked[-1])
        for found, here in parts:
            tensor = file.tensors[found.name]
            start, stop = int(here.min()), int(here.max()) + 1
            lines[found.row[here]] = _lines(gguf, tensor, start, stop)[here - start]
        whole = lines.view(stacked)
        return (whole.transpose(-1, -2) if transposed else whole).reshape(shape)

    return load


def _lines(gguf: Any, tensor: GgufTensor, start: int, stop: int) -> Tensor:
    """Rows of a GGUF tensor; a vector's places are rows of one weight."""
    if len(tensor.shape) > 1:
        return dequantized(gguf, tensor, start, stop)
    return dequantized(gguf, tensor).view(-1, 1)[start:stop]
