"""What can be chosen, and in which pieces: the ladder of grids of every engine, with the bytes that each step takes on disk.

An item gets one grid; a candidate is a grid with the item's bytes on it. What an item is depends on who reads the output:

    native              a projection of one expert (or what `allocation.granularity` says), and every linear; integer widths
    compressed-tensors  all experts of a layer together (vLLM, SGLang) or of the whole model (transformers), linears that share an input
                        together; integer widths whose rows fill 32-bit words
    mlx                 a projection of a layer's experts, and every linear; integer widths
    gguf                what shares a tensor of the file: a layer's gate and up, its down, every linear; block types of ggml

A type whose blocks do not divide a tensor's rows counts as the type that llama.cpp takes instead, with the bytes of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from moebit.errors import BadInputError
from moebit.formats.gguf.size import GgufSize
from moebit.formats.gguf.types import fitting
from moebit.formats.native import PackedSpec
from moebit.formats.profile import Profile, ProfiledModule
from moebit.formats.sinks import SINKS
from moebit.plan.bitplan import BitPlan
from moebit.plan.plan import Plan
from moebit.profiling.allocate import Member
from moebit.profiling.rounding import Label
from moebit.storage.weights import Weights

# Block types from small to large. The 2-bit type with blocks of 64 is taken only where blocks of 256 do not divide the rows, because older
# versions of llama.cpp do not have it.
LADDER = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")
LADDER_OF_SHORT_ROWS = ("q2_0", "iq4_nl", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
SUPER_BLOCK = 256


@dataclass(frozen=True)
class Item:
    """What gets one grid.

    Attributes:
        members: matrices. labels: candidate grids, rising in bytes; sizes: these bytes.
        tensors: the GGUF tensors that hold the members.
    """

    members: tuple[Member, ...]
    labels: tuple[Label, ...]
    sizes: tuple[int, ...]
    tensors: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[tuple[str, str], list[int]]:
        """(module, projection) -> experts."""
        found: dict[tuple[str, str], list[int]] = {}
        for name, part, expert in self.members:
            found.setdefault((name, part), []).append(expert)
        return found


def find_items(plan: Plan, profile: Profile, weights: Weights, gguf: GgufSize | None = None) -> list[Item]:
    """The items of a plan's recipe, in the order of the layers.

    Args:
        plan: of the recipe; what it quantizes is what gets grids. gguf: sizes of the file's tensors, for format gguf.

    Raises:
        BadInputError: a quantized matrix that the profile has no prices of, an item that no candidate fits.
    """
    missing = [name for name in plan.modules if name not in profile.modules]
    if missing:
        raise BadInputError(f"{profile.path}: has no prices of {missing[0]}; profile again with this recipe's scope and ignored modules")
    modules = {name: module for name, module in profile.modules.items() if name in plan.modules}
    if plan.gguf is not None:
        assert gguf is not None
        return list(_gguf_items(plan, modules, weights, gguf))
    return [_integers(plan, modules, members) for members in _grouped(plan, modules)]


def build(items: Sequence[Item], labels: Sequence[Label], modules: Mapping[str, ProfiledModule]) -> BitPlan:
    """The plan in which every item has its label."""
    types: dict[str, str] = {}
    linears: dict[str, int] = {}
    experts: dict[str, dict[str, list[int]]] = {}
    for item, label in zip(items, labels, strict=True):
        if isinstance(label, str):
            types |= dict.fromkeys(item.tensors, label)
            continue
        for (name, part), numbers in item.parts.items():
            if not part:
                linears[name] = label
                continue
            row = experts.setdefault(name, {}).setdefault(part, [0] * modules[name].experts)
            for number in numbers:
                row[number] = label
    short = {name: {p: bits[0] if len(set(bits)) == 1 else bits for p, bits in parts.items()} for name, parts in experts.items()}
    return BitPlan(short, linears, types)


# --- integer widths


def _grouped(plan: Plan, modules: Mapping[str, ProfiledModule]) -> Iterator[list[Member]]:
    """Members that share one width."""
    section, joined = plan.recipe.allocation, plan.recipe.format == "compressed-tensors"
    groups: dict[tuple[object, ...], list[Member]] = {}
    for name, module in modules.items():
        for part in module.parts:
            for expert in range(max(1, module.experts)):
                key = _key(plan, section.granularity, name, module, part, expert, joined)
                groups.setdefault(key, []).append((name, part, expert))
    yield from groups.values()


def _key(plan: Plan, granularity: str, name: str, module: ProfiledModule, part: str, expert: int, joined: bool) -> tuple[object, ...]:
    """What members have in common that share a width."""
    if not module.experts:
        return ("linears", module.layer, module.group) if joined else ("linear", name)
    output_format: str = plan.recipe.format
    if output_format == "compressed-tensors":
        return ("experts",) if plan.recipe.allocation.engine == "transformers" else ("experts", name)
    if output_format == "mlx":
        return ("experts", name, part)
    if output_format != "native":
        return ("experts", name)
    return {"layer": (name,), "expert": (name, expert), "projection": (name, part, expert)}[granularity]


def _integers(plan: Plan, modules: Mapping[str, ProfiledModule], members: list[Member]) -> Item:
    section, sizes = plan.recipe.allocation, dict[int, int]()
    for width in sorted(section.ladder):
        if plan.recipe.format != "compressed-tensors" or all(_fills_words(modules, member, width) for member in members):
            sizes[width] = sum(_bytes(plan, modules[name], part, width) for name, part, _ in members)
    if not sizes:
        name, part, _ = members[0]
        raise BadInputError(
            f"{name}{'.' if part else ''}{part}: no width of {section.ladder} fills 32-bit words in its rows; add one of 4 or 8"
        )
    return Item(tuple(members), tuple(sizes), tuple(sizes.values()))


def _fills_words(modules: Mapping[str, ProfiledModule], member: Member, width: int) -> bool:
    name, part, _ = member
    return modules[name].parts[part][1] * width % 32 == 0


def _bytes(plan: Plan, module: ProfiledModule, part: str, width: int) -> int:
    grid = plan.recipe.weights
    spec = PackedSpec((width,), module.parts[part], grid.group_size, grid.symmetric, module.scale_dtype, stacked=bool(module.experts))
    return SINKS[plan.recipe.format].nbytes(spec, module.scale_dtype)


# --- block types


def _gguf_items(plan: Plan, modules: Mapping[str, ProfiledModule], weights: Weights, sizes: GgufSize) -> Iterator[Item]:
    assert plan.gguf is not None
    rows = plan.gguf.target.rows
    tensors_of: dict[frozenset[Member], set[str]] = {}
    for members, parameter in _parameters(modules):
        tensors_of[frozenset(members)] = {t for stored in weights.stored_names(parameter) for t in rows.of(stored)}
    for several, tensors in _together(tensors_of):
        widths = {rows.maps[tensor].shape[-1] for tensor in tensors}
        inside = tuple(m for m in _in_order(modules) if m in several)
        labels = list(_fitting_types(plan, widths))
        totals = {label: sum(sizes.tensor(tensor, label) for tensor in tensors) for label in labels}
        if not totals:
            raise BadInputError(f"{sorted(tensors)[0]}: no type of allocation.types fits its rows of {sorted(widths)} weights; add q8_0")
        rising = sorted(totals, key=lambda label: totals[label])
        yield Item(inside, tuple(rising), tuple(totals[label] for label in rising), tuple(sorted(tensors)))


def _parameters(modules: Mapping[str, ProfiledModule]) -> Iterator[tuple[list[Member], str]]:
    """(members, parameter that holds them) of everything."""
    for name, module in modules.items():
        if not module.experts:
            yield [(name, "", 0)], f"{name}.weight"
            continue
        first = [part for part in module.parts if part != "down_proj"]
        for parts, leaf in ((first, "gate_up_proj" if len(first) > 1 else first[0]), (["down_proj"], "down_proj")):
            yield [(name, part, e) for part in parts for e in range(module.experts)], f"{name}.{leaf}"


def _in_order(modules: Mapping[str, ProfiledModule]) -> Iterator[Member]:
    for name, module in modules.items():
        for part in module.parts:
            yield from ((name, part, expert) for expert in range(max(1, module.experts)))


def _together(tensors_of: Mapping[frozenset[Member], set[str]]) -> list[tuple[set[Member], set[str]]]:
    """Parameters that share tensors of the file, joined: a tensor has one type, and so have the rows of a parameter."""
    found: list[tuple[set[Member], set[str]]] = []
    for members, tensors in tensors_of.items():
        mine, theirs = set(members), set(tensors)
        for other in [pair for pair in found if pair[1] & theirs]:
            found.remove(other)
            mine, theirs = mine | other[0], theirs | other[1]
        found.append((mine, theirs))
    return found


def _fitting_types(plan: Plan, widths: Iterable[int]) -> Iterator[str]:
    """Types that fit rows of these widths, each once."""
    assert plan.gguf is not None
    known = plan.gguf.target.converter.gguf.GGMLQuantizationType.__members__
    whole = all(width % SUPER_BLOCK == 0 for width in widths)
    wanted = plan.recipe.allocation.types or (LADDER if whole else LADDER_OF_SHORT_ROWS)
    seen = set[str]()
    for kind in wanted:
        fits = {fitting(kind, width) for width in widths}
        one = fits.pop() if len(fits) == 1 else None
        if one is not None and one.upper() in known and one not in seen:
            seen.add(one)
            yield one


def padded(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    """[N, K] of rows of different lengths: the last number of a short row is repeated."""
    most = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1]] * (most - len(row))] for row in rows], dtype=torch.float64)
