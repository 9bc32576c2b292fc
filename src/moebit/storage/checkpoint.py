"""A model on disk: its directory, its configuration, its skeleton and its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moebit.errors import BadInputError
from moebit.recipe.reading import is_there
from moebit.storage.files import TensorEntry, read_header
from moebit.storage.places import check_links
from moebit.storage.shipped.entries import Shipped
from moebit.storage.weights import Weights


def resolve(model: str | Path, revision: str | None = None, *, follow_links: bool = False) -> Path:
    """The local directory of a checkpoint: a path, or a hub id that is downloaded (safetensors, configuration, tokenizer).

    Args:
        follow_links: read files that are links out of the checkpoint's folder, too.

    Raises:
        BadInputError: neither a directory with a config.json nor a hub id that can be fetched; a link that leads out of the folder.
    """
    path = Path(model)
    if is_there(path) and path.is_dir():
        if not (path / "config.json").exists():
            raise BadInputError(f"{path}: no config.json here; give the directory of a Hugging Face checkpoint")
        if not follow_links:
            check_links(path)
        return path
    if str(model).count("/") != 1 or str(model).startswith((".", "/")):
        raise BadInputError(f"{model}: no such directory; give a checkpoint directory or a hub id like org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(model),
                revision=revision,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "README.md"],
                ignore_patterns=["*/*"],  # further copies of the weights in other forms
            )
        )
    except Exception as error:
        raise BadInputError(f"{model}: no such directory, and the hub could not provide it ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its configuration, its skeleton and where its weights come from.

    Attributes:
        entries: the tensors as they are stored. shipped: how, where the authors stored them quantized.
        beside: further safetensors files that belong to the model and hold no weights of it.
        left_over: names of safetensors files that are no part of the model -> how many tensors they hold (storage/left_over.py).
    """

    path: Path
    config: Any
    model: PreTrainedModel
    weights: Weights
    entries: dict[str, TensorEntry]
    shipped: Shipped | None = None
    beside: tuple[Path, ...] = ()
    left_over: Mapping[str, int] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes of all safetensors files of the model."""
        return sum(file.stat().st_size for file in {entry.file for entry in self.entries.values()}) + self.beside_bytes

    @property
    def beside_bytes(self) -> int:
        """Bytes of the files in `beside`."""
        return sum(file.stat().st_size for file in self.beside)


def checkpoint_fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 over the configuration and every shard's name, size and header."""
    fingerprint = hashlib.sha256((checkpoint.path / "config.json").read_bytes())
    for file in sorted({entry.file for entry in checkpoint.entries.values()}):
        own = (entry for entry in checkpoint.entries.values() if entry.file == file)
        entries = read_header(file).values() if file.suffix == ".safetensors" else own
        header = sorted((e.name, str(e.dtype), e.shape, e.offset) for e in entries)
        fingerprint.update(json.dumps([file.name, file.stat().st_size, header]).encode())
    return fingerprint.hexdigest()
