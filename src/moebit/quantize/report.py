"""What a quantization did, as numbers: layer by layer for report.json, and as a whole for whoever called it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moebit.plan.plan import Plan


@dataclass(frozen=True)
class LayerReport:
    """What happened in one layer.

    Attributes:
        linears: per quantized linear: bits, weight_error (|dW|^2 / |W|^2), damping, fallback.
        tokens_per_expert: routed slots in the calibration text.
        experts: per projection, lists over experts: bits, weight_error, damping, fallback.
        smoothing: which channels were scaled (steps/smooth.py).
        router: what was done to the router (steps/router.py). balance: which experts drew further tokens (methods/balance.py).
        scales: AWQ's exponent behind every norm and linear, and for every expert's down (steps/scale.py).
        coverage: over how many tokens soft coverage was taken, or why it was not (methods/soft_coverage.py).
        drift: by linear, and for experts by projection's input, how weights were corrected (methods/input_drift.py).
        refine: by experts module, lists over chunks: how rounding was learned (methods/learned_rounding.py).
        peak_memory_bytes: the most that the process has had resident until the layer's end.
    """

    layer: int
    linears: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokens_per_expert: list[int] = field(default_factory=list)
    experts: Mapping[str, Mapping[str, list[Any]]] = field(default_factory=dict)
    seconds: float = 0.0
    smoothing: Mapping[str, Any] = field(default_factory=dict)
    router: Mapping[str, Any] = field(default_factory=dict)
    balance: Mapping[str, Any] = field(default_factory=dict)
    scales: Mapping[str, Any] = field(default_factory=dict)
    coverage: Mapping[str, Any] = field(default_factory=dict)
    drift: Mapping[str, Any] = field(default_factory=dict)
    refine: Mapping[str, Any] = field(default_factory=dict)
    peak_memory_bytes: int = 0

    def adding(self, **parts: Mapping[str, Any]) -> LayerReport:
        """The report with further entries in its mappings, `linears` for example."""
        return replace(self, **{name: {**getattr(self, name), **more} for name, more in parts.items()})  # type: ignore[arg-type]

    @property
    def fallbacks(self) -> int:
        """Matrices that were rounded to nearest because their Hessian could not be factored."""
        linears = sum(bool(row["fallback"]) for row in self.linears.values())
        return linears + sum(sum(map(bool, rows["fallback"])) for rows in self.experts.values())

    @property
    def unseen_experts(self) -> int:
        """Experts without a token in the calibration text."""
        return sum(count == 0 for count in self.tokens_per_expert)


@dataclass(frozen=True)
class Result:
    """A finished quantization.

    Attributes:
        path: the output. plan: what was done. size_before, size_after: bytes of the weights. layers: what happened in each layer.
        already: the output was there and whole, and nothing was done. texts: from which fields each text was read.
    """

    path: Path
    plan: Plan
    size_before: int
    size_after: int
    layers: list[LayerReport]
    seconds: float
    already: bool = False
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def fallbacks(self) -> int:
        """Matrices that were rounded to nearest because their Hessian could not be factored."""
        return sum(layer.fallbacks for layer in self.layers)

    @property
    def unseen_experts(self) -> int:
        """Experts without a token in the calibration text."""
        return sum(layer.unseen_experts for layer in self.layers)

    @property
    def skipped(self) -> dict[str, int]:
        """What the recipe asks for and was left, as "what: reason" with the number of places."""
        left = [f"{what}: {reason}" for layer in self.layers for what, reason in layer.router.get("skipped", {}).items()]
        left += [f"smoothing: {reason}" for layer in self.layers for reason in layer.smoothing.get("skipped", {}).values()]
        left += [f"solver.drift: {row['skipped']}" for layer in self.layers for row in layer.drift.values() if "skipped" in row]
        left += [f"refine: {reason}" for layer in self.layers for row in layer.refine.values() for reason in row.get("skipped", [])]
        left += [f"calibration.coverage: {layer.coverage['skipped']}" for layer in self.layers if "skipped" in layer.coverage]
        return dict(Counter(left))
