"""Is the wheel all that a user needs? `make wheel-check`, or: .venv/bin/python tests/wheel_check.py

Builds the wheel, installs it into a fresh environment outside the clone and there lists the recipes, quantizes a tiny
random model and evaluates the result. The packages that moebit depends on are not installed again: the fresh environment
looks them up in the one that runs this script, which takes seconds. Whether a user's pip finds them is checked by the
wheel's own requirements (`pip check`).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

CLONE = Path(__file__).resolve().parents[1]
PROSE = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs, said the judge.\n" * 40
MUST_HOLD = (
    "moebit/recipe/presets/rtn-w4.yaml",
    "moebit/recipe/presets/gptq-w4.yaml",
    "moebit/report/templates/report.html",
    "licenses/LICENSE",
    "licenses/NOTICE",
    "entry_points.txt",
)
MUST_WRITE = ("config.json", "moebit.json", "recipe.yaml", "report.json", "report.html", "tokenizer.json")


def run(*command: str | Path, cwd: Path) -> str:
    """The output of `command`, which has to succeed, in an environment without the clone's paths."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    clean |= {"PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=clean, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}\nfailed with exit code {done.returncode}")
    return done.stdout


def build_wheel(out: Path) -> Path:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, CLONE, cwd=out)
    (wheel,) = out.glob("moebit-*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    missing = [name for name in MUST_HOLD if not any(entry.endswith(name) for entry in held)]
    strange = [entry for entry in held if not entry.startswith(("moebit/", "moebit-")) or entry.endswith((".nbi", ".nbc", ".safetensors"))]
    if missing or strange:
        raise SystemExit(f"{wheel.name}: missing {missing}, should not hold {strange}")
    return wheel


def fresh_environment(at: Path, wheel: Path) -> Path:
    """The bin directory of a new environment with `wheel` and, behind it, the packages of this one."""
    run(sys.executable, "-m", "venv", "--without-pip", at, cwd=at.parent)
    python = at / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=at.parent)
    (site,) = at.glob("lib/python*/site-packages")
    # A plain path: the .pth files in there, the editable moebit's among them, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(*pip, "check", cwd=at.parent)
    where = run(python, "-c", "import moebit; print(moebit.__file__)", cwd=at.parent).strip().splitlines()[-1]
    if not Path(where).resolve().is_relative_to(site.resolve()):
        raise SystemExit(f"moebit comes from {where}, not from the wheel in {site}")
    return at / "bin"


def tiny_model(at: Path) -> None:
    """A random OLMoE of two layers with a byte-level tokenizer, as a checkpoint on disk."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False)
    tokenizer.train_from_iterator([PROSE], trainer)
    config = OlmoeConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(at)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", model_max_length=256).save_pretrained(at)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="moebit-wheel-") as directory:
        work = Path(directory).resolve()
        wheel = build_wheel(work)
        print(f"built {wheel.name}, {wheel.stat().st_size / 1024:.0f} KiB")
        moebit = fresh_environment(work / "env", wheel) / "moebit"
        for verb in ("inspect", "quantize", "evaluate", "recipes"):
            if verb not in run(moebit, "--help", cwd=work):
                raise SystemExit(f"moebit --help does not name {verb}")
        listed = run(moebit, "recipes", cwd=work)
        if not all(name in listed for name in ("rtn-w4", "gptq-w4")):
            raise SystemExit(f"moebit recipes does not list the presets:\n{listed}")
        print("installed: moebit --help and moebit recipes answer")

        tiny_model(work / "model")
        (work / "prose.txt").write_text(PROSE, encoding="utf-8")
        small = ("--set", "calibration.samples=8", "--set", "calibration.seq_len=64")
        run(moebit, "quantize", "model", "-o", "out", "--recipe", "gptq-w4", "--text", "prose=prose.txt", *small, cwd=work)
        missing = [name for name in MUST_WRITE if not (work / "out" / name).is_file()]
        if missing or (work / "out.partial").exists():
            raise SystemExit(f"out is not complete: missing {missing}")
        compare = ("--against", "model", "--text", "prose=prose.txt", "--window", "64", "--json", "eval.json")
        run(moebit, "evaluate", "out", *compare, cwd=work)
        result = json.loads((work / "eval.json").read_text(encoding="utf-8"))
        perplexity, kl = (result["texts"]["prose"][key] for key in ("perplexity", "kl"))
        if not (math.isfinite(perplexity) and 0 <= kl < 0.5):
            raise SystemExit(f"the quantized model is not the model: perplexity {perplexity}, KL {kl}")
        print(f"quantized and evaluated: {result['average_bits']:.2f} bits, KL {kl:.4f} nats")


if __name__ == "__main__":
    main()
