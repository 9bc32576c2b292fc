"""`compare`: numbers are those of `evaluate`, and what did not load as it should is named and not scored."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

import moebit
from moebit.errors import BadInputError
from moebit.evaluate.judging import judge
from moebit.report.compare import compare_page, labels
from tests.report.test_page import Page
from tests.support.models import ARCHITECTURES, Checkpoints, load_reference
from tests.support.outputs import Outputs, read_config, token_file

MIXTRAL = ARCHITECTURES["mixtral"]
WINDOW = 16


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("texts")
    return {name: str(token_file(directory / f"{name}.jsonl", 6 * WINDOW, seed)) for seed, name in enumerate(("one", "two"))}


def rewritten(original: Path, at: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], config: dict[str, Any]) -> Path:
    """A copy of a checkpoint, of one file, with other tensors and further configuration."""
    shutil.copytree(original, at, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "moebit.json"))
    tensors = {name: value for file in sorted(original.glob("*.safetensors")) for name, value in load_file(file).items()}
    save_file(change(tensors), at / "model.safetensors", {"format": "pt"})
    (at / "config.json").write_text(json.dumps(read_config(original) | config))
    return at


@pytest.fixture(scope="module")
def theirs(outputs: Outputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compressed-tensors library's own output: its compressor on every expert and every projection of attention, one scale a row."""
    weights = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    library = BaseCompressor.get_value_from_registry("pack-quantized")

    def compressed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for name, value in tensors.items():
            if "experts" not in name and "_proj.weight" not in name:
                made[name] = value
                continue
            scale = value.float().abs().amax(1, keepdim=True) / 7
            parts = library.compress({"weight": value, "weight_scale": scale.to(value.dtype)}, scheme)
            made |= {f"{name.removesuffix('.weight')}.{leaf}": part.contiguous() for leaf, part in parts.items()}
        return made

    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group},
                    "ignore": ["lm_head", "re:.*gate$"]}  # fmt: skip
    at = tmp_path_factory.mktemp("theirs") / "theirs"
    return rewritten(outputs.checkpoints.path(MIXTRAL), at, compressed, {"quantization_config": quantization})


def test_numbers_are_those_of_evaluate(outputs: Outputs, theirs: Path, text: dict[str, str], tmp_path: Path) -> None:
    original = outputs.checkpoints.path(MIXTRAL)
    four, mixed = outputs.rtn(MIXTRAL), outputs.rtn(MIXTRAL, mixed=True, symmetric=False)
    found = moebit.compare(original, [four, mixed, theirs], tmp_path / "c.html", text=text, window=WINDOW)
    parameters = sum(p.numel() for p in load_reference(MIXTRAL, original).model.parameters())
    for path, row in zip((four, mixed, theirs), found["models"], strict=True):
        alone = moebit.evaluate(path, against=original, text=text, window=WINDOW)
        assert row["refused"] is None
        assert row["texts"] == alone["texts"]
        assert row["size_bytes"] == sum(file.stat().st_size for file in path.glob("*.safetensors"))
        assert row["bits_per_parameter"] == pytest.approx(8 * row["size_bytes"] / parameters)
    assert [row["made_by"] for row in found["models"]] == ["moebit", "moebit", "compressed-tensors"]
    assert all(0 < row["texts"]["one"]["kl"] < 0.1 for row in found["models"])
    assert found["reference"]["texts"]["two"]["perplexity"] == pytest.approx(
        moebit.evaluate(original, text=text, window=WINDOW)["texts"]["two"]["perplexity"]
    )
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    said = Page(page)
    assert all(reference.startswith("data:") for reference in said.references)
    assert "<script" not in page
    kl = [sum(one["kl"] for one in row["texts"].values()) / 2 for row in found["models"]]
    assert all(f"{1000 * value:.3g}" in said.text for value in kl)
    assert page.count("<title>") == 1 + 3 * 3, "of the page, and each output on both texts and on their mean"
    assert "read by moebit from its files" in said.text


def _without_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    new = {".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
    return {next((name.replace(a, b) for a, b in new.items() if a in name), name): value for name, value in tensors.items()}


def _noisy(share: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: value + share * value.std() * torch.randn(value.shape, generator=draw).to(value.dtype) if "experts" in name else value
            for name, value in tensors.items()
        }

    return change


def test_what_is_refused(outputs: Outputs, theirs: Path, text: dict[str, str], tmp_path: Path) -> None:
    original = outputs.checkpoints.path(MIXTRAL)
    mystery = {"quantization_config": {"quant_method": "mystery"}}

    def plain_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = {k: v for file in original.glob("*.safetensors") for k, v in load_file(file).items()}
        kept = {k: v for k, v in tensors.items() if "experts" not in k}
        return kept | {k: v for k, v in whole.items() if "experts" in k}

    cases = {
        "the experts under names that the model class does not know": (
            rewritten(original, tmp_path / "names", _without_names, {}), "random numbers"),
        "quantized by name only, unknown to moebit": (
            rewritten(original, tmp_path / "mystery", lambda t: t, mystery), "100% of the expert parameters are in full precision"),
        "attention quantized, experts walked past, readable by moebit": (
            rewritten(theirs, tmp_path / "past", plain_experts, {}), "100% of the expert parameters are in full precision"),
        "unknown to moebit, the experts random": (
            rewritten(original, tmp_path / "random", _noisy(5.0), mystery), "nothing like the original's"),
        "a format that nobody here reads": (
            rewritten(original, tmp_path / "gptq", lambda t: t, {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
            "neither moebit"),
    }  # fmt: skip
    found = moebit.compare(original, [path for path, _ in cases.values()], tmp_path / "c.html", text=text, window=WINDOW)
    for (case, (_, said)), row in zip(cases.items(), found["models"], strict=True):
        assert row["refused"] is not None, case
        assert said in row["refused"], (case, row["refused"])
        assert row["texts"] == {}, case
    page = Page((tmp_path / "c.html").read_text(encoding="utf-8"))
    assert page.text.count("is not scored") == len(cases)


@pytest.mark.slow
def test_what_only_transformers_reads_is_scored(outputs: Outputs, text: dict[str, str], tmp_path: Path) -> None:
    """Against a computation of its own: float64 log-probabilities of both models."""
    original = outputs.checkpoints.path(MIXTRAL)
    path = rewritten(original, tmp_path / "noisy", _noisy(0.05), {"quantization_config": {"quant_method": "mystery"}})
    found = judge(path, original, text, window=WINDOW)
    assert found.refused is None
    plain = rewritten(path, tmp_path / "plain", lambda t: t, {"quantization_config": None})
    mine, theirs = (load_reference(MIXTRAL, at).model for at in (plain, original))
    ids = torch.tensor(json.loads(Path(text["one"]).read_text())["input_ids"]).view(-1, WINDOW)
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for model in (theirs, mine))
    nats = -q.gather(2, ids[:, 1:, None]).mean()
    assert found.texts["one"]["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert found.texts["one"]["perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)


def test_labels() -> None:
    assert labels(["a/x", "b/y"]) == ["x", "y"]
    assert labels(["a/x", "b/x", "c/y"]) == ["a/x", "b/x", "c/y"]
    assert len(set(labels(["a", "a"]))) == 2


def test_a_page_of_nothing_but_refusals() -> None:
    reference = {"model": "m", "size_bytes": 10, "texts": {"a": {"tokens": 1, "perplexity": 2.0}}}
    row = {"model": "<b>", "made_by": "x", "size_bytes": 5, "bits_per_parameter": 4.0, "refused": "no", "remarks": [], "texts": {}}
    assert "&lt;b&gt;" in compare_page({"reference": reference, "models": [row]})


def test_bad_input(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model = checkpoints.path(MIXTRAL)
    for models, text, output, said in (
        ([], {"a": "b"}, None, "at least one MODEL"),
        ([model], {}, None, "at least one --text"),
        ([model], {"a": "b"}, tmp_path / "no" / "c.html", "no such directory"),
    ):
        with pytest.raises(BadInputError, match=said):
            moebit.compare(model, models, output, text=text)
