"""Transforms of the weights that leave the function as it is: found, proved and, where known beforehand, applied to a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moebit.errors import BadInputError
from moebit.model.proof.sites import LayerScales, find_scales
from moebit.model.structure import Structure
from moebit.plan.rotation import RotationPlan, plan_rotation
from moebit.recipe import Recipe
from moebit.storage.checkpoint import Checkpoint
from moebit.storage.conversion import tied_names
from moebit.storage.edits import EditedWeights


@dataclass(frozen=True)
class Transforms:
    """What is done to the weights before they are quantized.

    Attributes:
        rotation: applied already, when the checkpoint was opened.
        scales: by layer, where channels can be scaled when the layer is calibrated; empty where the recipe scales nothing.
    """

    rotation: RotationPlan | None = None
    scales: tuple[LayerScales, ...] = ()

    def __bool__(self) -> bool:
        return self.rotation is not None or bool(self.scales)

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        result: dict[str, Any] = {}
        if self.rotation is not None:
            result["rotation"] = self.rotation.describe()
        if self.scales:
            result["scales"] = {
                "norms": sum(len(layer.norms) for layer in self.scales),
                "pairs": sum(len(layer.pairs) for layer in self.scales),
                "experts": sum(layer.experts for layer in self.scales),
                "skipped": {name: why for layer in self.scales for name, why in layer.skipped.items()},
            }
        return result


NO_TRANSFORMS = Transforms()


def transformed(checkpoint: Checkpoint, structure: Structure, recipe: Recipe, seed: int) -> tuple[Checkpoint, EditedWeights, Transforms]:
    """The checkpoint with the recipe's rotation applied as it is read.

    Returns:
        The checkpoint; its weights, to which the edits that are found layer by layer are added; and what is done to them.

    Raises:
        BadInputError: a rotation that the model does not allow, a format that cannot hold an edited parameter.
    """
    kind = recipe.rotation.absorbed
    rotation, scales, weights = None, tuple[LayerScales, ...](), EditedWeights(checkpoint.weights)
    try:
        if kind != "none":
            rotation = plan_rotation(checkpoint, structure, kind)
            weights = rotation.applied(checkpoint.weights, seed)
        if recipe.scales_channels:
            scales = find_scales(checkpoint, structure)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # a model's own code fails in any way
        raise BadInputError(
            f"{type(checkpoint.model).__name__}: a run on random values failed ({type(error).__name__}: {error}), nothing is proved "
            "about its transforms; use a recipe without rotation.absorbed and channel scales"
        ) from error
    result = Transforms(rotation, scales)
    if result and recipe.format != "native":
        _check_stored(weights, recipe.format)
    return replace(checkpoint, weights=weights), weights, result


def _check_stored(weights: EditedWeights, form: str) -> None:
    """Formats that write the checkpoint's own tensors need one for every parameter that may be edited."""
    shared = weights.stored_together()
    if shared:
        raise BadInputError(
            f"format {form}: {next(iter(shared))} is stored in one tensor with others, a transform cannot be written there; "
            "write the native format instead"
        )
    if weights.untied and weights.stored_names(tied_names(weights.model)[weights.untied[0]]) != [
        tied_names(weights.model)[weights.untied[0]]
    ]:
        raise BadInputError(
            f"format {form}: no stored name is known for the untied head {weights.untied[0]}; write the native format instead"
        )
