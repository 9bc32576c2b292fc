"""How much memory the work may take (the default, and what a person may write for it), and how much the process has."""

from __future__ import annotations

import mmap
import re

from moebit.errors import BadInputError

Memory = int | str  # bytes, or a size with its unit such as "4GiB"
DEFAULT_MEMORY = "4GiB"
LEAST_MEMORY = 2**16  # less than this is a mistake in the unit: not even one matrix of a tiny model fits
MOST_MEMORY = 2**63 - 1
_SIZE = re.compile(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*(?:([KMGT]?)(i?)(B)?)\s*", flags=re.IGNORECASE | re.ASCII)


def memory_bytes(memory: Memory, option: str = "--memory") -> int:
    """Bytes from an integer (bytes) or from a text with a unit: `4GiB`, `500MB`, or `2G`, which is read as `2GiB`.

    Args:
        option: what the text was given for, in messages.

    Raises:
        BadInputError: a number without a unit in a text, less than `LEAST_MEMORY`, or anything else.
    """
    if isinstance(memory, bool) or not isinstance(memory, int | str):
        raise BadInputError(f"memory {memory!r}: give bytes as an integer, or a size with its unit such as '4GiB'")
    count = memory if isinstance(memory, int) else _read(memory, option)
    if not LEAST_MEMORY <= count <= MOST_MEMORY:
        raise BadInputError(f"{option} {memory}: this is {'less' if count < LEAST_MEMORY else 'more'} than can be meant; write 4GiB, say")
    return count


def asked_bytes(size: Memory, option: str = "--size") -> int:
    """Bytes of a size that somebody wants something to have: written as for `memory_bytes`, and as small as they like.

    Raises:
        BadInputError: a number without a unit in a text, or anything else; nothing at all.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise BadInputError(f"{option} {size!r}: give bytes as an integer, or a size with its unit such as '12GB'")
    count = size if isinstance(size, int) else _read(size, option)
    if not 0 < count <= MOST_MEMORY:
        raise BadInputError(f"{option} {size}: a size such as 12GB is expected")
    return count


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


def peak_resident_bytes() -> int:
    """The most that this process has ever had resident (Linux)."""
    with open("/proc/self/status") as status:
        return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")), resident_bytes())


def _read(text: str, option: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise BadInputError(f"{option} {text}: a size such as 4GiB or 500MB is expected")
    number, prefix, binary, byte = match.groups()
    if not (prefix or byte):
        raise BadInputError(
            f"{option} {text}: the unit is missing; write {text.strip()}GiB for gibibytes or {text.strip()}MB for megabytes"
        )
    base = 1000 if prefix and byte and not binary else 1024
    return int(float(number) * base ** " KMGT".index(prefix.upper() or " "))
