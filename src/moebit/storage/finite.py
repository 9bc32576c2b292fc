"""Values that are no numbers, found while a tensor is read."""

from __future__ import annotations

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.storage.files import TensorEntry

# 8-bit floats that are no finite numbers: code & mask == value
NOT_FINITE = {torch.float8_e4m3fn: (0x7F, 0x7F), torch.float8_e5m2: (0x7C, 0x7C), torch.float8_e8m0fnu: (0xFF, 0xFF)}


def check_piece(entry: TensorEntry, begin: int, piece: Tensor) -> None:
    """Look for NaN and infinity in some rows of a tensor that begin at byte `begin`.

    Raises:
        BadInputError: naming the tensor and the place.
    """
    if not piece.dtype.is_floating_point or not _suspicious(piece) or not bool(_not_finite(piece).any()):
        return
    place = _not_finite(piece).nonzero()[0].tolist()
    value = piece[tuple(place)].item()
    if place:
        place[0] += begin // (piece[:1].nbytes or 1)
    where = f" at {place}" if place else ""
    raise BadInputError(f"tensor {entry.name!r} holds {value}{where} ({entry.file}); the checkpoint is damaged")


def _suspicious(piece: Tensor) -> bool:
    """A quick look: a sum is finite where every term is (and seldom where one is not); 8-bit floats have no sums."""
    return piece.dtype in NOT_FINITE or not bool(torch.isfinite(piece.sum(dtype=torch.float32)))


def _not_finite(piece: Tensor) -> Tensor:
    if piece.dtype not in NOT_FINITE:
        return ~torch.isfinite(piece)
    mask, value = NOT_FINITE[piece.dtype]
    return (piece.view(torch.uint8) & mask) == value
