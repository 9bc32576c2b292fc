"""Where the tensors of one file go that do not reach it at once: to another rank, or nowhere."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moebit.ranks import Named, Ranks
from moebit.storage.files import Shard, TensorSpec


class Dropped(Shard):
    """What is written here is written by another rank."""

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self.specs = dict(specs)

    def write(self, name: str, tensor: Tensor, skip: int = 0) -> None:
        pass

    def __enter__(self) -> Dropped:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Collected(Shard):
    """What a rank wants to be written into a file that it may not hold; `settle` hands it over."""

    def __init__(self, shard: Shard) -> None:
        self.specs, self._shard, self._kept = shard.specs, shard, list[Named]()

    def write(self, name: str, tensor: Tensor, skip: int = 0) -> None:
        self._kept.append({f"{skip} {name}": tensor.detach()})

    def settle(self, ranks: Ranks) -> None:
        """Write what all ranks have collected since the last time."""
        for group in ranks.in_turn(self._kept):
            for key, tensor in group.items():
                skip, _, name = key.partition(" ")
                self._shard.write(name, tensor, skip=int(skip))
        self._kept = []
