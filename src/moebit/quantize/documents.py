"""The documents beside the weights: moebit.json, report.json and its page, recipe.yaml and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moebit.formats import native
from moebit.plan.plan import Plan
from moebit.quantize.report import LayerReport
from moebit.report.facts import Documents
from moebit.report.page import report_page
from moebit.storage.checkpoint import Checkpoint


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run when its last layer is written.

    Attributes:
        output: its directory's name. size_after: bytes of the weights. command: the way to make it again.
        coactivation: layer -> [E, E] tokens that two experts both got, of layers that were profiled.
    """

    output: str
    size_after: int
    seconds: float
    command: str
    peak_memory_bytes: int
    coactivation: Mapping[int, list[list[int]]]


def documents(
    checkpoint: Checkpoint, plan: Plan, identity: Mapping[str, Any], reports: list[LayerReport], facts: RunFacts
) -> dict[str, str]:
    """Every document of an output, name -> text; what depends on time or place is in report.json and report.html alone."""
    described = _described(checkpoint, plan, identity)
    report = {
        "seconds": round(facts.seconds, 2),
        "size_before": checkpoint.size_bytes,
        "size_after": facts.size_after,
        "average_bits": plan.average_bits,
        **({"original": plan.original} if plan.original else {}),
        "peak_memory_bytes": facts.peak_memory_bytes,
        "command": facts.command,
        "layers": [_layer(report, facts) for report in reports],
    }
    recipe = f"# sha256 of the content: {plan.recipe.digest()}\n{plan.recipe.to_yaml()}"
    return {
        "moebit.json": json.dumps(described, indent=1) + "\n",
        "report.json": json.dumps(report, indent=1) + "\n",
        "report.html": report_page(Documents(facts.output, report, described, recipe)),
        "recipe.yaml": recipe,
        "README.md": _card(checkpoint, plan),
    }


def _described(checkpoint: Checkpoint, plan: Plan, identity: Mapping[str, Any]) -> dict[str, Any]:
    """moebit.json: what the output depends on, and what was planned."""
    return {
        "format_version": native.FORMAT_VERSION,
        **identity,
        "format": plan.recipe.format,
        **({"shipped": checkpoint.shipped.describe()} if checkpoint.shipped else {}),
        "plan": {k: v for k, v in plan.describe().items() if k != "seconds"},
    }


def _layer(report: LayerReport, facts: RunFacts) -> dict[str, Any]:
    """A layer of report.json."""
    counts = facts.coactivation.get(report.layer)
    return asdict(report) | ({} if counts is None else {"coactivation": counts})


def _inputs(plan: Plan) -> str:
    """What happens to activations as the model runs."""
    a, rotation = plan.recipe.activations, plan.recipe.rotation.online
    said = [f"inputs are rotated ({rotation})"] if plan.activations.transforms else []
    said += [f"inputs are rounded to {a.bits} bits per token"] if a.bits < 16 else []
    said += [f"query, key and value to {a.qkv_bits}"] if plan.activations.attention_modules else []
    return f"As it runs, {', '.join(said)}.\n" if said else ""


def _card(checkpoint: Checkpoint, plan: Plan) -> str:
    base = checkpoint.path.name
    w, s = plan.recipe.weights, plan.recipe.solver
    kind = plan.recipe.allocation.kind
    width = f"{w.bits} bits" if kind == "uniform" else f"widths by {kind}"
    shipped = (
        f"The checkpoint itself is shipped quantized ({checkpoint.shipped.scheme}, {checkpoint.shipped.average_bits:.2f} bits per "
        "quantized weight) and was read as it is.\n"
        if checkpoint.shipped
        else ""
    )
    if plan.gguf:
        return _gguf_card(base, plan)
    registered = "import moebit  # registers the packed format with transformers\n" if plan.recipe.format == "native" else ""
    load = f'{registered}from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("DIRECTORY")'
    return (
        f"---\nbase_model: {base}\nlibrary_name: transformers\ntags: [moebit, quantized, moe]\n---\n\n# {base}, quantized\n\n"
        f"{base}, quantized by moebit: {s.method}, {width}, {'symmetric' if w.symmetric else 'asymmetric'}, "
        f"{'per channel' if w.group_size == -1 else f'groups of {w.group_size}'}, scope {w.scope}; "
        f"{plan.average_bits:.3f} bits per quantized weight on disk.\n{_inputs(plan)}{shipped}"
        f"Runs in: {', '.join(name for name, verdict in plan.engines.items() if verdict.runs)}.\n"
        f"`recipe.yaml` is the exact recipe, `report.json` says what happened in each layer.\n\n```python\n{load}\n```\n"
    )


def _gguf_card(base: str, plan: Plan) -> str:
    s, kinds = plan.recipe.solver, sorted(set(plan.gguf.types.values())) if plan.gguf else []
    return (
        f"---\nbase_model: {base}\nlibrary_name: gguf\ntags: [moebit, quantized, moe, gguf]\n---\n\n# {base}, quantized\n\n"
        f"{base} as a GGUF file, quantized by moebit: {s.method}, {', '.join(kinds)}; {plan.average_bits:.3f} bits per quantized weight.\n"
        f"`recipe.yaml` is the exact recipe, `report.json` says what happened in each layer.\n\n```\nllama-server -m FILE.gguf\n```\n"
    )
