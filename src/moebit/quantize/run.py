"""The straight line: every decoder layer, one at a time, on what the quantized layers before it produce; then the rest of the model.

    plan -> embed calibration windows -> for each layer: its steps (`layer.py`), written and in the journal -> rest

Each expert is read once for the work, and once before it to look for NaN, and written once.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace

from moebit.formats.followed import Output
from moebit.formats.sink import Sink
from moebit.memory import peak_resident_bytes
from moebit.model.structure import LayerSites
from moebit.plan.disk import layer_specs
from moebit.plan.plan import Plan
from moebit.quantize.context import LayerContext, LayerState, Progress
from moebit.quantize.data import Windows
from moebit.quantize.journal import embed, put_layer, put_rest, shard_name, written_layers
from moebit.quantize.layer import quantize_layer
from moebit.quantize.reference import full_precision
from moebit.quantize.report import LayerReport
from moebit.ranks import ALONE, Ranks
from moebit.storage.checkpoint import Checkpoint
from moebit.streaming.streams import Streams


@dataclass(frozen=True)
class Work:
    """One run over the layers of a checkpoint.

    Attributes:
        output: the directory, with its journal. sink: how tensors are written. device: where matrices are solved.
        seed: of random transforms. progress: called with (what, done, total). ranks: that share the work.
    """

    checkpoint: Checkpoint
    plan: Plan
    output: Output
    sink: Sink
    device: str
    progress: Progress
    seed: int
    ranks: Ranks = ALONE


def run(work: Work, windows: Windows) -> list[LayerReport]:
    """Quantize all layers that the journal does not have yet, then write the rest of the model."""
    layers, reports = work.plan.structure.layers, written_layers(work.output)
    streams = embed(work.checkpoint, work.plan, work.output, windows, len(reports), work.ranks) if len(reports) < len(layers) else None
    for sites in layers[len(reports) :]:
        work.progress("layers", sites.index, len(layers))
        reports.append(run_layer(work, sites, streams))
    work.progress("layers", len(layers), len(layers))
    if work.ranks.leads:
        put_rest(work.output, work.sink, work.plan.structure)
    return reports


def run_layer(work: Work, sites: LayerSites, streams: Streams | None) -> LayerReport:
    """Quantize, write and pass one decoder layer; from the journal entry on it need not be done again."""
    began, sink, index = time.perf_counter(), work.sink, sites.index
    reference = full_precision(work.plan, sites, streams.reference if streams else None)
    loaded, name = streams.calibration.loaded(index) if streams else nullcontext(), shard_name(work.output, work.plan.structure, index)
    with work.output.shard(name, layer_specs(sink, sites)) as shard, loaded as layer:
        context = LayerContext(work.plan, sink, sites, shard, layer, work.device, work.progress, work.seed, work.ranks)
        report = quantize_layer(context, LayerState(LayerReport(index), streams, reference)).report
    report = replace(report, seconds=round(time.perf_counter() - began, 3), peak_memory_bytes=peak_resident_bytes())
    put_layer(work.output, name, report, streams)
    return report
