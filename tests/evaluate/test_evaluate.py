"""`evaluate` against a naive evaluation of whole models in transformers: float64 logarithms, one token after the other."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moebit
from moebit.errors import BadInputError
from tests.support.models import ARCHITECTURES, VOCABULARY, Architecture, Checkpoints, Reference, load_reference, random_model, save
from tests.support.outputs import Outputs, byte_tokenizer, dequantized, quantization, stored_tensors, token_file, with_weights

WINDOW = 16
ALWAYS = {"tokens", "perplexity", "bits_per_byte"}
COMPARED = {"kl", "top1_agreement", "routing_exact", "routing_overlap", "per_layer"}
MODELS = [ARCHITECTURES[name] for name in ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")]
MIXTRAL = ARCHITECTURES["mixtral"]


@dataclass
class Seen:
    """One model on one window: log-probabilities [L, V] in float64, chosen experts [L, k] of every MoE layer."""

    log_probabilities: np.ndarray
    experts: dict[int, np.ndarray] = field(default_factory=dict)


@torch.no_grad()
def look(reference: Reference, window_L: Tensor) -> Seen:
    chosen: dict[int, np.ndarray] = {}

    def note(layer: int, ids: Tensor) -> None:
        chosen[layer] = ids.numpy().copy()

    architecture = reference.architecture
    with ExitStack() as stack:
        for index in (i for i, moe in enumerate(architecture.moe) if moe):
            router = reference.layers[index].get_submodule(f"{architecture.block}.{architecture.router}")
            stack.callback(router.register_forward_hook(lambda m, args, out, index=index: note(index, out[2])).remove)
        logits = reference.model(input_ids=window_L[None], use_cache=False).logits[0].double().numpy()
    top = logits.max(1, keepdims=True)
    return Seen(logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True)), chosen)


def naive(model: Reference, reference: Reference | None, ids: list[int], window: int = WINDOW) -> dict[str, Any]:
    """What `evaluate` says about one text."""
    nats, divergence, agree, scored = 0.0, 0.0, 0, 0
    exact: dict[int, list[float]] = {i: [] for i, moe in enumerate(model.architecture.moe) if moe}
    overlap: dict[int, list[float]] = {i: [] for i in exact}
    for start in range(0, len(ids) - window + 1, window):
        tokens = torch.tensor(ids[start : start + window])
        mine, theirs = look(model, tokens), look(reference, tokens) if reference else None
        for position in range(1, window):
            q = mine.log_probabilities[position - 1]
            scored += 1
            nats -= q[int(tokens[position])]
            if theirs:
                p = theirs.log_probabilities[position - 1]
                divergence += float(np.sum(np.exp(p) * (p - q)))
                agree += int(p.argmax() == q.argmax())
        for layer in exact if theirs else ():
            for left, right in zip(mine.experts[layer].tolist(), theirs.experts[layer].tolist(), strict=True):  # type: ignore[union-attr]
                exact[layer].append(float(set(left) == set(right)))
                overlap[layer].append(len(set(left) & set(right)) / len(right))
    row: dict[str, Any] = {"tokens": scored, "perplexity": math.exp(nats / scored), "nats": nats}
    if reference:
        row |= {"kl": divergence / scored, "top1_agreement": agree / scored}
        row["per_layer"] = [
            {"layer": i, "routing_exact": float(np.mean(exact[i])), "routing_overlap": float(np.mean(overlap[i]))} for i in exact
        ]
        row |= {key: float(np.mean([one[key] for one in row["per_layer"]])) for key in ("routing_exact", "routing_overlap")}
    return row


def ids_of(file: Path) -> list[int]:
    return json.loads(file.read_text())["input_ids"]  # type: ignore[no-any-return]


def assert_same(row: Mapping[str, Any], wanted: Mapping[str, Any], tolerance: float = 1e-5) -> None:
    for key in (ALWAYS | COMPARED) & set(wanted) - {"bits_per_byte", "per_layer"}:
        assert row[key] == pytest.approx(wanted[key], rel=tolerance, abs=tolerance), key
    assert len(row.get("per_layer", [])) == len(wanted.get("per_layer", []))
    for mine, theirs in zip(row.get("per_layer", []), wanted.get("per_layer", []), strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance)


# --- the numbers


@pytest.mark.parametrize("architecture", MODELS, ids=str)
def test_against_a_reference(architecture: Architecture, checkpoints: Checkpoints, outputs: Outputs, tmp_path: Path) -> None:
    text = token_file(tmp_path / "t.jsonl", 5 * WINDOW + 7)  # what does not fill a window is left out
    original, output = checkpoints.path(architecture), outputs.rtn(architecture, bits=2)
    result = moebit.evaluate(output, against=original, text={"t": text}, window=WINDOW)
    reference = checkpoints.reference(architecture)
    model = Reference(architecture, with_weights(architecture, original, output), reference.layers_name)
    wanted = naive(model, reference, ids_of(text))
    assert wanted["tokens"] == 5 * (WINDOW - 1)
    assert wanted["kl"] > 1e-3
    assert 0 < wanted["routing_overlap"] < 1  # two bits: there is something to see
    assert_same(result["texts"]["t"], wanted)


def test_alone(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """A full-precision model without a reference; `max_tokens` and `window`."""
    text = token_file(tmp_path / "t.jsonl", 300)
    path = checkpoints.path(MIXTRAL)
    row = moebit.evaluate(path, text={"t": text}, window=24, max_tokens=100)["texts"]["t"]
    wanted = naive(checkpoints.reference(MIXTRAL), None, ids_of(text)[:100], window=24)
    assert wanted["tokens"] == 4 * 23
    assert set(row) == ALWAYS
    assert_same(row, wanted)


def test_a_model_is_like_itself(checkpoints: Checkpoints, outputs: Outputs, tmp_path: Path) -> None:
    text = token_file(tmp_path / "t.jsonl", 4 * WINDOW)
    for path in (checkpoints.path(MIXTRAL), outputs.rtn(MIXTRAL, mixed=True)):
        row = moebit.evaluate(path, against=path, text={"t": text}, window=WINDOW)["texts"]["t"]
        assert row["kl"] == pytest.approx(0, abs=1e-12)
        assert (row["top1_agreement"], row["routing_exact"], row["routing_overlap"]) == (1, 1, 1)
        assert row["per_layer"] == [{"layer": layer, "routing_exact": 1.0, "routing_overlap": 1.0} for layer in (0, 1)]


def test_several_texts_at_once(checkpoints: Checkpoints, outputs: Outputs, tmp_path: Path) -> None:
    """Of different lengths, in one pass through the models: what each alone gives."""
    texts = {"b": token_file(tmp_path / "b.jsonl", 4 * WINDOW + 3, seed=1), "a": token_file(tmp_path / "a.jsonl", WINDOW, seed=2)}
    model, reference = outputs.rtn(MIXTRAL, bits=2), checkpoints.path(MIXTRAL)
    together = moebit.evaluate(model, against=reference, text=texts, window=WINDOW)["texts"]
    assert list(together) == ["b", "a"]
    for name, file in texts.items():
        alone = moebit.evaluate(model, against=reference, text={name: file}, window=WINDOW)["texts"][name]
        assert_same(together[name], alone, 1e-6)


@pytest.mark.parametrize("memory", [2 * 2**20, 2**16])
def test_little_memory(memory: int, checkpoints: Checkpoints, outputs: Outputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations on disk, experts one at a time: the same numbers, and nothing left behind."""
    text = token_file(tmp_path / "t.jsonl", 50 * WINDOW)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(tempfile, "tempdir", str(work))
    options: dict[str, Any] = {"against": checkpoints.path(MIXTRAL), "text": {"t": text}, "window": WINDOW}
    plenty = moebit.evaluate(outputs.rtn(MIXTRAL, bits=2), **options)
    little = moebit.evaluate(outputs.rtn(MIXTRAL, bits=2), memory=memory, **options)
    assert_same(little["texts"]["t"], plenty["texts"]["t"], 1e-6)
    assert not list(work.iterdir())


# --- bits per byte


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens are bytes."""
    path = save(random_model(MIXTRAL, vocab_size=257), tmp_path_factory.mktemp("bytes") / "model")
    byte_tokenizer().save_pretrained(path)
    return path


ASCII = "the quick brown fox jumps over the lazy dog again, and again. "
MANY_BYTES = "naïve coöperation — 你好，世界 – 🙂 und Straße\n"


# A window that begins inside a character may count that character's bytes a little otherwise, but not all windows to one side.
@pytest.mark.parametrize(("text", "tolerance"), [(ASCII, 1e-5), (MANY_BYTES, 0.01)], ids=["ascii", "many bytes"])
def test_bits_per_byte(text: str, tolerance: float, with_tokenizer: Path, tmp_path: Path) -> None:
    """Of the bytes that the scored tokens stand for."""
    file = tmp_path / "t.txt"
    file.write_text(text * 12, encoding="utf-8")
    row = moebit.evaluate(with_tokenizer, text={"t": file}, window=3 * WINDOW)["texts"]["t"]
    ids = byte_tokenizer()(text * 12, add_special_tokens=False)["input_ids"]
    assert len(ids) == len((text * 12).encode())
    wanted = naive(load_reference(MIXTRAL, with_tokenizer), None, ids, window=3 * WINDOW)
    assert_same(row, wanted)
    assert row["bits_per_byte"] == pytest.approx(wanted["nats"] / math.log(2) / wanted["tokens"], rel=tolerance)


def test_no_bytes_without_a_tokenizer(checkpoints: Checkpoints, tmp_path: Path) -> None:
    text = token_file(tmp_path / "t.jsonl", WINDOW)
    assert moebit.evaluate(checkpoints.path(MIXTRAL), text={"t": text}, window=WINDOW)["texts"]["t"]["bits_per_byte"] is None


# --- the document


def test_document(checkpoints: Checkpoints, outputs: Outputs, tmp_path: Path) -> None:
    """The keys of `--json`, in their order, and sizes counted from the files."""
    original, output = checkpoints.path(MIXTRAL), outputs.rtn(MIXTRAL, symmetric=False, mixed=True)
    text = token_file(tmp_path / "t.jsonl", WINDOW)
    compared = moebit.evaluate(output, against=original, text={"t": text}, window=WINDOW)
    assert list(compared) == ["model", "reference", "size_bytes", "average_bits", "texts"]
    assert (compared["model"], compared["reference"]) == (str(output), str(original))
    assert json.loads(json.dumps(compared)) == compared
    row = compared["texts"]["t"]
    assert list(row) == [
        "tokens", "perplexity", "bits_per_byte", "kl", "top1_agreement", "routing_exact", "routing_overlap", "per_layer",
    ]  # fmt: skip
    assert all(list(one) == ["layer", "routing_exact", "routing_overlap"] for one in row["per_layer"])

    assert compared["size_bytes"] == sum(file.stat().st_size for file in output.glob("*.safetensors"))
    stored, modules = stored_tensors(output), quantization(output)
    prefixes = tuple(f"{name}." for name in modules)
    packed = sum(t.nbytes for n, t in stored.items() if n.startswith(prefixes) and n.endswith((".codes", ".scale", ".zero_point")))
    weights = sum(matrix.size for matrix in dequantized(output).values())
    assert compared["average_bits"] == pytest.approx(8 * packed / weights, rel=1e-12)

    alone = moebit.evaluate(original, text=[f"x={text}"], window=WINDOW)
    assert alone["reference"] is None
    assert set(alone["texts"]["x"]) == ALWAYS
    assert alone["average_bits"] == 32
    assert alone["size_bytes"] == sum(file.stat().st_size for file in original.glob("*.safetensors"))


# --- refusals


def test_models_that_do_not_belong_together(checkpoints: Checkpoints, tmp_path: Path) -> None:
    text = token_file(tmp_path / "t.jsonl", 64)
    one = checkpoints.path(MIXTRAL)
    others = {
        "architecture": checkpoints.path(ARCHITECTURES["olmoe"]),
        "vocabulary": save(random_model(MIXTRAL, vocab_size=VOCABULARY + 32), tmp_path / "vocabulary"),
        "layers": save(random_model(MIXTRAL, num_hidden_layers=1), tmp_path / "layers"),
    }
    for other in others.values():
        with pytest.raises(BadInputError, match="not the same model") as error:
            moebit.evaluate(one, against=other, text={"t": text}, window=WINDOW)
        assert str(other) in str(error.value)


def test_bad_texts_and_windows(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path, text = checkpoints.path(MIXTRAL), token_file(tmp_path / "short.jsonl", WINDOW - 1)
    with pytest.raises(BadInputError, match="--text"):
        moebit.evaluate(path)
    with pytest.raises(BadInputError, match=r"'short\.jsonl'.*15 tokens.*window of 16"):
        moebit.evaluate(path, text=[str(text)], window=WINDOW)
    with pytest.raises(BadInputError, match="at least 2"):
        moebit.evaluate(path, text=[str(text)], window=1)
    with pytest.raises(BadInputError, match="no such file"):
        moebit.evaluate(path, text=[str(tmp_path / "none.txt")], window=4)
    with pytest.raises(BadInputError, match="twice"):
        moebit.evaluate(path, text=[f"a={text}", f"a={text}"], window=4)
