"""The whole line on a device, shown on one that is only said to be there (tests/support/labelled.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moebit
from moebit.device import checked_device
from moebit.errors import BadInputError
from moebit.quantize import chunk, statistics
from moebit.tensor import solver
from tests.support.labelled import DEVICE, DeviceError, is_labelled, labelled_device, use_plain_torch
from tests.support.models import ARCHITECTURES, Architecture, Checkpoints
from tests.support.outputs import token_file

pytestmark = pytest.mark.timeout(1200)  # on a machine that does much else
OLMOE = ARCHITECTURES["olmoe"]
SAMPLES, LENGTH = 4, 24
SMALL = {"calibration.samples": SAMPLES, "calibration.seq_len": LENGTH, "weights.group_size": 32}
# Presets whose blocks are GGUF's need a tokenizer that llama.cpp knows; tests/formats/gguf has one. Of presets that differ in nothing but
# a width or a group, one stands for the others. Profiles with gradients (moqa-4bit-vllm) read weights in a backward pass, where torch
# does not ask this device.
FAST = ["rtn-w4", "best-w3"]
SLOW = ["gptq-w4", "minmax-w3", "awq-w3", "moequant-w3", "moequant-awq-w3", "smoothquant-w4a4", "quarot-gptq-w3", "rtn-w4a4",
        "hadamard-w4a4", "duquant-w4a4", "eaquant-w3a4", "moqa-3bit"]  # fmt: skip
REFINED = {"refine.kind": "straight_through", "refine.steps": 3}
FURTHER: dict[str, dict[str, Any]] = {
    "moqa-3bit": {"allocation.target_bits": 4.5},
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two data sets: some presets look at how they differ."""
    directory = tmp_path_factory.mktemp("texts")
    return {name: token_file(directory / f"{name}.jsonl", 3 * SAMPLES * LENGTH, seed=seed) for seed, name in enumerate(("a", "b"))}


@pytest.fixture
def model(checkpoints: Checkpoints) -> Path:
    return checkpoints.path(OLMOE)


def quantized(
    model: Path, out: Path, texts: dict[str, Path], device: str, preset: str = "gptq-w4", memory: str = "4GiB", **changes: Any
) -> dict[str, bytes]:
    """The weight files of an output."""
    overrides = {**SMALL, **FURTHER.get(preset, {}), **changes}
    moebit.quantize(model, out, recipe=preset, text=texts, overrides=overrides, device=device, memory=memory, accept_unquantized=True)
    return {file.name: file.read_bytes() for file in out.glob("*.safetensors")}


def compared(model: Path, directory: Path, texts: dict[str, Path], preset: str, **changes: Any) -> None:
    """Hold the device's output to the CPU's, with plain torch in the place of compiled kernels on both."""
    with pytest.MonkeyPatch.context() as patch:
        use_plain_torch(patch)
        wanted = quantized(model, directory / "cpu", texts, "cpu", preset, **changes)
    with pytest.MonkeyPatch.context() as patch, labelled_device(patch):
        found = quantized(model, directory / "device", texts, "cuda:0", preset, **changes)
    assert found == wanted


@pytest.mark.parametrize("preset", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_presets_give_the_cpus_bytes(preset: str, model: Path, tmp_path: Path, texts: dict[str, Path]) -> None:
    compared(model, tmp_path, texts, preset)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [REFINED, {"calibration.kind": "self"}], ids=["refined", "sampled"])
def test_learned_rounding_and_sampling_give_the_cpus_bytes(
    changes: dict[str, Any], model: Path, tmp_path: Path, texts: dict[str, Path]
) -> None:
    compared(model, tmp_path, {} if "calibration.kind" in changes else texts, "best-w3", **changes)


@pytest.mark.slow
def test_small_pieces_give_the_cpus_bytes(model: Path, tmp_path: Path, texts: dict[str, Path]) -> None:
    """An expert and a window at a time; what a CPU run puts into files stays on the device."""
    compared(model, tmp_path, texts, "best-w3", memory="1MiB")


def test_evaluation_gives_the_cpus_numbers(checkpoints: Checkpoints, texts: dict[str, Path]) -> None:
    model = checkpoints.path(OLMOE)
    wanted = moebit.evaluate(model, against=model, text=texts, window=LENGTH, max_tokens=3 * LENGTH)
    with pytest.MonkeyPatch.context() as patch, labelled_device(patch):
        found = moebit.evaluate(model, against=model, text=texts, window=LENGTH, max_tokens=3 * LENGTH, device="cuda")
    assert found == wanted
    assert found["texts"]["a"]["top1_agreement"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_other_architectures_give_the_cpus_bytes(name: str, checkpoints: Checkpoints, tmp_path: Path, texts: dict[str, Path]) -> None:
    architecture: Architecture = ARCHITECTURES[name]
    compared(checkpoints.path(architecture), tmp_path, texts, "gptq-w4")


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert checked_device("cuda") == torch.device("cuda", 0)
    assert checked_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert checked_device("cuda") == torch.device("cuda", 1)
    for name, what in (("cuda:2", "has 2 CUDA devices"), ("tpu", "give cpu"), ("mps", "give cpu"), ("", "give cpu")):
        with pytest.raises(BadInputError, match=what):
            checked_device(name)


def test_the_device_labels_what_is_made_and_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    with labelled_device(monkeypatch):
        x = torch.arange(6.0, device=DEVICE).view(2, 3)
        assert is_labelled(x)
        assert is_labelled(x.to(torch.float64))
        assert is_labelled(x @ x.T)
        assert not is_labelled(x.cpu())
        assert is_labelled(x.cpu().to(x.device))
        assert is_labelled(x + torch.tensor(1.0))  # a number
        assert str(x.device) == "cuda:0"
        assert x.is_cuda
        with DEVICE:
            assert is_labelled(torch.zeros(3))
        copy = x.cpu()
        copy.zero_()
        assert float(x.sum()) == 15


@pytest.mark.parametrize("planted", ["between", "copied", "set", "numpy", "large"])
def test_what_a_device_refuses_fails(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with labelled_device(monkeypatch):
        x, host = torch.ones(128, 128, device=DEVICE), torch.ones(128, 128)
        wrong = {
            "between": lambda: x + host,
            "copied": lambda: host.copy_(x),
            "set": lambda: host.__setitem__(slice(0, 128), x),
            "numpy": x.numpy,
            "large": x.tolist,
        }
        with pytest.raises(DeviceError):
            wrong[planted]()


def test_planted_mistakes_in_the_line_are_caught(model: Path, tmp_path: Path, texts: dict[str, Path]) -> None:
    """One of each kind: sums that stay on the host, a large copy that nobody needs, a kernel for CPUs."""

    def on_host(experts: int, size: int, power: float) -> chunk.ExpertMoments:
        return chunk.ExpertMoments(*(torch.zeros(*shape, device="cpu") for shape in ((experts, size, size), (experts,), (experts,))), power)

    mirrored = statistics.mirror_

    def by_way_of_the_host(h: torch.Tensor) -> torch.Tensor:
        return mirrored(h.to("cpu")).to(h.device)

    planted: list[tuple[Any, str, Any, str]] = [
        (chunk.ExpertMoments, "zeros", on_host, "on cuda:0"),
        (statistics, "mirror_", by_way_of_the_host, "copied to the host"),
        (solver, "backend_of", lambda device: "numba", "kernel for CPUs"),
    ]
    for number, (owner, name, mistake, told) in enumerate(planted):
        with pytest.MonkeyPatch.context() as patch, labelled_device(patch):
            patch.setattr(owner, name, mistake)
            if owner is statistics:
                patch.setattr("tests.support.labelled.FEW", 1000)
            with pytest.raises(DeviceError, match=told):
                quantized(model, tmp_path / str(number), texts, "cuda:0")
