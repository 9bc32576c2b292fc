"""Several processes that do one job: who they are, and what they tell each other.

Each of them is a rank, started by torchrun or anything else that sets RANK and WORLD_SIZE. All ranks take the same way through the
program. A piece of work that can be shared out is done by one of them, and its results are then given to all, in an order that does not
depend on how many ranks there are: so every rank holds the same tensors behind every exchange, and the output has the same bytes. One
process alone is the case of one rank, in which an exchange hands back what it was given.

Tensors on the host travel through gloo, those on a CUDA device through NCCL.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moebit.errors import InterruptedWorkError

LONGEST = timedelta(days=7)  # that a rank may work while others wait: one that ends is noticed at once, by its closed connections
Named = Mapping[str, Tensor]

Piece = TypeVar("Piece")


@dataclass(frozen=True)
class Ranks:
    """One of `size` ranks.

    Attributes:
        rank: its number; rank 0 leads, and writes what is written.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def everyone(self, mine: Named) -> list[Named]:
        """Every rank's named tensors, in the order of the ranks; one's own are not copied.

        Raises:
            InterruptedWorkError: another rank has ended.
        """
        return list(self.in_turn([mine]))

    def in_turn(self, mine: Iterable[Named]) -> Iterator[Named]:
        """Every rank's groups of named tensors, one group at a time: rank 0's in their order, then rank 1's, and so on.

        Raises:
            InterruptedWorkError: another rank has ended.
        """
        if self.size == 1:
            yield from mine
            return
        mine = list(mine)
        for source, groups in enumerate(self.told([_header(group) for group in mine])):
            for number, header in enumerate(groups):
                yield self._passed_on(source, header, mine[number] if source == self.rank else None)

    def share_out(
        self,
        pieces: Sequence[Piece],
        work: Callable[[int, Piece], Named],
        take: Callable[[Piece, Named], None],
        *,
        done: int = 0,
        stop: int | None = None,
    ) -> None:
        """Do a piece of work for every item, one a rank at a time, and give all ranks what comes of it, in the order of the items.

        Args:
            work: from an item's number and the item to named tensors; called on one rank. take: called on all ranks, with its results.
            done: items to leave out, from the first. stop: the item to stop before.

        Raises:
            InterruptedWorkError: another rank has ended.
        """
        last = len(pieces) if stop is None else min(stop, len(pieces))
        for begin in range(done - done % self.size, last, self.size):
            own = begin + self.rank
            mine = work(own, pieces[own]) if done <= own < last else {}
            for number, found in enumerate(self.everyone(mine), start=begin):
                if done <= number < last:
                    take(pieces[number], found)

    def told(self, mine: Any) -> list[Any]:
        """What every rank says, as JSON, in the order of the ranks.

        Raises:
            InterruptedWorkError: another rank has ended.
        """
        if self.size == 1:
            return [mine]
        text = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
        with torch.device("cpu"), _lost(self):
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(text)]))
            texts = [text if rank == self.rank else torch.empty(int(size), dtype=torch.uint8) for rank, size in enumerate(sizes)]
            for rank, each in enumerate(texts):
                dist.broadcast(each, rank)
        return [json.loads(bytes(each.tolist())) for each in texts]

    def agreed(self, mine: Any) -> Any:
        """What rank 0 says."""
        return self.told(mine)[0]

    def wait(self) -> None:
        """Go on when all ranks are here."""
        self.told(None)

    def _passed_on(self, source: int, header: list[Any], mine: Named | None) -> Named:
        """One rank's group of tensors, on every rank."""
        result = {}
        for name, dtype, shape, on_host in header:
            if mine is not None:
                tensor = mine[name]
            else:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu" if on_host else torch.get_default_device())
            if tensor.numel():
                with _lost(self):
                    dist.broadcast(tensor.contiguous().view(-1).view(torch.uint8), source)
            result[name] = tensor
        return result


ALONE = Ranks()


@dataclass
class Sums:
    """Rows that are added to those of a tensor, rank after rank, whoever makes them.

    Attributes:
        total: [T, N], the same on every rank behind `settle`.
    """

    total: Tensor
    ranks: Ranks = ALONE
    _kept: list[Named] = field(default_factory=list)

    def add(self, rows_S: Tensor, values_SN: Tensor) -> None:
        """Add to rows of the total; a row may occur more than once."""
        if self.ranks.size == 1:
            self.total.index_add_(0, rows_S, values_SN)
        else:
            self._kept.append({"rows": rows_S, "values": values_SN})

    def settle(self) -> None:
        """Add what all ranks have given since the last time: first rank 0's, then rank 1's, and so on."""
        for group in self.ranks.in_turn(self._kept):
            self.total.index_add_(0, group["rows"], group["values"])
        self._kept = []


def own_rank() -> int:
    """The number of this process among those that were started together; 0 for one alone."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of this run: those that RANK and WORLD_SIZE speak of, or this process alone.

    Raises:
        InterruptedWorkError: the others cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    ranks = Ranks(int(os.environ["RANK"]), size)
    with _lost(ranks):
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=LONGEST)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


@contextmanager
def _lost(ranks: Ranks) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        told = re.sub(r"^\[\S+:\d+\] ", "", str(error).strip())  # without the line of the library's source
        reason = told.splitlines()[0].partition(". ")[0] if told else type(error).__name__
        raise InterruptedWorkError(
            f"rank {ranks.rank} of {ranks.size} has lost another rank ({reason}); what is finished is kept: start again with --resume, "
            "with as many ranks as there are"
        ) from error


def _header(group: Named) -> list[list[Any]]:
    return [
        [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), tensor.device.type == "cpu"] for name, tensor in group.items()
    ]
