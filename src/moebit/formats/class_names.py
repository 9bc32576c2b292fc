"""What the modules of one model are called in every class that may load it, for lists of names that engines compare with their own."""

from __future__ import annotations

import re

from moebit.storage.conversion import INSIDE
from moebit.storage.weights import Weights

BASE = "model."  # what stands before the names of a model that has a head


def in_every_class(name: str) -> list[str]:
    """A module's name, and what the other classes of its architecture call it.

    transformers' auto classes put the same language model into a wrapper, behind a head or by itself, and leave out of its names what is
    not around it: `model.language_model.layers.0.x`, `model.layers.0.x`, `language_model.layers.0.x`, `layers.0.x`.
    """
    inside = ".".join(part for part in name.split(".") if part != INSIDE)
    names = (name, inside, name.removeprefix(BASE), inside.removeprefix(BASE))
    return list(dict.fromkeys(names))


def plain_prediction(weights: Weights) -> list[str]:
    """What is stored and not in the model class, which is written as it is: layers by expressions, matrices outside of them by name.

    These are the layers of multi-token prediction and what leads into them (`mtp.fc`), which engines build beside the model.
    """
    layers: set[str] = set()
    matrices: dict[str, None] = {}
    for stored in weights.unused:
        numbered = re.match(r"(?:\w+\.)+?\d+\.", stored)
        if numbered:
            layers.update(in_every_class(numbered[0]))
        elif len(weights.entries[stored].shape) == 2:
            matrices |= dict.fromkeys(in_every_class(stored.removesuffix(".weight")))
    return [*matrices, *(f"re:{re.escape(layer)}.*" for layer in sorted(layers))]
