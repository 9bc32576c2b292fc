"""What auto-round writes under its own name: the layouts of GPTQ and AWQ, told apart by `packing_format`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moebit.storage.files import TensorEntry
from moebit.storage.shipped import awq, gptq
from moebit.storage.shipped.entries import Shipped, UnreadableError

METHOD = "auto-round"


def read(stored: Mapping[str, TensorEntry], quantization: Mapping[str, Any]) -> Shipped:
    """Zero points lie less one in `auto_round:auto_gptq` and as they are in its other packings of whole numbers."""
    packing = str(quantization.get("packing_format") or "auto_round:auto_gptq")
    if quantization.get("data_type", "int") != "int":
        raise UnreadableError(f"moebit reads auto-round's whole numbers, this holds {quantization['data_type']}")
    if "awq" in packing:
        return awq.read_gemm(stored, quantization, METHOD)
    if packing.partition(":")[0] not in ("auto_round", "auto_gptq"):
        raise UnreadableError(f"moebit reads auto-round's packings in the layouts of GPTQ and AWQ, this is {packing!r}")
    version = 1 if "gptq" in packing and "gptqmodel" not in packing else 2
    return gptq.read_version(stored, quantization, version, METHOD)
