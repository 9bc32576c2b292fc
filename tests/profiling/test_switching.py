"""Allocation and switching inside `quantize`, then `adapt`, `drift` and the way back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import moebit
from moebit.errors import BadInputError
from moebit.formats.opening import open_checkpoint
from moebit.quantize.report import Result
from moebit.runtime import use
from tests.support.models import ARCHITECTURES, EXPERTS, INTERMEDIATE, Architecture, Checkpoints, Reference, quiet, windows
from tests.support.observer import observed, stopped
from tests.support.outputs import file_bytes, quantization, read_stack, stored_tensors

MIXTRAL, GPT_OSS, NEMOTRON = ARCHITECTURES["mixtral"], ARCHITECTURES["gpt_oss"], ARCHITECTURES["nemotron_h"]
SAMPLES, LENGTH = 8, 24
RECIPE = {
    "weights": {"bits": 3, "group_size": 32},
    "calibration": {"samples": SAMPLES, "seq_len": LENGTH},
    "allocation": {"kind": "fuzzy", "target_bits": 4.2},
    "switching": {"share": 0.1},
}
SIZES = {"samples": 8, "length": LENGTH}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random tokens of two halves of the vocabulary, and of a few tokens alone."""
    folder, result = tmp_path_factory.mktemp("text"), {}
    for name, low, high in (("low", 0, 64), ("high", 64, 128), ("few", 5, 9)):
        ids = torch.randint(low, high, (16 * LENGTH,), generator=torch.Generator().manual_seed(low)).tolist()
        result[name] = folder / f"{name}.jsonl"
        result[name].write_text(json.dumps({"input_ids": ids}) + "\n")
    return result


def quantized(path: Path, out: Path, texts: dict[str, Path], **options: Any) -> Result:
    known = {name: texts[name] for name in ("low", "high")}
    result = moebit.quantize(path, out, **{"recipe": RECIPE, "text": known, **options})
    assert isinstance(result, Result)
    return result


@pytest.fixture(scope="module")
def output(checkpoints: Checkpoints, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(checkpoints.path(MIXTRAL), tmp_path_factory.mktemp("out") / "out", texts).path


@pytest.fixture
def mine(output: Path, tmp_path: Path) -> Path:
    return shutil.copytree(output, tmp_path / "mine")


# --- quantize


def test_quantize_profiles_by_itself(checkpoints: Checkpoints, texts: dict[str, Path], output: Path, tmp_path: Path) -> None:
    """The same as profile, allocate and quantize one after the other; the size is met; the output is whole."""
    path, known = checkpoints.path(MIXTRAL), {name: texts[name] for name in ("low", "high")}
    profile = moebit.profile(path, tmp_path / "p", text=known, recipe=RECIPE, samples=SAMPLES // 2, length=LENGTH)
    allocation = moebit.allocate(profile, target_bits=4.2, linear_bits=3)
    for name, parts in allocation.plan.experts.items():
        for part, bits in parts.items():
            assert quantization(output)[name]["projections"][part]["bits"] == bits
    manifest = json.loads((output / "moebit.json").read_text())
    assert manifest["plan"]["average_bits"] == pytest.approx(allocation.average_bits)
    assert 4.2 - 0.3 < allocation.average_bits <= 4.2
    assert set(manifest["profile"]["sets"]) == {"low", "high"}
    assert manifest["profile"]["allocation"]["method"] == "fuzzy"
    assert moebit.verify(output)["findings"] == []
    assert not (output / "profile").exists()
    given = quantized(path, tmp_path / "given", texts, profile=profile.path).path
    assert {n: b for n, b in file_bytes(given).items() if n.endswith("safetensors")} == {
        n: b for n, b in file_bytes(output).items() if n.endswith("safetensors")
    }


def test_the_report_has_what_is_chosen_together(output: Path) -> None:
    """Two experts a token: the diagonal counts every token twice, and beside it each of them met one other."""
    layers = json.loads((output / "report.json").read_text())["layers"]
    side = load_file(output / "switch.safetensors")
    for layer in layers:
        both = torch.tensor(layer["coactivation"])
        assert both.shape == (EXPERTS, EXPERTS)
        assert torch.equal(both, both.T)
        assert int(both.diagonal().sum()) == SAMPLES // 2 * 2 * LENGTH * 2
        assert torch.equal(both.sum(1), 2 * both.diagonal())
        tokens = next(side[key] for key in side if key.endswith("usage.tokens") and f".{layer['layer']}." in key)
        assert both.diagonal().tolist() == tokens.sum(0).tolist()
    assert "Chosen together" in (output / "report.html").read_text()


def test_the_side_file_is_part_of_the_size(texts: dict[str, Path], output: Path) -> None:
    size = moebit.evaluate(output, text={"low": texts["low"]}, window=LENGTH, max_tokens=LENGTH)["size_bytes"]
    assert size == sum(file.stat().st_size for file in output.glob("*.safetensors"))
    assert size > sum(file.stat().st_size for file in output.glob("model-*.safetensors"))


def test_the_side_file_has_the_originals(checkpoints: Checkpoints, output: Path) -> None:
    """Three channels of every expert (a tenth of 32), the most dynamic ones, with the checkpoint's own values."""
    model, side = checkpoints.reference(MIXTRAL), load_file(output / "switch.safetensors")
    for index in model.routed:
        name = f"{model.layers_name}.{index}.mlp.experts"
        expert, channel = (side[f"{name}.switch.{leaf}"].tolist() for leaf in ("expert", "channel"))
        assert expert == [e for e in range(EXPERTS) for _ in range(round(0.1 * INTERMEDIATE))]
        experts = model.experts(index)
        for n, (e, c) in enumerate(zip(expert, channel, strict=True)):
            gate, up = experts.gate_up_proj[e].chunk(2)
            assert torch.equal(side[f"{name}.switch.gate"][n], gate[c])
            assert torch.equal(side[f"{name}.switch.up"][n], up[c])
            assert torch.equal(side[f"{name}.switch.down"][n], experts.down_proj[e][:, c])
        assert side[f"{name}.usage.tokens"].sum(1).tolist() == [SAMPLES // 2 * LENGTH * 2] * 2
        assert torch.allclose(side[f"{name}.usage.significance"].sum(1), torch.ones(2))


def test_an_interrupted_profile_goes_on(checkpoints: Checkpoints, texts: dict[str, Path], output: Path, tmp_path: Path) -> None:
    """After the first data set; then in the first layer, when nothing is decided again."""
    out = tmp_path / "out"
    with observed("moebit.pass") as passes:
        with stopped("moebit.pass", KeyboardInterrupt(), nth=2), pytest.raises(KeyboardInterrupt):
            quantized(checkpoints.path(MIXTRAL), out, texts)
        with stopped("moebit.layer", KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            quantized(checkpoints.path(MIXTRAL), out, texts, resume=True)
        assert len(passes) == 3
        quantized(checkpoints.path(MIXTRAL), out, texts, resume=True)
        assert len(passes) == 3
    assert file_bytes(out) == file_bytes(output)


def test_a_given_plan_stands_in_for_the_allocation(checkpoints: Checkpoints, texts: dict[str, Path], output: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"version": 1, "experts": {}, "linears": {}}))
    out = quantized(checkpoints.path(MIXTRAL), tmp_path / "out", texts, plan=plan).path
    assert all(part["bits"] == 3 for entry in quantization(out).values() for part in entry.get("projections", {}).values())
    assert (out / "switch.safetensors").exists()  # switching still wants its channels


def test_what_quantize_refuses(checkpoints: Checkpoints, texts: dict[str, Path], tmp_path: Path) -> None:
    path = checkpoints.path(MIXTRAL)
    with pytest.raises(BadInputError, match="two texts or more"):
        moebit.quantize(path, tmp_path / "out", recipe=RECIPE, text={"low": texts["low"]})
    profile = moebit.profile(path, tmp_path / "p", text={"low": texts["low"]}, recipe=RECIPE, errors=False, **SIZES)
    with pytest.raises(BadInputError, match="with group_size 32"):
        quantized(path, tmp_path / "out", texts, profile=profile.path, overrides={"weights.group_size": -1})
    with pytest.raises(BadInputError, match="another checkpoint"):
        quantized(checkpoints.path(ARCHITECTURES["olmoe"]), tmp_path / "out", texts, profile=profile.path)


# --- adapt


def overlay_of(directory: Path, architecture: Architecture) -> dict[str, dict[str, Any]]:
    """EXPERTS.PROJECTION -> places and values of its channels, read without moebit."""
    tensors, result = stored_tensors(directory), {}
    for name, entry in quantization(directory).items():
        for projection, part in entry.get("overlay", {}).items():
            stored = f"{name}.overlay.{projection}"
            hidden = entry["projections"][projection]["shape"][projection != "down_proj"]
            if part["bits"] == 16:
                values = tensors[f"{stored}.values"].double().numpy()
            else:
                values = read_stack(tensors, stored, part["bits"], (1, hidden), entry["symmetric"])[:, 0]
            places = tensors[f"{stored}.expert"].tolist(), tensors[f"{stored}.channel"].tolist()
            result[f"{name}.{projection}"] = {"places": list(zip(*places, strict=True)), "values": values, "bits": part["bits"]}
    return result


def test_adapt_leaves_the_base_alone_and_can_be_taken_back(mine: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    before = file_bytes(mine, set())
    apart = moebit.adapt(mine, text={"few": texts["few"]}, to=tmp_path / "apart", **SIZES)
    assert file_bytes(mine, set()) == before
    result = moebit.adapt(mine, text={"few": texts["few"]}, in_place=True, **SIZES)
    after = file_bytes(mine, set())
    assert after == file_bytes(tmp_path / "apart", set())
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"overlay.safetensors", "overlay.json", "config.json", "moebit.json", "model.safetensors.index.json"}
    assert result.channels == apart.channels > 0
    assert result.bytes_written == len(after["overlay.safetensors"])
    assert moebit.verify(mine)["findings"] == []
    with pytest.raises(BadInputError, match="--undo"):
        moebit.adapt(mine, text={"few": texts["few"]}, in_place=True, **SIZES)
    moebit.adapt(mine, undo=True)
    assert file_bytes(mine, set()) == before


def test_an_adapted_copy_shares_sealed_weights_and_nothing_else(mine: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    (mine / "notes.txt").write_text("no part of the output")
    apart = moebit.adapt(mine, text={"few": texts["few"]}, to=tmp_path / "apart", **SIZES).path
    shared = {file.name for file in apart.iterdir() if (mine / file.name).exists() and file.samefile(mine / file.name)}
    assert shared
    assert {Path(name).suffix for name in shared} == {".safetensors"}
    assert not (apart / "notes.txt").exists()
    before = (mine / "report.html").read_bytes()
    with open(apart / "report.html", "a") as page:
        page.write("changed")
    assert (mine / "report.html").read_bytes() == before


def test_an_adaptation_that_was_cut_short_can_be_taken_back(mine: Path, texts: dict[str, Path]) -> None:
    before = file_bytes(mine, set())
    with stopped("moebit.document", KeyboardInterrupt(), lambda path: Path(path).parent == mine, nth=3), pytest.raises(KeyboardInterrupt):
        moebit.adapt(mine, text={"few": texts["few"]}, in_place=True, **SIZES)
    assert file_bytes(mine, set()) != before
    moebit.adapt(mine, undo=True)
    assert file_bytes(mine, set()) == before


@pytest.mark.parametrize("keep", [False, True])
def test_channels_are_the_originals_at_the_new_width(keep: bool, mine: Path, texts: dict[str, Path]) -> None:
    """Only channels of the side file; in full precision with keep, else within half a step; never at fewer bits than the base has."""
    moebit.adapt(mine, text={"few": texts["few"]}, in_place=True, keep=keep, **SIZES)
    side, found = load_file(mine / "switch.safetensors"), overlay_of(mine, MIXTRAL)
    assert found
    for key, part in found.items():
        name, _, projection = key.rpartition(".")
        kept = list(zip(side[f"{name}.switch.expert"].tolist(), side[f"{name}.switch.channel"].tolist(), strict=True))
        base = quantization(mine)[name]["projections"][projection]["bits"]
        base = [base] * EXPERTS if isinstance(base, int) else base
        for n, place in enumerate(part["places"]):
            original = side[f"{name}.switch.{projection.removesuffix('_proj')}"][kept.index(place)].double().numpy()
            if keep:
                assert np.array_equal(part["values"][n], original)
                continue
            bits = part["bits"][n]
            assert bits > base[place[0]]
            error = np.square(part["values"][n] - original).sum() / np.square(original).sum()
            assert error < 4 * 4.0**-bits


def replaced(reference: Reference, base: Path, adapted: Path, architecture: Architecture) -> dict[str, Tensor]:
    """The experts' weights of the base with the channels of the overlay in place, as transformers stores them."""
    from tests.support.outputs import as_parameters, dequantized

    matrices = dequantized(base)
    for key, part in overlay_of(adapted, architecture).items():
        for (e, c), values in zip(part["places"], part["values"], strict=True):
            if key.endswith("down_proj"):
                matrices[key][e, :, c] = values
            else:
                matrices[key][e, c] = values
    return as_parameters(architecture, matrices)


@pytest.mark.parametrize(
    ("architecture", "keep"),
    [
        (MIXTRAL, False),
        (GPT_OSS, True),
        *(
            pytest.param(a, keep, marks=pytest.mark.slow)
            for a, keep in ((MIXTRAL, True), (GPT_OSS, False), (NEMOTRON, False), (NEMOTRON, True))
        ),
    ],
    ids=str,
)
def test_every_reader_puts_the_channels_in_their_place(
    architecture: Architecture, keep: bool, checkpoints: Checkpoints, texts: dict[str, Path], tmp_path: Path
) -> None:
    """Streaming, and from_pretrained on every path, compute what transformers does with the replaced weights."""
    from tests.support.outputs import replace_weights

    path = checkpoints.path(architecture)
    recipe = {**RECIPE, "solver": {"method": "rtn"}, "weights": {"bits": 3, "group_size": -1}, "allocation": {"kind": "uniform"}}
    base = quantized(path, tmp_path / "base", texts, recipe=recipe).path
    adapted = moebit.adapt(base, text={"few": texts["few"]}, to=tmp_path / "adapted", keep=keep, **SIZES).path
    assert overlay_of(adapted, architecture)
    reference = checkpoints.reference(architecture)
    with quiet(), torch.no_grad():
        truth = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager").eval()
        replace_weights(truth, replaced(reference, base, adapted, architecture))
        wanted = truth(input_ids=windows(), use_cache=False).logits
        model = AutoModelForCausalLM.from_pretrained(adapted, dtype=torch.float32).eval()
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        for way in ("auto", "dequantize", "reference"):
            use(model, way)  # type: ignore[arg-type]
            found = model(input_ids=windows(), use_cache=False).logits
            assert torch.allclose(found, wanted, atol=2e-3, rtol=1e-3), way
        few = model(input_ids=windows()[:1, :2], use_cache=False).logits
        assert torch.allclose(few, truth(input_ids=windows()[:1, :2], use_cache=False).logits, atol=2e-3, rtol=1e-3)
        assert not torch.allclose(plain(input_ids=windows(), use_cache=False).logits, wanted, atol=2e-3, rtol=1e-3)
    weights = open_checkpoint(adapted).weights
    for name, value in replaced(reference, base, adapted, architecture).items():
        if value.ndim == 3:
            assert torch.allclose(weights.expert_rows(name, 0, EXPERTS), value, atol=1e-6), name
            assert torch.allclose(weights.expert_rows(name, 3, 6), value[3:6], atol=1e-6), name


def test_what_adapt_refuses(checkpoints: Checkpoints, output: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    text = {"few": texts["few"]}
    with pytest.raises(BadInputError, match="-o OUT2 or --in-place"):
        moebit.adapt(output, text=text)
    with pytest.raises(BadInputError, match="-o OUT2 or --in-place"):
        moebit.adapt(output, text=text, to=tmp_path / "x", in_place=True)
    with pytest.raises(BadInputError, match="nothing to take back"):
        moebit.adapt(output, undo=True)
    with pytest.raises(BadInputError, match="--text"):
        moebit.adapt(output, to=tmp_path / "x", **SIZES)
    plain = moebit.quantize(
        checkpoints.path(MIXTRAL), tmp_path / "plain", recipe={"weights": {"group_size": -1}, "solver": {"method": "rtn"}}
    )
    assert isinstance(plain, Result)
    with pytest.raises(BadInputError, match=r"no switch\.safetensors"):
        moebit.adapt(plain.path, text=text, to=tmp_path / "x", **SIZES)
    without = quantized(checkpoints.path(MIXTRAL), tmp_path / "w", texts, overrides={"switching.share": 0}).path
    with pytest.raises(BadInputError, match="keeps no channels"):
        moebit.adapt(without, text=text, to=tmp_path / "x", **SIZES)
    assert not (tmp_path / "x").exists()


def test_nothing_to_switch_writes_nothing(checkpoints: Checkpoints, texts: dict[str, Path], tmp_path: Path) -> None:
    """All experts have the ladder's highest width already."""
    recipe = {**RECIPE, "weights": {"bits": 8, "group_size": 32}, "solver": {"method": "rtn"}, "allocation": {"kind": "uniform"}}
    out = quantized(checkpoints.path(MIXTRAL), tmp_path / "out", texts, recipe=recipe).path
    before = file_bytes(out, set())
    result = moebit.adapt(out, text={"few": texts["few"]}, to=tmp_path / "to", **SIZES)
    assert (result.channels, result.bytes_written, result.path) == (0, 0, out)
    assert file_bytes(out, set()) == before
    assert not (tmp_path / "to").exists()


def test_for_vllm(checkpoints: Checkpoints, texts: dict[str, Path], tmp_path: Path) -> None:
    """The preset, at a grid that fits a tiny model: one width for a layer's experts, in the format that vLLM reads."""
    out = tmp_path / "out"
    changes = {"weights.group_size": 32, "calibration.samples": 8, "calibration.seq_len": LENGTH, "allocation.target_bits": 7.0}
    path = checkpoints.path(ARCHITECTURES["olmoe"])
    quantized(path, out, texts, recipe="moqa-4bit-vllm", overrides=changes, engine="vllm")
    manifest = json.loads((out / "moebit.json").read_text())
    assert manifest["plan"]["engines"]["vllm"]["runs"]
    assert manifest["plan"]["average_bits"] <= 7.0
    assert manifest["profile"]["allocation"]["engine"] == "vllm"
    assert not (out / "switch.safetensors").exists()
    assert moebit.verify(out)["findings"] == []


# --- drift


def test_drift(output: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    """A text of the same kind is near its set, one of four tokens is far from all."""
    ids = torch.randint(0, 64, (16 * LENGTH,), generator=torch.Generator().manual_seed(77)).tolist()
    (tmp_path / "more.jsonl").write_text(json.dumps({"input_ids": ids}) + "\n")
    found = moebit.drift(output, text={"more": tmp_path / "more.jsonl", "few": texts["few"]}, **SIZES)
    assert found["texts"]["more"]["nearest"] == "low"
    assert not found["texts"]["more"]["drifted"]
    assert found["texts"]["few"]["drifted"]
    assert found["texts"]["few"]["distance"] > found["texts"]["more"]["distance"]
    assert set(found["sets"]) == {"low", "high"}
    for row in found["texts"].values():
        assert row["distance"] == pytest.approx(min(row["distances"].values()))
        assert 0 <= row["distance"] <= 1


def test_drift_by_hand(output: Path, texts: dict[str, Path]) -> None:
    """The distance from the usage that transformers' own routing of the packed model gives."""

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    use(model, "reference")
    ids = torch.tensor(json.loads(texts["few"].read_text())["input_ids"]).view(16, LENGTH)
    chosen: dict[int, Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(lambda m, a, out, index=index: chosen.__setitem__(index, out[2]))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    side, distances = load_file(output / "switch.safetensors"), []
    for index, picked in chosen.items():
        mine = torch.bincount(picked.flatten(), minlength=EXPERTS).double()
        theirs = side[f"model.layers.{index}.mlp.experts.usage.tokens"].double()
        mine, theirs = mine / mine.sum(), theirs / theirs.sum(1, keepdim=True)
        distances.append((mine - theirs).abs().sum(1) / 2)
    wanted = torch.stack(distances).mean(0)
    found = moebit.drift(output, text={"few": texts["few"]}, samples=16, length=LENGTH)["texts"]["few"]["distances"]
    assert list(found.values()) == pytest.approx(wanted.tolist(), abs=2e-3)
