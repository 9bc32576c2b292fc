"""Texts to tokens to windows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moebit.calibration.text import TokenText, calibration_windows, consecutive_windows, digest, load_tokenizer, parse_texts, tokenize
from moebit.errors import BadInputError
from tests.support.outputs import byte_tokenizer

VOCABULARY = 257  # of the byte tokenizer: 0 is the end, n + 1 stands for the n-th letter of its alphabet
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def ids_of(text: str, tokenizer: Any) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    letters = {32: "Ġ", 10: "Ċ"}  # the byte-level alphabet's own letters for space and newline
    return [vocabulary[letters.get(byte, chr(byte))] for byte in text.encode("ascii")]


def lines(path: Path, *documents: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents), encoding="utf-8")
    return path


def counted(name: str, tokens: int, start: int = 0) -> TokenText:
    return TokenText(name, torch.arange(start, start + tokens), None)


# --- names and files


def test_names(tmp_path: Path) -> None:
    a, b = tmp_path / "a.txt", tmp_path / "b=c.txt"
    a.write_text("a")
    b.write_text("b")
    assert parse_texts([str(a), f"other={a}", str(b)]) == {"a.txt": a, "other": a, "b=c.txt": b}
    assert list(parse_texts({"z": a, "y": str(b)}).items()) == [("z", a), ("y", b)]
    assert parse_texts(()) == {}


def test_the_same_name_twice(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    one, two = tmp_path / "t.txt", tmp_path / "x" / "t.txt"
    one.write_text("a")
    two.write_text("b")
    with pytest.raises(BadInputError, match=r"'t\.txt' is given twice.*NAME=FILE") as error:
        parse_texts([str(one), str(two)])
    assert str(one) in str(error.value)
    assert str(two) in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    for item in (str(tmp_path / "no.txt"), f"name={tmp_path / 'no.txt'}", tmp_path / "no.txt"):
        with pytest.raises(BadInputError, match="no such file"):
            parse_texts([item])


# --- to tokens


def test_plain_text(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "t.txt"
    file.write_text("Hello, you\nthere ")
    text = tokenize("t", file, tokenizer, VOCABULARY)
    assert text.ids.dtype == torch.int64
    assert text.ids.tolist() == ids_of("Hello, you\nthere ", tokenizer)
    assert text.bytes_between(0, 5) == 5


def test_jsonl(tmp_path: Path, tokenizer: Any) -> None:
    """Ids win over messages, messages over text; a text ends in the end token; empty lines do not count."""
    user = [{"role": "user", "content": "hi"}]
    file = lines(
        tmp_path / "t.jsonl",
        {"text": "one"},
        {"text": "not this", "input_ids": [7, 8, 9]},
        {"input_ids": [5], "messages": user},
        {"text": "nor this", "messages": user},
    )
    file.write_text(file.read_text() + "\n   \n")
    ids = tokenize("t", file, tokenizer, VOCABULARY).ids.tolist()
    assert ids == [*ids_of("one", tokenizer), 0, 7, 8, 9, 5, *ids_of("<user>hi", tokenizer)]


def test_jsonl_with_other_line_separators(tmp_path: Path, tokenizer: Any) -> None:
    """Only a newline ends a line of jsonl: JSON strings may hold the other characters that Unicode calls line breaks."""
    file = lines(tmp_path / "t.jsonl", {"text": "a\u2028b\u0085c"}, {"input_ids": [3]})
    ids = tokenize("t", file, tokenizer, VOCABULARY).ids
    assert tokenizer.decode(ids[:-2].tolist()) == "a\u2028b\u0085c"
    assert ids[-2:].tolist() == [0, 3]


def test_ids_need_no_tokenizer(tmp_path: Path) -> None:
    text = tokenize("t", lines(tmp_path / "t.jsonl", {"input_ids": [1, 2]}, {"input_ids": [3]}), None, 4)
    assert text.ids.tolist() == [1, 2, 3]
    assert text.bytes_between(0, 3) == 0
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.txt", "plain", "no tokenizer files"),
        ("t.jsonl", '{"text": "a"}', "no tokenizer files"),
        ("t.jsonl", '{"messages": []}', "line 1.*chat template"),
        ("t.jsonl", '{"input_ids": [1]}\n{"input_ids": [', "line 2: not valid JSON"),
        ("t.jsonl", '{"input_ids": [1]}\n\n{"texts": "a"}', "line 3: expected"),
        ("t.jsonl", "[1, 2]", "line 1: expected"),
        ("t.jsonl", '{"input_ids": [1, 4]}', "token id 4.*vocabulary of 4"),
        ("t.jsonl", '{"input_ids": [1, -1]}', "token id -1.*vocabulary of 4"),
        ("t.jsonl", '{"input_ids": [1, "x"]}', "line 1"),
        ("t.jsonl", '{"input_ids": 5}', "line 1"),
    ],
)
def test_texts_that_cannot_be_read(name: str, content: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(BadInputError, match=says) as error:
        tokenize("t", file, None, 4)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("document", [{"text": 5}, {"text": None}, {"messages": "hello"}])
def test_documents_of_the_wrong_type(document: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(BadInputError, match=r"t\.jsonl, line 2"):
        tokenize("t", lines(tmp_path / "t.jsonl", {"text": "fine"}, document), tokenizer, VOCABULARY)


def test_not_utf8(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes("Größe".encode("latin-1"))
    with pytest.raises(BadInputError, match=r"t\.txt: not UTF-8"):
        tokenize("t", file, tokenizer, VOCABULARY)


# --- to windows


def test_consecutive_windows() -> None:
    text = counted("t", 23)
    assert torch.equal(consecutive_windows(text, 5), torch.arange(20).view(4, 5))
    assert torch.equal(consecutive_windows(text, 5, max_tokens=14), torch.arange(10).view(2, 5))
    assert torch.equal(consecutive_windows(text, 23), torch.arange(23).view(1, 23))
    with pytest.raises(BadInputError, match=r"'t': 23 tokens.*window of 24"):
        consecutive_windows(text, 24)


def starts(windows_NL: Tensor) -> list[int]:
    """Where the windows of a text of consecutive numbers begin; each holds what follows."""
    for row in windows_NL.tolist():
        assert row == list(range(row[0], row[0] + len(row)))
    return [int(row[0]) for row in windows_NL]


def test_calibration_windows_do_not_overlap() -> None:
    windows = calibration_windows([counted("t", 1003)], 40, 10, seed=0)
    assert windows.shape == (40, 10)
    assert windows.dtype == torch.int64
    assert len(set(starts(windows))) == 40
    assert all(start % 10 == 0 and start + 10 <= 1003 for start in starts(windows))


def test_every_text_is_used_or_the_sample_is_refused() -> None:
    texts = [counted("a", 300), counted("b", 300, start=10_000), counted("c", 300, start=20_000)]
    with pytest.raises(BadInputError, match=r"3 texts but calibration\.samples=2"):
        calibration_windows(texts, 2, 10, seed=0)


def test_texts_share_the_windows_evenly() -> None:
    texts = [counted("a", 300), counted("b", 5000, start=10_000), counted("c", 300, start=20_000)]
    for samples, shares in ((9, [3, 3, 3]), (11, [4, 4, 3]), (3, [1, 1, 1])):
        counts = [0, 0, 0]
        for start in starts(calibration_windows(texts, samples, 10, seed=0)):
            counts[start // 10_000] += 1
        assert counts == shares


def test_the_seed_chooses() -> None:
    text = [counted("t", 1000)]
    first, again, other = (calibration_windows(text, 10, 10, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert set(starts(first)) != set(starts(other))
    assert set(starts(calibration_windows(text, 100, 10, seed=3))) == set(range(0, 1000, 10))  # all there are


def test_too_short() -> None:
    """Says which text, what there is, what is needed and what would fit."""
    with pytest.raises(BadInputError) as error:
        calibration_windows([counted("long", 1000), counted("short", 39)], 20, 10, seed=0)
    assert "'short'" in str(error.value)
    assert "39 tokens give 3 windows of 10, 10 are needed" in str(error.value)
    assert "calibration.samples=6" in str(error.value)
    assert calibration_windows([counted("long", 1000), counted("short", 39)], 6, 10, seed=0).shape == (6, 10)


def test_digest() -> None:
    windows = torch.arange(6).view(2, 3)
    assert digest(windows) == hashlib.sha256(b"".join(i.to_bytes(8, "little") for i in range(6))).hexdigest()
    assert digest(windows.T.contiguous().T) == digest(windows)
