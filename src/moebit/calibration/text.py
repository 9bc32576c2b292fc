"""Texts and token windows.

A text is a plain UTF-8 file, or a `.jsonl` with one document a line: `{"input_ids": [...]}`, `{"messages": [...]}` (through the
tokenizer's chat template) or `{"text": ...}`, in this order of preference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moebit.calibration.named_texts import Texts as Texts
from moebit.calibration.named_texts import parse_texts as parse_texts
from moebit.calibration.timing import TEMPLATE_SECONDS, time_limit
from moebit.errors import BadInputError
from moebit.recipe.reading import TEXT_BYTES, parse_json, read_text
from moebit.storage import documents
from moebit.storage.documents import one_line, understood


@dataclass(frozen=True)
class TokenText:
    """A tokenized text.

    Attributes:
        ids: int64 [T].
        byte_starts: int64 [T + 1], the UTF-8 byte of the text at which each token begins, and their number; None without a tokenizer.
    """

    name: str
    ids: Tensor
    byte_starts: Tensor | None

    def bytes_between(self, start: int, stop: int) -> int:
        """UTF-8 bytes that tokens [start, stop) stand for; 0 where that is not known."""
        return int(self.byte_starts[stop] - self.byte_starts[start]) if self.byte_starts is not None else 0


@dataclass(frozen=True)
class _Piece:
    """A document's ids, and the bytes up to each of them (one more than ids); None where that is not known."""

    ids: list[int]
    starts: list[int] | None


def load_tokenizer(path: Path) -> Any | None:
    """The checkpoint's tokenizer, or None where it has none."""
    return documents.load_tokenizer(path)


def tokenize(name: str, file: Path, tokenizer: Any | None, vocabulary: int) -> TokenText:
    """Read and tokenize one text.

    Raises:
        BadInputError: not UTF-8, a malformed jsonl line, no tokenizer for plain text, an id outside of the vocabulary.
    """
    raw = read_text(file, limit=TEXT_BYTES)
    with understood(f"{file}: what the tokenizer makes of it", "copy the tokenizer's files again"):
        if file.suffix == ".jsonl":
            pieces = [
                _document(file, number, line, tokenizer, vocabulary) for number, line in enumerate(raw.split("\n"), 1) if line.strip()
            ]
        else:
            pieces = [_encode(file, raw, tokenizer)]
    ids = torch.tensor([i for piece in pieces for i in piece.ids], dtype=torch.int64)
    _check_ids(file, [int(ids.min()), int(ids.max())] if len(ids) else [], vocabulary)
    return TokenText(name, ids, _join_starts(pieces))


def _check_ids(file: Path, ids: Sequence[int], vocabulary: int) -> None:
    outside = next((i for i in ids if not 0 <= i < vocabulary), None)
    if outside is not None:
        remedy = "leave label padding out" if outside < 0 else "is this the model's own tokenizer?"
        raise BadInputError(f"{file}: token id {outside} is outside of the model's vocabulary of {vocabulary}; {remedy}")


def _join_starts(pieces: list[_Piece]) -> Tensor | None:
    starts, base = [], 0
    for piece in pieces:
        if piece.starts is None:
            return None
        starts += [base + start for start in piece.starts[:-1]]
        base += piece.starts[-1]
    return torch.tensor([*starts, base], dtype=torch.int64)


def _document(file: Path, number: int, line: str, tokenizer: Any | None, vocabulary: int) -> _Piece:
    try:
        item = parse_json(line)
    except ValueError as error:
        raise BadInputError(f"{file}, line {number}: not valid JSON ({error})") from error
    if not isinstance(item, dict) or not {"input_ids", "messages", "text"}.intersection(item):
        raise BadInputError(f'{file}, line {number}: expected {{"text": ...}}, {{"input_ids": [...]}} or {{"messages": [...]}}')
    if "input_ids" in item:
        ids = item["input_ids"]
        if not isinstance(ids, list) or not all(type(i) is int and abs(i) < 2**31 for i in ids):
            raise BadInputError(f"{file}, line {number}: input_ids must be a list of token ids (integers)")
        _check_ids(file, ids, vocabulary)
        return _Piece(ids, _starts_by_decoding(ids, tokenizer))
    if "messages" in item:
        if not isinstance(item["messages"], list):
            raise BadInputError(f"{file}, line {number}: messages must be a list of {{role, content}}")
        if tokenizer is None or not getattr(tokenizer, "chat_template", None):
            raise BadInputError(
                f"{file}, line {number}: messages need a chat template, which this model's tokenizer lacks; give text instead"
            )
        try:
            with time_limit(TEMPLATE_SECONDS):
                text = tokenizer.apply_chat_template(item["messages"], tokenize=False)
        except Exception as error:  # whatever a template, which is a program, raises about these messages
            raise BadInputError(f"{file}, line {number}: the chat template refuses these messages ({one_line(error)})") from error
        if not isinstance(text, str):
            raise BadInputError(f"{file}, line {number}: the chat template gives no text for these messages")
        return _encode(file, text, tokenizer)
    if not isinstance(item["text"], str):
        raise BadInputError(f"{file}, line {number}: text must be a string, got {type(item['text']).__name__}")
    piece = _encode(file, item["text"], tokenizer)
    end = getattr(tokenizer, "eos_token_id", None)
    return piece if end is None or piece.starts is None else _Piece([*piece.ids, end], [*piece.starts, piece.starts[-1]])


def _encode(file: Path, text: str, tokenizer: Any | None) -> _Piece:
    if tokenizer is None:
        raise BadInputError(f"{file}: the model has no tokenizer files, so that plain text cannot be read; give a .jsonl with input_ids")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInputError(f"{file}: text that is no valid Unicode ({error}); a surrogate stands alone") from error
    if not getattr(tokenizer, "is_fast", False):
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return _Piece(ids, _starts_by_decoding(ids, tokenizer))
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    at_char = np.concatenate([[0], np.cumsum(1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000))])
    # A token begins where its first character does; the bytes of a character that tokens share count for the first of them.
    starts = at_char[np.array([begin for begin, _ in encoded["offset_mapping"]], dtype=np.int64)].tolist()
    return _Piece(list(encoded["input_ids"]), [*starts, int(at_char[-1])])


def _starts_by_decoding(ids: list[int], tokenizer: Any | None) -> list[int] | None:
    """Byte positions from the length of each token by itself: exact but for characters that several tokens share."""
    if tokenizer is None:
        return None
    starts = [0]
    for i in ids:
        starts.append(starts[-1] + len(tokenizer.decode([i], skip_special_tokens=True, clean_up_tokenization_spaces=False).encode()))
    return starts


def consecutive_windows(text: TokenText, length: int, max_tokens: int | None = None) -> Tensor:
    """int64 [N, length]: windows one after the other without overlap; what is left at the end is dropped.

    Raises:
        BadInputError: less than one window.
    """
    ids = text.ids if max_tokens is None else text.ids[:max_tokens]
    count = len(ids) // length
    if count == 0:
        raise BadInputError(
            f"text {text.name!r}: {len(ids)} tokens are less than one window of {length}; give more text or a smaller window"
        )
    return ids[: count * length].view(count, length)


def calibration_windows(texts: Sequence[TokenText], samples: int, length: int, seed: int) -> Tensor:
    """int64 [samples, length]: non-overlapping windows, equally many of every text, chosen at random by `seed`.

    Raises:
        BadInputError: texts too short for that, saying which and by how much.
    """
    if samples < len(texts):
        raise BadInputError(f"{len(texts)} texts but calibration.samples={samples}: some would not be used; set it to {len(texts)} or more")
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for number, text in enumerate(texts):
        share = samples // len(texts) + (number < samples % len(texts))
        available = len(text.ids) // length
        if available < share:
            raise BadInputError(
                f"text {text.name!r} is too short to calibrate on: {len(text.ids)} tokens give {available} windows of {length}, "
                f"{share} are needed; "
                f"give more text, or set calibration.samples={max(1, available * len(texts))} or a smaller calibration.seq_len"
            )
        windows = text.ids[: available * length].view(available, length)
        chosen.append(windows[torch.randperm(available, generator=generator)[:share].sort().values])
    return torch.cat(chosen)


def digest(windows: Tensor) -> str:
    """sha256 of token windows."""
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
