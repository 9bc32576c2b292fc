"""What makes a run durable: layers, the streams behind them and the rest of the model, each in the journal once it is written."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor

from moebit.formats.followed import Output
from moebit.formats.sink import Sink, put_stored
from moebit.model.structure import Structure
from moebit.plan.disk import rest_names, rest_specs
from moebit.plan.plan import Plan
from moebit.quantize.data import Windows
from moebit.quantize.report import LayerReport
from moebit.ranks import ALONE, Ranks
from moebit.storage.checkpoint import Checkpoint
from moebit.storage.files import TensorSpec, read_header
from moebit.streaming.stream import Stream
from moebit.streaming.streams import Streams


def written_layers(output: Output) -> list[LayerReport]:
    """The reports of the layers that are written."""
    return [LayerReport(**entry["report"]) for entry in output.entries if entry["kind"] == "layer"]


def embed(checkpoint: Checkpoint, plan: Plan, output: Output, windows: Windows, done: int, ranks: Ranks = ALONE) -> Streams | None:
    """The calibration windows behind the layers that are done, with what the recipe wants beside them; None without calibration."""
    if windows.calibration is None:
        return None
    budget, pool = plan.budget, windows.pool
    store = budget.store(output.partial, checkpoint.weights.device)

    def stream(rows: Tensor) -> Stream:
        return Stream(checkpoint, plan.structure, rows, store, budget.batch_tokens, budget.slots, ranks)

    streams = Streams(
        stream(windows.calibration),
        stream(windows.calibration) if plan.recipe.needs_reference else None,
        stream(pool) if pool is not None and len(pool) > 0 else None,
    )
    if done:
        streams.take_up(read_header(output.partial / _stream_file(done - 1)))
    return streams


def put_layer(output: Output, shard: str, report: LayerReport, streams: Streams | None) -> None:
    """Note a written layer, with the streams behind it; those in front of it are not needed any more."""
    files = [shard]
    if streams is not None:
        files.append(_stream_file(report.layer))
        state = streams.state()
        with output.shard(files[1], {name: TensorSpec(value.dtype, tuple(value.shape)) for name, value in state.items()}) as saved:
            for name, value in state.items():
                for start, piece in streams.calibration.store.pieces(value):
                    saved.write(name, piece, skip=start)
    output.record("layer", files, index=report.layer, report=asdict(report))
    if report.layer:
        output.remove(_stream_file(report.layer - 1))


def put_rest(output: Output, sink: Sink, structure: Structure) -> None:
    """Write embeddings, final norm, head, and stored tensors that the model class does not use, unless the journal has them."""
    if any(entry["kind"] == "rest" for entry in output.entries):
        return
    name = shard_name(output, structure, len(structure.layers))
    with output.shard(name, rest_specs(sink, structure)) as shard:
        sink.put_plain(shard, rest_names(sink, structure))
        for stored in sink.weights.unused:
            put_stored(shard, sink.weights.entries[stored])
    output.record("rest", [name])


def shard_name(output: Output, structure: Structure, number: int) -> str:
    """File of a layer; of the rest, with the number behind the last layer's."""
    return output.shard_name(number, len(structure.layers) + 1)


def _stream_file(index: int) -> str:
    return f"stream-{index:05d}.safetensors"
