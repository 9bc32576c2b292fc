"""A full-precision checkpoint, or one that is shipped quantized, with the skeleton that its weights are for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moebit.errors import BadInputError
from moebit.model.gains import shifted_gain
from moebit.model.skeleton import skeleton
from moebit.storage.checkpoint import Checkpoint
from moebit.storage.config import load_config
from moebit.storage.documents import check_layers, understood
from moebit.storage.files import Entry, read_index
from moebit.storage.hub import HubWeights
from moebit.storage.left_over import left_over
from moebit.storage.shipped import mlx
from moebit.storage.shipped.reading import check_plain, declared, read_shipped

FAST_BF16_WIDTH = 512  # hidden size from which on bf16 products are faster than float32 ones on a CPU that has instructions for them


def fast_compute_type(config: Any, entries: Mapping[str, Entry]) -> torch.dtype:
    """bf16 for checkpoints stored so, where the CPU multiplies bf16 matrices natively and they are wide enough to gain; else float32.

    Depends on the model and the kind of CPU alone, not on a measurement, so that runs can be repeated.
    """
    stored = sum(e.spec.nbytes for e in entries.values() if e.dtype == torch.bfloat16)
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    wide = config.get_text_config().hidden_size >= FAST_BF16_WIDTH
    mostly = 2 * stored > sum(e.spec.nbytes for e in entries.values())
    return torch.bfloat16 if native and wide and mostly else torch.float32


def open_hub_checkpoint(path: Path, dtype: torch.dtype | None = torch.float32) -> Checkpoint:
    """A checkpoint directory in full precision, or shipped quantized in a way that moebit reads (storage/shipped).

    Args:
        dtype: what its layers are computed in; None takes `fast_compute_type`.

    Raises:
        BadInputError: whatever is wrong with it, by name; one that is quantized in another way.
    """
    config = load_config(path)
    quantization = declared(path)
    stored = read_index(path)
    check_layers(config, len(stored), path)
    further = left_over(path, stored, getattr(config.get_text_config(), "num_hidden_layers", None))
    stored |= further.prediction
    with understood(path / "config.json", "copy it again"):
        shipped = read_shipped(path, stored, quantization) if quantization else None
    if shipped is None:
        check_plain(path, stored)
    entries: Mapping[str, Entry] = shipped.entries if shipped else stored
    model = skeleton(config, dtype or fast_compute_type(config, entries))
    if shipped and shipped.method == mlx.METHOD and (norm := shifted_gain(model)) is not None:
        raise BadInputError(
            f"{path}: already quantized ({mlx.METHOD}); give the full-precision checkpoint: the gain of {norm} is not its stored weight, "
            "and mlx-lm stores some of those otherwise"
        )
    return Checkpoint(path, config, model, HubWeights(model, entries), stored, shipped, left_over=further.files)
