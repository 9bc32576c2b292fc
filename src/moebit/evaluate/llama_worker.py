"""llama.cpp in a process of its own, through the C interface that xllamacpp's library exports. Run by moebit.evaluate.llama, not imported.

llama.cpp ends the process where something does not fit (`GGML_ASSERT`), so it gets one that may end. This file is run as a script and
imports nothing of moebit, because importing the package takes seconds that loading a file does not.

Structures are never filled by hand. llama.cpp returns its default parameters by value, as many bytes as its version has; the few fields
that are set here stand at the front, where llama.h has had them since August 2026 (`llama_context_params`, builds b10566 to b11549).
`check_layout` compares the defaults with what llama.h says they are before anything is written, so that a library with another layout is
refused instead of misread. The structures get spare room at the end: a callee reads only as much as it knows, because structures of this
size are passed in memory on every platform.

Messages, little-endian: a request is one letter (L: logits, T: tokens), a uint32 and that many bytes (int32 ids, text); an answer is + or
-, a uint64 and that many bytes (float32 logits, int32 ids, or what went wrong). The first answer says that the file is loaded.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint8, c_uint32, c_void_p
from typing import Any, BinaryIO, ClassVar

import numpy as np

GGML_TYPE_F32, GGML_TYPE_F16 = 0, 1
FLASH_ATTENTION_OFF = 0
LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class _ModelParams(ctypes.Structure):
    _fields_: ClassVar = [("opaque", c_uint8 * 512)]


class _ContextParams(ctypes.Structure):
    _fields_: ClassVar = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("opaque", c_uint8 * 400),
    ]


DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_rs_seq": 0,
    "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1,
    "ctx_type": 0,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "rope_freq_base": 0.0,
    "rope_freq_scale": 0.0,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0,
    "yarn_beta_fast": -1.0,
    "yarn_beta_slow": -1.0,
    "yarn_orig_ctx": 0,
    "defrag_thold": -1.0,
    "cb_eval": None,
    "cb_eval_user_data": None,
    "type_k": GGML_TYPE_F16,
    "type_v": GGML_TYPE_F16,
}


class _Batch(ctypes.Structure):
    _fields_: ClassVar = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LOG, c_void_p]),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, _ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_n_ubatch": (c_uint32, [c_void_p]),
    "llama_n_threads": (c_int32, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_model_size": (ctypes.c_uint64, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_batch_init": (_Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_token_to_piece": (c_int32, [c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool]),
}


class RefusedError(Exception):
    """What cannot be done, as a sentence for the user."""


class Llama:
    """A file loaded by llama.cpp, with a context for windows of up to `window` tokens.

    Keys and values are kept in float32 and attention is computed without flash attention, so that what differs from another engine is the
    file and not the cache.
    """

    def __init__(self, library: str, file: str, window: int, threads: int) -> None:
        self.functions = load(library)
        self.said: list[str] = []
        # 3 and 4 are warnings and errors, 5 continues a line.
        self._log = LOG(lambda level, text, _: self.said.append(text.decode(errors="replace")) if level in (3, 4, 5) else None)
        self.functions.llama_log_set(self._log, None)
        self.functions.llama_backend_init()
        self.model = self.functions.llama_model_load_from_file(file.encode(), self.functions.llama_model_default_params())
        if not self.model:
            raise RefusedError(f"llama.cpp cannot load this file: {self.complaint}")
        self.vocab = self.functions.llama_model_get_vocab(self.model)
        self.vocabulary: int = self.functions.llama_vocab_n_tokens(self.vocab)
        self.window = window
        self.context = self.functions.llama_init_from_model(self.model, self._params(window, threads))
        if not self.context:
            raise RefusedError(f"llama.cpp has no context of {window} tokens for this file: {self.complaint}")

    def _params(self, window: int, threads: int) -> _ContextParams:
        params: _ContextParams = self.functions.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = window
        params.n_outputs_max = params.n_outputs_max_per_seq = window
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = FLASH_ATTENTION_OFF
        params.type_k = params.type_v = GGML_TYPE_F32
        return params

    @property
    def complaint(self) -> str:
        """The last of what llama.cpp complained about, in one line."""
        return "; ".join(line for line in "".join(self.said).splitlines() if line)[-600:] or "it does not say why"

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [T, V]: the logits behind every one of the tokens."""
        if not 0 < len(tokens) <= self.window:
            raise RefusedError(f"a window of {len(tokens)} tokens; this context holds 1 to {self.window}")
        if tokens.min() < 0 or tokens.max() >= self.vocabulary:
            raise RefusedError(f"token {tokens.max()} is not one of the file's {self.vocabulary}; is the text another model's?")
        self.functions.llama_memory_clear(self.functions.llama_get_memory(self.context), True)
        self.said.clear()
        batch = self.functions.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
                batch.seq_id[i][0] = 0
            status = self.functions.llama_decode(self.context, batch)
        finally:
            self.functions.llama_batch_free(batch)
        if status != 0:
            raise RefusedError(f"llama_decode ended with {status}: {self.complaint}")
        return np.ctypeslib.as_array(self.functions.llama_get_logits(self.context), shape=(len(tokens), self.vocabulary))

    def tokenize(self, text: bytes) -> np.ndarray:
        """int32: the text's tokens by llama.cpp's tokenizer, nothing added at its ends, special tokens not recognised."""
        room = len(text) + 16
        ids = (c_int32 * room)()
        count = self.functions.llama_tokenize(self.vocab, text, len(text), ids, room, False, False)
        if count < 0:
            raise RefusedError(f"llama.cpp's tokenizer failed on a text of {len(text)} bytes ({count})")
        return np.array(ids[:count], dtype=np.int32)


def load(path: str) -> Any:
    """llama.cpp's functions with their signatures."""
    library = ctypes.CDLL(path)
    missing = [name for name in FUNCTIONS if not hasattr(library, name)]
    if missing:
        raise RefusedError(f"{path} does not export {missing[0]}; pip install 'moebit[gguf]' has a library that does")
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    check_layout(library.llama_context_default_params(), path)
    return library


def check_layout(params: _ContextParams, path: str) -> None:
    """Compare the default parameters with what llama.h says they are."""
    other = [name for name, value in DEFAULTS.items() if getattr(params, name) != value]
    if other:
        raise RefusedError(
            f"llama_context_params of {path} has another layout than moebit knows (field {other[0]}); "
            "use a version of xllamacpp that moebit's extra gguf allows"
        )


def answer(out: BinaryIO, sign: bytes, content: bytes) -> None:
    """Send one answer."""
    out.write(sign + struct.pack("<Q", len(content)))
    out.write(content)
    out.flush()


def serve(llama: Llama, requests: BinaryIO, out: BinaryIO) -> None:
    """Answer until the requests end."""
    while head := requests.read(5):
        kind, size = struct.unpack("<cI", head)
        content = requests.read(size)
        try:
            found = llama.logits(np.frombuffer(content, dtype=np.int32)) if kind == b"L" else llama.tokenize(content)
            answer(out, b"+", found.tobytes())
        except RefusedError as error:
            answer(out, b"-", str(error).encode())


def main() -> None:
    """LIBRARY FILE WINDOW THREADS."""
    library, file, window, threads = sys.argv[1:]
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    try:
        llama = Llama(library, file, int(window), int(threads))
    except RefusedError as error:
        answer(out, b"-", str(error).encode())
        return
    answer(out, b"+", json.dumps({"vocabulary": llama.vocabulary}).encode())
    serve(llama, sys.stdin.buffer, out)


if __name__ == "__main__":
    main()
