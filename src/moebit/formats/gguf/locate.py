"""Whether a name stands for a GGUF file, and what such a file has, for people and JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from moebit.formats.gguf.converter import find_converter
from moebit.formats.gguf.read import GgufFile, read_gguf


def gguf_file(model: str | Path) -> Path | None:
    """The GGUF file that is meant: the file itself, or the one in an output of moebit; None for anything else."""
    path = Path(model)
    if path.name.endswith(".gguf") and path.is_file():
        return path
    if path.is_dir() and (path / "moebit.json").is_file() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        return files[0] if files else None
    return None


def open_gguf(path: Path, llama_cpp: Path | None = None) -> GgufFile:
    """The headers of a GGUF file, read with the library of llama.cpp's converter.

    Raises:
        BadInputError: no GGUF file, a damaged one, or the extra `gguf` is not installed.
    """
    return read_gguf(find_converter(llama_cpp).gguf, path)


def describe_gguf(file: GgufFile) -> dict[str, Any]:
    """Architecture, size, and what each type holds."""
    types: dict[str, dict[str, int]] = {}
    for tensor in file.tensors.values():
        known = types.setdefault(tensor.type, {"tensors": 0, "weights": 0, "bytes": 0})
        known["tensors"] += 1
        known["weights"] += math.prod(tensor.shape)
        known["bytes"] += tensor.nbytes
    return {
        "architecture": file.architecture,
        "files": [path.name for path in file.files],
        "bits_per_weight": file.bits_per_weight,
        "types": dict(sorted(types.items(), key=lambda item: -item[1]["bytes"])),
        "tensors": {tensor.name: {"type": tensor.type, "shape": list(tensor.shape)} for tensor in file.tensors.values()},
    }
