"""What llama.cpp's converter does to the rows of a checkpoint's tensors, found out by sending numbered ones through it.

Quantized rows are bytes: they can be put into another order, stacked and split, but not added to, transposed or rotated. A converter that
does only the former to a tensor leaves its rows whole, and a map says where each of them went. It is found with six payloads in place of
every weight, of its own shape and small whole numbers, which float32 holds exactly:

- the number of a line (a row of the last two axes, counted over all leading axes), everywhere in that line;
- a random number of the line, without repeats, so that arithmetic shows: a sum, a mean or a norm + 1 of the numbers may look like numbers,
  but not in both payloads;
- the number of the place within the line, which has to arrive as 0, 1, 2 …, and a random number of it for what is stored transposed;
- the number of the tensor, and another number of it.

A tensor that is stored [.., in, out] and transposed by the converter has its lines along the other axis; `RowMap.transposed` says so. What
fits none of this has been computed, and no map.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.formats.gguf.converter import Converter, stored_tensors, without_code
from moebit.formats.gguf.numbered import LARGEST, PAYLOADS, counted, lines_at_most, numbered, other_number, send, shuffle, thin, two_axes
from moebit.storage.files import TensorSpec


@dataclass(frozen=True)
class RowMap:
    """Where the rows of one GGUF tensor come from.

    Attributes:
        name: the GGUF tensor's.
        shape: (.., out, in) of it.
        sources: names of the checkpoint's tensors that it is made of.
        source: int32 [rows], for every row of the flattened [.. × out, in] the index in `sources`.
        row: int64 [rows], and the line in that tensor.
        transposed: the sources are stored [.., in, out], so a line is a column of theirs.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    source: Tensor
    row: Tensor
    transposed: bool = False

    @property
    def whole(self) -> str | None:
        """The one tensor whose lines these are, all of them in their order; None if there is no such tensor."""
        same = len(self.sources) == 1 and torch.equal(self.row, torch.arange(len(self.row)))
        return self.sources[0] if same and not self.transposed else None

    def gather(self, lines: Mapping[str, Tensor]) -> Tensor:
        """[.., out, bytes]: the rows of this tensor, from the lines [n, bytes] of every source (codes, packed bytes or weights alike).

        Raises:
            BadInputError: a source that is not there.
        """
        missing = [name for name in self.sources if name not in lines]
        if missing:
            raise BadInputError(f"{self.name}: the rows of {missing[0]} are wanted for it, and there are none")
        width = lines[self.sources[0]].shape[-1]
        result = lines[self.sources[0]].new_empty(len(self.row), width)
        for name, here in self.positions().items():
            result[here] = lines[name][self.row[here]]
        return result.view(self.shape if len(self.shape) < 2 else (*self.shape[:-1], width))

    def positions(self) -> dict[str, Tensor]:
        """Source → int64, the numbers of its rows in the flattened [.. × out, in], in their order."""
        order = self.source.argsort(stable=True)
        counts = torch.bincount(self.source, minlength=len(self.sources)).tolist()
        return dict(zip(self.sources, order.split(counts), strict=True))


@dataclass(frozen=True)
class Computed:
    """A GGUF tensor that is not made of whole rows of the checkpoint's.

    Attributes:
        why: what was seen, as the end of a sentence.
        sources: the checkpoint's tensors that take part, as far as they could be told.
    """

    why: str
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rows:
    """What the converter does to a checkpoint.

    Attributes:
        maps: GGUF name → where its rows come from.
        computed: GGUF name → why there is no map.
        skipped: tensors of the checkpoint that the converter leaves out.
        unread: tensors of the checkpoint whose conversion failed on numbered rows, with what the converter said.
    """

    maps: dict[str, RowMap]
    computed: dict[str, Computed]
    skipped: tuple[str, ...]
    unread: dict[str, str]

    def of(self, checkpoint_name: str) -> tuple[str, ...]:
        """The GGUF tensors that hold rows of a tensor of the checkpoint."""
        return tuple(name for name, found in self.maps.items() if checkpoint_name in found.sources)

    def packable(self, checkpoint_name: str) -> bool:
        """Whether a tensor arrives in whole rows wherever it arrives, so that packed rows can take its place."""
        return bool(self.of(checkpoint_name)) and not any(checkpoint_name in one.sources for one in self.computed.values())


def find_rows(converter: Converter, checkpoint: Path, specs: Mapping[str, TensorSpec] | None = None) -> Rows:
    """Send numbered rows through the converter; no weight is read.

    Args:
        checkpoint: a Hugging Face directory.
        specs: the checkpoint's tensors as they are given to the converter, if not as they are stored.

    Raises:
        BadInputError: an architecture that the converter does not know, or a tensor of more lines than float32 can number.
    """
    given = specs if specs is not None else {name: tensor.spec for name, tensor in stored_tensors(checkpoint).items()}
    for name, spec in given.items():
        if lines_at_most(spec.shape) > LARGEST:
            raise BadInputError(f"{name}: {spec.shape} has more than {LARGEST} lines, which is as many as can be numbered")
    failed: dict[str, str] = {}
    came: dict[str, str] = {}
    arrived = {}
    with without_code(checkpoint, specs is not None) as directory:
        for kind, payload in PAYLOADS.items():
            arrived[kind] = send(converter, directory, numbered(given, payload), came, failed)
    return _judge(arrived, given, came, failed)


def _judge(
    arrived: Mapping[str, Mapping[str, Tensor]], given: Mapping[str, TensorSpec], came: Mapping[str, str], failed: dict[str, str]
) -> Rows:
    names = tuple(given)
    numbers = {name: number for number, name in enumerate(names)}
    maps, computed, used = {}, {}, set[str]()
    for name, first in arrived["line"].items():
        sent = {kind: found[name] for kind, found in arrived.items() if name in found and found[name].shape == first.shape}
        if len(sent) < len(arrived):
            computed[name] = Computed("what the converter makes of it depends on the values", (came[name],))
            used.add(came[name])
            continue
        sources = _sources(sent["tensor"], sent["scattered tensor"], names)
        found = _map_of(name, sent, numbers, sources, given) if sources else "its values are computed from the checkpoint's"
        sources = sources or (came[name],)
        used.update(sources)
        if isinstance(found, RowMap):
            maps[name] = found
        else:
            computed[name] = Computed(found, sources)
    skipped = tuple(name for name in names if name not in used and name not in failed)
    return Rows(maps, computed, skipped, failed)


def _sources(numbers: Tensor, scattered: Tensor, names: tuple[str, ...]) -> tuple[str, ...]:
    """The tensors whose two numbers arrived, unchanged, in each other's places."""
    pairs = torch.stack([thin(numbers).flatten(), thin(scattered).flatten()]).unique(dim=1).T.tolist()
    valid = [first for first, second in pairs if first in range(len(names)) and other_number(first) == second]
    return tuple(names[int(number)] for number in valid)


def _map_of(
    name: str, sent: Mapping[str, Tensor], numbers: Mapping[str, int], sources: tuple[str, ...], given: Mapping[str, TensorSpec]
) -> RowMap | str:
    """The map of one GGUF tensor, or why there is none."""
    shape = tuple(sent["line"].shape)
    rows = {kind: _as_rows(values) for kind, values in sent.items()}
    number = _constant(rows["tensor"])
    order = torch.tensor([float(numbers[one]) for one in sources])
    if number is None or not bool(torch.isin(number, order).all()):
        return "its rows are made of several tensors"
    source = torch.searchsorted(order, number.contiguous())
    for transposed, (along, check, across) in ORIENTATIONS.items():
        line = _constant(rows[along])
        stored = _Lines.of([given[one] for one in sources], transposed)
        if line is None or not stored.hold(line, source, rows[across]):
            continue
        if not stored.agree(line, source, _constant(rows[check])):
            return "its values are computed from the checkpoint's"
        return RowMap(name, shape, sources, source.to(torch.int32), line.to(torch.int64), transposed)
    return "its rows are no rows of the checkpoint's: it is transposed or computed"


ORIENTATIONS = {False: ("line", "shuffled line", "place"), True: ("place", "shuffled place", "line")}


@dataclass(frozen=True)
class _Lines:
    """How the lines of some tensors are numbered, int64 [S] each: lines of one leading index, places in a line, all lines."""

    per: Tensor
    length: Tensor
    count: Tensor

    @classmethod
    def of(cls, specs: Sequence[TensorSpec], transposed: bool) -> _Lines:
        shapes = [(1, *two_axes(spec.shape)) for spec in specs]
        tall, wide = torch.tensor([shape[-2] for shape in shapes]), torch.tensor([shape[-1] for shape in shapes])
        per, length = (wide, tall) if transposed else (tall, wide)
        return cls(per, length, per * torch.tensor([math.prod(shape[:-2]) for shape in shapes]))

    def hold(self, line: Tensor, source: Tensor, across: Tensor) -> bool:
        """Whether rows across [.., rows, width] hold the places of line [R] of source [R], all of them, in their order; R = .. × rows."""
        *_, rows, width = across.shape
        if not bool(((self.length == width).all() & (line == line.round()) & (line >= 0) & (line < self.count[source])).all()):
            return False
        # Places are counted over the leading axes, too: the lines of the n-th leading index begin at n times their length.
        begins = (line.to(torch.int64) // self.per[source]) * width
        begins = begins.view(-1, rows)
        if across.stride(-2) == 0 and bool((begins == begins[:, :1]).all()):
            across, begins = across[..., :1, :], begins[:, :1]
        return bool((across.reshape(-1, width) - begins.reshape(-1, 1) == counted(width)).all())

    def agree(self, line: Tensor, source: Tensor, shuffled: Tensor | None) -> bool:
        """Whether the shuffled numbers [R] say the same lines."""
        if shuffled is None:
            return False
        tables = {count: shuffle(count) for count in set(self.count.tolist())}
        table = torch.cat([tables[count] for count in self.count.tolist()])
        begins = self.count.cumsum(0) - self.count
        wanted = table[begins[source] + line.to(torch.int64)]
        return torch.equal(wanted, shuffled)


def _as_rows(values: Tensor) -> Tensor:
    """[.., rows, width], a vector as rows of one place."""
    return values.reshape(-1, 1) if values.ndim < 2 else values


def _constant(values: Tensor) -> Tensor | None:
    """[R] of values [.., rows, width] that are the same along every row, R = .. × rows; None if they are not."""
    few = thin(values)
    return values[..., 0].reshape(-1) if bool((few == few[..., :1]).all()) else None


def expert_orders(rows: Rows) -> dict[str, tuple[int, ...]]:
    """GGUF name → the numbers of the checkpoint's experts in the order of the stack, for every tensor [E, ..] that is made of them.

    Experts that are stored one by one have their number in their names; in a fused tensor it is the index of the first axis.
    """
    found = ((name, _expert_order(one)) for name, one in rows.maps.items() if len(one.shape) == 3)
    return {name: order for name, order in found if order}


def _expert_order(one: RowMap) -> tuple[int, ...]:
    begins = torch.arange(0, len(one.row), one.shape[1])
    if len(one.sources) > 1:
        numbers = [re.findall(r"\.(\d+)\.", name) for name in one.sources]
        varying = [position for position, values in enumerate(zip(*numbers, strict=True)) if len(set(values)) == len(one.sources)]
        return tuple(int(numbers[int(i)][varying[0]]) for i in one.source[begins]) if varying else ()
    return tuple(one.row[begins].argsort().argsort().tolist())


def exchanged_experts(rows: Rows) -> list[str]:
    """What is wrong with the order of experts, as sentences: stacks of one block that disagree with each other or with the router's rows.

    A converter that exchanges two experts in one of them writes a file that loads and talks nonsense.
    """
    wrong = []
    orders = expert_orders(rows)
    for name, order in orders.items():
        block = name.split(".ffn_")[0]
        router = rows.maps.get(f"{block}.ffn_gate_inp.weight")
        wanted = tuple(router.row.tolist()) if router is not None and len(router.row) == len(order) else tuple(range(len(order)))
        if order != wanted:
            at = next(i for i, (a, b) in enumerate(zip(order, wanted, strict=True)) if a != b)
            wrong.append(f"{name}: expert {order[at]} stands in place {at}, where the router has expert {wanted[at]}")
    return wrong
