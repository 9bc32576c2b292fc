"""What every step of a layer is given (`LayerContext`) and what it hands on (`LayerState`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from moebit.formats.native import PackedSpec
from moebit.formats.sink import Sink
from moebit.methods.agreement import agreement
from moebit.methods.soft_coverage import SoftCoverage
from moebit.model.experts import RoutedTokens
from moebit.model.structure import LayerSites
from moebit.plan.plan import Plan
from moebit.quantize import solve
from moebit.quantize.reference import FullPrecision
from moebit.quantize.report import LayerReport
from moebit.ranks import ALONE, Ranks
from moebit.recipe import Recipe
from moebit.storage.edits import Edit
from moebit.storage.files import Shard
from moebit.streaming.routing import Routing
from moebit.streaming.shortcut import KeptInput
from moebit.streaming.stream import Stream
from moebit.streaming.streams import Streams
from moebit.tensor import QTensor, SolveInfo
from moebit.tensor.blocks import BlockTransform

Progress = Callable[[str, int, int], None]
PARTS, PART_WEIGHTS = 16, 2**20  # into how many a layer's experts are cut, and from how many weights on that is worth it


@dataclass(frozen=True)
class LayerContext:
    """One decoder layer, what is to be made of it, and where that goes.

    Attributes:
        sites: what can be quantized in the layer. sink, shard: where it is written.
        layer: the loaded layer, None where no stream runs through it.
        device: where matrices are solved. seed: of random transforms.
        progress: called with ("experts", done, total) after every chunk of experts. ranks: that share the work.
    """

    plan: Plan
    sink: Sink
    sites: LayerSites
    shard: Shard
    layer: nn.Module | None
    device: str
    progress: Progress
    seed: int = 0
    ranks: Ranks = ALONE

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @property
    def chunk(self) -> int:
        """Experts in memory at a time."""
        return self.plan.chunk.get(self.sites.index, 1)

    @property
    def part(self) -> int:
        """Experts that are solved together, by one rank.

        Where rounding is learned on what a chunk of experts puts out, that is the whole chunk. Else the parts are smaller than memory
        would allow, by the layer's shape alone, so that several ranks have some each and one alone does what they do.
        """
        moe = self.sites.moe
        assert moe is not None
        if self.recipe.refine.active:
            return self.chunk
        layout = moe.layout
        return min(self.chunk, max(-(-layout.experts // PARTS), -(-PART_WEIGHTS // layout.parameters_per_expert)))

    def full(self, name: str) -> str:
        """Full name of a module of the layer."""
        return f"{self.sites.name}.{name}"

    def solve(self, w_EOI: Tensor, h_EII: Tensor | None, bits_E: Tensor, spec: PackedSpec) -> tuple[QTensor, SolveInfo | None]:
        """Round a stack of matrices as the recipe says."""
        return solve.solve(self.recipe, w_EOI, h_EII, bits_E, spec, self.device)

    def edit(self, edits: Mapping[str, tuple[Edit, ...]]) -> None:
        """Change parameters of the layer: in what is read and written from here on, and in the loaded layer."""
        weights = self.sink.weights
        weights.add(edits)
        if self.layer is not None:
            weights.refresh(self.layer, self.sites.name, edits)


@dataclass(frozen=True)
class Captured:
    """What the experts of a layer are asked by one stream.

    Attributes:
        without: [N, L, ...] what the layer puts out without its experts; None where something in it changes afterwards.
    """

    tokens: RoutedTokens
    without: Tensor | None


@dataclass(frozen=True)
class ChangedRouter:
    """A router that was corrected or rounded, until it is known what the new one chooses.

    Attributes:
        report: numbers for report.json (docs/format.md). skipped: what the recipe asks for and was not done, with the reason.
        yardstick: what the router is compared with. logits: of the new weight, where they are known. score: its score function.
    """

    report: Mapping[str, Any]
    skipped: Mapping[str, str]
    yardstick: Routing
    logits: Tensor | None
    score: str | None

    def described(self, ids_Tk: Tensor) -> dict[str, Any]:
        """The report, once it is known which experts the new router chooses."""
        after = agreement(self.yardstick.ids, ids_Tk, self.yardstick.logits, self.logits, self.score)
        return {**self.report, "after": after, "skipped": dict(self.skipped)}


@dataclass(frozen=True)
class LayerState:
    """What is known of a layer so far.

    Attributes:
        streams: windows in front of the layer; None rounds to nearest without data.
        reference: what full precision says and delivers in this layer, where the recipe compares with it.
        inputs: stored inputs of groups of linears, by group, from which later groups are computed.
        kept: what entered the last linear before the experts, until it has been run through the rest of the layer.
        router: how the router was changed. soft: how near tokens came to experts, where the recipe asks for soft coverage.
        routed, pooled: what the experts are asked by the calibration set and by the pool.
        outputs, pool_outputs: [T, H] float32, what the quantized experts put out.
        transforms: online transforms that were made, by name.
        report: what was done.
    """

    report: LayerReport
    streams: Streams | None = None
    reference: FullPrecision = field(default_factory=FullPrecision)
    inputs: Mapping[int, Tensor] = field(default_factory=dict)
    kept: KeptInput | None = None
    router: ChangedRouter | None = None
    soft: SoftCoverage | None = None
    routed: Captured | None = None
    pooled: Captured | None = None
    outputs: Tensor | None = None
    pool_outputs: Tensor | None = None
    transforms: Mapping[str, BlockTransform] = field(default_factory=dict)

    @property
    def stream(self) -> Stream | None:
        """The calibration set."""
        return self.streams.calibration if self.streams else None

    @property
    def pool(self) -> Stream | None:
        """Further windows, for experts that get too few tokens."""
        return self.streams.pool if self.streams else None

    @property
    def dtype(self) -> torch.dtype:
        """What the layer is computed in; without a stream nothing is."""
        return self.stream.dtype if self.stream else torch.float32

    def noting(self, **parts: Mapping[str, Any]) -> LayerState:
        """The state with further entries in the report's mappings."""
        return replace(self, report=self.report.adding(**parts))


Step = Callable[[LayerContext, LayerState], LayerState]
