"""Which tensor of a GGUF file gets which block type: the recipe's type, mixture and overrides, what fits, and what cannot be packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moebit.errors import BadInputError
from moebit.formats.gguf.target import GgufPlan, GgufTarget
from moebit.formats.gguf.types import EMBEDDINGS, FILE_TYPES, HEAD, Mixture, fitting, value_blocks
from moebit.model.structure import Structure
from moebit.recipe import Recipe
from moebit.storage.checkpoint import Checkpoint

REFIT = "solver.refit: the scales of ggml's blocks hang together and are not fitted once more"


@dataclass
class GgufChooser:
    """Decides on types while the plan walks through the layers.

    Attributes:
        types, instead: as in `GgufPlan`, of what was decided so far. sources: tensors of the checkpoint that will be packed.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    target: GgufTarget
    mixture: Mixture
    types: dict[str, str] = field(default_factory=dict)
    instead: dict[str, str] = field(default_factory=dict)
    sources: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    given: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, structure: Structure, recipe: Recipe, target: GgufTarget, given: Mapping[str, str] | None = None
    ) -> GgufChooser:
        """A chooser for a model; `given` are types of a plan."""
        return cls(checkpoint, recipe, target, _mixture(checkpoint, structure, recipe, target), given=given or {})

    def decide(self, parameters: list[str]) -> tuple[dict[str, str], str | None]:
        """(parameter -> type, None), or ({}, why one of them is kept).

        Raises:
            BadInputError: rows of one parameter that go to tensors of several types.
        """
        decided, names = {}, dict[str, str]()
        for parameter in parameters:
            found, reason = self._tensors(parameter)
            if reason:
                return {}, reason
            kinds = {name: self._fitting(name) for name in found}
            if None in kinds.values():
                return {}, f"no block type of ggml fits its rows of {self.target.rows.maps[found[0]].shape[-1]} weights"
            if len(set(kinds.values())) > 1:
                told = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
                raise BadInputError(f"{parameter}: its rows have one type, and {told} were asked for; change weights.overrides")
            names |= {name: kind for name, kind in kinds.items() if kind}
            decided[parameter] = str(kinds[found[0]])
        self._take(parameters, names)
        return decided, None

    def _take(self, parameters: list[str], names: Mapping[str, str]) -> None:
        self.types.update(names)
        self.instead.update({name: self._wanted(name) for name in names if self._wanted(name) != names[name]})
        self.sources |= {stored for name in parameters for stored in self.checkpoint.weights.stored_names(name)}

    def _tensors(self, parameter: str) -> tuple[list[str], str | None]:
        """(the GGUF tensors that hold a parameter, why it cannot be packed)."""
        rows, found = self.target.rows, dict[str, None]()
        for stored in self.checkpoint.weights.stored_names(parameter):
            if stored in rows.unread:
                return [], f"llama.cpp's converter failed on its rows ({rows.unread[stored]})"
            if not rows.packable(stored):
                made = next((name for name, one in rows.computed.items() if stored in one.sources), None)
                what = f"{made} is computed from it, which is kept in f16" if made else "it is left out"
                return [], f"in llama.cpp's converter {what}"
            found |= dict.fromkeys(rows.of(stored))
        return list(found), None

    def _fitting(self, name: str) -> str | None:
        return fitting(self._wanted(name), self.target.rows.maps[name].shape[-1])

    def _wanted(self, name: str) -> str:
        for override in self.recipe.weights.overrides:
            if override.type and override.matches(name):
                self.used.add(override.match)
                return self.given.get(name, override.type)
        return self.given[name] if name in self.given else self.mixture.type_of(name)

    def plan(self) -> GgufPlan:
        """What was decided, with embeddings and head.

        Raises:
            BadInputError: tensors of the file whose rows are quantized in part; an override that matches nothing.
        """
        for name in (EMBEDDINGS, HEAD):
            found = self.target.rows.maps.get(name)
            kind = self._fitting(name) if found is not None else None
            if found is not None and kind is not None and all(self.target.rows.packable(source) for source in found.sources):
                self._take([], {name: kind})
        self._check()
        notes = (REFIT,) if self.recipe.solver.refit else ()
        return GgufPlan(self.target, self.types, self.instead, FILE_TYPES.get(self.recipe.weights.mixture, ""), notes)

    def _check(self) -> None:
        for name in self.types:
            sources = self.target.rows.maps[name].sources
            left = [source for source in sources if source not in self.sources]
            if left and len(left) < len(sources):
                raise BadInputError(f"{name} holds rows of {left[0]}, which is kept, and of tensors that are quantized; keep all or none")
        if unknown := [name for name in self.given if name not in self.types]:
            first = next(iter(self.types), "")
            raise BadInputError(f"plan: types: {unknown[0]!r} is no quantized tensor of this GGUF file (names look like {first!r})")
        for override in self.recipe.weights.overrides:
            if override.match not in self.used:
                raise BadInputError(
                    f"weights.overrides: {override.match!r} matches no quantized tensor (names look like {next(iter(self.types), '')!r})"
                )


def _mixture(checkpoint: Checkpoint, structure: Structure, recipe: Recipe, target: GgufTarget) -> Mixture:
    config: Any = checkpoint.config.get_text_config()
    heads = int(getattr(config, "num_attention_heads", 1) or 1)
    keys = int(getattr(config, "num_key_value_heads", heads) or heads)
    experts = max((layer.moe.layout.experts for layer in structure.moe_layers if layer.moe), default=0)
    maps = target.rows.maps
    kinds = recipe.weights
    return Mixture(
        kinds.mixture, kinds.type, len(structure.layers), experts, max(1, heads // keys), value_blocks(maps), HEAD not in maps
    )  # fmt: skip
