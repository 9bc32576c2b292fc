"""What a model is calibrated on: windows of given text, what the model writes itself, a pool of further windows, data sets or a profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moebit.calibration.sampling import kept_windows
from moebit.calibration.settings import Settings, sampling_settings
from moebit.calibration.text import Texts, TokenText, calibration_windows, load_tokenizer, parse_texts, tokenize
from moebit.errors import BadInputError
from moebit.formats.followed import Output
from moebit.formats.output import SAMPLE
from moebit.formats.profile import Profile
from moebit.methods.balance import further_windows
from moebit.plan.bitplan import BitPlan
from moebit.profiling.prepare import check_profile
from moebit.profiling.profile import data_sets
from moebit.quantize.context import Progress
from moebit.recipe import Recipe
from moebit.storage.checkpoint import Checkpoint


@dataclass(frozen=True)
class Windows:
    """Token windows that run through the layers.

    Attributes:
        calibration: int64 [N, L]; None rounds to nearest without data. pool: [P, L] for experts that get too few tokens.
    """

    calibration: Tensor | None = None
    pool: Tensor | None = None


@dataclass(frozen=True)
class Data:
    """What a model is calibrated on, and what is decided from.

    Attributes:
        windows: of given text; None where there are none to be. sampled: how the model writes its own, or None.
        pool: further windows, for experts that get too few tokens. sets: what widths and switchable channels are decided from.
        texts: by name, from which fields each text was read, and how many documents it has.
    """

    windows: Tensor | None
    sampled: Settings | None
    pool: Tensor | None
    sets: dict[str, Tensor] | Profile | None
    texts: Mapping[str, str] = field(default_factory=dict)

    def streamed(self, recipe: Recipe) -> int:
        """Tokens that go through the layers, in all streams."""
        base = recipe.calibration.samples * recipe.calibration.seq_len if recipe.needs_calibration else 0
        return base * (2 if recipe.needs_reference else 1) + (self.pool.numel() if self.pool is not None else 0)


@dataclass(frozen=True)
class Sources:
    """What a user gave to calibrate on.

    Attributes:
        text: `[NAME=]FILE` items or a mapping. profile: what `moebit profile` wrote. bits: widths, which need no profile then.
        seed: chooses windows.
    """

    text: Texts
    profile: str | Path | None
    bits: BitPlan | None
    seed: int


def gather(checkpoint: Checkpoint, recipe: Recipe, sources: Sources) -> Data:
    """Read and cut what was given.

    Raises:
        BadInputError: text that the recipe needs is not there, or does not fit; a profile of another model.
    """
    text, seed = sources.text, sources.seed
    windows, texts = _calibration(checkpoint, recipe, text, seed)
    return Data(
        windows,
        sampling_settings(recipe, bool(text), seed),
        _pool(checkpoint, recipe, text, seed),
        _data_sets(checkpoint, recipe, sources),
        {each.name: each.read_as for each in texts},
    )


def calibration_set(output: Output, checkpoint: Checkpoint, data: Data, memory: int, progress: Progress) -> Tensor | None:
    """The windows of given text, behind what the model writes itself, where the recipe has it write. The sample is journaled.

    A resumed run reads the sample instead of writing it again.
    """
    if data.sampled is None:
        return data.windows
    known = any(entry["kind"] == "sample" for entry in output.entries)
    windows = kept_windows(checkpoint.path, data.sampled, memory, output.partial / SAMPLE, whole=known, progress=progress).cpu()
    if not known:
        output.record("sample", [SAMPLE])
    output.remove(f"{SAMPLE}.partial")  # only now: the journal has the whole sample
    return windows if data.windows is None else torch.cat([windows, data.windows])


def _calibration(checkpoint: Checkpoint, recipe: Recipe, text: Texts, seed: int) -> tuple[Tensor | None, list[TokenText]]:
    """The windows of given text, None where there are none to be; and the texts that they were cut from."""
    chosen, given = recipe.calibration, bool(parse_texts(text))  # a text that is not there is refused even where it is not needed
    if not recipe.needs_calibration:
        return None, []
    sampled = sampling_settings(recipe, given, seed)
    if sampled and not chosen.text_share:
        return None, []
    if not given:
        raise _no_text(chosen.text_share)
    texts = _tokens(checkpoint, recipe, text)
    limit = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    if limit and chosen.seq_len > limit:
        raise BadInputError(f"calibration.seq_len {chosen.seq_len} is longer than the model's context of {limit}; set a smaller one")
    count = chosen.samples - (sampled.sequences if sampled else 0)
    return calibration_windows(texts, count, chosen.seq_len, seed, pack=chosen.pack), texts


def _no_text(share: float) -> BadInputError:
    if share:
        return BadInputError(
            f"calibration.text_share: {share}: give the text that is to be so much of the calibration set with --text FILE"
        )
    return BadInputError("this recipe calibrates on text: give --text FILE (docs/texts.md), or use an rtn recipe, which needs none")


def _tokens(checkpoint: Checkpoint, recipe: Recipe, text: Texts) -> list[TokenText]:
    """The texts as the model's tokens."""
    begin = recipe.calibration.bos == "auto"
    tokenizer, vocabulary = load_tokenizer(checkpoint.path), int(checkpoint.config.get_text_config().vocab_size)
    return [tokenize(name, file, tokenizer, vocabulary, begin=begin) for name, file in parse_texts(text).items()]


def _pool(checkpoint: Checkpoint, recipe: Recipe, text: Texts, seed: int) -> Tensor | None:
    """Further windows of the calibration texts, for experts that get too few tokens; None where the recipe does not balance."""
    chosen = recipe.calibration
    if chosen.balance == "none":
        return None
    if not parse_texts(text):
        raise BadInputError("calibration.balance draws further windows from given text: give --text FILE, or set calibration.balance: none")
    return further_windows([each.ids for each in _tokens(checkpoint, recipe, text)], chosen.samples, chosen.seq_len, seed, chosen.pool)


def _data_sets(checkpoint: Checkpoint, recipe: Recipe, sources: Sources) -> dict[str, Tensor] | Profile | None:
    """What widths and switchable channels are decided from: a profile, or windows of every text; None where nothing is to be decided."""
    if sources.profile is not None:
        found = Profile.read(sources.profile)
        check_profile(found, checkpoint, recipe)
        return found
    if not recipe.needs_profile or (sources.bits is not None and not recipe.switching.share):
        return None
    texts = parse_texts(sources.text)
    if recipe.switching.share and len(texts) < 2:
        raise BadInputError(
            f"switching.share {recipe.switching.share}: which channels change with the data takes two texts or more to see; "
            "give --text NAME=FILE several times, or --set switching.share=0"
        )
    each = max(1, recipe.calibration.samples // max(1, len(texts)))
    return data_sets(checkpoint, sources.text, each, recipe.calibration.seq_len, sources.seed)
