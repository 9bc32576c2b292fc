"""llama.cpp itself: the logits of a GGUF file in the engine that will run it, and its tokens beside the checkpoint's.

llama.cpp runs in a process of its own (llama_worker.py), which it may end.
"""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from moebit.errors import BadInputError

WORKER = Path(__file__).with_name("llama_worker.py")


def llama_library() -> Path:
    """llama.cpp's library in xllamacpp's wheel.

    Raises:
        BadInputError: the extra `gguf` is not installed.
    """
    found = importlib.util.find_spec("xllamacpp")
    places = list(found.submodule_search_locations or []) if found else []
    files = [file for place in places for ending in ("*.so", "*.pyd", "*.dylib") for file in sorted(Path(place).glob(ending))]
    if not files:
        raise BadInputError("running a GGUF file needs llama.cpp's library: pip install 'moebit[gguf]'")
    return files[0]


@dataclass(frozen=True)
class LlamaModel:
    """A GGUF file that llama.cpp has loaded, for windows of up to `window` tokens.

    Attributes:
        vocabulary: V, the number of tokens of the file.
    """

    file: Path
    window: int
    vocabulary: int
    _process: subprocess.Popen[bytes]
    _errors: IO[bytes]

    def logits(self, ids: Sequence[int] | Tensor) -> Tensor:
        """float32 [T, V]: the logits behind every token of a window.

        Raises:
            BadInputError: a window that is too long, an id that the file does not have, or a forward that llama.cpp gives up.
        """
        tokens = np.asarray(ids, dtype=np.int32).reshape(-1)
        found = _ask(self.file, self._process, self._errors, b"L", tokens.tobytes())
        return torch.frombuffer(found, dtype=torch.float32).view(len(tokens), self.vocabulary)

    def tokenize(self, text: str) -> list[int]:
        """The text's tokens by llama.cpp's own tokenizer, nothing added at its ends, special tokens not recognised.

        Raises:
            BadInputError: a file without a tokenizer, or with one that fails.
        """
        found = _ask(self.file, self._process, self._errors, b"T", text.encode())
        return [int(token) for token in np.frombuffer(found, dtype=np.int32)]


@contextmanager
def open_llama(file: Path, window: int, threads: int = 1, library: Path | None = None) -> Iterator[LlamaModel]:
    """A GGUF file in llama.cpp; of shards, the first one's path.

    Args:
        window: tokens that a window has at most.
        threads: that llama.cpp computes with.
        library: llama.cpp's, if not the one that the extra installs.

    Raises:
        BadInputError: a file that llama.cpp cannot load, an architecture that it does not know or gives up, or a library of a version whose
            structures moebit does not know.
    """
    command = [sys.executable, str(WORKER), str(library or llama_library()), str(file), str(window), str(threads)]
    with tempfile.TemporaryFile() as errors:
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}  # it would call a debugger
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment)
        try:
            said = json.loads(bytes(_answer(file, process, errors)))
            yield LlamaModel(file, window, int(said["vocabulary"]), process, errors)
        finally:
            process.kill()
            process.communicate()


def _ask(file: Path, process: subprocess.Popen[bytes], errors: IO[bytes], kind: bytes, content: bytes) -> bytearray:
    assert process.stdin is not None
    try:
        process.stdin.write(struct.pack("<cI", kind, len(content)) + content)
        process.stdin.flush()
    except BrokenPipeError:
        raise _ended(file, process, errors) from None
    return _answer(file, process, errors)


def _answer(file: Path, process: subprocess.Popen[bytes], errors: IO[bytes]) -> bytearray:
    assert process.stdout is not None
    head = process.stdout.read(9)
    if len(head) < 9:
        raise _ended(file, process, errors)
    sign, size = struct.unpack("<cQ", head)
    content = bytearray(size)
    view, done = memoryview(content), 0
    while done < size:
        count = process.stdout.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise _ended(file, process, errors)
        done += count
    if sign == b"-":
        raise BadInputError(f"{file}: {content.decode()}")
    return content


def _ended(file: Path, process: subprocess.Popen[bytes], errors: IO[bytes]) -> BadInputError:
    code = process.wait()
    errors.seek(0)
    lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    told = next((line for line in reversed(lines) if "ASSERT" in line or "rror" in line), lines[-1] if lines else "without a word")
    return BadInputError(f"{file}: llama.cpp gave up on this file and ended its process ({code}): {told[-300:]}")


@dataclass(frozen=True)
class TokenDifference:
    """Where two tokenizations of a text part.

    Attributes:
        texts: how many texts differ, of how many.
        where: number of the first such text.
        position: number of the first token that differs there.
        ours, theirs: the tokens from there on, a few of them, of the checkpoint's tokenizer and of llama.cpp's.
    """

    texts: tuple[int, int]
    where: int
    position: int
    ours: list[int]
    theirs: list[int]

    def __str__(self) -> str:
        return (
            f"llama.cpp splits {self.texts[0]} of {self.texts[1]} texts into other tokens than the checkpoint's tokenizer; first in text "
            f"{self.where} at token {self.position}: {self.ours} by the tokenizer, {self.theirs} by llama.cpp"
        )


def token_difference(model: LlamaModel, tokenizer: Any, texts: Sequence[str]) -> TokenDifference | None:
    """What differs between the checkpoint's tokenizer and the one in the GGUF file, on some texts; None where they agree."""
    pairs = [(list(tokenizer.encode(text, add_special_tokens=False)), model.tokenize(text)) for text in texts]
    different = [i for i, (ours, theirs) in enumerate(pairs) if ours != theirs]
    if not different:
        return None
    ours, theirs = pairs[different[0]]
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return TokenDifference((len(different), len(pairs)), different[0], at, ours[at : at + 5], theirs[at : at + 5])
