"""Names from strangers on the terminal: no markup is read in them, and nothing in them reaches a terminal as a command."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import moebit as package
from moebit.cli import terminal
from moebit.cli.screens.evaluation import show_comparison, show_evaluation, show_tasks
from moebit.cli.screens.generation import show_generation
from moebit.cli.screens.model import show_activations, show_engines, show_structure
from moebit.cli.screens.plan import show_plan
from moebit.cli.screens.profiling import show_adaptation, show_allocation, show_drift, show_profile
from moebit.cli.screens.result import show_result
from moebit.cli.screens.sample import show_sample
from moebit.cli.screens.verification import show_verification
from tests.cli.test_cli import MODEL, TEXTS, Moebit, moebit  # noqa: F401 - the fixture

NAMES = (
    "x[/bold]y",
    "[red]*.[qk]_proj",
    "[link=x]a[/link]",
    ":smile:",
    "back\\[slash\\",
    "\x1b[31mred\x1b]0;title\x07",
    "a\rb\x9b2J",
)
REVERSED = "name\u202egnp.exe"


def shown(name: str) -> str:
    """How the name has to appear: as it is, but with what a terminal obeys written out."""
    return "".join(f"\\x{ord(c):02x}" if ord(c) < 32 or 127 <= ord(c) < 160 else f"\\u{ord(c):04x}" if c == "\u202e" else c for c in name)


def test_safe() -> None:
    assert terminal.safe("a\x1b[1mb\x00\x9b\u202e\ud800\nc") == "a\\x1b[1mb\\x00\\x9b\\u202e\\ud800\\x0ac"
    assert terminal.safe("a\n\tb\r", lines=True) == "a\n\tb\\x0d"
    for fine in ("plain", "Ünïcödé 漢字\u3000\u00a0", "👩\u200d🔬", "[bold]"):
        assert terminal.safe(fine) == fine


@dataclass
class Bag:
    """Any result: what a screen asks for."""

    values: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return self.values[name]


def engines(name: str) -> dict[str, Any]:
    return {name: {"runs": True, "notes": [name]}, "b": {"runs": False, "reasons": [name, name]}}


def activations(name: str) -> dict[str, Any]:
    grid = {"bits": 4, "symmetric": True, "clip": 1.0}
    return {
        "inputs": grid, "attention": {**grid, "modules": 3}, "transforms": {"kind": name, "count": 2},
        "inputs_only": {name: name}, "untransformed": {name: name, "b": name},
    }  # fmt: skip


def plan(name: str) -> dict[str, Any]:
    return {
        "size_bytes": 1, "average_bits": 4.0, "quantized_linears": 1, "quantized_experts_modules": 1, "peak_memory_bytes": 5, "seconds": 1,
        "memory": 4, "engines": engines(name), "kept": {"a": name}, "kept_as_stored": [name], "unquantized_expert_share": 0.1,
        "activations": activations(name), "original": name, "other_group_sizes": {name: 32},
    }  # fmt: skip


def structure(name: str) -> dict[str, Any]:
    return {
        "model": name, "architecture": name, "parameters": 10, "size_bytes": 1, "layers": 1, "moe_layers": 1, "experts": 2, "router": name,
        "expert_intermediate_size": 1, "hidden_size": 1, "top_k": 1, "shared_experts": False, "shipped": {"scheme": name, "read_as": name},
        "parts": {name: {"parameters": 10, "bytes": 1}}, "not_in_model": [name], "not_in_model_bytes": 1,
        "quantized": {"format": name, "average_bits": 4.0, "engines": engines(name), "activations": activations(name)},
    }  # fmt: skip


def evaluation(name: str) -> dict[str, Any]:
    row = {
        "tokens": 1,
        "perplexity": 1.0,
        "bits_per_byte": 1.0,
        "kl": 0.0,
        "top1_agreement": 1.0,
        "routing_exact": 1.0,
        "routing_overlap": 1.0,
    }
    return {"model": name, "reference": name, "size_bytes": 1, "average_bits": 4.0, "texts": {name: row}}


def tasks(name: str) -> dict[str, Any]:
    return {name: {"items": 3, "metrics": {name: {"score": 0.5, "interval": [0.4, 0.6]}}}}


def comparison(name: str) -> dict[str, Any]:
    row = {"model": name, "made_by": name, "size_bytes": 1, "bits_per_parameter": 4.0, "refused": name, "texts": {}}
    return {"models": [row]}


def sample(name: str) -> dict[str, Any]:
    layer = {"sigma": 0.1, "std": 0.1, "tokens_per_expert": {"min": 1, "median": 1, "max": 1}, "unseen": 0}
    settings = {"sequences": 1, "length": 8, "kind": name}
    return {
        **layer, "settings": settings, "tokens_per_second": 1.0, "perplexity": 2.0, "distinct_4grams": 1.0,
        "per_layer": [{**layer, "layer": name}],
    }  # fmt: skip


def generated(name: str) -> Bag:
    facts = {"decode": 1.0, "prompt_tokens": 1, "prefill": 1.0, "tokens": [1], "weights_bytes": 1, "resident_bytes": 1}
    run = Bag({"model": name, "text": name, "products": [name], **facts})
    return Bag({"model": run, "reference": run, "differ_at": 2})


def quantized(name: str) -> Bag:
    recipe = Bag({"calibration": Bag({"kind": name, "text_share": 0})})
    facts = {
        "size_before": 2,
        "size_after": 1,
        "seconds": 1,
        "unseen_experts": 1,
        "fallbacks": 1,
        "skipped": {name: 1},
        "already": False,
        "texts": {name: name},
    }
    return Bag({"plan": Bag({"recipe": recipe, "average_bits": 4.0}), "path": Path(name), **facts})


FINDINGS = {"state": "damaged", "files": 1, "tensors": 1, "bytes": 1, "durable": {"layers": 1, "of": 2, "rest": True}}
SCREENS = {
    "structure": lambda name: show_structure(structure(name)),
    "plan": lambda name: show_plan(plan(name), 3),
    "engines": lambda name: show_engines(engines(name)),
    "activations": lambda name: show_activations(activations(name)),
    "evaluation": lambda name: show_evaluation(evaluation(name)),
    "tasks": lambda name: show_tasks(tasks(name)),
    "comparison": lambda name: show_comparison(comparison(name)),
    "generation": lambda name: show_generation(name, generated(name)),
    "result": lambda name: show_result(quantized(name), text_given=True),
    "sample": lambda name: show_sample(Path(name), sample(name)),
    "verification": lambda name: show_verification(
        {**FINDINGS, "output": name, "findings": [{"where": name, "what": name, "remedy": name}]}
    ),
    "profile": lambda name: show_profile(
        Bag({"sets": {name: {"tokens": 1, "errors": True}}, "path": Path(name), "experts": [], "linears": []})
    ),
    "drift": lambda name: show_drift(
        {"texts": {name: {"nearest": name, "distance": 0.1, "noise": 0.1, "drifted": True}}, "sets": {name: 0.1}}
    ),
    "allocation": lambda name: show_allocation(Bag({"counts": {name: {4: 2}}, "average_bits": 4.0}), Path(name)),
    "adaptation": lambda name: show_adaptation(
        Path(name), Bag({"channels": 1, "raised": {name: [1]}, "path": Path(name), "bytes_written": 1, "seconds": 1.0, "noted": 0.5})
    ),
    "nothing adapted": lambda name: show_adaptation(Path(name), Bag({"channels": 0})),
}


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", [*NAMES, REVERSED])
def test_screens(screen: str, name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    for console in (Console(width=1000), Console(width=1000, force_terminal=True, color_system=None)):
        monkeypatch.setattr(terminal, "out", console)
        SCREENS[screen](name)
        printed = capfd.readouterr().out
        assert shown(name) in printed
        assert not {c for c in printed if c != "\n" and (ord(c) < 32 or 127 <= ord(c) < 160 or c == "\u202e")}


@pytest.mark.parametrize("name", [*NAMES, REVERSED, "no[/x]where"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "NAME"),
        ("inspect", MODEL, "--recipe", "NAME"),
        ("inspect", MODEL, "--memory", "NAME"),
        ("inspect", MODEL, "--NAME"),
        ("NAME",),
        ("recipes", "NAME"),
        ("quantize", MODEL, "-o", "x", "--set", "NAME"),
        ("quantize", MODEL, "-o", "x", "--set", "NAME=1"),
        ("quantize", MODEL, "-o", "x", "--recipe", "rtn-w4", "--plan", "NAME"),
        ("quantize", "NAME", "-o", "x", "--recipe", "rtn-w4"),
        ("evaluate", MODEL, "--text", "NAME"),
        ("evaluate", MODEL, "--json", "no/NAME/x"),
        ("generate", "NAME", "--prompt", "a"),
        ("verify", "NAME"),
        ("report", "NAME"),
        ("profile", "NAME", "-o", "p", "--text", TEXTS / "wiki.tune.txt"),
        ("allocate", "NAME", "-o", "x.json", "--target-bits", "3"),
        ("allocate", "p", "-o", "x.json", "--target-bits", "3", "--ladder", "NAME"),
        ("adapt", "NAME", "--undo"),
        ("drift", "NAME", "--text", TEXTS / "wiki.tune.txt"),
        ("sample", MODEL, "-o", "NAME"),
        ("compare", MODEL, "NAME", "-o", "no/NAME/x.html", "--text", TEXTS / "wiki.tune.txt"),
    ],
    ids=lambda arguments: " ".join(Path(str(word)).name for word in arguments),
)
def test_refusals(arguments: tuple[object, ...], name: str, moebit: Moebit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    run = moebit(*(str(word).replace("NAME", name) for word in arguments))
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    assert not {c for c in run.stdout + run.stderr if c != "\n" and (ord(c) < 32 or 127 <= ord(c) < 160 or c == "\u202e")}


def test_an_output_with_a_hostile_name(moebit: Moebit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """From quantizing to reporting: the work is done, and every verb names the output as it is called."""
    monkeypatch.chdir(tmp_path)
    name = "out[/x]\x1b[31m"
    ignored = "*.[qk]_proj"
    run = moebit("quantize", MODEL, "-o", name, "--recipe", "rtn-w4", "--set", f"weights.ignore=['{ignored}']")
    assert run.returncode == 0, run.stderr
    assert shown(name) in run.stdout
    for verb in ("inspect", "verify", "report"):
        run = moebit(verb, name)
        assert run.returncode == 0, run.stderr
        assert shown(name) in run.stdout
        assert "\x1b" not in run.stdout
    run = moebit("evaluate", name, "--text", f"[b]t[/c]={TEXTS / 'wiki.tune.txt'}", "--window", 16, "--max-tokens", 32)
    assert run.returncode == 0, run.stderr
    assert "[b]t[/c]" in run.stdout
    run = moebit("inspect", MODEL, "--recipe", Path("p[/b].yaml"))
    assert (run.returncode, "p[/b].yaml" in run.stderr) == (2, True)
    run = moebit("quantize", MODEL, "-o", "y", "--recipe", "rtn-w4", "--set", f"weights.ignore=['{ignored}']", "--dry-run")
    assert ignored in run.stdout


def test_json_on_the_terminal_is_plain(moebit: Moebit, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(package, "inspect", lambda *arguments, **options: {"name\x9b": ["\x1b[31m", REVERSED, ":smile:"]})
    run = moebit("inspect", MODEL, "--json", "-")
    assert run.stdout.isascii()
    assert json.loads(run.stdout) == {"name\x9b": ["\x1b[31m", REVERSED, ":smile:"]}


def test_messages_cannot_pass_for_others(moebit: Moebit) -> None:  # noqa: F811
    run = moebit("verify", "x\nError: all is well")
    assert [line.startswith("Error:") for line in run.stderr.splitlines()][:2] == [True, False]


def test_bugs_are_reported_without_their_control_characters(moebit: Moebit, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def fails(*arguments: object, **options: object) -> None:
        raise ValueError("x[/bold]\x1b[2J")

    monkeypatch.setattr(package, "verify", fails)
    run = moebit("verify", "x")
    assert run.returncode == 1
    assert "x[/bold]\\x1b[2J" in run.stderr
    assert "\x1b" not in run.stderr
    assert "this is a bug in moebit" in run.stderr
