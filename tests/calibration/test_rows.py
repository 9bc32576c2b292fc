"""Texts as people have them: rows in files of every kind, in folders and compressed, and which of their fields say what."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moebit.calibration import rows
from moebit.calibration.text import TokenText, calibration_windows, parse_texts, tokenize
from moebit.errors import BadInputError
from tests.support.outputs import byte_tokenizer

VOCABULARY = 257
TEMPLATE = (
    "{% if tools %}[{{ tools[0].name }}]{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{% endfor %}"
)
ROWS = [{"text": "one"}, {"text": 'two, "2"'}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def words(text: TokenText, tokenizer: Any) -> str:
    """What was read, with | for the end of a text."""
    return str(tokenizer.decode(text.ids.tolist())).replace("<end>", "|")


def said(path: Path | str, tokenizer: Any) -> str:
    (source,) = parse_texts([str(path)]).values()
    return words(tokenize("t", source, tokenizer, VOCABULARY), tokenizer)


def as_lines(documents: list[Any]) -> str:
    return "".join(json.dumps(document) + "\n" for document in documents)


# --- kinds of files

FILES: dict[str, Callable[[list[dict[str, str]]], str]] = {
    "a.jsonl": as_lines,
    "a.ndjson": as_lines,
    "A.JSONL": as_lines,
    "a.json": json.dumps,
    "b.json": lambda documents: json.dumps({"version": 1, "data": documents}, indent=1),
    "c.json": as_lines,  # what many data sets call .json
    "a.csv": lambda documents: "id,text\n" + "".join('1,"' + d["text"].replace('"', '""') + '"\n' for d in documents),
    "excel.csv": lambda documents: "\ufefftext\r\n" + "".join('"' + d["text"].replace('"', '""') + '"\r\n' for d in documents),
    "a.tsv": lambda documents: "text\tid\n" + "".join('"' + d["text"].replace('"', '""') + '"\t1\n' for d in documents),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", FILES)
def test_rows_of_every_kind(name: str, packed: bool, tmp_path: Path, tokenizer: Any) -> None:
    content = FILES[name](ROWS).encode()
    file = tmp_path / (name + ".gz" if packed else name)
    file.write_bytes(gzip.compress(content) if packed else content)
    assert said(file, tokenizer) == 'one|two, "2"|'


def test_parquet(tmp_path: Path, tokenizer: Any) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    turns = [[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]]
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "n": [1, 2]}), tmp_path / "t.parquet")
    parquet.write_table(pyarrow.table({"conversations": turns, "n": [1]}), tmp_path / "c.parquet")
    parquet.write_table(pyarrow.table({"n": [1], "body": ["three"]}), tmp_path / "n.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing more")
    assert said(tmp_path / "t.parquet", tokenizer) == "one|two|"
    assert said(tmp_path / "c.parquet", tokenizer) == "<user>a<assistant>b"
    assert said(f"{tmp_path / 'n.parquet'}:body", tokenizer) == "three|"
    with pytest.raises(BadInputError, match="it has n, body"):
        said(tmp_path / "n.parquet", tokenizer)
    with pytest.raises(BadInputError, match="cannot be understood"):
        said(tmp_path / "broken.parquet", tokenizer)


def test_a_folder(tmp_path: Path, tokenizer: Any) -> None:
    """All rows in it, in the order of their names, whatever else lies there; prose where there are none."""
    (tmp_path / "data").mkdir()
    (tmp_path / ".cache" / "download").mkdir(parents=True)
    (tmp_path / ".cache" / "download" / "0.jsonl").write_text("{}")
    (tmp_path / "README.md").write_text("# No text to calibrate on")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "data" / "2.jsonl").write_text(as_lines([{"text": "two"}]))
    (tmp_path / "data" / "1.json").write_text(json.dumps([{"text": "one"}]))
    assert said(tmp_path, tokenizer) == "one|two|"
    books = tmp_path / "books"
    books.mkdir()
    (books / "a.txt").write_text("First. ")
    (books / "b.txt").write_text("Second.")
    text = tokenize("t", books, tokenizer, VOCABULARY)
    assert words(text, tokenizer) == "First. Second."
    assert text.document_starts == (0, 7)
    (tmp_path / "none").mkdir()
    with pytest.raises(BadInputError, match="none of the 0 files"):
        said(tmp_path / "none", tokenizer)


REFUSED = {
    "arrow": ("t.arrow", b"ARROW1", "convert it to .parquet"),
    "zstandard": ("t.jsonl.zst", b"(\xb5/\xfd", "compress it with gzip"),
    "weights": ("t.safetensors", b"{}", "is no text"),
    "not gzip": ("t.txt.gz", b"plain", "not compressed by gzip"),
    "half of it": ("t.txt.gz", gzip.compress(b"words " * 1000)[:20], "not compressed by gzip, or damaged"),
    "rows called prose": ("t.txt", b'{"text": "a"}\n{"text": "b"}\n', "call the file .jsonl"),
    "no JSON": ("t.json", b"[1, ", "not valid JSON"),
    "a number": ("t.json", b"3", "expected a list"),
    "unknown fields": ("t.json", b'[{"title": "a", "body": "b"}]', "it has title, body: name the one that is meant"),
    "a value too many": ("t.csv", b"text\na,b\n", "row 2: 2 values for the 1 columns"),
    "an open quote": ("t.csv", b'text\n"a\n', "no table"),
    "a column twice": ("t.csv", b"text,text\na,b\n", "named twice"),
    "a stranger": ("t.jsonl", b'{"conversations": [{"from": "narrator", "value": "x"}]}', "from 'narrator'"),
    "tools": ("t.jsonl", b'{"messages": [], "tools": "{"}', "tools: not valid JSON"),
    "a number for words": ("t.jsonl", b'{"instruction": "a", "output": 3}', "output must be a string"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_never_taken_as_prose(case: str, tmp_path: Path, tokenizer: Any) -> None:
    name, content, says = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInputError, match=says) as error:
        said(tmp_path / name, tokenizer)
    assert name in str(error.value)


def test_what_swells_when_it_is_unpacked(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "UNPACKED_BYTES", 2**20)
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(b"a" * 2**21))
    with pytest.raises(BadInputError, match="when it is unpacked"):
        said(tmp_path / "t.txt.gz", tokenizer)


def test_code_that_begins_with_a_brace_is_prose(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "t.c").write_text("{ int a; }\nreturn 0;")
    assert said(tmp_path / "t.c", tokenizer) == "{ int a; }\nreturn 0;"


# --- fields

USER, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
DOCUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "messages": ({"messages": [USER, REPLY]}, "<user>a<assistant>b"),
    "reasoning is kept": ({"messages": [USER, {**REPLY, "reasoning_content": "why"}]}, "<user>a<assistant>b(why)"),
    "tools are kept": ({"messages": [USER], "tools": [{"name": "f"}]}, "[f]<user>a"),
    "tools as a table has them": ({"messages": [USER], "tools": '[{"name": "f"}]'}, "[f]<user>a"),
    "messages as a table has them": ({"messages": json.dumps([USER])}, "<user>a"),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "<user>a<assistant>b"),
    "ShareGPT with a system": ({"system": "s", "conversations": [{"from": "Human", "value": "a"}]}, "<system>s<user>a"),
    "ShareGPT with roles": ({"conversations": [USER, REPLY]}, "<user>a<assistant>b"),
    "prompt and completion": ({"prompt": "a", "completion": "b"}, "<user>a<assistant>b"),
    "conversational": ({"prompt": [USER], "completion": [REPLY]}, "<user>a<assistant>b"),
    "Alpaca": ({"instruction": "a", "input": "", "output": "b"}, "<user>a<assistant>b"),
    "Alpaca with input": ({"instruction": "a", "input": "x", "output": "b"}, "<user>a\n\nx<assistant>b"),
    "text beside a title": ({"title": "no", "text": "a"}, "a|"),
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_fields(case: str, tmp_path: Path, tokenizer: Any) -> None:
    document, wanted = DOCUMENTS[case]
    (tmp_path / "t.jsonl").write_text(as_lines([document]))
    assert said(tmp_path / "t.jsonl", tokenizer) == wanted


def test_without_a_chat_template(tmp_path: Path) -> None:
    """An instruction and its answer are prose, too; a conversation is not."""
    plain = byte_tokenizer()
    (tmp_path / "t.jsonl").write_text(as_lines([{"prompt": "a ", "completion": "b"}, {"instruction": "c", "output": "d"}]))
    assert said(tmp_path / "t.jsonl", plain) == "a b|c\n\nd|"
    (tmp_path / "t.jsonl").write_text(as_lines([{"conversations": [{"from": "human", "value": "a"}]}]))
    with pytest.raises(BadInputError, match="chat template, which this model's tokenizer lacks"):
        said(tmp_path / "t.jsonl", plain)


def test_a_field_that_the_user_names(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(as_lines([{"text": "no", "body": "a", "turns": [{"from": "human", "value": "b"}], "codes": [5, 6]}]))
    assert said(f"x={file}:body", tokenizer) == "a|"
    assert said(f"{file}:turns", tokenizer) == "<user>b"
    (source,) = parse_texts([f"{file}:codes"]).values()
    assert tokenize("t", source, tokenizer, VOCABULARY).ids.tolist() == [5, 6]
    with pytest.raises(BadInputError, match=r"has no field 'nothing'; it has text, body"):
        said(f"{file}:nothing", tokenizer)


def test_what_was_read_is_said(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "t.jsonl").write_text(as_lines([{"text": "a"}, {"prompt": "b", "completion": "c"}, {"text": "d"}]))
    text = tokenize("t", tmp_path / "t.jsonl", tokenizer, VOCABULARY)
    assert text.read_as == "text (2 documents), prompt and completion (1 documents)"


# --- tokens and windows


def test_documents_begin_as_the_tokenizer_has_it(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    tokenizer._tokenizer.post_processor = None
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing("<begin> $A", special_tokens=[("<begin>", bos)])
    (tmp_path / "t.jsonl").write_text(as_lines([{"text": "a"}, {"text": "b"}, {"input_ids": [7]}]))
    plain, begun = (tokenize("t", tmp_path / "t.jsonl", tokenizer, 300, begin=begin) for begin in (False, True))
    a, b = plain.ids.tolist()[0], plain.ids.tolist()[2]
    assert begun.ids.tolist() == [bos, a, 0, bos, b, 0, 7]
    assert begun.document_starts == (0, 3, 6)
    assert begun.bytes_between(0, len(begun.ids) - 1) == 2


def test_one_document_a_window(tmp_path: Path) -> None:
    """Only documents that fill a window, so that nothing is padded; without packing nothing of another document is in it."""
    ids = [[1] * 5, [2] * 9, [3] * 7, [4] * 8]
    (tmp_path / "t.jsonl").write_text(as_lines([{"input_ids": each} for each in ids]))
    text = tokenize("t", tmp_path / "t.jsonl", None, 10)
    windows = calibration_windows([text], 3, 7, seed=0, pack=False)
    assert windows.tolist() == [[2] * 7, [3] * 7, [4] * 7]
    with pytest.raises(BadInputError, match=r"3 of its 4 documents have 7 tokens or more .*calibration\.samples=3"):
        calibration_windows([text], 4, 7, seed=0, pack=False)
    assert calibration_windows([text], 4, 7, seed=0).shape == (4, 7)
