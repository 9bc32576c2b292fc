"""Native outputs in transformers against the original model with the weights that a naive reader finds in the files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moebit.runtime import PackedLinear, PackedMatrices
from tests.support.models import ARCHITECTURES, Architecture, Checkpoints, quiet, windows
from tests.support.outputs import WIDTHS, Outputs, dequantized, read_config, stored_tensors, with_weights

NAMED = [ARCHITECTURES[name] for name in ("olmoe", "qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3")]
OTHERS = [architecture for architecture in ARCHITECTURES.values() if architecture not in NAMED]
GRIDS = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


def load(directory: Path, **options: Any) -> PreTrainedModel:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(directory, **options).eval()  # type: ignore[no-any-return]


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=windows(), use_cache=False).logits.float()  # type: ignore[no-any-return]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def check_float32(architecture: Architecture, checkpoints: Checkpoints, output: Path) -> None:
    original = checkpoints.path(architecture)
    wanted = logits(with_weights(architecture, original, output))
    torch.testing.assert_close(logits(load(output, dtype=torch.float32)), wanted, rtol=1e-4, atol=2e-5)
    assert distance(wanted, checkpoints.reference(architecture).logits) > 1e-3  # the weights were replaced


# --- the same logits


@GRIDS
@pytest.mark.parametrize("architecture", NAMED, ids=str)
def test_mixed_widths(architecture: Architecture, symmetric: bool, checkpoints: Checkpoints, outputs: Outputs) -> None:
    check_float32(architecture, checkpoints, outputs.rtn(architecture, symmetric=symmetric, mixed=True))


@GRIDS
@pytest.mark.parametrize("bits", WIDTHS)
def test_uniform_widths(bits: int, symmetric: bool, checkpoints: Checkpoints, outputs: Outputs) -> None:
    architecture = ARCHITECTURES["olmoe"]
    check_float32(architecture, checkpoints, outputs.rtn(architecture, bits=bits, symmetric=symmetric))


@pytest.mark.slow
@GRIDS
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("architecture", NAMED[1:], ids=str)
def test_uniform_widths_elsewhere(
    architecture: Architecture, bits: int, symmetric: bool, checkpoints: Checkpoints, outputs: Outputs
) -> None:
    check_float32(architecture, checkpoints, outputs.rtn(architecture, bits=bits, symmetric=symmetric))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", OTHERS, ids=str)
def test_mixed_widths_elsewhere(architecture: Architecture, checkpoints: Checkpoints, outputs: Outputs) -> None:
    check_float32(architecture, checkpoints, outputs.rtn(architecture, symmetric=False, mixed=True))


@GRIDS
@pytest.mark.parametrize("architecture", NAMED, ids=str)
def test_bfloat16(architecture: Architecture, symmetric: bool, checkpoints: Checkpoints, outputs: Outputs) -> None:
    """Loaded in bf16, whatever it was stored in: the very weights of the original model in bf16, and its logits but for rounding."""
    output = outputs.rtn(architecture, symmetric=symmetric, mixed=True)
    loaded = load(output, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    for name, value in dequantized(output).items():
        module = loaded.get_submodule(name)
        wanted = torch.from_numpy(value).float().to(torch.bfloat16)
        if isinstance(module, PackedLinear):
            assert torch.equal(module.unpacked(torch.bfloat16), wanted), name
        else:
            assert isinstance(module, PackedMatrices)
            assert torch.equal(module.unpacked(2, 5, torch.bfloat16), wanted[2:5]), name
    wanted_logits = logits(with_weights(architecture, checkpoints.path(architecture), output, torch.bfloat16))
    assert distance(logits(loaded), wanted_logits) < 0.02


@pytest.mark.parametrize("architecture", NAMED, ids=str)
def test_default_dtype_is_the_checkpoints(architecture: Architecture, outputs: Outputs) -> None:
    assert load(outputs.rtn(architecture, mixed=True)).dtype == architecture.dtype


def test_forward_without_no_grad(outputs: Outputs) -> None:
    """Nobody has to switch gradients off to call a model."""
    loaded = load(outputs.rtn(NAMED[0], mixed=True))
    with_gradients = loaded(input_ids=windows(), use_cache=False).logits
    torch.testing.assert_close(with_gradients.detach(), logits(loaded), rtol=0, atol=1e-6)


# --- what is resident


def resident(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers; tied ones once."""
    return sum({t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}.values())


@pytest.mark.parametrize("architecture", NAMED, ids=str)
def test_only_packed_weights_are_resident(architecture: Architecture, outputs: Outputs) -> None:
    output = outputs.rtn(architecture, symmetric=False, mixed=True)
    loaded = load(output)
    stored = stored_tensors(output)
    logits(loaded)
    state = loaded.state_dict()
    size = 0
    for name, tensor in stored.items():
        assert torch.equal(state[name].float(), tensor.float()), name  # transformers keeps some biases of routers in float32
        if name.endswith((".codes", ".zero_point", ".bits")):
            assert state[name].dtype == tensor.dtype == torch.uint8, name
        size += state[name].nbytes
    beside = sum(buffer.nbytes for _, buffer in loaded.named_non_persistent_buffers())
    assert resident(loaded) == size + beside
    assert resident(loaded) < sum(file.stat().st_size for file in output.glob("*.safetensors"))
    assert not [name for name, parameter in loaded.named_parameters() if parameter.ndim == 3]


# --- further life of a loaded model


@pytest.mark.parametrize("architecture", NAMED, ids=str)
def test_save_and_load_again(architecture: Architecture, outputs: Outputs, tmp_path: Path) -> None:
    output = outputs.rtn(architecture, symmetric=False, mixed=True)
    loaded = load(output)
    with quiet():
        loaded.save_pretrained(tmp_path)
    config, again = read_config(output), read_config(tmp_path)
    assert again["quantization_config"]["modules"] == config["quantization_config"]["modules"]
    assert again["quantization_config"]["format_version"] == config["quantization_config"]["format_version"]
    assert torch.equal(logits(load(tmp_path)), logits(loaded))
    assert again["experts_implementation"] == "moebit"  # or transformers without moebit would make up experts


@pytest.mark.parametrize("architecture", [ARCHITECTURES["olmoe"], ARCHITECTURES["gpt_oss"]], ids=str)
def test_generate(architecture: Architecture, checkpoints: Checkpoints, outputs: Outputs) -> None:
    output = outputs.rtn(architecture, mixed=True)
    loaded, original = load(output), with_weights(architecture, checkpoints.path(architecture), output)
    prompt = windows()[:2, :7]
    with quiet():
        produced, wanted = (m.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (loaded, original))
    assert torch.equal(produced, wanted)


# --- without moebit


def load_without_moebit(directory: Path) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys\nfrom transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert 'moebit' not in sys.modules\nprint('loaded', type(model).__name__)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", program, str(directory)], capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_refused_without_moebit(outputs: Outputs) -> None:
    """An unknown quantization method alone is a warning, followed by random experts: the output has to say more."""
    run = load_without_moebit(outputs.rtn(NAMED[0], mixed=True))
    assert run.returncode != 0, run.stdout + run.stderr
    assert "loaded" not in run.stdout
    assert "moebit" in run.stderr.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", NAMED, ids=str)
def test_refused_without_moebit_elsewhere(architecture: Architecture, outputs: Outputs, tmp_path: Path) -> None:
    """As written, and as saved again by transformers."""
    output = outputs.rtn(architecture, mixed=True)
    with quiet():
        load(output).save_pretrained(tmp_path)
    for directory in (output, tmp_path):
        run = load_without_moebit(directory)
        assert run.returncode != 0, run.stdout + run.stderr
        assert "moebit" in run.stderr.strip().splitlines()[-1]


def test_config_says_what_is_packed(outputs: Outputs) -> None:
    config = read_config(outputs.rtn(NAMED[0], mixed=True))
    assert config["quantization_config"]["quant_method"] == "moebit"
    assert config["experts_implementation"] == "moebit"
    assert json.dumps(config["quantization_config"])
