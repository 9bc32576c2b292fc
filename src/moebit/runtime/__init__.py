"""Running native outputs in transformers: importing this registers the `moebit` quantizer and experts implementation."""

from moebit.runtime.packed import EXPERTS_IMPLEMENTATION, PackedLinear, PackedMatrices, multiplied, use
from moebit.runtime.paths import PATHS, Path
from moebit.runtime.quantizer import MoebitConfig, MoebitQuantizer

__all__ = [
    "EXPERTS_IMPLEMENTATION",
    "PATHS",
    "MoebitConfig",
    "MoebitQuantizer",
    "PackedLinear",
    "PackedMatrices",
    "Path",
    "multiplied",
    "use",
]
