"""The verbs of profiles and switching on the command line, one after the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_cli import Moebit, moebit  # noqa: F401 - the fixture
from tests.support.models import ARCHITECTURES, Checkpoints
from tests.support.outputs import token_file

LENGTH = 24


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    return [f"--text={name}={token_file(tmp_path / f'{name}.jsonl', 16 * LENGTH, seed=seed)}" for seed, name in enumerate(("a", "b"))]


def test_profile_allocate_quantize_drift_adapt(
    moebit: Moebit,  # noqa: F811
    checkpoints: Checkpoints,
    texts: list[str],
    tmp_path: Path,
) -> None:
    model, profile, plan, out = checkpoints.path(ARCHITECTURES["mixtral"]), tmp_path / "p", tmp_path / "plan.json", tmp_path / "out"
    grid = ("--set", "weights.group_size=32", "--recipe", "rtn-w3")
    windows = ("--samples", 4, "--length", LENGTH)
    run = moebit("profile", model, "-o", profile, *texts[:1], *grid, *windows)
    assert run.returncode == 0, run.stderr
    run = moebit("profile", model, "-o", profile, *texts[1:], *grid, *windows)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("measured") == 2

    run = moebit("allocate", profile, "-o", plan, "--target-bits", 4.2, "--method", "knapsack", "--plots", tmp_path / "plots")
    assert run.returncode == 0, run.stderr
    assert f"{json.loads(plan.read_text())['made']['average_bits']:.4f} bits" in run.stdout
    assert (tmp_path / "plots" / "bits.svg").exists()

    run = moebit("quantize", model, "-o", out, *grid, "--plan", plan, "--set", "switching.share=0.1", "--profile", profile, *texts)
    assert run.returncode == 0, run.stderr
    run = moebit("drift", out, *texts[:1], *windows, "--json", "-")
    assert run.returncode == 0, run.stderr
    assert set(json.loads(run.stdout)["texts"]) == {"a"}
    run = moebit("drift", out, *texts, *windows)
    assert run.returncode == 0, run.stderr
    assert "nearest other set" in run.stdout

    run = moebit("adapt", out, *texts[:1], *windows)
    assert (run.returncode, "--in-place" in run.stderr) == (2, True)
    run = moebit("adapt", out, *texts[:1], *windows, "--in-place")
    assert run.returncode == 0, run.stderr
    assert "channels of" in run.stdout
    assert moebit("verify", out).returncode == 0
    run = moebit("adapt", out, "--undo")
    assert (run.returncode, "as it was" in run.stdout) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("allocate", "nowhere", "-o", "x.json", "--target-bits", "3"), "no profile.json"),
        (("allocate", "nowhere", "-o", "x.json", "--target-bits", "3", "--ladder", "2,x"), "--ladder 2,x"),
        (("drift", "nowhere", "--text", __file__), "no moebit.json"),
        (("adapt", "nowhere", "--undo"), "nothing to take back"),
    ],
)
def test_refusals(moebit: Moebit, arguments: tuple[str, ...], says: str) -> None:  # noqa: F811
    run = moebit(*arguments)
    assert run.returncode == 2
    assert says in run.stderr


def test_help_has_examples(moebit: Moebit) -> None:  # noqa: F811
    for verb in ("profile", "allocate", "adapt", "drift"):
        assert f"moebit {verb}" in moebit(verb, "--help").stdout
