"""Tasks: local items in the harness's form, scores equal to the harness run by itself, paired differences."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import moebit
from moebit.errors import BadInputError
from moebit.evaluate import task_data
from moebit.evaluate.tasks import answers, find_harness, interval, local_tasks

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data" / "tasks"
MODEL = ROOT / "reference" / "olmoe"
HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HARNESS, reason="lm-evaluation-harness is not installed (pip install 'moebit[eval]')")


def test_the_shipped_sample() -> None:
    arc, piqa, hellaswag = (task_data.documents(task, DATA) for task in ("arc_easy", "piqa", "hellaswag"))
    assert arc is not None
    assert piqa is not None
    assert hellaswag is not None
    assert (len(arc), len(piqa), len(hellaswag)) == (24, 16, 6)
    assert arc[0]["answerKey"] == "A"
    assert arc[0]["choices"]["text"][0] == "Sunlight is the source of energy for nearly all ecosystems."
    assert all(len(item["choices"]["text"]) == len(item["choices"]["label"]) for item in arc)
    assert [item["label"] for item in piqa[:3]] == [0, 1, 1]
    assert {key: hellaswag[1][key] for key in ("activity_label", "ctx_a", "ctx_b", "label")} == {
        "activity_label": "Clean and jerk", "ctx_a": "A lady walks to a barbell. She bends down and grabs the pole.", "ctx_b": "the lady",
        "label": "3",
    }  # fmt: skip
    assert task_data.documents("winogrande", DATA) is None


@pytest.mark.parametrize(
    ("task", "file", "text", "document"),
    [
        ("boolq", "superglue/BoolQ/val.jsonl", '{"question": "is it", "passage": "It is.", "idx": 3, "label": true}',
         {"question": "is it", "passage": "It is.", "idx": 3, "label": 1}),
        ("boolq", "superglue/BoolQ/val.jsonl", '{"question": "is it", "passage": "It is not.", "label": "false"}',
         {"question": "is it", "passage": "It is not.", "idx": 0, "label": 0}),
        ("rte", "superglue/RTE/val.jsonl", '{"premise": "A.", "hypothesis": "B.", "label": "not_entailment", "idx": 1}',
         {"sentence1": "A.", "sentence2": "B.", "label": 1, "idx": 1}),
        ("mathqa", "mathqa/mathqa_test.jsonl", '{"problem": "1 + 1 ?", "options": ["2", "3", "4", "5", "none"], "answer": "a"}',
         {"Problem": "1 + 1 ?", "options": "a ) 2 , b ) 3 , c ) 4 , d ) 5 , e ) none", "correct": "a"}),
        ("winogrande", "winogrande/winogrande_dev.jsonl", '{"sentence": "_ is.", "option1": "A", "option2": "B", "answer": "2"}',
         {"sentence": "_ is.", "option1": "A", "option2": "B", "answer": "2"}),
        ("openbookqa", "openbookqa/test.tsv",
         "ID\tQuestion Stem\tChoices\tComplete Question\tAnswer Key\n8-1\tThe sun is\t(A) cold (B) \"hot\" (C) a (D) b c\tx\tB",
         {"id": "8-1", "question_stem": "The sun is", "choices": {"text": ["cold", '"hot"', "a", "b c"], "label": ["A", "B", "C", "D"]},
          "answerKey": "B"}),
        ("lambada_openai", "lambada/lambada_test.jsonl", '{"text": "a b c"}', {"text": "a b c"}),
        ("gsm8k", "gsm8k/test.jsonl", '{"question": "1 + 1?", "answer": "#### 2"}', {"question": "1 + 1?", "answer": "#### 2"}),
        ("anything", "anything.jsonl", '{"own": 1}', {"own": 1}),
        ("piqa", "piqa.jsonl", '{"goal": "g"}', {"goal": "g"}),
    ],
)  # fmt: skip
def test_readers(task: str, file: str, text: str, document: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text + "\n")
    assert task_data.documents(task, tmp_path) == [document]
    (tmp_path / file).write_text('{"question": 1}\n3\n')
    with pytest.raises(BadInputError, match=r"cannot be read as items of|no items"):
        task_data.documents(task, tmp_path)


def test_intervals() -> None:
    """Of a mean, from the sample's standard deviation; covers the truth as often as it says."""
    assert interval([1.0]) == (1.0, None)
    mean, ends = interval([0, 1, 1, 1])
    half = 1.96 * 0.5 / 2
    assert ends is not None
    assert mean == 0.75
    assert ends == pytest.approx([0.75 - half, 0.75 + half], rel=1e-4)
    import random

    draw = random.Random(0)
    held = 0
    for _ in range(400):
        _, ends = interval([float(draw.random() < 0.4) - float(draw.random() < 0.3) for _ in range(100)])
        assert ends is not None
        held += ends[0] <= 0.1 <= ends[1]
    assert 0.91 <= held / 400 <= 0.98


@pytest.mark.skipif(HARNESS, reason="the harness is installed")
def test_without_the_harness() -> None:
    with pytest.raises(BadInputError, match=r"--tasks needs lm-evaluation-harness: pip install 'moebit\[eval\]'"):
        moebit.evaluate(MODEL, tasks=["arc_easy"], task_data=DATA)


@needs_harness
def test_bad_tasks(tmp_path: Path) -> None:
    for tasks, data, said in (
        (["arc_eazy"], DATA, "did you mean 'arc_easy'"),
        (["winogrande"], DATA, r"nothing for winogrande there; it would be winogrande\.jsonl or winogrande/winogrande_dev\.jsonl"),
        (["piqa"], tmp_path / "no", "no such directory"),
    ):
        with pytest.raises(BadInputError, match=said):
            moebit.evaluate(MODEL, tasks=tasks, task_data=data)
    with pytest.raises(BadInputError, match="at least one item"):
        moebit.evaluate(MODEL, tasks=["piqa"], task_data=DATA, limit=0)


DIRECTLY = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
model, folder, out = sys.argv[1:]
result = lm_eval.simple_evaluate(model="hf", model_args={"pretrained": model, "dtype": "auto"}, tasks=["arc", "goals", "endings"],
    batch_size=8, task_manager=TaskManager(include_path=folder, include_defaults=False), device="cpu", bootstrap_iters=0)
assert "moebit" not in sys.modules
rows = {task: sorted(rows, key=lambda row: row["doc_id"]) for task, rows in result["samples"].items()}
json.dump({"results": result["results"], "items": {task: [{name: row[name] for name in row["metrics"]} for row in mine]
    for task, mine in rows.items()}}, open(out, "w"))
"""


def write_by_hand(folder: Path, name: str, rows: list[dict[str, object]], **task: str) -> None:
    """A task of the harness on rows of a file, written out from the task's description."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    files = {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
    whole = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "output_type": "multiple_choice", "test_split": "test",
             "num_fewshot": 0, "metric_list": metrics, **task}  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))


def arc_rows() -> list[dict[str, object]]:
    items = [json.loads(line)["question"] | json.loads(line) for line in (DATA / "arc" / "ARC-Easy-Test.jsonl").read_text().splitlines()]
    return [
        {
            "stem": item["stem"],
            "texts": [choice["text"] for choice in item["choices"]],
            "right": [choice["label"] for choice in item["choices"]].index(item["answerKey"]),
        }
        for item in items
    ]


def goal_rows() -> list[dict[str, object]]:
    labels = (DATA / "piqa" / "valid-labels.lst").read_text().split()
    lines = (DATA / "piqa" / "valid.jsonl").read_text().splitlines()
    return [json.loads(line) | {"right": int(label)} for line, label in zip(lines, labels, strict=True)]


def ending_rows() -> list[dict[str, object]]:
    """Without the brackets that the harness takes out, which no item of the sample has."""
    lines = (DATA / "hellaswag" / "hellaswag_val_full.txt").read_text().splitlines()
    assert not any("[" in line for line in lines)
    rows = []
    for start in range(0, len(lines), 6):
        head, label, *endings = (line.strip().replace("  ", " ") for line in lines[start : start + 6])
        sentences = head.split(". ")
        sentences[-1] = sentences[-1].capitalize() if not head.endswith(".") else sentences[-1]
        rows.append({"text": ". ".join(sentences), "texts": endings, "right": int(label)})
    return rows


@needs_harness
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_scores_are_those_of_the_harness_by_itself(tmp_path: Path) -> None:
    """A process without moebit and tasks written out by hand, item by item; then the paired difference to a quantized output."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_by_hand(
        folder, "arc", arc_rows(), doc_to_text="Question: {{stem}}\nAnswer:", doc_to_target="{{right}}", doc_to_choice="{{texts}}"
    )
    write_by_hand(folder, "goals", goal_rows(), doc_to_text="Question: {{goal}}\nAnswer:", doc_to_target="{{right}}",
                  doc_to_choice="{{[sol1, sol2]}}")  # fmt: skip
    write_by_hand(folder, "endings", ending_rows(), doc_to_text="{{text}}", doc_to_target="{{right}}", doc_to_choice="{{texts}}")
    command = [sys.executable, "-c", DIRECTLY, str(MODEL), str(folder), str(tmp_path / "direct.json")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    direct = json.loads((tmp_path / "direct.json").read_text())

    names = {"arc_easy": "arc", "piqa": "goals", "hellaswag": "endings"}
    (tmp_path / "scratch").mkdir()
    manager = local_tasks(list(names), DATA, tmp_path / "scratch", None)
    mine = answers(find_harness(), MODEL, [f"{task}_local" for task in names], manager, None)
    for task, name in names.items():
        assert [item.scores for item in mine[f"{task}_local"]] == direct["items"][name], task

    moebit.quantize(MODEL, tmp_path / "w2", recipe="rtn-w2")
    result = moebit.evaluate(tmp_path / "w2", against=MODEL, tasks=list(names), task_data=DATA)
    assert result["texts"] == {}
    for task, name in names.items():
        found = result["tasks"][task]
        assert found["items"] == len(direct["items"][name])
        assert set(found["metrics"]) == {"acc", "acc_norm"}
        for metric, row in found["metrics"].items():
            assert row["reference"] == pytest.approx(direct["results"][name][f"{metric},none"], abs=1e-12)
            assert row["difference"] == pytest.approx(row["score"] - row["reference"])
            low, high = row["difference_interval"]
            assert low <= row["difference"] <= high
    alone = moebit.evaluate(MODEL, tasks=["arc_easy"], task_data=DATA, limit=10)["tasks"]["arc_easy"]
    assert alone["items"] == 10
    assert alone["metrics"]["acc"]["score"] == pytest.approx(math.fsum(item["acc"] for item in direct["items"]["arc"][:10]) / 10)
    assert "difference" not in alone["metrics"]["acc"]


@needs_harness
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tasks_with_several_filters_and_other_means(tmp_path: Path) -> None:
    """gsm8k scores an answer twice: one item each all the same. lambada's perplexity is no mean over items: its logarithm is."""
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text(
        '{"question": "1 + 1?", "answer": "#### 2"}\n{"question": "2 + 1?", "answer": "#### 3"}\n'
    )
    (tmp_path / "lambada_openai.jsonl").write_text('{"text": "the end of the day"}\n{"text": "he said that he was the king"}\n')
    found = moebit.evaluate(MODEL, tasks=["gsm8k", "lambada_openai"], task_data=tmp_path)["tasks"]
    assert found["gsm8k"]["items"] == found["lambada_openai"]["items"] == 2
    assert set(found["gsm8k"]["metrics"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert set(found["lambada_openai"]["metrics"]) == {"log_likelihood", "acc"}
    assert -40 < found["lambada_openai"]["metrics"]["log_likelihood"]["score"] < 0


TASKS = ("arc_easy", "arc_challenge", "piqa", "hellaswag", "winogrande", "openbookqa", "boolq", "rte", "lambada_openai", "mathqa", "gsm8k")


def test_the_documented_tasks_are_those_that_are_read() -> None:
    assert set(task_data.READERS) == set(TASKS)
    page = (ROOT / "docs" / "evaluation.md").read_text()
    for task, (files, _) in task_data.READERS.items():
        assert f"`{task}`" in page
        assert all(f"`{file}`" in page or f"/{file.split('/')[-1]}`" in page for file in files), task
