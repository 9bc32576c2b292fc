"""What a model is made of, and who runs it."""

from __future__ import annotations

from typing import Any

from moebit.cli.terminal import bold, row, say, show, table, warning
from moebit.words import size


def show_gguf(result: dict[str, Any]) -> None:
    """What a GGUF file holds."""
    found = result["gguf"]
    say(bold(result["model"]), f": {found['architecture']}, {size(result['size_bytes'])}, {found['bits_per_weight']:.3f} bits per weight")
    types = table("type", "tensors", "weights", "bytes")
    for kind, part in found["types"].items():
        row(types, kind, part["tensors"], f"{part['weights']:,}", size(part["bytes"]))
    show(types)


def show_structure(result: dict[str, Any]) -> None:
    shared = "with shared experts" if result["shared_experts"] else "no shared experts"
    parameters = f"{result['parameters'] / 1e6:,.1f} M parameters"
    say(bold(result["model"]), f": {result['architecture']}, {parameters}, {size(result['size_bytes'])}")
    say(
        f"{result['layers']} layers, {result['moe_layers']} with {result['experts']} experts of "
        f"{result['expert_intermediate_size']} x {result['hidden_size']}, "
        f"top-{result['top_k']}, {shared}; router: {result['router']}"
    )
    parts = table("part", "parameters", "bytes", "share")
    for label, part in result["parts"].items():
        share = f"{part['parameters'] / result['parameters']:.1%}"
        row(parts, label, f"{part['parameters']:,}", size(part["bytes"]), share)
    show(parts)
    _show_formats(result)


def _show_formats(result: dict[str, Any]) -> None:
    """Show in which form the weights are stored, and what the model class does not use of them."""
    if quantized := result.get("quantized"):
        say(f"quantized: {quantized['format']}, {quantized['average_bits']:.3f} bits per quantized weight")
        if "activations" in quantized:
            show_activations(quantized["activations"])
        show_engines(quantized["engines"])
    if result["shipped"]:
        say(f"shipped quantized: {result['shipped']['scheme']}, read as {result['shipped']['read_as']}")
    show_reading(result)
    if result["not_in_model"]:
        say(
            f"{len(result['not_in_model'])} stored tensors ({size(result['not_in_model_bytes'])}) that {result['architecture']} does not "
            f"use (multi-token prediction layers are like this) are kept byte for byte, first {result['not_in_model'][0]}"
        )


def show_reading(result: dict[str, Any]) -> None:
    """Under which type a checkpoint is read, and which of its files are not, where there is anything to say."""
    if known := result.get("read_as"):
        say(f"model type {known['model_type']}, which transformers does not know, is read as {known['as']}")
    if files := result.get("left_over"):
        told = ", ".join(f"{name} ({count} tensors)" if count else f"{name} (unreadable)" for name, count in files.items())
        say(warning("not read"), f", as transformers does not read it: {told}")


def show_activations(said: dict[str, Any]) -> None:
    """How inputs are rounded and rotated, and where they are not."""
    if said["inputs"]:
        say(f"inputs: {_grid(said['inputs'])}")
    if said["attention"]:
        say(f"query, key and value: {_grid(said['attention'])}, in {said['attention']['modules']} attention modules")
    if said["transforms"]:
        say(f"inputs rotated: {said['transforms']['kind']}, {said['transforms']['count']} transforms")
    for key, what in (("inputs_only", "query, key and value stay whole in"), ("untransformed", "not rotated:")):
        reasons: dict[str, list[str]] = {}
        for name, why in said.get(key, {}).items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            say(warning(what), f" {names[0]}{more}: {why}")


def _grid(part: dict[str, Any]) -> str:
    if part.get("float8"):
        return "float8 per token"
    kind = "symmetric" if part["symmetric"] else "asymmetric"
    return f"{part['bits']} bits per token, {kind}, clip {part['clip']}"


def show_engines(engines: dict[str, Any]) -> None:
    for name, verdict in engines.items():
        told = verdict["notes"] if verdict["runs"] else verdict["reasons"]
        say(f"{name}: {'runs it' if verdict['runs'] else 'cannot run it'}" + (f" ({'; '.join(told)})" if told else ""))
