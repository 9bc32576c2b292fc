"""Write reference/README.md: what the reference models are, what they learnt, and in what they resemble large models.

python examples/reference_card.py

Bits per byte and the load of experts are in the training.json that training left beside each model; activations are measured here, on
the beginning of `wiki`'s held-out text (seconds).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "reference"
TRAINED = ("wiki", "novels", "python", "speeches")
EVEN = (0.4, 2.5)  # times the mean: between them an expert counts as evenly used
TOKENS, WINDOW = 8192, 256

HEAD = """# Reference models

Small Mixture-of-Experts language models with real, trained routing, so that every method can be tried and measured without a download
and none is judged on one architecture alone. `examples/train_reference.py` trained them from scratch with the configurations beside it;
weights in bfloat16, Apache-2.0. This page is written by `python examples/reference_card.py`.

{models}

`text/DOMAIN.{{calib,tune,eval}}.txt` are the texts. `calib` is for calibration (from the training part, where the domain was trained
on); `tune` and `eval` are held out: `tune` for choosing between settings, `eval` for tables only. The models were trained on wiki
(WikiText-2), novels, python (the standard library) and speeches; shakespeare, c, german and french are novel to them. Sources and
licences: [NOTICE](../NOTICE).

## What they learnt

Bits per byte on the held-out `eval` texts, beside a unigram model of the training tokens and `xz -9e` on the same text.
"""

LOAD = """## How evenly their experts are used

Large models are trained until their experts are used nearly evenly. The load of an expert is its share of a layer's routed slots, in
multiples of the mean share, on the four texts of the training mix together. The effective number of experts is the exponential of the
entropy of these shares, as a part of the number that there is: 100% is an even load.
"""

OUTLIERS = """## How far their activations reach

On {tokens:,} tokens of `wiki`. "Largest" is the largest absolute value of the residual stream behind any layer, and "channels" the
largest channel's maximum over the median channel's, for what enters attention and for what enters the router and the experts (the
worst layer). In a study of 27 open models the largest activations of Mixture-of-Experts checkpoints lie between 10² and 10³, nearly
always in the residual stream (Chen et al., 2605.15572). Where the numbers of channels below are small, no channel stands out as some do
in large models, so that methods against outliers are judged on copies that have them put in (`benchmarks/outliers.py`).
"""


def models() -> list[Path]:
    return sorted(path.parent for path in REFERENCE.glob("*/training.json"))


def described(directory: Path) -> str:
    """One sentence about a model, from its configuration and the comment above it."""
    name = directory.name
    source = next(file for file in (ROOT / "examples" / f"{name}.yaml", ROOT / "examples" / f"reference_{name}.yaml") if file.exists())
    comment = " ".join(line.lstrip("# ").strip() for line in source.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    model: dict[str, Any] = yaml.safe_load(source.read_text(encoding="utf-8"))["model"]
    experts = model.get("num_experts") or model["n_routed_experts"]
    width = model.get("moe_intermediate_size") or model["intermediate_size"]
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 2e6
    return (
        f"- **{name}**: {size:.1f} M parameters, {model['num_hidden_layers']} layers of {experts} experts "
        f"({width} × {model['hidden_size']}), top-{model['num_experts_per_tok']}. {comment}"
    )


def table(columns: list[str], rows: list[list[str]]) -> str:
    marks = "|".join("---" if number == 0 else "---:" for number in range(len(columns)))
    return "\n".join([f"| {' | '.join(columns)} |", f"|{marks}|", *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def learnt(record: dict[str, Any]) -> str:
    rows = []
    for domain in sorted(record["domains"], key=lambda d: (d not in TRAINED, d)):
        found = record["domains"][domain]
        numbers = (found[f"{who}bits_per_byte"] for who in ("", "unigram_", "xz_"))
        rows.append([domain, "yes" if domain in TRAINED else "no", *(f"{number:.3f}" for number in numbers)])
    return table(["text", "in the training mix", "model", "unigram", "xz"], rows)


def loads(record: dict[str, Any]) -> np.ndarray:
    """[layers, E] load of every expert in multiples of the mean, over the texts of the training mix, each counting alike."""
    shares: np.ndarray = np.mean([record["domains"][domain]["expert_load"] for domain in TRAINED], axis=0)
    return shares / shares.mean(1, keepdims=True)


def load_row(name: str, record: dict[str, Any]) -> list[str]:
    load = loads(record)
    even = ((load >= EVEN[0]) & (load <= EVEN[1])).mean()
    p = load / load.sum(1, keepdims=True)
    effective = np.exp(-(p * np.log(np.maximum(p, 1e-12))).sum(1)) / load.shape[1]
    return [name, f"{load.min():.2f}", f"{load.max():.2f}", f"{even:.0%}", f"{effective.min():.0%}", f"{effective.mean():.0%}"]


@torch.no_grad()
def activations(directory: Path) -> tuple[float, float, float, float]:
    """(largest |residual|, its multiple of the median |residual|, channels of attention's inputs, channels of the experts' inputs)."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = (REFERENCE / "text" / "wiki.eval.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text[: 8 * TOKENS], verbose=False).input_ids[:TOKENS]).view(-1, WINDOW)
    seen: dict[str, list[float]] = {"attention": [], "experts": []}
    residual: list[torch.Tensor] = []

    def channels(kind: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> None:
            largest = output.abs().flatten(0, -2).amax(0)
            seen[kind].append(float(largest.max() / largest.median()))

        return hook

    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(channels("attention"))
        layer.post_attention_layernorm.register_forward_hook(channels("experts"))
        layer.register_forward_hook(lambda m, a, out: residual.append((out[0] if isinstance(out, tuple) else out).abs().flatten()))
    model(input_ids=ids, use_cache=False)
    values = torch.cat(residual)
    return float(values.max()), float(values.max() / values.median()), max(seen["attention"]), max(seen["experts"])


def outlier_row(directory: Path) -> list[str]:
    largest, multiple, attention, experts = activations(directory)
    return [directory.name, f"{largest:.0f}", f"{multiple:.0f}", f"{attention:.1f}", f"{experts:.1f}"]


def main() -> None:
    found = {path: json.loads((path / "training.json").read_text(encoding="utf-8")) for path in models()}
    parts = [HEAD.format(models="\n".join(described(path) for path in found))]
    for path, record in found.items():
        parts.append(f"### {path.name}\n\nAfter {record['steps']:,} steps, {record['tokens']:,} tokens:\n")
        parts.append(learnt(record))
    parts.append(LOAD)
    columns = ["model", "least", "most", f"experts between {EVEN[0]} and {EVEN[1]}", "effective number, least layer", "mean"]
    parts.append(table(columns, [load_row(path.name, record) for path, record in found.items()]))
    parts.append(OUTLIERS.format(tokens=TOKENS))
    columns = ["model", "largest", "times the median", "channels, attention", "channels, experts"]
    parts.append(table(columns, [outlier_row(path) for path in found]))
    (REFERENCE / "README.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
