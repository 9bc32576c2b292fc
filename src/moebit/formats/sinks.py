"""Every format that can be written, by the name that recipes have for it."""

from __future__ import annotations

from moebit.formats.awq import AwqSink
from moebit.formats.compressed_sink import CompressedTensorsSink
from moebit.formats.gguf.sink import GgufSink
from moebit.formats.gptq import GptqSink
from moebit.formats.mlx import MlxSink
from moebit.formats.sink import DenseSink, NativeSink, Sink

SINKS: dict[str, type[Sink]] = {
    "native": NativeSink,
    "compressed-tensors": CompressedTensorsSink,
    "gptq": GptqSink,
    "awq": AwqSink,
    "mlx": MlxSink,
    "gguf": GgufSink,
    "dense": DenseSink,
}
