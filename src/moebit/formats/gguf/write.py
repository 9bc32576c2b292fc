"""A GGUF file, or shards of one, written tensor by tensor with llama.cpp's own writer."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moebit.errors import BadInputError
from moebit.formats.gguf.converter import GgufData, Prepared

FILE_TYPE = "general.file_type"
FLOATS = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
# What llama.cpp's loader takes a file for whose tensors are mostly of a type (llama_model_loader in llama-model-loader.cpp).
FILE_TYPES = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q2_K": "MOSTLY_Q2_K",
    "Q3_K": "MOSTLY_Q3_K_M",
    "Q4_K": "MOSTLY_Q4_K_M",
    "Q5_K": "MOSTLY_Q5_K_M",
    "MXFP4": "MOSTLY_MXFP4_MOE",
}


def write_gguf(
    gguf: Any,
    path: Path,
    prepared: Prepared,
    tensors: Mapping[str, GgufData],
    file_type: str = "",
    shard_bytes: int = 0,
    announce: Callable[[list[Path]], None] | None = None,
) -> list[Path]:
    """Write what a converter prepared, with some tensors replaced.

    One tensor is in memory at a time. The same arguments give the same bytes.

    Args:
        gguf: the converter's `gguf` library.
        path: the file to write; with several shards, NAME-00001-of-0000N.gguf in its place.
        prepared: metadata, tokenizer and every tensor, as the converter makes them.
        tensors: GGUF name → what is written there instead, rows packed by ggml's blocks.
        file_type: llama.cpp's name of the mixture of types, such as MOSTLY_Q4_K_M; without one it follows from the types of the weights, as
            llama.cpp guesses it.
        shard_bytes: the largest size of a shard's tensors (a tensor that is larger has a shard of its own); 0 writes one file.
        announce: called with the files before the first of them is begun.

    Returns:
        The files, in their order.

    Raises:
        BadInputError: a name or a shape that the converter does not have, a type that rows of this length cannot hold, or data that does
            not have the size that its type and shape say.
    """
    _check_names(prepared, tensors)
    content = {name: tensors.get(name, made) for name, made in prepared.tensors.items()}
    writer = gguf.GGUFWriter(path=None, arch=prepared.architecture, split_max_size=shard_bytes)
    writer.kv_data = [dict(prepared.metadata)]
    file_type = file_type or guessed_file_type(content)
    writer.kv_data[0].pop(FILE_TYPE, None)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    for name, data in content.items():
        writer.add_tensor_info(name, data.shape, np.dtype(np.float32), packed_bytes(gguf, name, data), _type(gguf, name, data.type))
    files: list[Path] = writer.format_shard_names(path)
    if announce is not None:
        announce(files)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, data in content.items():
            sys.audit("moebit.tensor", str(path), name)
            writer.write_tensor_data(_loaded(gguf, name, data))
    finally:
        writer.close()
    return files


def guessed_file_type(content: Mapping[str, GgufData]) -> str:
    """llama.cpp's name for a file of these tensors: that of the type that most of its matrices have."""
    counted = Counter(data.type for data in content.values() if len(data.shape) > 1)
    common = max(counted, key=lambda name: (counted[name], name)) if counted else "F32"
    return FILE_TYPES.get(common, f"MOSTLY_{common}")


def packed_bytes(gguf: Any, name: str, data: GgufData) -> int:
    """The size of a tensor in a GGUF file.

    Raises:
        BadInputError: a type that llama.cpp does not have, or rows that its blocks do not divide.
    """
    block, size = gguf.GGML_QUANT_SIZES[_type(gguf, name, data.type)]
    if data.shape and data.shape[-1] % block:
        raise BadInputError(
            f"{name}: rows of {data.shape[-1]} weights cannot be {data.type}, whose blocks have {block}; choose another type for it"
        )
    return math.prod(data.shape) // block * size


def _type(gguf: Any, name: str, kind: str) -> Any:
    try:
        return gguf.GGMLQuantizationType[kind]
    except KeyError:
        raise BadInputError(f"{name}: this llama.cpp has no type {kind}") from None


def _check_names(prepared: Prepared, tensors: Mapping[str, GgufData]) -> None:
    for name, data in tensors.items():
        if name not in prepared.tensors:
            raise BadInputError(f"{name}: llama.cpp's converter writes no tensor of this name")
        if data.shape != prepared.tensors[name].shape:
            raise BadInputError(f"{name}: shape {data.shape}, and llama.cpp's converter writes {prepared.tensors[name].shape}")


def _loaded(gguf: Any, name: str, data: GgufData) -> np.ndarray:
    array = np.ascontiguousarray(data.load())
    if data.type in FLOATS and array.dtype != FLOATS[data.type]:
        array = array.astype(FLOATS[data.type])
    if array.nbytes != packed_bytes(gguf, name, data):
        raise BadInputError(f"{name}: {array.nbytes} bytes for {data.type} {data.shape}, which has {packed_bytes(gguf, name, data)}")
    return array
