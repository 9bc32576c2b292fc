"""Documents of outputs as `quantize` writes them, made up: any size, every trouble, without quantizing anything."""

from __future__ import annotations

import random
from typing import Any

from moebit.report.facts import Documents

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def layer(index: int, experts: int, draw: random.Random, *, mixed: bool, calibrated: bool, trouble: bool) -> dict[str, Any]:
    tokens = [int(draw.expovariate(1 / 4000)) + 1 for _ in range(experts)]
    if trouble:
        tokens[0] = 0

    def part() -> dict[str, list[Any]]:
        return {
            "bits": [draw.choice((2, 3, 4, 8)) if mixed else 4 for _ in range(experts)],
            "weight_error": [0.002 + 0.02 * draw.random() ** 4 for _ in range(experts)],
            "damping": [0.01 if calibrated else None] * experts,
            "fallback": [trouble and e == 1 for e in range(experts)],
        }

    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return {
        "layer": index,
        "seconds": 12.3 + index % 5,
        "peak_memory_bytes": 10**9 + 10**7 * index,
        "tokens_per_expert": tokens if calibrated else [],
        "linears": {
            f"self_attn.{name}": {"bits": 4, "weight_error": 0.004, "damping": 0.01 if calibrated else None, "fallback": trouble}
            for name in names
        },
        "experts": {name: part() for name in PROJECTIONS},
    }


def evaluation(layers: int, *, size_bytes: int = 2, texts: tuple[str, ...] = ("wiki", "python")) -> dict[str, Any]:
    per_layer = [{"layer": i, "routing_exact": 0.97 - 0.1 * i / layers, "routing_overlap": 0.99 - 0.02 * i / layers} for i in range(layers)]
    row = {"tokens": 19_968, "perplexity": 41.23, "bits_per_byte": 1.63, "kl": 0.00541, "top1_agreement": 0.936}
    routed = {"routing_exact": 0.92, "routing_overlap": 0.98, "per_layer": per_layer}
    return {"model": "m", "reference": "r", "size_bytes": size_bytes, "average_bits": 4.1, "texts": {name: row | routed for name in texts}}


def comparison(outputs: int = 8) -> dict[str, Any]:
    """What `compare` found out about so many outputs, two of them nearly the same and the last one refused."""
    texts = ("wiki", "python")

    def scores(kl: float) -> dict[str, Any]:
        return {"tokens": 4088, "perplexity": 41.7 + kl, "bits_per_byte": 1.6, "kl": kl, "top1_agreement": 0.93, "routing_exact": 0.9}

    rows = [
        {
            "model": f"runs/a-model-with-a-long-name-method-{i}", "made_by": "moebit" if i % 2 else "compressed-tensors",
            "average_bits": 3.1, "size_bytes": 9_600_000_000 + 700_000_000 * (i // 2), "bits_per_parameter": 4.9, "refused": None,
            "remarks": ["read by moebit from its files"], "tasks": {},
            "texts": {name: scores(0.02 / (1 + i // 2) + 1e-5 * i) for name in texts},
        }
        for i in range(outputs)
    ]  # fmt: skip
    rows[-1] |= {"refused": "100% of the expert parameters are in full precision", "texts": {}, "remarks": []}
    reference = {"model": "reference/model", "size_bytes": 31_600_000_000, "texts": {name: scores(0.0) for name in texts}}
    return {"reference": reference, "models": rows}


def documents(
    *, layers: int = 4, experts: int = 32, mixed: bool = False, calibrated: bool = True, trouble: bool = False, evaluated: bool = True,
    name: str = "olmoe-w4",
) -> Documents:  # fmt: skip
    draw = random.Random(layers * experts)
    engines = {
        "transformers": {"runs": True, "reasons": [], "notes": ["with `import moebit`, which registers the format"]},
        "vllm": {"runs": False, "reasons": ["it does not know the native format"], "notes": []},
    }
    plan = {
        "size_bytes": 1, "average_bits": 4.125, "peak_memory_bytes": 3 * 2**30, "memory": 2**31 if trouble else 2**32, "engines": engines,
        "kept": {f"model.layers.{i}.mlp.gate": "router" for i in range(layers)}, "unquantized_expert_share": 0.02 if trouble else 0.0,
    }  # fmt: skip
    report = {
        "seconds": 4321.0, "size_before": 61_064_245_248, "size_after": 16_321_000_123, "average_bits": 4.125,
        "peak_memory_bytes": 3_100_000_000,
        "command": "moebit quantize some/model -o out --recipe gptq-w4 " + " ".join(f"--text text{i}.txt" for i in range(8)),
        "layers": [layer(i, experts, draw, mixed=mixed, calibrated=calibrated, trouble=trouble and i == 1) for i in range(layers)],
    }  # fmt: skip
    manifest = {"moebit": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "input": "ab" * 32, "seed": 0, "memory": 2**32,
                "format": "native", "plan": plan}  # fmt: skip
    recipe = "# sha256 of the content: " + "0" * 64 + "\nversion: 1\nweights:\n  bits: 4\n"
    return Documents(name, report, manifest, recipe, [evaluation(layers)] if evaluated else [])
