"""How small and how fast do packed models run? `make bench-runtime`, or `python benchmarks/runtime.py --help`.

A model of random weights with OLMoE's layers (64 experts of 1024 x 2048, top-8), as many of them as are asked for, in transformers:

  bf16, eager / grouped_mm   the checkpoint as it is, with the two implementations of experts that transformers has.
  packed                     moebit's native output of 4, 3 and 2 bits in groups of 128, and one whose experts have 2, 3, 4 and 8 bits.

Each in a process of its own, one after the other, with the same number of threads. `prefill` reads 512 tokens, `decode` writes 64, one at a
time; best of three. Memory is that of the process beyond what it had before loading: `resident` behind the first forward (files are mapped:
before it, hardly anything is resident), `peak` the most it ever was. A second table says where a decoded token's time goes.
Prints the tables and writes them to benchmarks/results/runtime.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RESULTS = Path(__file__).parent / "results" / "runtime.md"
REPEATS = 3
SIZES = {
    "full": {"hidden": 2048, "intermediate": 1024, "experts": 64, "top_k": 8, "heads": 16, "vocabulary": 50304},
    "small": {"hidden": 512, "intermediate": 256, "experts": 16, "top_k": 4, "heads": 8, "vocabulary": 4096},
}
MIXED = (2, 3, 4, 8)
PARTS = ("experts", "attention's linears", "head", "everything else")


# --- making the models


def write_checkpoint(directory: Path, size: dict[str, int], layers: int) -> None:
    """Random weights straight to one file a layer, so that no more than one layer is in memory."""
    directory.mkdir(parents=True)
    hidden, intermediate = size["hidden"], size["intermediate"]
    config = {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "dtype": "bfloat16", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": size["heads"],
        "num_key_value_heads": size["heads"], "num_experts": size["experts"], "num_experts_per_tok": size["top_k"],
        "vocab_size": size["vocabulary"], "max_position_embeddings": 4096, "eos_token_id": 0, "pad_token_id": None,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    generator, index = torch.Generator().manual_seed(0), {}

    def put(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        file = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        tensors = {name: _random(name, shape, generator) for name, shape in shapes.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    for layer in range(layers):
        shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"self_attn.{name}_norm.weight": (hidden,) for name in "qk"} | {"mlp.gate.weight": (size["experts"], hidden)}
        for e in range(size["experts"]):
            shapes |= {f"mlp.experts.{e}.{name}_proj.weight": (intermediate, hidden) for name in ("gate", "up")}
            shapes[f"mlp.experts.{e}.down_proj.weight"] = (hidden, intermediate)
        put(layer, {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()})
    matrix = (size["vocabulary"], hidden)
    put(layers, {"model.embed_tokens.weight": matrix, "lm_head.weight": matrix, "model.norm.weight": (hidden,)})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    spread = 0.5 if name.endswith("gate.weight") else 0.02  # routers that spread the tokens over the experts
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, spread, generator=generator)


def quantize(checkpoint: Path, output: Path, bits: int | None, size: dict[str, int], layers: int) -> None:
    """Rounded to nearest without the clipping search, which changes values but no speed; `bits` None mixes widths."""
    import moebit

    plan = None
    if bits is None:
        widths = [MIXED[e % len(MIXED)] for e in range(size["experts"])]
        experts = {
            f"model.layers.{layer}.mlp.experts": dict.fromkeys(("gate_proj", "up_proj", "down_proj"), widths) for layer in range(layers)
        }
        plan = output.with_suffix(".plan.json")
        plan.write_text(json.dumps({"version": 1, "experts": experts, "linears": {}}))
    recipe = "rtn-w4" if bits is None else f"rtn-w{bits}"
    moebit.quantize(checkpoint, output, recipe=recipe, overrides={"solver.clip_search": False}, plan=plan, overwrite=True)


# --- measuring one, in a process of its own


def measure(model_directory: str, implementation: str, prompt: int, new_tokens: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import moebit  # noqa: F401 - registers the packed format

    logging.disable_progress_bar()
    before = memory("VmRSS")
    options = {} if implementation == "packed" else {"experts_implementation": implementation}
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype="auto", **options).eval()
    ids = torch.randint(1, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        resident = memory("VmRSS") - before
        prefill = min(seconds(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1)) for _ in range(REPEATS))
        decode = min(decode_seconds(model, ids[:, :16], new_tokens) for _ in range(REPEATS))
        parts = time_of_parts(model, ids[:, :16], new_tokens)
    return {
        "prefill": prompt / prefill, "decode": 1 / decode, "resident": resident, "peak": memory("VmHWM") - before, "parts": parts,
    }  # fmt: skip


def memory(key: str) -> int:
    """Bytes, from Linux's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def decode_seconds(model: Any, ids: torch.Tensor, new_tokens: int) -> float:
    """Per token, behind the prompt."""
    output = model(input_ids=ids, use_cache=True)
    began = time.perf_counter()
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    return (time.perf_counter() - began) / new_tokens


def time_of_parts(model: Any, ids: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """Seconds per decoded token in each of PARTS, by hooks around modules."""
    spent = dict.fromkeys(PARTS, 0.0)
    began: dict[Any, float] = {}
    handles = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        part = (
            "experts"
            if last == "experts"
            else "head"
            if name == "lm_head"
            else PARTS[1]
            if last[:1] in "qkvo" and last[1:] == "_proj"
            else None
        )
        if part is None:
            continue

        def enter(module: Any, args: Any) -> None:
            began[module] = time.perf_counter()

        def leave(module: Any, args: Any, result: Any, part: str = part) -> None:
            spent[part] += time.perf_counter() - began[module]

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    output = model(input_ids=ids, use_cache=True)
    spent.update(dict.fromkeys(PARTS, 0.0))
    cache, whole = output.past_key_values, 0.0
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        whole += time.perf_counter() - start
    for handle in handles:
        handle.remove()
    spent[PARTS[-1]] = whole - sum(spent.values())
    return {part: value / new_tokens for part, value in spent.items()}


# --- the tables


def run(arguments: argparse.Namespace, work: Path) -> dict[str, dict[str, Any]]:
    size = SIZES["small" if arguments.small else "full"]
    checkpoint = work / "bf16"
    note(f"writing {arguments.layers} layers of random weights")
    write_checkpoint(checkpoint, size, arguments.layers)
    found = {}
    for implementation in ("eager", "grouped_mm"):
        note(f"bf16, {implementation}")
        found[f"bf16, {implementation}"] = in_process(arguments, checkpoint, implementation)
    for name, bits in (("packed, 4 bits", 4), ("packed, 3 bits", 3), ("packed, 2 bits", 2), ("packed, mixed", None)):
        note(name)
        output = work / f"w{bits}"
        quantize(checkpoint, output, bits, size, arguments.layers)
        found[name] = in_process(arguments, output, "packed")
        shutil.rmtree(output)
    return found


def in_process(arguments: argparse.Namespace, model: Path, implementation: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", str(model), "--implementation", implementation]
    command += ["--prompt", str(arguments.prompt), "--new-tokens", str(arguments.new_tokens)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)}\n{finished.stderr}")
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return {**result, "bytes": sum(file.stat().st_size for file in model.glob("*.safetensors"))}


def tables(found: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> str:
    base = max((row for name, row in found.items() if name.startswith("bf16")), key=lambda row: row["decode"])
    size = SIZES["small" if arguments.small else "full"]
    lines = [
        "# Packed models in transformers",
        "",
        f"{arguments.layers} layers with OLMoE's structure, random weights: {size}. {torch.get_num_threads()} threads, {processor()}, "
        f"torch {torch.__version__}. Made by `python benchmarks/runtime.py --layers {arguments.layers}`; what the columns mean stands in",
        "[runtime.py](../runtime.py).",
        "Ratios of speed are to the faster of the two bf16 rows, those of memory to the bf16 weights: transformers, stacking experts",
        "that are stored one by one, also has the file's pages resident, which the system can take back.",
        "",
        f"| model | file, MB | resident, MB | | peak, MB | prefill ({arguments.prompt}), tokens/s | | decode, tokens/s | |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in found.items():
        ratios = {key: f"{row[key] / base[key]:.2f}×" for key in ("prefill", "decode")} | {
            "resident": f"{row['resident'] / base['bytes']:.2f}×"
        }
        lines.append(
            f"| {name} | {row['bytes'] / 1e6:,.0f} | {row['resident'] / 1e6:,.0f} | {ratios['resident']} | {row['peak'] / 1e6:,.0f} "
            f"| {row['prefill']:.1f} | {ratios['prefill']} | {row['decode']:.2f} | {ratios['decode']} |"
        )
    lines += ["", "Where a decoded token's time goes, in ms:", "", f"| model | {' | '.join(PARTS)} |", "|---|" + "---:|" * len(PARTS)]
    for name, row in found.items():
        cells = (f"{1e3 * row['parts'][part]:.2f}" for part in PARTS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *findings(found["packed, 4 bits"], base), ""])


def findings(packed: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """What the tables say about 4 bits: decode at least twice as fast in a third of the memory is what is hoped for."""
    decode, memory = packed["decode"] / base["decode"], packed["resident"] / base["bytes"]
    faster = {part: base["parts"][part] / packed["parts"][part] for part in PARTS}
    whole = sum(packed["parts"].values())
    same = sum(packed["parts"][part] for part in PARTS[2:]) / whole
    judged = {True: "reached", False: "missed"}
    return [
        f"- 4 bits: decode {decode:.2f}× (2× hoped for: {judged[decode >= 2]}), memory {memory:.2f}× of the bf16 weights",
        f"  (a third hoped for: {judged[memory <= 1 / 3]}).",
        f"- Experts run {faster[PARTS[0]]:.1f}× as fast, attention's linears {faster[PARTS[1]]:.1f}×. The head, which stays bf16, and",
        f"  what is no product at all take {same:.0%} of a packed token's time: the more layers, the less of that is the head's.",
        f"- Prefill: {packed['prefill'] / base['prefill']:.2f}×. An expert with many tokens is dequantized first and multiplied by torch,",
        "  which costs more than the smaller weights save as long as memory is not what limits.",
    ]


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor()


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--small", action="store_true", help="small shapes, to see that it works; writes no results unless --output says where"
    )
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--work", type=Path, help="where the models go (deleted afterwards); a temporary directory otherwise")
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS.relative_to(RESULTS.parents[2])}")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--implementation", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.implementation, arguments.prompt, arguments.new_tokens)))
        return
    with tempfile.TemporaryDirectory(prefix="moebit-bench-", dir=arguments.work) as work:
        text = tables(run(arguments, Path(work)), arguments)
    print(text)
    output = arguments.output or (None if arguments.small else RESULTS)
    if output:
        output.parent.mkdir(exist_ok=True)
        output.write_text(text)


if __name__ == "__main__":
    main()
