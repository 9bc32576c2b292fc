"""`inspect`: what a model is made of and, with a recipe, what would be made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebit.errors import BadInputError
from moebit.formats.engines import ANY, verdicts
from moebit.formats.gguf.locate import describe_gguf, gguf_file, open_gguf
from moebit.formats.gguf.target import GgufTarget
from moebit.formats.inputs_config import describe_activations
from moebit.formats.opening import activations_of, average_bits, open_checkpoint, quantized_modules
from moebit.memory import DEFAULT_MEMORY, Memory, memory_bytes
from moebit.model.structure import Structure, find_structure
from moebit.plan.describe import describe_structure
from moebit.plan.plan import make_plan
from moebit.plan.transforms import transformed
from moebit.recipe import Recipe, load_recipe
from moebit.storage.checkpoint import Checkpoint


def inspect(
    model: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    format: str | None = None,
    llama_cpp: str | Path | None = None,
    engine: str = ANY,
    memory: Memory = DEFAULT_MEMORY,
    follow_links: bool = False,
) -> dict[str, Any]:
    """Structure, sizes and, with a recipe, what it would make of the model. Reads headers, no weights.

    Args:
        llama_cpp: a clone of llama.cpp whose converter is asked about a GGUF file, instead of the one of the extra `gguf`.

    Raises:
        BadInputError: not a model that moebit understands, or a recipe that does not fit it.
    """
    if (file := gguf_file(model)) is not None:
        if recipe is not None:
            raise BadInputError(f"{model} is already quantized; give the full-precision checkpoint")
        found = open_gguf(file)
        return {"model": str(model), "size_bytes": found.size_bytes, "gguf": describe_gguf(found)}
    checkpoint = open_checkpoint(model, follow_links=follow_links)
    structure = find_structure(checkpoint.model)
    result = describe_structure(checkpoint, structure)
    quantized = _quantized(checkpoint, structure)
    if quantized is not None:
        result["quantized"] = quantized
        if recipe is not None:
            raise BadInputError(f"{model} is already quantized; give the full-precision checkpoint")
    elif recipe is not None:
        chosen = load_recipe(recipe, {"format": format} if format else {})
        checkpoint, weights, transforms = transformed(checkpoint, structure, chosen, 0)
        clone = Path(llama_cpp) if llama_cpp else None
        target = GgufTarget.find(checkpoint.path, weights.stored_specs, clone) if chosen.format == "gguf" else None
        plan = make_plan(checkpoint, structure, chosen, memory_bytes(memory), engine=engine, transforms=transforms, target=target)
        result["plan"] = plan.describe()
    return result


def _quantized(checkpoint: Checkpoint, structure: Structure) -> dict[str, Any] | None:
    """How an output of moebit is quantized, and what runs it; None for a full-precision checkpoint."""
    packed = quantized_modules(checkpoint)
    if packed is None:
        return None
    merged = checkpoint.weights.merged()
    activations = activations_of(checkpoint)
    return {
        "average_bits": average_bits(checkpoint),
        "format": packed[0],
        "engines": {name: verdict.describe() for name, verdict in verdicts(*packed, structure, merged, activations).items()},
        **({"activations": describe_activations(activations)} if activations else {}),
    }
