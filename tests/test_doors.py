"""The doors: whatever a document of a checkpoint, an output or a user says, the answer is one sentence, and no code is run."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moebit
from moebit.calibration.text import load_tokenizer, tokenize
from moebit.calibration.timing import TooSlowError, time_limit
from moebit.errors import BadInputError, InterruptedWorkError
from moebit.formats import carried
from moebit.profiling.adapt import former_texts
from moebit.storage.contents import changed, look_through
from moebit.storage.files import read_header
from tests.support.models import ARCHITECTURES, Checkpoints
from tests.support.outputs import byte_tokenizer, small_recipe, token_file

SRC = Path(__file__).resolve().parents[1] / "src" / "moebit"
LOADERS = {"from_pretrained", "from_config", "HFLM"}
RTN, GPTQ = small_recipe("rtn"), small_recipe("gptq")


@pytest.fixture
def model(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(checkpoints.path(ARCHITECTURES["mixtral"]), tmp_path / "model"))
    byte_tokenizer().save_pretrained(copy)
    return copy


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


# --- what runs


def test_every_loader_is_told_to_run_no_code() -> None:
    calls = []
    for file in sorted(SRC.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in LOADERS:
                    told = [k for k in node.keywords if k.arg == "trust_remote_code"]
                    assert told, f"{file}:{node.lineno}"
                    assert isinstance(told[0].value, ast.Constant), f"{file}:{node.lineno}"
                    assert told[0].value.value is False, f"{file}:{node.lineno}"
                    calls.append(name)
    assert len(calls) >= 6


@pytest.mark.parametrize("which", ["AutoConfig", "AutoTokenizer"])
def test_code_of_a_checkpoint_is_not_run(which: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands on standard input."""
    ran = model / "ran"
    (model / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: ...\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if which == "AutoConfig":
        change(model / "config.json", model_type="unheard_of", auto_map={"AutoConfig": "code.C"})
    else:
        change(model / "tokenizer_config.json", tokenizer_class="C", auto_map={"AutoTokenizer": ["code.C", "code.C"]})
    with contextlib.suppress(BadInputError):
        moebit.inspect(model)
        load_tokenizer(model)
    assert not ran.exists()


def test_templates_in_sub_folders_are_not_carried_and_found(model: Path, tmp_path: Path) -> None:
    folder = model / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool.jinja").write_text("{{ messages }}")
    moebit.quantize(model, tmp_path / "out", recipe=RTN)
    assert not (tmp_path / "out" / folder.name).exists()
    assert moebit.verify(tmp_path / "out")["findings"] == []
    shutil.copytree(folder, tmp_path / "out" / folder.name)
    assert "additional_chat_templates/tool.jinja" in [finding["where"] for finding in moebit.verify(tmp_path / "out")["findings"]]


def test_the_page_says_that_it_is_not_sealed(model: Path, tmp_path: Path) -> None:
    moebit.quantize(model, tmp_path / "out", recipe=RTN)
    assert "This page is not sealed" in (tmp_path / "out" / "report.html").read_text()


# --- configurations

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "100,000 layers": ({"num_hidden_layers": 100_000}, "num_hidden_layers"),
    "5,000 layers": ({"num_hidden_layers": 5_000}, "5000 layers"),
    "no layers by text": ({"num_hidden_layers": "two"}, "num_hidden_layers"),
    "labels": ({"num_labels": 10**12}, "num_labels"),
    "no expert for a token": ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
    "more than there are": ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
    "negative window": ({"sliding_window": -3}, "sliding_window"),
    "negative epsilon": ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    "infinite epsilon": ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    "no hidden size": ({"hidden_size": 0}, "hidden_size"),
    "a hidden size of text": ({"hidden_size": "64"}, "hidden_size"),
    "a list for a name": ({"model_type": ["mixtral"]}, "model_type"),
    "a name for a list": ({"architectures": "Mixtral"}, "architectures"),
    "inside": ({"text_config": {"num_hidden_layers": -1}}, "num_hidden_layers"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_nonsense_in_a_configuration(case: str, model: Path) -> None:
    fields, said = CONFIGS[case]
    change(model / "config.json", **fields)
    began = time.monotonic()
    with pytest.raises(BadInputError, match=rf"(config\.json|model).*{said}"):
        moebit.inspect(model)
    assert time.monotonic() - began < 10


DOCUMENTS: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2]),
    "bytes": lambda file: file.write_bytes(b"\xff\xfe\x00"),
    "list": lambda file: file.write_text("[1, 2]"),
    "text": lambda file: file.write_text('"yes"'),
    "null": lambda file: file.write_text("null"),
    "deep": lambda file: file.write_text('{"a":' * 50_000),
    "twice": lambda file: file.write_text('{"a": 1, "a": 2}'),
    "pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "folder": lambda file: (file.unlink(), file.mkdir()),
    "sparse": lambda file: os.truncate(file, 2**36),
    "link to a device": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("damage", DOCUMENTS)
def test_damaged_documents(damage: str, name: str, model: Path, tmp_path: Path) -> None:
    if not (model / name).exists():
        (model / name).write_text('{"eos_token_id": 0}')
    DOCUMENTS[damage](model / name)
    (tmp_path / "text.txt").write_text("words of a text " * 100)
    refused = None
    try:
        moebit.quantize(model, tmp_path / "out", recipe=GPTQ, text={"t": tmp_path / "text.txt"})
    except BadInputError as error:
        refused = str(error)
    if refused is None:
        assert name == "generation_config.json", damage  # carried as it stands; only sampling reads it
    else:
        assert "model" in refused


@pytest.mark.parametrize("fields", [{"model": {"type": "Unheard"}}, {"model": None}, {"added_tokens": 3}, {"decoder": {"type": []}}])
def test_tokenizers_of_another_kind(fields: dict[str, Any], model: Path) -> None:
    change(model / "tokenizer.json", **fields)
    with pytest.raises(BadInputError, match="its tokenizer: cannot be understood"):
        load_tokenizer(model)


# --- texts


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"input_ids": [5, -100]}', "token id -100 is outside .*label padding"),
        ('{"input_ids": [5, 99999999999999999999]}', "integers"),
        ('{"input_ids": [1.5]}', "integers"),
        ('{"input_ids": [true]}', "integers"),
        ('{"text": "\\ud800"}', "no valid Unicode"),
        ('{"text": "a", "text": "b"}', "twice"),
        ("[" * 100_000, "nested"),
        ('{"text": 3}', "must be a string"),
    ],
)
def test_lines_of_a_text(line: str, said: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(line + "\n")
    with pytest.raises(BadInputError, match=said):
        tokenize("t", tmp_path / "t.jsonl", load_tokenizer(model), 257)


def test_tokenizers_that_fail_when_they_are_used(model: Path, tmp_path: Path) -> None:
    change(model / "tokenizer_config.json", model_max_length=[1])
    (tmp_path / "t.txt").write_text("words")
    with pytest.raises(BadInputError, match=r"t\.txt: what the tokenizer makes of it|its tokenizer"):
        tokenize("t", tmp_path / "t.txt", load_tokenizer(model), 257)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[0].nothing.at.all }}",
        "{% for",
    ],
)
def test_templates_that_go_wrong(template: str, model: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    (tmp_path / "t.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    began = time.monotonic()
    with pytest.raises(BadInputError, match=r"t\.jsonl, line 1: the chat template refuses"):
        tokenize("t", tmp_path / "t.jsonl", tokenizer, 257)
    assert time.monotonic() - began < 10


def test_a_time_limit_ends_with_what_it_is_for() -> None:
    with pytest.raises(TooSlowError), time_limit(0.05):
        sum(i for i in range(10**12))
    with time_limit(0.05):
        pass
    time.sleep(0.1)


def test_a_prompt_that_is_no_text(model: Path) -> None:
    with pytest.raises(BadInputError, match="not UTF-8"):
        moebit.generate(model, prompt=os.fsdecode(b"caf\xe9"))


# --- outputs and what belongs to them


def test_undo_writes_what_was_sealed_and_nothing_else(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    moebit.quantize(model, out, recipe=RTN)
    victim = tmp_path / "victim"
    for names in ({"../victim": "x"}, {str(victim): "x"}, {"config.json": "x"}, {}):
        texts = {name: (out / name).read_text() for name in ("config.json", "model.safetensors.index.json", "moebit.json")}
        (out / "overlay.json").write_text(json.dumps({"version": 1, "before": {**texts, **names}}))
        if not names:
            assert former_texts(out) == texts
            continue
        with pytest.raises(BadInputError, match=r"overlay\.json: is not what"):
            moebit.adapt(out, undo=True)
        assert not victim.exists()
        assert moebit.load_recipe(out / "recipe.yaml")


def test_nothing_is_written_through_a_link(model: Path, tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    moebit.quantize(model, out, recipe=RTN)
    victim.write_text("mine")
    (out / "report.html").unlink()
    (out / "report.html").symlink_to(victim)
    (out / "report.html.writing").symlink_to(victim)
    moebit.report(out)
    assert victim.read_text() == "mine"
    assert not (out / "report.html").is_symlink()


def test_a_profile_overwrites_no_other_files(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.safetensors").write_text("mine")
    options: dict[str, Any] = {
        "text": {"a": token_file(tmp_path / "a.jsonl", 500)},
        "recipe": RTN,
        "samples": 2,
        "length": 16,
        "errors": False,
    }
    with pytest.raises(BadInputError, match="holds files, and no profile"):
        moebit.profile(model, tmp_path / "mine", **options)
    assert (tmp_path / "mine" / "a.safetensors").read_text() == "mine"
    moebit.profile(model, tmp_path / "new", **options)
    moebit.profile(model, tmp_path / "new", **options)


@pytest.mark.parametrize(
    "plan",
    [
        "{",
        "[]",
        '{"version": 1, "experts": []}',
        '{"version": 1, "linears": {"a": NaN}}',
        '{"version": 1, "linears": {"a": 1e999}}',
        '{"version": 1, "linears": {}, "linears": {}}',
        '{"version": 1, "linears": {"model.layers.0.self_attn.q_proj": "four"}}',
        '{"version": 1, "linears": {"model.layers.0.self_attn.q_proj": 4.5}}',
        '{"version": 1, "experts": {"model.layers.0.mlp.experts": {"gate_proj": [4, null]}}}',
    ],
)
def test_plans(plan: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(plan)
    with pytest.raises(BadInputError, match="plan"):
        moebit.quantize(model, tmp_path / "out", recipe=RTN, plan=tmp_path / "plan.json", dry_run=True)


# --- resuming


def interrupted(model: Path, out: Path, **options: Any) -> Path:
    def stop(what: str, done: int, total: int) -> None:
        if what == "layers" and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moebit.quantize(model, out, recipe=RTN, progress=stop, **options)
    return out.with_name(out.name + ".partial")


@pytest.mark.parametrize("line", [1, 2])
def test_a_journal_that_lacks_a_line_is_believed_up_to_there(line: int, model: Path, tmp_path: Path) -> None:
    journal = interrupted(model, tmp_path / "out") / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:line] + lines[line + 1 :]))
    moebit.quantize(model, tmp_path / "out", recipe=RTN, resume=True)
    moebit.quantize(model, tmp_path / "straight", recipe=RTN)
    shards = [file.name for file in (tmp_path / "straight").glob("model-*")]
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes() for name in shards)


def test_another_shard_of_the_same_age_is_noticed(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    before = weights.stat()
    interrupted(model, tmp_path / "out")
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BadInputError, match=r"model\.safetensors changed since"):
        moebit.quantize(model, tmp_path / "out", recipe=RTN, resume=True)


def test_a_shard_that_is_only_touched_is_the_same(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    interrupted(model, tmp_path / "out")
    os.utime(weights)
    moebit.quantize(model, tmp_path / "out", recipe=RTN, resume=True)
    entries = read_header(weights)
    seen = look_through(entries.values())
    assert changed(entries, seen) == []
    weights.unlink()
    assert changed(entries, seen) == ["model.safetensors"]


def test_another_number_of_threads_is_another_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over a whole tensor differ with the number of threads that add them up."""
    interrupted(model, tmp_path / "out")
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    with pytest.raises(BadInputError, match=r"threads \(\d+, now 77\)"):
        moebit.quantize(model, tmp_path / "out", recipe=RTN, resume=True)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")])
def test_memory_that_runs_out(error: Exception, model: Path, tmp_path: Path) -> None:
    def run_out(what: str, done: int, total: int) -> None:
        if what == "layers" and done == 1:
            raise error

    with pytest.raises(InterruptedWorkError, match=r"memory ran out.*--resume.*--memory"):
        moebit.quantize(model, tmp_path / "out", recipe=RTN, progress=run_out)
    moebit.quantize(model, tmp_path / "out", recipe=RTN, resume=True)


def test_carried_files_are_regular_and_small(model: Path, tmp_path: Path) -> None:
    os.mkfifo(model / "pipe.txt")
    with pytest.raises(BadInputError, match=r"pipe\.txt: no regular file"):
        carried.carried_files(model)
    (model / "pipe.txt").unlink()
    with open(model / "sparse.txt", "wb") as file:
        file.truncate(2**34)
    with pytest.raises(BadInputError, match=r"sparse\.txt: .* too large"):
        moebit.quantize(model, tmp_path / "out", recipe=RTN)


def test_a_text_that_is_no_file(model: Path, tmp_path: Path) -> None:
    for name in ("x" * 300, "a\0b", str(tmp_path)):
        with pytest.raises(BadInputError):
            moebit.quantize(model, tmp_path / "out", recipe=GPTQ, text=[name])
    token_file(tmp_path / "t.jsonl", 10)
