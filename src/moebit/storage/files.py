"""Safetensors files, read and written piece by piece.

Reading goes through plain file reads instead of a memory map, because mapped pages count as resident memory; writing lays
the whole file out first, so that the experts of a layer can be put in place chunk by chunk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import sys
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.recipe.reading import read_object
from moebit.storage.documents import Index, checked
from moebit.storage.headers import check_covered, stored_tensors

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U32": torch.uint32,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PIECE_BYTES = 64 * 2**20  # of a tensor that is read, looked at or copied at a time


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor will be: its type and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Entry(Protocol):
    """A tensor of a checkpoint that can be read, whole or by rows of its first axis; stored like this or computed when it is read."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def spec(self) -> TensorSpec: ...
    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        """The stored tensors behind it."""

    def read(self, start: int = 0, stop: int | None = None) -> Tensor: ...
    def expect(self, start: int = 0, stop: int | None = None) -> None: ...


@dataclass(frozen=True)
class TensorEntry:
    """Where a stored tensor lies."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        return (self,)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the first axis (all by default), as a fresh tensor.

        Raises:
            BadInputError: the file changed underneath or ends early.
        """
        if not self.shape:
            return self._read_bytes(0, self.dtype.itemsize).view(self.dtype).view(())
        stop = self.shape[0] if stop is None else stop
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"{self.name}: rows {start} to {stop} of {self.shape[0]}")
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        raw = self._read_bytes(start * row, (stop - start) * row)
        return raw.view(self.dtype).view(stop - start, *self.shape[1:])

    def expect(self, start: int = 0, stop: int | None = None) -> None:
        """Ask the system to read these rows ahead, where it takes such hints."""
        if not hasattr(os, "posix_fadvise"):
            return
        stop = (self.shape[0] if self.shape else 1) if stop is None else stop
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        with open(self.file, "rb", buffering=0) as f:
            os.posix_fadvise(f.fileno(), self.offset + start * row, (stop - start) * row, os.POSIX_FADV_WILLNEED)

    def _read_bytes(self, skip: int, size: int) -> Tensor:
        sys.audit("moebit.read", str(self.file), self.name, skip, size)
        buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        with open(self.file, "rb", buffering=0) as f:
            f.seek(self.offset + skip)
            view, done = memoryview(buffer.numpy().data), 0
            while done < size:
                count = f.readinto(view[done:])
                if not count:
                    raise BadInputError(f"{self.file}: ended while tensor {self.name!r} was read; the file changed or is truncated")
                done += count
        return buffer


def pieces(entry: Entry) -> Iterator[tuple[int, Tensor]]:
    """(byte at which it begins, tensor) of some rows of a stored tensor after the other."""
    row = max(1, math.prod(entry.shape[1:]) * entry.dtype.itemsize)
    if not entry.shape or row * entry.shape[0] <= PIECE_BYTES:
        yield 0, entry.read()
        return
    step = max(1, PIECE_BYTES // row)
    for start in range(0, entry.shape[0], step):
        yield start * row, entry.read(start, min(start + step, entry.shape[0]))


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of a safetensors file.

    Raises:
        BadInputError: not a safetensors file, shorter than its header says, or not readable.
    """
    header = stored_tensors(file)
    entries = {name: _entry(file, header.size, header.start, name, *item) for name, item in header.tensors.items()}
    check_covered(file, header)
    return entries


def _entry(file: Path, size: int, data: int, name: str, dtype: str, shape: tuple[int, ...], begin: int, end: int) -> TensorEntry:
    if dtype not in DTYPES:
        raise BadInputError(f"{file}: tensor {name!r} has type {dtype}, which moebit cannot read")
    entry = TensorEntry(file, name, DTYPES[dtype], shape, data + begin)
    if entry.spec.nbytes != end - begin:
        raise BadInputError(
            f"{file}: tensor {name!r} claims {end - begin} bytes for {shape} {dtype}, it is corrupt; download or copy this shard again"
        )
    if data + end > size:
        raise BadInputError(
            f"{file}: truncated: tensor {name!r} should end at byte {data + end}, the file has {size}; download or copy this shard again"
        )
    return entry


def read_index(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint directory that transformers loads: those of `model.safetensors`, else those that the index names.

    An index that names `model.safetensors` itself is taken at its word.

    Raises:
        BadInputError: no safetensors, a damaged index, a shard missing or truncated, a tensor of the index not in its shard.
    """
    index, single = directory / INDEX, directory / SINGLE
    weight_map = _weight_map(index) if index.exists() else {}
    if index.exists() and (SINGLE in weight_map.values() or not single.exists()):
        shards: dict[str, dict[str, TensorEntry]] = {}
        for shard in sorted(set(weight_map.values())):
            if not (directory / shard).exists():
                raise BadInputError(f"{directory}: shard {shard} is named in {INDEX} but missing; download it again")
            shards[shard] = read_header(directory / shard)
        absent = sorted(name for name, shard in weight_map.items() if name not in shards[shard])
        if absent:
            raise BadInputError(
                f"{directory}: {len(absent)} tensors are not in the shard that {INDEX} names, first {absent[0]!r} "
                f"({weight_map[absent[0]]}); download index and shards again"
            )
        return {name: shards[shard][name] for name, shard in weight_map.items()}
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise BadInputError(f"{directory}: no safetensors files here; moebit reads Hugging Face checkpoints in safetensors form")
    if len(files) > 1 and not single.exists():
        raise BadInputError(f"{directory}: {len(files)} safetensors files but no {INDEX}; add the index file")
    return read_header(single if len(files) > 1 else files[0])


def index_text(files: Mapping[str, Mapping[str, int]]) -> str:
    """The index of the weights, from file -> tensor -> bytes."""
    total = sum(sum(tensors.values()) for tensors in files.values())
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=1)


def _weight_map(index: Path) -> dict[str, str]:
    return checked(Index, read_object(index, remedy="download it again"), index, "download it again").weight_map


class Shard(ABC):
    """A safetensors file that is laid out first and filled piece by piece.

    Attributes:
        specs: what has to be written.
    """

    specs: dict[str, TensorSpec]

    @abstractmethod
    def write(self, name: str, tensor: Tensor, skip: int = 0) -> None:
        """Put `tensor`'s bytes `skip` bytes into the stored tensor `name`."""


class ShardFile(Shard):
    """A safetensors file that is laid out first and filled piece by piece.

    It is written under a temporary name and gets its own name, synced to disk, only when everything has been written. No byte may
    be written twice, so that a full count of bytes means that none is missing.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.path, self.specs = path, dict(specs)
        self._temporary = path.with_name(path.name + ".writing")
        text, self._offsets, position = _laid_out(specs)
        self._start = 8 + len(text)
        self._missing = {name: spec.nbytes for name, spec in specs.items()}
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in specs}
        self._temporary.unlink(missing_ok=True)  # nothing is written through a link
        self._file = open(self._temporary, "xb", buffering=0)  # noqa: SIM115 - closed by finish() or abandon()
        try:
            self._put(0, len(text).to_bytes(8, "little") + text)
            self._file.truncate(self._start + position)
        except BaseException:
            self.abandon()
            raise

    def write(self, name: str, tensor: Tensor, skip: int = 0) -> None:
        """Put `tensor`'s bytes `skip` bytes into the stored tensor `name`.

        Raises:
            TypeError: another type than announced. ValueError: outside of what was announced, or written before.
        """
        spec = self.specs[name]
        if tensor.dtype != spec.dtype:
            raise TypeError(f"{name}: {tensor.dtype} written where {spec.dtype} was announced")
        if tensor.nbytes > self._missing[name] or skip + tensor.nbytes > spec.nbytes:
            raise ValueError(f"{name}: more bytes written than announced for {spec.shape}")
        if not _claim(self._written[name], skip, skip + tensor.nbytes):
            raise ValueError(f"{name}: some of the bytes {skip} to {skip + tensor.nbytes} have been written before")
        self._missing[name] -= tensor.nbytes
        data = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._put(self._start + self._offsets[name] + skip, data)

    def _put(self, position: int, data: bytes | memoryview) -> None:
        self._file.seek(position)
        done = 0
        while done < len(data):
            done += self._file.write(data[done:])

    def finish(self) -> None:
        """Sync, give the file its name and make the name durable: whatever is written afterwards may rely on it.

        Raises:
            ValueError: something announced was not written.
        """
        sys.audit("moebit.shard", str(self.path))
        left = {name: count for name, count in self._missing.items() if count}
        if left:
            raise ValueError(f"{self.path.name}: {len(left)} tensors incomplete, first {next(iter(left))}")
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        sync_directory(self.path.parent)

    def abandon(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.abandon()
            return
        try:
            self.finish()
        except BaseException:
            self.abandon()
            raise


def shard_bytes(specs: Mapping[str, TensorSpec]) -> int:
    """The size of the file that holds these tensors."""
    header, _, data = _laid_out(specs)
    return 8 + len(header) + data


def _laid_out(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int], int]:
    """(header, name -> byte at which a tensor begins behind it, bytes of all tensors)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, offsets = 0, {}
    for name, spec in specs.items():
        header[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, position + spec.nbytes]}
        offsets[name] = position
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), offsets, position


def _claim(written: list[tuple[int, int]], start: int, stop: int) -> bool:
    """Add [start, stop) to sorted, merged ranges; False if some of it is there already."""
    if start == stop:
        return True
    at = bisect_left(written, (start, stop))
    before = written[at - 1] if at else (-1, -1)
    after = written[at] if at < len(written) else (-1, -1)
    if before[1] > start or (at < len(written) and after[0] < stop):
        return False
    left, right = before[1] == start, after[0] == stop
    written[at - left : at + right] = [(before[0] if left else start, after[1] if right else stop)]
    return True


def sync_file(file: Path) -> None:
    """Wait until a file's content is on the disk."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable: a rename is not on disk before its directory is."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a network file system without such a thing keeps its own order
            raise
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
