"""The documents beside the weights: moebit.json, report.json and its page, recipe.yaml and the model card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moebit.formats import native
from moebit.plan.plan import Plan
from moebit.quantize.report import LayerReport
from moebit.report.facts import Documents
from moebit.report.page import report_page
from moebit.storage.checkpoint import Checkpoint

CARD_BYTES = 2**20


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run when its last layer is written.

    Attributes:
        output: its directory's name. size_after: bytes of the weights. command: the way to make it again.
        coactivation: layer -> [E, E] tokens that two experts both got, of layers that were profiled.
        texts: by name, from which fields each text was read.
    """

    output: str
    size_after: int
    seconds: float
    command: str
    peak_memory_bytes: int
    coactivation: Mapping[int, list[list[int]]]
    texts: Mapping[str, str] = field(default_factory=dict)


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
        "command": without_folders(facts.command),
        **({"texts": dict(facts.texts)} if facts.texts else {}),
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


def without_folders(command: str) -> str:
    """A command whose absolute paths are names alone: a report is handed on, and the folders of the machine are nobody's business."""
    return re.sub(r"(?<![\w.~-])/(?:[^/\s'\"=,:]+/)*(?=[^/\s'\"]+)", "", command)


def base_model(path: Path) -> str:
    """What a model card calls the checkpoint: the hub id where it lies in the hub's cache (`models--ORG--NAME/snapshots/…`)."""
    for part in reversed(path.absolute().parts):
        if part.startswith("models--"):
            return "/".join(part.removeprefix("models--").split("--", 1))
    return path.name


def licence(path: Path) -> dict[str, str]:
    """The licence that the checkpoint's own card names, in the fields of the hub's cards."""
    card = path / "README.md"
    if not card.is_file() or card.stat().st_size > CARD_BYTES:
        return {}
    matter = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    lines = matter[1].splitlines() if matter else []
    found = [re.fullmatch(r"(license|license_name|license_link):\s*[\"']?([\w.:/?=#-]+)[\"']?\s*", line) for line in lines]
    return {match[1]: match[2] for match in found if match}


def _front(checkpoint: Checkpoint, library: str, tags: str) -> str:
    """What stands in front of a card, for the hub."""
    named = "".join(f"{key}: {value}\n" for key, value in licence(checkpoint.path).items())
    return f"---\nbase_model: {base_model(checkpoint.path)}\n{named}library_name: {library}\ntags: [{tags}]\n---\n\n"


def _inputs(plan: Plan) -> str:
    """What happens to activations as the model runs."""
    a, rotation = plan.recipe.activations, plan.recipe.rotation.online
    said = [f"inputs are rotated ({rotation})"] if plan.activations.transforms else []
    said += [f"inputs are rounded to {a.bits} bits per token"] if a.bits < 16 else []
    said += [f"query, key and value to {a.qkv_bits}"] if plan.activations.attention_modules else []
    return f"As it runs, {', '.join(said)}.\n" if said else ""


def _card(checkpoint: Checkpoint, plan: Plan) -> str:
    base = base_model(checkpoint.path).rpartition("/")[2]
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
        return _gguf_card(checkpoint, base, plan)
    registered = "import moebit  # registers the packed format with transformers\n" if plan.recipe.format == "native" else ""
    load = f'{registered}from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("DIRECTORY")'
    return (
        f"{_front(checkpoint, 'transformers', 'moebit, quantized, moe')}# {base}, quantized\n\n"
        f"{base}, quantized by moebit: {s.method}, {width}, {'symmetric' if w.symmetric else 'asymmetric'}, "
        f"{'per channel' if w.group_size == -1 else f'groups of {w.group_size}'}, scope {w.scope}; "
        f"{plan.average_bits:.3f} bits per quantized weight on disk.\n{_inputs(plan)}{shipped}"
        f"Runs in: {', '.join(name for name, verdict in plan.engines.items() if verdict.runs)}.\n"
        f"`recipe.yaml` is the exact recipe, `report.json` says what happened in each layer.\n\n```python\n{load}\n```\n"
    )


def _gguf_card(checkpoint: Checkpoint, base: str, plan: Plan) -> str:
    s, kinds = plan.recipe.solver, sorted(set(plan.gguf.types.values())) if plan.gguf else []
    return (
        f"{_front(checkpoint, 'gguf', 'moebit, quantized, moe, gguf')}# {base}, quantized\n\n"
        f"{base} as a GGUF file, quantized by moebit: {s.method}, {', '.join(kinds)}; {plan.average_bits:.3f} bits per quantized weight.\n"
        f"`recipe.yaml` is the exact recipe, `report.json` says what happened in each layer.\n\n```\nllama-server -m FILE.gguf\n```\n"
    )
