"""Safetensors files of a checkpoint that neither its index nor its single file stands for.

transformers loads `model.safetensors` where there is one, else what the index names, and nothing beside it. What lies beside it may be the
layers of multi-token prediction in a file of their own, which belong to the model whoever loads it, or anything else (the same weights in
another form, an adapter, an older upload), which does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moebit.errors import BadInputError
from moebit.storage.files import TensorEntry, read_header

# How multi-token prediction is called in names of tensors: DeepSeek, Qwen, GLM, MiMo and Step call it mtp or nextn where they don't number
# it as one more decoder layer.
PREDICTION = re.compile(r"(^|\.)(mtp|nextn|mtp_\w+|nextn_\w+|\w+_mtp|\w+_nextn)(\.|$)")
NUMBERED = re.compile(r"(^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class LeftOver:
    """What lies beside the weights that transformers loads.

    Attributes:
        prediction: tensors of multi-token prediction, by name; they are kept with the model.
        files: names of files with other tensors -> how many, of which nothing is kept.
    """

    prediction: dict[str, TensorEntry]
    files: dict[str, int]


def left_over(directory: Path, stored: Mapping[str, TensorEntry], layers: int | None) -> LeftOver:
    """Look at the files that hold none of the stored tensors, and at tensors that the index does not name.

    Args:
        stored: what is loaded. layers: how many decoder layers the configuration speaks of, or None.
    """
    read = {entry.file.name for entry in stored.values()}
    prediction: dict[str, TensorEntry] = {}
    files: dict[str, int] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found = _header(file, files)
        kept = {name: entry for name, entry in found.items() if name not in stored and is_prediction(name, layers)}
        prediction |= {name: entry for name, entry in kept.items() if name not in prediction}
        others = len(found) - len(kept)
        if others and file.name not in read:
            files[file.name] = others
    return LeftOver(prediction, files)


def _header(file: Path, files: dict[str, int]) -> dict[str, TensorEntry]:
    """The tensors of a file that nobody asked for; one that cannot be read is no reason to refuse the model."""
    try:
        return read_header(file)
    except BadInputError:
        files[file.name] = 0
        return {}


def is_prediction(name: str, layers: int | None) -> bool:
    """Whether a tensor's name is that of multi-token prediction, or of a layer behind the last that the configuration speaks of."""
    if PREDICTION.search(name):
        return True
    found = NUMBERED.search(name)
    return bool(found and layers and int(found[2]) >= layers)
