"""How large a GGUF file will be, before it is written."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moebit.formats.gguf.converter import Prepared
from moebit.formats.gguf.write import packed_bytes


class GgufSize:
    """The size of a file of what a converter prepared, for any choice of types.

    Metadata and the list of tensors are written once, to a file that is thrown away, with llama.cpp's own writer: their length does not
    depend on types.
    """

    def __init__(self, gguf: Any, prepared: Prepared) -> None:
        self._gguf, self._tensors = gguf, prepared.tensors
        self._alignment = int(gguf.GGUF_DEFAULT_ALIGNMENT)
        self._head = self._padded(_head_bytes(gguf, prepared))

    def of(self, types: Mapping[str, str]) -> int:
        """Bytes of the whole file, where the tensors in `types` (GGUF name -> block type) are packed."""
        kinds = {name: types.get(name, "").upper() or data.type for name, data in self._tensors.items()}
        return self._head + sum(self.tensor(name, kind) for name, kind in kinds.items())

    def tensor(self, name: str, kind: str) -> int:
        """Bytes that one tensor of a type takes in the file, with what fills it up to where the next one may begin."""
        data = replace(self._tensors[name], type=kind.upper())
        return self._padded(packed_bytes(self._gguf, name, data))

    def _padded(self, count: int) -> int:
        return -(-count // self._alignment) * self._alignment


def _head_bytes(gguf: Any, prepared: Prepared) -> int:
    """Bytes in front of the first tensor."""
    writer = gguf.GGUFWriter(path=None, arch=prepared.architecture)
    writer.kv_data = [dict(prepared.metadata)]
    writer.kv_data[0].pop("general.file_type", None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, data in prepared.tensors.items():
        kind = gguf.GGMLQuantizationType[data.type]
        writer.add_tensor_info(name, data.shape, np.dtype(np.float32), packed_bytes(gguf, name, data), kind)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "head.gguf"
        try:
            writer.write_header_to_file(file)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        return file.stat().st_size
