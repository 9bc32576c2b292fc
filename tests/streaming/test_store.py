"""The allocator's memory: kept while work goes on, given back afterwards."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch

from moebit.memory import resident_bytes
from moebit.streaming.store import ActivationStore, freed_memory_kept

SIZE, PARTS = 128 * 2**20, 8  # in tensors of 16 MiB, which lie in the heap
glibc = pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's allocator")


def left_behind(parts: int = PARTS) -> int:
    """Bytes that are resident after so many tensors, SIZE bytes in all, and were not before them."""
    before = resident_bytes()
    tensors = [torch.empty(SIZE // parts, dtype=torch.uint8).fill_(1) for _ in range(parts)]
    del tensors
    return resident_bytes() - before


@glibc
def test_temporaries_are_kept_until_the_end() -> None:
    before = resident_bytes()
    with freed_memory_kept():
        assert left_behind() > SIZE // 2
    assert resident_bytes() < before + SIZE // 4


@glibc
def test_large_tensors_are_not() -> None:
    with freed_memory_kept():
        assert sum(left_behind(parts=1) for _ in range(8)) < SIZE // 4


@glibc
def test_kept_memory_is_released_past_the_limit() -> None:
    with freed_memory_kept():
        left_behind()
        before = resident_bytes()
        ActivationStore(limit=before + SIZE).release()
        assert resident_bytes() > before - SIZE // 8
        ActivationStore(limit=before - SIZE // 8).release()
        assert resident_bytes() < before - SIZE // 2


@glibc
def test_a_failure_inside_is_passed_on() -> None:
    def fail() -> None:
        left_behind()
        raise RuntimeError("out of luck")

    before = resident_bytes()
    with pytest.raises(RuntimeError, match="out of luck"), freed_memory_kept():
        fail()
    assert resident_bytes() < before + SIZE // 4
