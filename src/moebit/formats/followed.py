"""The output of a run as its ranks see it: one of them writes it (`output.py`), the others follow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from moebit.formats.ownership import JOURNAL, read_journal
from moebit.storage.files import Shard, TensorSpec
from moebit.storage.shards import Dropped


class Output(ABC):
    """An output that is being made.

    Attributes:
        partial: the directory of the work in progress. entries: of its journal.
    """

    partial: Path
    entries: list[dict[str, Any]]

    def shard_name(self, number: int, total: int) -> str:
        """The name of weight file `number` (from 0) of `total`."""
        return f"model-{number + 1:05d}-of-{total:05d}.safetensors"

    @abstractmethod
    def shard(self, name: str, specs: Mapping[str, TensorSpec]) -> AbstractContextManager[Shard]:
        """A new file of this output."""

    @abstractmethod
    def record(self, kind: str, files: list[str], **facts: Any) -> None:
        """Note in the journal that these files are whole; from here on a resumed run will not make them again."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a file that a recorded one has replaced."""


class FollowedOutput(Output):
    """What a rank has that does not write: it reads the journal, in a directory that all ranks see."""

    def __init__(self, partial: Path) -> None:
        self.partial = partial
        self.refresh()

    def refresh(self) -> None:
        """Read the journal again."""
        self.entries = read_journal(self.partial / JOURNAL)[1:]

    def shard(self, name: str, specs: Mapping[str, TensorSpec]) -> AbstractContextManager[Shard]:
        return Dropped(specs)

    def record(self, kind: str, files: list[str], **facts: Any) -> None:
        pass

    def remove(self, name: str) -> None:
        pass
