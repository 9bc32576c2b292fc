"""Where a layer's channels can be scaled without changing what it computes, each place proved with random values in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from moebit.errors import BadInputError
from moebit.model.experts import ExpertsLayout
from moebit.model.proof.flow import LayerFlow, NormSite, find_flow
from moebit.model.proof.passage import Passage
from moebit.model.proof.rehearsal import Rehearsal, difference
from moebit.model.structure import LayerSites, Structure
from moebit.storage.checkpoint import Checkpoint
from moebit.storage.edits import Edit, Edits, RotateHeads, Scale, joined
from moebit.tensor.rotation import Rotation, randomised_hadamard

TOLERANCE = 1e-9
NOTHING_IN_FRONT = "no norm and no linear stands in front of it that could take its scales"


@dataclass(frozen=True)
class PairSite:
    """Two linears, the first's output channels reaching the second's input one by one and linearly.

    Attributes:
        first, second: full names. bias: the first has one.
        channels: int64 [in of second]: which output channel of the first each input channel of the second comes from.
        rows: output channels of the first.
        attention: values reach the second through attention; else it is gated or activated, channel by channel.
    """

    first: str
    second: str
    channels: Tensor
    rows: int
    bias: bool
    attention: bool = False

    @property
    def reached(self) -> Tensor:
        """bool [rows]: which rows of the first reach the second; the others must not be scaled."""
        return torch.zeros(self.rows, dtype=torch.bool).index_fill_(0, self.channels, True)

    def renamed(self, old: str, new: str) -> PairSite:
        """This pair in a layer of another name."""
        first, second = (new + name.removeprefix(old) for name in (self.first, self.second))
        return replace(self, first=first, second=second)


@dataclass(frozen=True)
class HeadSite:
    """Values on their way through attention, head by head.

    Attributes:
        values, output: full names of the linears that make them and that take them.
        value_channels: int64 [kv heads, D] in the output of `values`. output_channels: int64 [heads, D] in the input of `output`.
        bias: `values` has one.
    """

    values: str
    output: str
    value_channels: Tensor
    output_channels: Tensor
    rows: int
    bias: bool

    @property
    def group(self) -> int:
        """Heads that share a kv head."""
        return len(self.output_channels) // len(self.value_channels)

    def as_pair(self) -> PairSite:
        """This place as a pair of linears, channel by channel."""
        channels = torch.empty(self.output_channels.numel(), dtype=torch.int64)
        channels[self.output_channels] = self.value_channels.repeat_interleave(self.group, 0)
        return PairSite(self.values, self.output, channels, self.rows, self.bias, attention=True)

    def renamed(self, old: str, new: str) -> HeadSite:
        """This place in a layer of another name."""
        return HeadSite(
            new + self.values.removeprefix(old),
            new + self.output.removeprefix(old),
            self.value_channels,
            self.output_channels,
            self.rows,
            self.bias,
        )


@dataclass(frozen=True)
class LayerScales:
    """The places in one layer where channels can be scaled.

    Attributes:
        norms: behind a norm: s divides the norm's gain and multiplies its readers' columns.
        pairs: behind a linear: s divides the rows of the first and multiplies the columns of the second.
        experts: down's columns against up's rows, an own s per expert.
        skipped: module -> why there is no such place.
    """

    norms: tuple[NormSite, ...] = ()
    pairs: tuple[PairSite, ...] = ()
    experts: bool = False
    skipped: Mapping[str, str] = field(default_factory=dict)


def scale_behind_norm(site: NormSite, s: Tensor, layouts: Mapping[str, ExpertsLayout]) -> dict[str, tuple[Edit, ...]]:
    """Norm divided by s [size], the columns of what reads it multiplied."""
    edits: dict[str, tuple[Edit, ...]] = {f"{site.norm}.weight": (Scale(1 / s, offset=site.offset),)}
    if site.bias:
        edits[f"{site.norm}.bias"] = (Scale(1 / s),)
    edits |= {f"{reader}.weight": (Scale(s),) for reader in site.readers}
    if site.experts is not None:
        layout = layouts[site.experts]
        edits[f"{site.experts}.{layout.first}"] = (Scale(s, layout.input_axis),)
    return edits


def scale_pair(pair: PairSite, s: Tensor) -> dict[str, tuple[Edit, ...]]:
    """Rows of the first divided by s [rows], columns of the second multiplied; s is 1 for rows that are not `reached`."""
    edits: dict[str, tuple[Edit, ...]] = {f"{pair.first}.weight": (Scale(1 / s, 0),), f"{pair.second}.weight": (Scale(s[pair.channels]),)}
    return edits | ({f"{pair.first}.bias": (Scale(1 / s),)} if pair.bias else {})


def scale_down(experts: str, layout: ExpertsLayout, s_EI: Tensor) -> dict[str, tuple[Edit, ...]]:
    """Up's rows divided by s [E, I], down's columns multiplied; where h is linear in up."""
    rows = torch.ones(len(s_EI), layout.intermediate * (2 if layout.gated else 1), dtype=s_EI.dtype)
    rows[:, layout.rows("up_proj")] = 1 / s_EI
    edits: dict[str, tuple[Edit, ...]] = {
        f"{experts}.{layout.first}": (Scale(rows, layout.output_axis),),
        f"{experts}.down_proj": (Scale(s_EI, layout.input_axis),),
    }
    return edits | ({f"{experts}.{layout.first}_bias": (Scale(rows),)} if layout.bias else {})


def find_scales(checkpoint: Checkpoint, structure: Structure) -> tuple[LayerScales, ...]:
    """The proved places of every layer. Layers of one kind are looked at once."""
    rehearsal = Rehearsal(checkpoint, structure)
    passage, known, everything = rehearsal.passage(), {}, {}
    for index in rehearsal.representatives:
        known[index] = _scales_of(rehearsal, passage, index)
        everything[index] = _random_edits(rehearsal, known[index])
        rehearsal.step(passage, index)
    _check_handed_on(rehearsal, joined(*everything.values()))
    names = [sites.name for sites in structure.layers]
    return tuple(_renamed(known[kind], names[kind], names[index]) for index, kind in enumerate(rehearsal.kinds))


def _renamed(scales: LayerScales, old: str, new: str) -> LayerScales:
    return LayerScales(
        tuple(site.renamed(old, new) for site in scales.norms),
        tuple(pair.renamed(old, new) for pair in scales.pairs),
        scales.experts,
        {new + name.removeprefix(old): why for name, why in scales.skipped.items()},
    )


def _check_handed_on(rehearsal: Rehearsal, edits: Edits) -> None:
    """All at once, through all layers: something that a layer hands to a later one must not have been scaled."""
    plain, edited = rehearsal.passage(), rehearsal.passage(edits)
    for index in rehearsal.representatives:
        rehearsal.step(plain, index)
        rehearsal.step(edited, index)
        if (far := difference(plain.hidden, edited.hidden)) > TOLERANCE:
            name = rehearsal.structure.layers[index].name
            raise BadInputError(
                f"{name}: channels that can be scaled one by one cannot be scaled together, or are handed to other layers "
                f"(difference {far:.1e} on random values); use a method that scales none"
            )


def _scales_of(rehearsal: Rehearsal, passage: Passage, index: int) -> LayerScales:
    flow, skipped = find_flow(rehearsal, passage, index), {}
    plain = rehearsal.output(passage, index)

    def keeps(edits: Edits) -> bool:
        return difference(plain, rehearsal.output(passage, index, edits)) <= TOLERANCE

    norms, pairs = [], []
    for site in flow.norms:
        if keeps(scale_behind_norm(site, _random(site.size), rehearsal.layouts)):
            norms.append(site)
        else:
            skipped[site.norm] = "something beside linears reads this norm"
    heads = [site.as_pair() for site in find_heads(rehearsal, passage, index, flow)]
    for pair in (*plain_pairs(rehearsal, flow), *heads):
        if keeps(scale_pair(pair, _random_rows(pair))):  # values behind a norm can be rotated, which is proved already, but not scaled
            pairs.append(pair)
    for output, _ in flow.attention:
        if all(pair.second != output for pair in pairs):
            skipped[output] = "no linear's output reaches it through attention channel by channel"
    sites = rehearsal.structure.layers[index]
    linear = False
    if sites.moe is not None:
        linear = linear_in_up(rehearsal.model.get_submodule(sites.experts), sites.moe.layout)
        if not linear:
            skipped[f"{sites.experts}.down_proj"] = "what enters down is not linear in up"
    skipped |= {name: NOTHING_IN_FRONT for name in _left(sites, flow, pairs) if name not in skipped}
    return LayerScales(tuple(norms), tuple(pairs), linear, skipped)


def _left(sites: LayerSites, flow: LayerFlow, pairs: list[PairSite]) -> list[str]:
    """What could be quantized and stands neither behind a norm nor behind a linear that can be scaled."""
    names = [f"{sites.name}.{name}" for group in sites.groups for name in group.names]
    names += [sites.experts] if sites.moe else []
    reached = {pair.second for pair in pairs}.union(*(site.readers for site in flow.norms), (str(site.experts) for site in flow.norms))
    return [name for name in names if name not in reached]


def plain_pairs(rehearsal: Rehearsal, flow: LayerFlow) -> Iterator[PairSite]:
    """Candidates outside of attention: up and down of dense layers and shared experts, for one."""
    for first, second in flow.pairs:
        rows = flow.called[first][0]
        yield PairSite(first, second, torch.arange(rows), rows, _has_bias(rehearsal, first))


def _has_bias(rehearsal: Rehearsal, name: str) -> bool:
    return isinstance(rehearsal.model.get_submodule(name)._parameters.get("bias"), Tensor)


def find_heads(rehearsal: Rehearsal, passage: Passage, index: int, flow: LayerFlow) -> list[HeadSite]:
    """Which rows of which linear are the values of an attention block: what can be rotated there, head by head, without a trace."""
    plain, found = rehearsal.output(passage, index), []
    for output, _ in flow.attention:
        for site in _head_candidates(rehearsal, flow, output):
            edits = head_rotation(site, torch.Generator().manual_seed(0))
            if difference(plain, rehearsal.output(passage, index, edits)) <= TOLERANCE:
                found.append(site)
                break
    return found


def head_rotation(site: HeadSite, generator: torch.Generator) -> dict[str, tuple[Edit, ...]]:
    """A random rotation of every kv head's values, undone where the output linear takes them."""
    drawn = randomised_hadamard(site.value_channels.shape[1], generator)
    rotation = Rotation(torch.ones_like(drawn.signs), drawn.factors)
    signs = torch.randint(0, 2, tuple(site.value_channels.shape), generator=generator).double() * 2 - 1
    edits: dict[str, tuple[Edit, ...]] = {
        f"{site.values}.weight": (RotateHeads(rotation, site.value_channels, signs, 0),),
        f"{site.output}.weight": (RotateHeads(rotation, site.output_channels, signs.repeat_interleave(site.group, 0), -1),),
    }
    return edits | ({f"{site.values}.bias": (RotateHeads(rotation, site.value_channels, signs, 0),)} if site.bias else {})


def _head_candidates(rehearsal: Rehearsal, flow: LayerFlow, output: str) -> Iterator[HeadSite]:
    """Rows that may be values: all of a linear's, the last of every head's (latent attention), the last of all (joint projections)."""
    parent, width = output.rpartition(".")[0] + ".", flow.called[output][1]
    makers = [name for name in flow.called if name.startswith(parent) and name != output]
    for d, name in product(_head_sizes(rehearsal, parent[:-1], width), makers):
        heads, rows = width // d, flow.called[name][0]
        out = torch.arange(width).view(heads, d)
        shapes = []
        if rows % d == 0 and heads % (rows // d) == 0:
            shapes.append(torch.arange(rows).view(-1, d))
        if rows % heads == 0 and rows // heads > d:
            shapes.append(torch.arange(rows).view(heads, -1)[:, -d:].contiguous())
        kv = (rows // d - heads) // 2 if rows % d == 0 else 0
        if kv > 0 and rows == (heads + 2 * kv) * d and heads % kv == 0:
            shapes.append(torch.arange(rows - kv * d, rows).view(kv, d))
        yield from (HeadSite(name, output, values, out, rows, _has_bias(rehearsal, name)) for values in shapes)


def _head_sizes(rehearsal: Rehearsal, attention: str, width: int) -> list[int]:
    """What may be the size of a head's values, by the attention module's and the configuration's own numbers."""
    module, config = rehearsal.model.get_submodule(attention), rehearsal.model.config.get_text_config()
    owners = [module, *(config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config])]
    numbers = [getattr(owner, key, None) for owner in owners for key in ("v_head_dim", "head_dim")]
    numbers += [width // heads for owner in owners[1:] if (heads := getattr(owner, "num_attention_heads", None))]
    return list(dict.fromkeys(n for n in numbers if isinstance(n, int) and n > 1 and width % n == 0))


def linear_in_up(module: nn.Module, layout: ExpertsLayout) -> bool:
    """Whether what enters down is, channel by channel, proportional to up's output."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(16, 2 * layout.intermediate if layout.gated else layout.intermediate, dtype=torch.float64, generator=generator)
    rows, s = layout.rows("up_proj"), _random(layout.intermediate)
    scaled = first.clone()
    scaled[:, rows] = scaled[:, rows] / s
    owner: Any = module
    apply = owner._apply_gate if layout.gated else owner.act_fn
    return difference(apply(first), apply(scaled) * s) <= TOLERANCE


def _random(size: int) -> Tensor:
    """Factors between 1/2 and 2."""
    return torch.exp2(2 * torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)) - 1)


def _random_rows(pair: PairSite) -> Tensor:
    """Factors for the rows of the first that reach the second, 1 for the others."""
    return _random(pair.rows).where(pair.reached, torch.ones(pair.rows, dtype=torch.float64))


def _random_edits(rehearsal: Rehearsal, scales: LayerScales) -> dict[str, tuple[Edit, ...]]:
    norms = [scale_behind_norm(site, _random(site.size), rehearsal.layouts) for site in scales.norms]
    return joined(*norms, *(scale_pair(pair, _random_rows(pair)) for pair in scales.pairs))
