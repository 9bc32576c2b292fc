"""How a model is to write its own calibration text."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from moebit.errors import BadInputError
from moebit.model.structure import Structure
from moebit.recipe import Recipe

KINDS = ("ebss", "self", "self-balanced")
SCOPES = ("set", "sequence")
EXTENSIONS = ("likeliest", "sampled")
NATS = 40.0  # see `balancing_temperature`: as balanced as with 15, and the text as hard to predict as what is sampled plainly


@dataclass(frozen=True)
class Settings:
    """What to sample.

    Attributes:
        kind: `ebss`, `self` or `self-balanced`.
        sequences, length: how many, of how many tokens.
        width: candidates of a sequence. scope: whether a candidate's balance is judged alone (the paper) or with the other sequences.
            extend: which next tokens are looked at, the `likeliest` (the paper) or `sampled` ones; without it the paper's where its tau
            or its scope is asked for, else `sampled`. These are `ebss`'s own.
        temperature: for `ebss` the paper's tau, which weighs likelihood (high) against balance (low): 1.2 for the likeliest tokens, by the
            model's shape for sampled ones (`balancing_temperature`). Else that of the draws (1).
        oversample: times as many sequences as are kept are drawn; `self-balanced` alone.
        repetition_penalty, no_repeat_ngram: against repetition (see beam.py); 1.12 and 4 for the likeliest tokens, 1 and 0 (off) else.
        group: at most so many sequences advance together; 0: as many as the memory holds.
    """

    kind: str = "ebss"
    sequences: int = 128
    length: int = 512
    width: int = 4
    temperature: float | None = None
    scope: str = "set"
    oversample: int = 3
    repetition_penalty: float | None = None
    no_repeat_ngram: int | None = None
    group: int = 0
    seed: int = 0
    extend: str | None = None

    def complete(self) -> Settings:
        """Settings with the kind's own values where none is given.

        Raises:
            BadInputError: a value that cannot be.
        """
        asked = self.scope == "sequence" or self.temperature is not None
        extend = self.extend or ("likeliest" if asked or self.kind != "ebss" else "sampled")
        beam = self.kind == "ebss" and extend == "likeliest"
        usual = None if self.kind == "ebss" and not beam else 1.2 if beam else 1.0
        full = replace(
            self,
            extend=extend,
            temperature=usual if self.temperature is None else self.temperature,
            repetition_penalty=(1.12 if beam else 1.0) if self.repetition_penalty is None else self.repetition_penalty,
            no_repeat_ngram=(4 if beam else 0) if self.no_repeat_ngram is None else self.no_repeat_ngram,
        )
        full._check()
        return full

    def _check(self) -> None:
        assert self.repetition_penalty is not None
        checks = [
            (self.kind in KINDS, f"--kind {self.kind}: choose from {', '.join(KINDS)}"),
            (self.scope in SCOPES, f"--scope {self.scope}: choose from {', '.join(SCOPES)}"),
            (self.extend in EXTENSIONS, f"--extend {self.extend}: choose from {', '.join(EXTENSIONS)}"),
            (self.sequences >= 1, f"--sequences {self.sequences}: at least 1"),
            (self.length >= 8, f"--length {self.length}: at least 8 tokens"),
            (self.width >= 1, f"--width {self.width}: at least 1 candidate"),
            (self.temperature is None or 0 < self.temperature < math.inf, f"--temperature {self.temperature}: a positive number"),
            (self.oversample >= 1, f"--oversample {self.oversample}: at least 1"),
            (1 <= self.repetition_penalty < math.inf, f"--repetition-penalty {self.repetition_penalty}: 1 (none) or more"),
            (
                self.no_repeat_ngram == 0 or (self.no_repeat_ngram or 0) >= 2,
                f"--no-repeat-ngram {self.no_repeat_ngram}: 0 (none), 2 or more",
            ),
            (self.group >= 0, f"--group {self.group}: 0 (as many as fit) or more"),
            (0 <= self.seed < 2**63, f"--seed {self.seed}: a number from 0 to 2^63 - 1"),
        ]
        for fine, message in checks:
            if not fine:
                raise BadInputError(message)

    @property
    def drawn(self) -> int:
        """Sequences that are written, kept or not."""
        return self.sequences * (self.oversample if self.kind == "self-balanced" else 1)

    @property
    def candidates(self) -> int:
        """Rows of the model per sequence."""
        return self.width if self.kind == "ebss" else 1


def balancing_temperature(structure: Structure) -> float:
    """tau at which what a token usually does to the imbalance counts as much as `NATS` of its log-probability.

    With usage spread as sigma says, one more token changes a layer's sigma by about 1 / (|c| sqrt(k E)), k experts a token of E, up or
    down, and sigma's mean over layers by the root of the squares' sum over their number; the mean log-probability changes by nats / |c|.
    """
    layers = [(layer.moe.top_k, layer.moe.layout.experts) for layer in structure.layers if layer.moe]
    return math.sqrt(sum(1 / (top_k * experts) for top_k, experts in layers)) / len(layers) / NATS


def sampling_settings(recipe: Recipe, text: bool, seed: int) -> Settings | None:
    """What a recipe lets the model write for its calibration; None for nothing.

    Args:
        text: whether any is given. Unless the recipe gives it a share, it takes the place of all that would be sampled.
    """
    section = recipe.calibration
    if not recipe.needs_calibration or section.kind == "text" or (text and not section.text_share):
        return None
    from_text = min(max(1, round(section.text_share * section.samples)), section.samples - 1) if section.text_share else 0
    return Settings(
        section.kind, section.samples - from_text, section.seq_len, section.width, section.temperature, section.scope, section.oversample,
        section.repetition_penalty, section.no_repeat_ngram, 0, seed, section.extend,
    ).complete()  # fmt: skip
