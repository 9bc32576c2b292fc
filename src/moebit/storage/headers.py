"""The header of a safetensors file, read as strictly as the safetensors library reads it.

The file begins with the header's length (8 bytes, little-endian) and the header, a JSON object: tensor name -> type, shape, first and last
byte behind the header. The tensors lie one after the other, without gap or overlap, up to the end of the file
(https://github.com/huggingface/safetensors#format). A header that says otherwise would give a tensor another one's bytes.
"""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebit.errors import BadInputError
from moebit.recipe.reading import parse_json

HEADER_BYTES = 100_000_000  # as the library has it
AGAIN = "download or copy this shard again"


@dataclass(frozen=True)
class Header:
    """What a file says about itself.

    Attributes:
        start: byte at which the tensors begin. size: of the file.
        tensors: name -> (type as it is written there, shape, first byte, end), counted from `start`.
    """

    start: int
    size: int
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]


def stored_tensors(file: Path) -> Header:
    """The header of a safetensors file.

    Raises:
        BadInputError: no such file, no regular file, no safetensors file, a header that is damaged; naming the file and the tensor.
    """
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as f:
            found = os.fstat(f.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("no regular file")
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= min(HEADER_BYTES, found.st_size - 8):
                raise ValueError("impossible header length")
            text = f.read(length).decode("utf-8")
        return Header(8 + length, found.st_size, _tensors(text))
    except OSError as error:
        raise BadInputError(f"{file}: cannot be read ({error.strerror}); mend the permissions or the disk") from error
    except ValueError as error:
        raise BadInputError(f"{file}: not a safetensors file or truncated ({error}); {AGAIN}") from error


def _tensors(text: str) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    if not text.startswith("{"):
        raise ValueError("the header does not begin with a brace")
    header = parse_json(text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is no object of texts")
    return {name: _tensor(name, item) for name, item in header.items()}


def _tensor(name: str, item: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(item, dict) or not isinstance(item.get("dtype"), str):
        raise ValueError(f"tensor {name!r} has no type")
    shape: Any = item.get("shape")
    place: Any = item.get("data_offsets")
    if not _are_counts(shape):
        raise ValueError(f"impossible place or shape of tensor {name!r}: the shape is {_short(shape)}")
    if not _are_counts(place) or len(place) != 2 or place[0] > place[1]:
        raise ValueError(f"impossible place or shape of tensor {name!r}: the bytes are {_short(place)}")
    if math.prod(shape) >= 2**63:
        raise ValueError(f"impossible place or shape of tensor {name!r}: {_short(shape)} has too many values")
    return item["dtype"], tuple(shape), place[0], place[1]


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 60 else said[:60] + "…"


def check_covered(file: Path, header: Header) -> None:
    """The tensors follow each other without gap or overlap, from the header to the end of the file.

    Raises:
        BadInputError: naming the tensor at which they do not.
    """
    at = 0
    for name, (_, _, begin, end) in sorted(header.tensors.items(), key=lambda item: item[1][2:]):
        if begin != at:
            what = "overlaps with the tensor before it" if begin < at else "leaves a gap behind the tensor before it"
            raise BadInputError(
                f"{file}: tensor {name!r} lies at byte {begin} of the data and {what}, which ends at {at}: the header is damaged; {AGAIN}"
            )
        at = end
    if header.start + at != header.size:
        raise BadInputError(
            f"{file}: goes on behind its last tensor: {header.size} bytes where the header speaks of {header.start + at}; {AGAIN}"
        )
