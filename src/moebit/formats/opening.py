"""Open any model that moebit can read: a full-precision checkpoint, one that is shipped quantized, or one of its own outputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from moebit.errors import BadInputError
from moebit.formats import compressed_matrix, compressed_tensors, native
from moebit.formats.compressed_reading import CompressedWeights, is_output
from moebit.formats.gguf.shipped import gguf_source, open_gguf_checkpoint
from moebit.formats.inputs_config import read_activations
from moebit.formats.names import METHOD
from moebit.formats.native import NativeWeights, PackedSpec, packed_specs
from moebit.formats.overlay import OVERLAY_FILE, overlay_specs, read_overlays
from moebit.formats.switch import SIDE_FILE
from moebit.model.experts import layout_of
from moebit.model.inputs import Activations, attach
from moebit.model.opening import open_hub_checkpoint
from moebit.model.seam import is_experts
from moebit.model.skeleton import skeleton
from moebit.storage.checkpoint import Checkpoint, resolve
from moebit.storage.config import load_config, read_config
from moebit.storage.documents import check_layers, understood
from moebit.storage.files import read_index

AGAIN = "`moebit verify` says what is damaged; copy or make this output again"


def open_checkpoint(model: str | Path, compute: torch.dtype | None = torch.float32, *, follow_links: bool = False) -> Checkpoint:
    """A checkpoint directory, hub id or GGUF file; moebit's own outputs are dequantized as they are read, inputs rounded where they say so.

    Args:
        compute: the type in which its layers are to be computed; None takes what is fastest here without losing accuracy that is stored.
        follow_links: read files that are links out of the checkpoint's folder, too.

    Raises:
        BadInputError: whatever is wrong with it, by name.
    """
    if str(model).endswith(".partial"):
        raise BadInputError(f"{model}: unfinished output of an interrupted run; finish it with `moebit quantize ... --resume`")
    source = gguf_source(model)
    if source is not None:
        return open_gguf_checkpoint(*source, compute, follow_links=follow_links)
    path = resolve(model, follow_links=follow_links)
    quantization = read_config(path).get("quantization_config") or {}
    if is_output(path, quantization):
        config, stored = load_config(path), read_index(path)
        check_layers(config, len(stored), path)
        model_of_it = skeleton(config)
        with understood(path / "config.json", AGAIN):
            compressed = CompressedWeights(model_of_it, stored, quantization)
        for name, rounding in compressed.inputs().items():
            attach(model_of_it, Activations(rounding), [name])
        return Checkpoint(path, config, model_of_it, compressed, stored)
    if quantization.get("quant_method") != METHOD:
        return open_hub_checkpoint(path, compute)
    config, entries = load_config(path), read_index(path)
    check_layers(config, len(entries), path)
    skeleton_model = skeleton(config, compute or torch.float32)
    layouts = {name: layout_of(module, name) for name, module in skeleton_model.named_modules() if is_experts(module)}
    with understood(path / "config.json", AGAIN):
        specs, overlays = packed_specs(quantization), read_overlays(overlay_specs(quantization), entries)
        attach(skeleton_model, read_activations(quantization), specs)
        weights = NativeWeights(skeleton_model, entries, specs, layouts, overlays)
    beside = (path / SIDE_FILE,) if (path / SIDE_FILE).is_file() else ()
    return Checkpoint(path, config, skeleton_model, weights, entries, beside=beside)


def quantized_modules(checkpoint: Checkpoint) -> tuple[str, Mapping[str, Mapping[str, PackedSpec]]] | None:
    """(format, what is quantized and how) of a packed output of moebit; None for a checkpoint with whole weights."""
    weights = checkpoint.weights
    if isinstance(weights, NativeWeights):
        return "native", weights.modules
    if isinstance(weights, CompressedWeights):
        return compressed_tensors.METHOD, weights.modules()
    return None


def native_modules(checkpoint: Checkpoint) -> Mapping[str, Mapping[str, PackedSpec]]:
    """What is quantized, and how, of an output in moebit's own format; nothing for any other checkpoint."""
    weights = checkpoint.weights
    return weights.modules if isinstance(weights, NativeWeights) else {}


def activations_of(checkpoint: Checkpoint) -> Activations:
    """What an output asks of those who run it; nothing for checkpoints."""
    if isinstance(checkpoint.weights, CompressedWeights):
        return Activations(next(iter(checkpoint.weights.inputs().values()), None))
    quantization = read_config(checkpoint.path).get("quantization_config") or {}
    return read_activations(quantization) if quantization.get("quant_method") == METHOD else Activations()


def average_bits(checkpoint: Checkpoint) -> float | None:
    """8 x bytes of codes, scales and zero points / number of weights they stand for, of a packed output; None for whole weights.

    Channels that stand in for others (formats/overlay.py) add their bytes and no weights.
    """
    found = quantized_modules(checkpoint)
    if found is None:
        return None
    if found[0] != "native":
        return compressed_matrix.average_bits(found[1])
    weights = sum(spec.weights for parts in found[1].values() for spec in parts.values())
    further = sum(entry.spec.nbytes for entry in checkpoint.entries.values() if entry.file.name == OVERLAY_FILE)
    return native.average_bits(found[1]) + 8 * further / weights
