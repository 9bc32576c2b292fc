"""What a model wrote for its calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moebit.cli.terminal import bold, row, say, show, table


def show_sample(output: Path, result: dict[str, Any]) -> None:
    settings, speed = result["settings"], result["tokens_per_second"]
    told = f": {settings['sequences']} sequences of {settings['length']} tokens, {settings['kind']}"
    say(bold(output), told, f", {speed:,.0f} tokens/s" if speed else "")
    say(f"perplexity {result['perplexity']:.2f}, distinct 4-grams {result['distinct_4grams']:.1%}")
    usage = table("layer", "sigma", "std", "tokens per expert: least", "median", "most", "never seen")
    for layer in [{"layer": "all", **result}, *result["per_layer"]]:
        tokens = layer["tokens_per_expert"]
        numbers = (f"{layer['sigma']:.4f}", f"{layer['std']:.4f}", f"{tokens['min']:,}", f"{tokens['median']:,.0f}", f"{tokens['max']:,}")
        row(usage, layer["layer"], *numbers, layer["unseen"])
    show(usage)
