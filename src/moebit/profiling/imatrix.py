"""The verb `imatrix`: a model's importance matrix under the names that llama.cpp has for its tensors."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moebit.calibration.text import Texts
from moebit.errors import BadInputError
from moebit.formats.gguf.converter import find_converter
from moebit.formats.gguf.imatrix import Importance, ImportanceMatrix, write_imatrix
from moebit.formats.gguf.rows import Rows, expert_orders, find_rows
from moebit.formats.opening import open_checkpoint, quantized_modules
from moebit.memory import DEFAULT_MEMORY, Memory, memory_bytes
from moebit.model.experts import experts_names
from moebit.model.structure import Structure, find_structure
from moebit.profiling.importance import ENOUGH, InputSums, Progress, input_sums
from moebit.profiling.profile import data_sets
from moebit.storage.checkpoint import Checkpoint

SAMPLES, LENGTH = 64, 512


@dataclass(frozen=True)
class ImatrixResult:
    """What was written.

    Attributes:
        path: the file. tokens: of all texts together. tensors: how many of llama.cpp's tensors have an importance.
        filled: experts module -> expert -> its own tokens, for the experts that had too few and were filled up (`enough` is how many
            would have been enough). unweighted: those of these modules whose router is not recognised.
        missing: tensors of the GGUF file that llama.cpp's converter computes from linears, so that the inputs here are not theirs, and
            linears that it leaves out, with what it does.
    """

    path: Path
    tokens: int
    tensors: int
    filled: dict[str, dict[int, int]]
    unweighted: list[str]
    missing: dict[str, str]
    enough: int = ENOUGH

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.__dict__, "path": str(self.path)}


def imatrix(
    model: str | Path,
    out: str | Path,
    *,
    text: Texts = (),
    samples: int = SAMPLES,
    length: int = LENGTH,
    llama_cpp: str | Path | None = None,
    memory: Memory = DEFAULT_MEMORY,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ImatrixResult:
    """Write llama.cpp's importance matrix of a full-precision model, every expert covered.

    Args:
        model: directory or hub id of a checkpoint. out: the file to write, which `llama-quantize --imatrix` reads.
        text: `[NAME=]FILE` items or a mapping. samples, length: windows of every text, and tokens of a window.
        llama_cpp: a clone of llama.cpp whose converter says the names, instead of the one of the extra `gguf`.
        memory: bytes, or a size such as `4GiB`, that the work may take. seed: chooses the windows.
        overwrite: replace a file that is there.

    Raises:
        BadInputError: no text, a model that llama.cpp's converter does not know, one that is quantized already, a file that exists.
    """
    path, allowed = _free(Path(out), overwrite), memory_bytes(memory)
    checkpoint = open_checkpoint(model, compute=None)
    if quantized_modules(checkpoint) is not None:
        raise BadInputError(f"{model} is already quantized; give the full-precision checkpoint")
    converter = find_converter(Path(llama_cpp) if llama_cpp else None)
    structure, weights = find_structure(checkpoint.model), checkpoint.weights
    rows = find_rows(converter, checkpoint.path, weights.stored_specs)
    sets = data_sets(checkpoint, text, samples, length, seed)
    windows = torch.cat(list(sets.values()))
    sys.audit("moebit.pass", windows)
    sums = input_sums(checkpoint, structure, windows, allowed, progress or _silent)
    tensors, missing = _named(checkpoint, structure, rows, sums)
    matrix = ImportanceMatrix(tensors, tuple(sets), len(windows), windows.shape[1])
    part = path.with_name(path.name + ".partial")
    write_imatrix(converter.gguf, part, matrix)
    part.replace(path)
    return ImatrixResult(path, windows.numel(), len(tensors), sums.filled, sums.unweighted, missing)


def _free(path: Path, overwrite: bool) -> Path:
    if path.is_dir() or (path.exists() and not overwrite):
        raise BadInputError(f"-o {path}: exists; choose another -o, or add --overwrite")
    if not path.absolute().parent.is_dir():
        raise BadInputError(f"-o {path}: no such directory: {path.absolute().parent}")
    return path


def _silent(what: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


def _named(checkpoint: Checkpoint, structure: Structure, rows: Rows, sums: InputSums) -> tuple[dict[str, Importance], dict[str, str]]:
    """(GGUF name -> importance, tensor -> why it has none)."""
    tensors, missing, orders = dict[str, Importance](), dict[str, str](), expert_orders(rows)
    parameters = {f"{name}.weight": one for name, one in sums.linears.items()}
    for layer in structure.moe_layers:
        if layer.moe is not None and layer.experts in sums.first:
            first, down = experts_names(layer.experts, layer.moe.layout)[:2]
            parameters |= {first: sums.first[layer.experts], down: sums.down[layer.experts]}
    for parameter, one in parameters.items():
        stored = checkpoint.weights.stored_names(parameter)
        names = dict.fromkeys(name for source in stored for name in rows.of(source))
        tensors |= {name: _stacked(one, rows.maps[name].shape, orders.get(name)) for name in names}
        computed = {name: made.why for name, made in rows.computed.items() if set(stored) & set(made.sources)}
        missing |= computed
        if not names and not computed:
            missing[parameter] = "llama.cpp's converter leaves it out"
    return tensors, missing


def _stacked(one: Importance, shape: tuple[int, ...], order: tuple[int, ...] | None) -> Importance:
    """One row for every matrix of a tensor, as llama-quantize wants it: experts in the file's order; a linear that is cut, in all parts."""
    if len(one.counts) == 1:
        count = shape[0] if len(shape) > 2 else 1
        return Importance(one.sums.expand(count, -1), one.counts.expand(count))
    return one if order is None else Importance(one.sums[list(order)], one.counts[list(order)])
