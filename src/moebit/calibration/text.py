"""Texts and token windows.

A text is a file or a folder: prose, one document; or rows (calibration/rows.py) that each say token ids, text or a conversation
(calibration/conversations.py), which the model's own chat template puts into words.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moebit.calibration.conversations import FIELDS, Said, read_row
from moebit.calibration.named_texts import Texts as Texts
from moebit.calibration.named_texts import parse_texts as parse_texts
from moebit.calibration.rows import Chosen, files_of, read_documents
from moebit.calibration.timing import TEMPLATE_SECONDS, time_limit
from moebit.errors import BadInputError
from moebit.storage import documents
from moebit.storage.documents import one_line, understood


@dataclass(frozen=True)
class TokenText:
    """A tokenized text.

    Attributes:
        ids: int64 [T].
        byte_starts: int64 [T + 1], the UTF-8 byte of the text at which each token begins, and their number; None without a tokenizer.
        document_starts: at which token each document begins; one that begins at 0 if nothing else is said.
        read_as: which fields its documents were read from, or "prose"; and how many documents there are.
    """

    name: str
    ids: Tensor
    byte_starts: Tensor | None
    document_starts: tuple[int, ...] = (0,)
    read_as: str = "prose"

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


def tokenize(name: str, source: Path | Chosen, tokenizer: Any | None, vocabulary: int, *, begin: bool = False) -> TokenText:
    """Read and tokenize one text.

    Args:
        source: a file or folder, or one of which a column is meant. begin: put in front of every document of text what the tokenizer
            puts there by itself (a BOS token); chat templates do that themselves.

    Raises:
        BadInputError: not UTF-8, a malformed row, fields that say nothing, no tokenizer for text, an id outside of the vocabulary.
    """
    path, column = (source, None) if isinstance(source, Path) else (source.path, source.column)
    reader = _Reader(tokenizer, vocabulary, _beginning(tokenizer) if begin else [])
    pieces, kinds = [], Counter[str]()
    for file in files_of(path):
        found = read_documents(file, FIELDS | ({column} if column else set()))
        with understood(f"{file}: what the tokenizer makes of it", "copy the tokenizer's files again"):
            if isinstance(found, str):
                if column:
                    raise BadInputError(f"{file}: is prose and has no field {column!r}; leave it out")
                pieces.append(reader.begun(_encode(str(file), found, tokenizer)))
                kinds["prose"] += 1
            else:
                for row in found:
                    said = read_row(row, column)
                    pieces.append(reader.piece(row.where, said))
                    kinds[" and ".join(said.fields)] += 1
    ids = torch.tensor([i for piece in pieces for i in piece.ids], dtype=torch.int64)
    _check_ids(path, [int(ids.min()), int(ids.max())] if len(ids) else [], vocabulary)
    starts = tuple(accumulate((len(piece.ids) for piece in pieces[:-1]), initial=0))
    read_as = ", ".join(f"{kind} ({count:,} documents)" if kind != "prose" or count > 1 else kind for kind, count in kinds.items())
    return TokenText(name, ids, _join_starts(pieces), starts, read_as)


def _beginning(tokenizer: Any | None) -> list[int]:
    """What the tokenizer puts in front of a text by itself, most often one BOS token or nothing."""
    if tokenizer is None:
        return []
    letter, plain = (list(tokenizer("a", add_special_tokens=added, verbose=False)["input_ids"]) for added in (True, False))
    place = next((at for at in range(len(letter)) if letter[at : at + len(plain)] == plain), 0)
    return letter[:place]


@dataclass(frozen=True)
class _Reader:
    """Documents to tokens. `beginning`: what stands in front of every document of text."""

    tokenizer: Any | None
    vocabulary: int
    beginning: list[int]

    def begun(self, piece: _Piece) -> _Piece:
        if not self.beginning:
            return piece
        return _Piece([*self.beginning, *piece.ids], None if piece.starts is None else [*[0] * len(self.beginning), *piece.starts])

    def piece(self, where: str, said: Said) -> _Piece:
        """The tokens of one row."""
        if said.ids is not None:
            _check_ids(where, said.ids, self.vocabulary)
            return _Piece(said.ids, _starts_by_decoding(said.ids, self.tokenizer))
        if said.messages is not None and (said.plain is None or getattr(self.tokenizer, "chat_template", None)):
            return _encode(where, self._in_words(where, said), self.tokenizer)
        piece = self.begun(_encode(where, said.text if said.text is not None else str(said.plain), self.tokenizer))
        end = getattr(self.tokenizer, "eos_token_id", None)
        return piece if end is None or piece.starts is None else _Piece([*piece.ids, end], [*piece.starts, piece.starts[-1]])

    def _in_words(self, where: str, said: Said) -> str:
        """A conversation in the words of the model's chat template."""
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise BadInputError(f"{where}: conversations need a chat template, which this model's tokenizer lacks; give text instead")
        try:
            with time_limit(TEMPLATE_SECONDS):
                text = self.tokenizer.apply_chat_template(said.messages, tools=said.tools, tokenize=False)
        except Exception as error:  # whatever a template, which is a program, raises about these messages
            raise BadInputError(f"{where}: the chat template refuses these messages ({one_line(error)})") from error
        if not isinstance(text, str):
            raise BadInputError(f"{where}: the chat template gives no text for these messages")
        return text


def _check_ids(where: Path | str, ids: Sequence[int], vocabulary: int) -> None:
    outside = next((i for i in ids if not 0 <= i < vocabulary), None)
    if outside is not None:
        remedy = "leave label padding out" if outside < 0 else "is this the model's own tokenizer?"
        raise BadInputError(f"{where}: token id {outside} is outside of the model's vocabulary of {vocabulary}; {remedy}")


def _join_starts(pieces: list[_Piece]) -> Tensor | None:
    starts, base = [], 0
    for piece in pieces:
        if piece.starts is None:
            return None
        starts += [base + start for start in piece.starts[:-1]]
        base += piece.starts[-1]
    return torch.tensor([*starts, base], dtype=torch.int64)


def _encode(where: str, text: str, tokenizer: Any | None) -> _Piece:
    if tokenizer is None:
        raise BadInputError(f"{where}: the model has no tokenizer files, so that plain text cannot be read; give a .jsonl with input_ids")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInputError(f"{where}: text that is no valid Unicode ({error}); a surrogate stands alone") from error
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


def calibration_windows(texts: Sequence[TokenText], samples: int, length: int, seed: int, *, pack: bool = True) -> Tensor:
    """int64 [samples, length]: non-overlapping windows, equally many of every text, chosen at random by `seed`.

    Args:
        pack: windows are cut from all documents of a text one after the other; else a window is the beginning of one document that is at
            least so long. Nothing is padded either way.

    Raises:
        BadInputError: texts too short for that, saying which and by how much.
    """
    if samples < len(texts):
        raise BadInputError(f"{len(texts)} texts but calibration.samples={samples}: some would not be used; set it to {len(texts)} or more")
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for number, text in enumerate(texts):
        share = samples // len(texts) + (number < samples % len(texts))
        windows = packed_windows(text, length) if pack else whole_documents(text, length)
        available = len(windows)
        if available < share:
            what = f"{len(text.ids)} tokens give {available} windows of {length}"
            if not pack:
                what = f"{available} of its {len(text.document_starts)} documents have {length} tokens or more (calibration.pack: false)"
            raise BadInputError(
                f"text {text.name!r} is too short to calibrate on: {what}, {share} are needed; "
                f"give more text, or set calibration.samples={max(1, available * len(texts))} or a smaller calibration.seq_len"
            )
        chosen.append(windows[torch.randperm(available, generator=generator)[:share].sort().values])
    return torch.cat(chosen)


def packed_windows(text: TokenText, length: int) -> Tensor:
    """int64 [N, length]: all windows of a text, one after the other."""
    available = len(text.ids) // length
    return text.ids[: available * length].view(available, length)


def whole_documents(text: TokenText, length: int) -> Tensor:
    """int64 [N, length]: the beginning of every document that is long enough."""
    ends = (*text.document_starts[1:], len(text.ids))
    starts = [start for start, end in zip(text.document_starts, ends, strict=True) if end - start >= length]
    return torch.stack([text.ids[start : start + length] for start in starts]) if starts else text.ids.new_empty(0, length)


def digest(windows: Tensor) -> str:
    """sha256 of token windows."""
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
