"""What other libraries write, read by moebit: does it equal what their own code makes of it?

    python benchmarks/round_trips.py --peers PYTHON [--out benchmarks/results/round-trips.md]

PYTHON is the interpreter of an environment with the libraries whose rows are wanted: bitsandbytes, gptqmodel, autoawq, auto-round,
nvidia-modelopt, llmcompressor, mlx-lm. A library that is not there, or fails, has its reason in the table. The source is a tiny random
Qwen3-MoE with the tokenizer of reference/olmoe.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, environment, facts
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from moebit.errors import BadInputError
from moebit.formats.opening import open_checkpoint

SIZES = {
    "vocab_size": 50304,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
}


def make_source(directory: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES, bos_token_id=None, eos_token_id=0)).bfloat16()
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    older = {"num_experts": SIZES["num_experts"], "rope_theta": 10000.0}  # names that mlx-lm asks for and transformers no longer writes
    (directory / "config.json").write_text(json.dumps(config | older))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "reference" / "olmoe" / name, directory)
    return directory


def compare(directory: Path) -> str:
    """How what moebit reads differs from what the library says the weights are."""
    expected = load_file(directory / "expected.safetensors")
    (directory / "expected.safetensors").rename(directory / "expected.data")
    try:
        checkpoint = open_checkpoint(directory)
    except BadInputError as error:
        return f"refused: {error}"
    missing = sorted(set(checkpoint.weights.entries) ^ set(expected))
    if missing:
        return f"**other tensors**: {len(missing)}, first {missing[0]}"
    scheme = checkpoint.shipped.scheme if checkpoint.shipped else "plain"
    equal, worst = 0, 0.0
    for name, value in expected.items():
        found = checkpoint.weights.entries[name].read()
        if found.shape != value.shape:
            return f"**other shapes**: {name}"
        equal += torch.equal(found, value.to(found.dtype))
        worst = max(worst, float((found.float() - value.float()).abs().max() / value.float().abs().max().clamp(min=1e-30)))
    if equal == len(expected):
        return f"equal ({scheme}, {len(expected)} tensors)"
    return f"within {worst:.1e} of the largest weight ({scheme}; {equal} of {len(expected)} tensors equal)"


def table(made: dict[str, dict[str, Any]], out: Path) -> str:
    lines = ["| written | by | read by moebit |", "|---|---|---|"]
    for name, case in made.items():
        lines.append(f"| {name} | {case['by']} | {compare(out / case['folder']) if 'folder' in case else 'not written: ' + case['why']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", required=True, help="the Python of an environment with the libraries")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "round-trips.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        source, out = make_source(Path(directory) / "source"), Path(directory) / "out"
        out.mkdir()
        script = ROOT / "benchmarks" / "peers" / "write_round_trips.py"
        subprocess.run([options.peers, str(script), str(source), str(out)], check=True, env=environment(1, {"TORCHDYNAMO_DISABLE": "1"}))
        text = table(json.loads((out / "cases.json").read_text()), out)
    intro = "Checkpoints that other libraries write, read by moebit and compared, tensor by tensor, with what their own code dequantizes."
    options.out.write_text(f"# Round trips\n\n{intro}\n\n{text}\n\n{facts(1, ['--peers', 'PYTHON'])}\n")


if __name__ == "__main__":
    main()
