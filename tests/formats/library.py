"""compressed-tensors outputs as others see them: through the compressed-tensors library, and through transformers without moebit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support.models import quiet, windows
from tests.support.outputs import read_config, stored_tensors
from tests.support.rounded import ORACLE, rounded


def by_the_library(output: Path) -> dict[str, Tensor]:
    """Every tensor under the checkpoint's names, the quantized ones as the library reads config.json and decompresses them."""
    tensors = stored_tensors(output)
    said = read_config(output).get("quantization_config")
    if said is None:
        return tensors
    groups = QuantizationConfig.model_validate(said).config_groups.values()
    modules = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    result = {name: value for name, value in tensors.items() if name.rpartition(".")[0] not in modules or name.endswith(".bias")}
    for module in modules:
        fitting = [g for g in groups if any(target == "Linear" or match_name(module, target) for target in g.targets)]
        assert len(fitting) == 1, module
        own = {name.rpartition(".")[2]: value for name, value in tensors.items() if name.rpartition(".")[0] == module}
        own.pop("bias", None)
        value = BaseCompressor.get_value_from_registry(fitting[0].format).decompress(own, fitting[0])["weight"]
        result[f"{module}.weight"] = value
    return result


def plain_transformers(tmp_path: Path, models: dict[str, tuple[Path, str]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(logits of what loads, errors of what does not) in a process without moebit."""
    job = {"tokens": windows().tolist(), "models": {name: [str(path), dtype] for name, (path, dtype) in models.items()}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, str(Path(__file__).parent / "plain.py"), str(tmp_path / "job.json"), str(tmp_path / "logits")]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert run.returncode == 0, run.stderr
    errors = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return load_file(tmp_path / "logits"), {name: message for error in errors for name, message in error.items()}


def reference_model(original: Path, output: Path, tmp_path: Path, dtype: torch.dtype, experts: str = "eager") -> PreTrainedModel:
    """The original architecture with the weights that the library decompresses, as a checkpoint of its own."""
    save_file(
        {name: value.contiguous() for name, value in by_the_library(output).items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    (tmp_path / "config.json").write_text((original / "config.json").read_text())
    with quiet():
        return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, experts_implementation=experts).eval()  # type: ignore[no-any-return]


@torch.no_grad()
def reference_logits(original: Path, output: Path, tmp_path: Path, dtype: torch.dtype) -> Tensor:
    """Its logits; where the output says that inputs are rounded to float8, those of its quantized linears are (not those of experts)."""
    model = reference_model(original, output, tmp_path, dtype)
    said = read_config(output).get("quantization_config", {"config_groups": {}})
    if any((group.get("input_activations") or {}).get("type") == "float" for group in said["config_groups"].values()):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name not in said["ignore"]:
                module.register_forward_pre_hook(lambda _, args: (rounded_to_float8(args[0]),))
    return model(input_ids=windows(), use_cache=False).logits.float()  # type: ignore[no-any-return]


def rounded_to_float8(x: Tensor) -> Tensor:
    """On the float8 e4m3 grid whose largest number, 448, is the largest magnitude of what shares a scale.

    The library keeps the first two axes. That is a token in [batch, token, channel]; in [token, channel], as shared experts get their
    inputs, all tokens share one, and in [batch, 1, token, channel], as latent attention unfolds its own, those of a sequence.
    """
    scale = (x.abs().amax(tuple(range(2, x.ndim)), keepdim=True) if x.ndim > 2 else x.abs().amax()) / 448
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale


def engines_model(original: Path, output: Path, tmp_path: Path) -> PreTrainedModel:
    """The same with all inputs rounded per token as vLLM does: those of linears, of experts and of their down projections."""
    model = reference_model(original, output, tmp_path, torch.float32, ORACLE)
    said = read_config(output)["quantization_config"]
    (kind,) = {group["input_activations"]["type"] for group in said["config_groups"].values()}
    how = {"float8": True} if kind == "float" else {"bits": 8, "symmetric": True, "clip": 1.0}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in said["ignore"]:
            module.register_forward_pre_hook(lambda _, args: (rounded(args[0], how),))
        elif getattr(module, "down_proj", None) is not None and name.endswith(".experts"):
            eyes = [torch.eye(size, dtype=torch.float64) for size in module.down_proj.shape[1:]]
            module.oracle = (eyes[0], [eyes[1]], how)
    return model
