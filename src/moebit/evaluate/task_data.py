"""Task items from local files, in the form in which the harness's own data sets have them.

A reader per task turns the files that the task's authors publish into documents with the fields that the harness's prompts use;
`TASK.jsonl` with such documents serves any task.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moebit.errors import BadInputError
from moebit.recipe.reading import TEXT_BYTES, parse_json, read_text

Document = dict[str, Any]
LETTERS = "abcdefgh"


def documents(task: str, directory: Path) -> list[Document] | None:
    """The items of a task; None where the directory has none for it.

    Raises:
        BadInputError: a file that is not what it should be, by name.
    """
    own = directory / f"{task}.jsonl"
    files, read = ((own.name,), _lines) if own.is_file() else READERS.get(task, ((), _lines))
    paths = [directory / file for file in files]
    if not paths or not all(path.is_file() for path in paths):
        return None
    try:
        found = list(read(*paths))
    except (ValueError, KeyError, IndexError, TypeError, csv.Error) as error:
        raise BadInputError(f"--task-data {paths[0]}: cannot be read as items of {task} ({type(error).__name__}: {error})") from error
    if not found:
        raise BadInputError(f"--task-data {paths[0]}: no items in it")
    return found


def expected(task: str) -> str:
    """The file names that would be looked for."""
    files = READERS[task][0] if task in READERS else ()
    return " or ".join([f"{task}.jsonl", *([" with ".join(files)] if files else [])])


def _lines(file: Path) -> Iterator[Document]:
    for line in read_text(file, limit=TEXT_BYTES).splitlines():
        if line.strip():
            item = parse_json(line)
            if not isinstance(item, dict):
                raise ValueError(f"a line is no JSON object: {line[:60]}")
            yield item


def _arc(file: Path) -> Iterator[Document]:
    for item in _lines(file):
        question = item["question"]
        choices = {key: [choice[key] for choice in question["choices"]] for key in ("text", "label")}
        yield {"id": item["id"], "question": question["stem"], "choices": choices, "answerKey": item["answerKey"]}


def _piqa(file: Path, labels: Path) -> Iterator[Document]:
    answers = read_text(labels, limit=TEXT_BYTES).split()
    for item, label in zip(_lines(file), answers, strict=True):
        yield {"goal": item["goal"], "sol1": item["sol1"], "sol2": item["sol2"], "label": int(label)}


def _hellaswag(file: Path) -> Iterator[Document]:
    """Six lines an item: `ACTIVITY: CONTEXT`, the right ending's number, four endings.

    The published data has the context in two parts of which the second is an unfinished sentence; the harness begins it with a capital.
    """
    lines = read_text(file, limit=TEXT_BYTES).splitlines()
    if len(lines) % 6:
        raise ValueError(f"{len(lines)} lines are no multiple of 6")
    for start in range(0, len(lines), 6):
        head, label, *endings = lines[start : start + 6]
        activity, _, context = head.partition(": ")
        unfinished = re.search(r"(?<=[.!?] )[^.!?]+$", context)
        begun = unfinished[0] if unfinished and not context.rstrip().endswith((".", "!", "?", "]")) else ""
        yield {
            "ind": start // 6, "activity_label": activity, "ctx_a": context.removesuffix(begun).rstrip(), "ctx_b": begun,
            "endings": endings, "label": str(int(label)), "split_type": "", "source_id": "",
        }  # fmt: skip


def _winogrande(file: Path) -> Iterator[Document]:
    for item in _lines(file):
        yield {key: item[key] for key in ("sentence", "option1", "option2", "answer")}


def _openbookqa(file: Path) -> Iterator[Document]:
    with open(file, encoding="utf-8", newline="") as table:
        for row in csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE):
            parts = re.split(r"\(([A-D])\) ", row["Choices"])[1:]
            choices = {"text": [text.strip() for text in parts[1::2]], "label": parts[::2]}
            yield {"id": row["ID"], "question_stem": row["Question Stem"], "choices": choices, "answerKey": row["Answer Key"]}


def _boolq(file: Path) -> Iterator[Document]:
    """Labels are `true` and `false`, as JSON or, in some copies of the data, as text."""
    for item in _lines(file):
        label = ("false", "true").index(str(item["label"]).lower())
        yield {"question": item["question"], "passage": item["passage"], "idx": item.get("idx", 0), "label": label}


def _rte(file: Path) -> Iterator[Document]:
    for item in _lines(file):
        label = ("entailment", "not_entailment").index(item["label"])
        yield {"sentence1": item["premise"], "sentence2": item["hypothesis"], "label": label, "idx": item.get("idx", 0)}


def _mathqa(file: Path) -> Iterator[Document]:
    for item in _lines(file):
        options = " , ".join(f"{letter} ) {option}" for letter, option in zip(LETTERS, item["options"], strict=False))
        yield {"Problem": item["problem"], "options": options, "correct": item["answer"]}


READERS: dict[str, tuple[tuple[str, ...], Callable[..., Iterator[Document]]]] = {
    "arc_easy": (("arc/ARC-Easy-Test.jsonl",), _arc),
    "arc_challenge": (("arc/ARC-Challenge-Test.jsonl",), _arc),
    "piqa": (("piqa/valid.jsonl", "piqa/valid-labels.lst"), _piqa),
    "hellaswag": (("hellaswag/hellaswag_val_full.txt",), _hellaswag),
    "winogrande": (("winogrande/winogrande_dev.jsonl",), _winogrande),
    "openbookqa": (("openbookqa/test.tsv",), _openbookqa),
    "boolq": (("superglue/BoolQ/val.jsonl",), _boolq),
    "rte": (("superglue/RTE/val.jsonl",), _rte),
    "lambada_openai": (("lambada/lambada_test.jsonl",), _lines),
    "mathqa": (("mathqa/mathqa_test.jsonl",), _mathqa),
    "gsm8k": (("gsm8k/test.jsonl",), _lines),
}
