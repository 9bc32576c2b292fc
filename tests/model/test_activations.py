"""The allocator's memory: kept while work goes on, given back afterwards."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch

from moebit.model.activations import ActivationStore, freed_memory_kept, resident_bytes

SIZE = 64 * 2**20
glibc = pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's allocator")


def left_behind() -> int:
    """Bytes that are resident after a tensor of SIZE bytes, and were not before it."""
    before = resident_bytes()
    torch.empty(SIZE, dtype=torch.uint8).fill_(1)
    return resident_bytes() - before


@glibc
def test_freed_memory_is_kept_until_the_end() -> None:
    before = resident_bytes()
    assert left_behind() < SIZE // 8, "left alone, glibc gives every large tensor back"
    with freed_memory_kept():
        assert left_behind() > SIZE // 2
        assert sum(left_behind() for _ in range(8)) < 3 * SIZE, "what was freed is used again"
    assert resident_bytes() < before + SIZE // 8


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
    assert resident_bytes() < before + SIZE // 8
