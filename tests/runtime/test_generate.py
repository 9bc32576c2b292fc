"""`moebit.generate` against transformers' own generation, and its refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import moebit
from moebit.errors import BadInputError
from moebit.runtime.generate import _first_difference
from tests.runtime.test_load import load
from tests.support.models import ARCHITECTURES, Checkpoints, quiet
from tests.support.outputs import Outputs, byte_tokenizer

OLMOE = ARCHITECTURES["olmoe"]
# the tiny models know 128 tokens: letters of the byte tokenizer below that
PROMPT = "0123456789"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, checkpoints: Checkpoints, outputs: Outputs) -> tuple[Path, Path]:
    """(packed, original), both with a tokenizer."""
    directory = tmp_path_factory.mktemp("generate")
    for name, source in (("packed", outputs.rtn(OLMOE, mixed=True)), ("original", checkpoints.path(OLMOE))):
        shutil.copytree(source, directory / name)
        byte_tokenizer().save_pretrained(directory / name)
    return directory / "packed", directory / "original"


def test_what_transformers_would_write(models: tuple[Path, Path]) -> None:
    packed, original = models
    with quiet():
        result = moebit.generate(packed, prompt=PROMPT, against=original, max_new_tokens=12)
        ids = byte_tokenizer()(PROMPT, return_tensors="pt").input_ids
        wanted = [load(path).generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :] for path in models]
    assert result.reference is not None
    assert result.model.tokens == wanted[0].tolist()
    assert result.reference.tokens == wanted[1].tolist()
    same = [a == b for a, b in zip(result.model.tokens, result.reference.tokens, strict=False)]
    assert result.differ_at == (same.index(False) if False in same else None)
    assert result.model.text == byte_tokenizer().decode(wanted[0], skip_special_tokens=True)
    assert result.model.prompt_tokens == len(PROMPT)
    assert (result.model.products, result.reference.products) == (("auto",), ())
    assert result.model.weights_bytes < result.reference.weights_bytes < result.reference.resident_bytes
    assert min(result.model.prefill, result.model.decode or 0) > 0


def test_the_seed_decides_and_nothing_else_is_touched(models: tuple[Path, Path]) -> None:
    torch.manual_seed(5)
    with quiet():
        drawn = [
            moebit.generate(models[0], prompt=PROMPT, max_new_tokens=12, temperature=1.5, seed=seed, path="float") for seed in (0, 0, 1)
        ]
    following = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(following, torch.rand(1))
    assert drawn[0].model.tokens == drawn[1].model.tokens != drawn[2].model.tokens


def test_first_difference() -> None:
    assert _first_difference([1, 2], [1, 2]) is None
    assert _first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert _first_difference([1, 2], [1]) == 1


def test_refusals(models: tuple[Path, Path], outputs: Outputs, tmp_path: Path) -> None:
    packed = models[0]
    for match, arguments in (
        ("no tokenizer", {"model": outputs.rtn(OLMOE, mixed=True)}),
        ("prompt is empty", {"prompt": ""}),
        ("0 new tokens", {"max_new_tokens": 0}),
        ("temperature nan", {"temperature": float("nan")}),
        ("temperature -1", {"temperature": -1.0}),
        ("temperature inf", {"temperature": float("inf")}),
        (r"the prompt has \d+ tokens, and the context of .* shorten", {"prompt": "a b c " * 4000}),
        (r"ask for \d+ new tokens or fewer", {"max_new_tokens": 10**9}),
        ("'fast'", {"path": "fast"}),
        *([] if torch.cuda.is_available() else [("--device cuda: this torch sees no CUDA device", {"device": "cuda"})]),
        ("unfinished", {"model": "out.partial"}),
        ("no such directory", {"model": str(tmp_path / "nowhere")}),
    ):
        with pytest.raises(BadInputError, match=match):
            moebit.generate(**{"model": packed, "prompt": PROMPT, **arguments})  # type: ignore[arg-type]


def test_the_verb(models: tuple[Path, Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from moebit import cli
    from moebit.cli import terminal

    monkeypatch.setattr(terminal, "out", Console(width=200))
    arguments = ["moebit", "generate", str(models[0]), "--prompt", PROMPT, "--max-new-tokens", "3", "--against", str(models[1])]
    for more in ([], ["--json", "-"]):
        monkeypatch.setattr("sys.argv", [*arguments, *more])
        with quiet(), pytest.raises(SystemExit, match="0"):
            cli.main()
        shown = capfd.readouterr().out
        if more:
            assert len(json.loads(shown)["model"]["tokens"]) == 3
        else:
            assert PROMPT in shown
            assert "tokens/s" in shown
            assert "they differ" in shown or "both wrote the same" in shown
    monkeypatch.setattr("sys.argv", [*arguments, "--greedy", "--temperature", "1"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
