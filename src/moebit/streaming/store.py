"""Activations of all calibration tokens: in memory, or past an allowance in memory-mapped files that leave no trace.

Mapped pages count as resident as long as they are mapped in, and so does memory that was freed but that the allocator keeps; `release`
lets go of both between two pieces of work. The system brings back from its cache or the disk what is touched again. `freed_memory_kept`
has the allocator keep temporaries' memory that it would give back at once, only to have fresh pages filled again.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebit.memory import resident_bytes

PIECE = 64 * 2**20
# glibc's mallopt: from what size on an allocation is a mapping of its own, given back as soon as it is freed (the largest that glibc
# takes), and how much may lie free at the end of the heap before that is given back. The latter is set back, when the work is done, to
# where glibc's own adjusting ends in a process that frees large tensors.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAPPED, KEPT, KEPT_AFTERWARDS = 2**25, 2**28, 2**26


@dataclass
class ActivationStore:
    """Where activations live.

    Attributes:
        directory: for the files; None keeps everything in memory.
        allowance: bytes of a tensor from which on it goes to a file.
        limit: resident bytes of the process below which `release` has nothing to do; no result depends on it.
    """

    directory: Path | None = None
    allowance: int = 0
    limit: int = 0
    _maps: list[weakref.ref[mmap.mmap]] = field(default_factory=list)

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor; its file, if it has one, has no name any more and disappears with it.

        Raises:
            OSError: the disk has no room for the file (found now, not when it is written to).
        """
        size = math.prod(shape) * dtype.itemsize
        if self.directory is None or self.in_memory(size):
            return torch.empty(shape, dtype=dtype)  # on the device, where one is worked on (`moebit.device`)
        with tempfile.TemporaryFile(dir=self.directory, prefix="activations-") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            mapped = mmap.mmap(file.fileno(), size)
        self._maps = [*(ref for ref in self._maps if ref() is not None), weakref.ref(mapped)]
        return torch.frombuffer(mapped, dtype=dtype).view(shape)

    def in_memory(self, size: int) -> bool:
        """Whether a tensor of `size` bytes needs no file."""
        return self.directory is None or size <= self.allowance or not size

    def pieces(self, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(byte at which it begins, rows) of a tensor that may lie in a file, some rows after the other."""
        row = tensor[:1].nbytes if tensor.ndim and len(tensor) else 1
        step = max(1, PIECE // max(1, row))
        if not tensor.ndim:
            yield 0, tensor
            return
        for start in range(0, len(tensor), step):
            yield start * row, tensor[start : start + step].contiguous()
            self.release()

    def release(self) -> None:
        """Unmap the pages of all files (their contents stay) and hand freed memory back, where the process is above its limit."""
        if sys.platform != "linux" or resident_bytes() <= self.limit:
            return
        for ref in self._maps:
            mapped = ref()
            if mapped is not None:
                mapped.madvise(mmap.MADV_DONTNEED)
        if (trim := _glibc("malloc_trim")) is not None:
            trim(0)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """glibc keeps what is freed at the end of its heap, up to `KEPT` bytes, for what is allocated next, inside this context.

    By itself it gives back all but a few temporaries' worth at once, and every batch of a forward begins with fresh pages, which the system
    has to find and fill with zeros. Larger tensors are mapped and unmapped as ever: in the heap they would leave holes that the next ones
    don't quite fit into, and memory would grow from layer to layer. A setting of the whole process; of other allocators nothing is asked.
    """
    mallopt, trim = (_glibc(name) for name in ("mallopt", "malloc_trim"))
    if mallopt is None or trim is None:
        yield
        return
    try:
        mallopt(M_MMAP_THRESHOLD, MAPPED)
        mallopt(M_TRIM_THRESHOLD, KEPT)
        yield
    finally:
        mallopt(M_TRIM_THRESHOLD, KEPT_AFTERWARDS)
        trim(0)


def _glibc(name: str) -> Any:
    """A function of glibc's allocator; None where there is another one, which keeps and gives back as it likes."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
