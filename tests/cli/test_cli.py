"""The command line: exit codes, messages, JSON, help."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from moebit import cli
from moebit.cli import terminal

ROOT = Path(__file__).resolve().parents[2]
MODEL, TEXTS = ROOT / "reference" / "olmoe", ROOT / "reference" / "text"


@dataclass
class Run:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def moebit(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """The command line in this process: its start-up alone takes seconds."""
    monkeypatch.setattr(terminal, "out", Console(width=200))
    monkeypatch.setattr(terminal, "err", Console(width=200, stderr=True))

    def run(*arguments: object) -> Run:
        monkeypatch.setattr("sys.argv", ["moebit", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        return Run(code, captured.out, captured.err)

    return run


Moebit = Callable[..., Run]


def test_the_program_itself() -> None:
    """As a process: the entry point, an exit code, and nothing but the message on standard error."""
    run = subprocess.run([sys.executable, "-m", "moebit", "inspect", "no/such/model"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("Error: no/such/model")
    assert run.stdout == ""


def test_help_shows_every_verb_with_examples(moebit: Moebit) -> None:
    overview = moebit("--help")
    assert overview.returncode == 0
    for verb in ("inspect", "quantize", "evaluate", "recipes", "sample", "verify"):
        assert verb in overview.stdout
        page = moebit(verb, "--help")
        assert page.returncode == 0
        assert f"moebit {verb}" in page.stdout


def test_inspect_tells_structure_and_plan(moebit: Moebit, tmp_path: Path) -> None:
    run = moebit("inspect", MODEL, "--recipe", "gptq-w3", "--json", tmp_path / "plan.json")
    assert run.returncode == 0, run.stderr
    assert "32 experts" in run.stdout
    document = json.loads((tmp_path / "plan.json").read_text())
    assert (document["layers"], document["experts"], document["top_k"], document["shared_experts"]) == (4, 32, 4, False)
    assert document["plan"]["average_bits"] == pytest.approx(3 + 16 / 128)
    assert sum(part["parameters"] for part in document["parts"].values()) == document["parameters"]


def test_quantize_then_evaluate_round_to_nearest(moebit: Moebit, tmp_path: Path) -> None:
    out = tmp_path / "w4"
    run = moebit("quantize", MODEL, "-o", out, "--recipe", "rtn-w4")
    assert run.returncode == 0, run.stderr
    assert "smaller" in run.stdout
    predicted = json.loads(moebit("inspect", MODEL, "--recipe", "rtn-w4", "--json", "-").stdout)["plan"]["size_bytes"]
    stored = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert predicted <= stored <= predicted * 1.02 + 20_000, "the plan said how large it would be"
    run = moebit(
        "evaluate", out, "--against", MODEL, "--text", f"c={TEXTS / 'c.eval.txt'}", "--max-tokens", 2048, "--json", tmp_path / "r.json"
    )
    assert run.returncode == 0, run.stderr
    row = json.loads((tmp_path / "r.json").read_text())["texts"]["c"]
    assert 0 < row["kl"] < 0.1
    assert row["tokens"] == 4 * 511


def test_dry_run_writes_nothing(moebit: Moebit, tmp_path: Path) -> None:
    run = moebit("quantize", MODEL, "-o", tmp_path / "x", "--recipe", "rtn-w4", "--dry-run")
    assert run.returncode == 0, run.stderr
    assert "average bits" in run.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["quantize", MODEL, "-o", "OUT", "--set", "weights.bitz=3"], "did you mean 'bits'"),
        (["quantize", MODEL, "-o", "OUT", "--recipe", "gptq-w33"], "gptq-w3"),
        (["quantize", MODEL, "-o", "OUT", "--recipe", "gptq-w4"], "--text"),
        (["quantize", MODEL, "-o", "OUT", "--recipe", "rtn-w4", "--memory", "lots"], "4GiB"),
        (["quantize", MODEL, "--recipe", "rtn-w4"], "--output"),
        (["inspect", "no/such/model"], "no such directory"),
        (["evaluate", MODEL, "--text", "nothing.txt"], "nothing.txt"),
        (["evaluate", MODEL], "--text"),
        (["quantize", MODEL, "-o", "OUT", "--recipe", "rtn-w4", "--plan", "absent.json"], "absent.json"),
    ],
)
def test_bad_input_is_exit_code_2_with_the_thing_named(
    moebit: Moebit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = moebit(*(tmp_path / "out" if item == "OUT" else item for item in arguments))
    assert run.returncode == 2, run.stdout + run.stderr
    assert named in run.stderr.replace("\n", " ")
    assert "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == [], "nothing was started"


def test_recipes_lists_and_prints(moebit: Moebit) -> None:
    listing = moebit("recipes")
    assert listing.returncode == 0
    assert "gptq-w4" in listing.stdout
    printed = moebit("recipes", "gptq-w4")
    assert printed.stdout.splitlines()[-1] == "format: native"
    assert moebit("recipes", "gptq-w44").returncode == 2


def test_short_help_and_no_verb_at_all(moebit: Moebit) -> None:
    for arguments, code in ((("-h",), 0), ((), 2)):
        run = moebit(*arguments)
        assert run.returncode == code
        assert "moebit inspect MODEL" in run.stdout
        assert run.stderr == ""
    assert "--memory" in moebit("quantize", "-h").stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["inspect", MODEL, "--memory", "4"], "4GiB"),
        (["inspect", MODEL, "--memory", "0.0001"], "unit"),
        (["inspect", MODEL, "--memory", "nan"], "4GiB"),
        (["inspect", MODEL, "--recipe", "gptq-w44"], "'gptq-w4', "),
        (["generate", MODEL, "--prompt", "a", "--temperature", "nan"], "--temperature"),
        (["generate", MODEL, "--prompt", "a", "--temperature", "inf"], "inf is no finite number"),
        (["generate", MODEL, "--prompt", "a", "--temperature", "-1"], "temperature"),
        (["sample", MODEL, "-o", "x.jsonl", "--temperature", "inf"], "inf is no finite number"),
        (["sample", MODEL, "-o", "x.jsonl", "--repetition-penalty", "inf"], "inf is no finite number"),
        (["allocate", "p", "-o", "x.json", "--target-bits", "nan"], "nan is no finite number"),
        (["quantize", MODEL, "-o", "x", "--recipe", "gptq-w4", "--set", "solver.damping=.nan"], "solver.damping"),
        (["quantize", MODEL, "-o", "x", "--recipe", "gptq-w4", "--set", "solver.affinity_power=.inf"], "solver.affinity_power"),
        (["evaluate", MODEL, "--text", "nothing.txt"], "no such file: nothing.txt"),
        (["evaluate", MODEL, "--json", "no/such/dir/x.json"], "no such directory"),
        (["drift", MODEL, "--samples", "-3"], "--samples"),
        (["profile", MODEL, "-o", "p", "--widths", "2;3"], "--widths 2;3"),
        (["quantize", MODEL, "-o", "x", "--seed", "-1"], "--seed"),
    ],
)
def test_arguments_are_checked_first(arguments: list[object], named: str, moebit: Moebit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch is imported: here, before anything of moebit's that would do the work is asked for."""
    import moebit as package

    def asked(name: str) -> None:
        raise AssertionError(f"moebit.{name} was asked for")

    for name in ("inspect", "quantize", "evaluate", "generate", "sample", "allocate", "drift", "profile"):
        monkeypatch.delattr(package, name, raising=False)
    monkeypatch.setattr(package, "__getattr__", asked)
    run = moebit(*arguments)
    assert (run.returncode, run.stdout) == (2, ""), run.stderr
    assert named in run.stderr
    assert len(run.stderr.splitlines()) == 1, "one sentence"


def test_memory_that_runs_out_is_said(moebit: Moebit, monkeypatch: pytest.MonkeyPatch) -> None:
    import moebit as package

    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")):

        def fails(*arguments: object, error: Exception = error, **options: object) -> None:
            raise error

        monkeypatch.setattr(package, "quantize", fails)
        run = moebit("quantize", MODEL, "-o", "x", "--recipe", "rtn-w4")
        assert run.returncode == 3
        assert "no memory left" in run.stderr
        assert "--resume" in run.stderr


def test_sample_writes_calibration_text(moebit: Moebit, tmp_path: Path) -> None:
    out, told = tmp_path / "own.jsonl", tmp_path / "told.json"
    run = moebit("sample", MODEL, "-o", out, "--kind", "self", "--sequences", 2, "--length", 16, "--json", told)
    assert run.returncode == 0, run.stderr
    result = json.loads(told.read_text())
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(row["input_ids"]) for row in rows] == [16, 16]
    assert all(row["text"] for row in rows)
    assert f"perplexity {result['perplexity']:.2f}" in run.stdout
    assert f"{result['sigma']:.4f}" in run.stdout
    again = moebit("sample", MODEL, "-o", out, "--kind", "self", "--sequences", 2, "--length", 16)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
