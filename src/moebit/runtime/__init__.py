"""Running native outputs in transformers: importing this registers the `moebit` quantizer and experts implementation."""

from moebit.runtime.packed import EXPERTS_IMPLEMENTATION, PackedLinear, PackedMatrices
from moebit.runtime.quantizer import MoebitConfig, MoebitQuantizer

__all__ = ["EXPERTS_IMPLEMENTATION", "MoebitConfig", "MoebitQuantizer", "PackedLinear", "PackedMatrices"]
