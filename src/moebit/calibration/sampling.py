"""Calibration text that the model writes itself: `ebss` (beam.py), `self` (plain sampling), `self-balanced` (plain sampling of several
times too many sequences, of which those are kept that use the experts most evenly together).

The whole model is in memory, in full precision. Sequences advance together, as many as the memory holds with the caches of all their
candidates; where that is not all of them, group after group. A finished group is on disk: an interrupted run goes on behind it.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebit import words
from moebit.calibration.beam import Rules, ancestral, ebss
from moebit.calibration.sample_files import Partial, fingerprint, write_sample, write_whole
from moebit.calibration.settings import Settings, balancing_temperature
from moebit.calibration.text import Texts, calibration_windows, load_tokenizer, parse_texts, tokenize
from moebit.calibration.usage import Progress, balanced_subset, describe_windows
from moebit.errors import BadInputError
from moebit.memory import DEFAULT_MEMORY, Memory, memory_bytes
from moebit.model.decoder import Decoder, weight_bytes
from moebit.model.embeddings import named_tokens
from moebit.model.opening import open_hub_checkpoint
from moebit.model.structure import Structure, find_structure
from moebit.recipe.reading import read_object
from moebit.storage.checkpoint import Checkpoint, resolve
from moebit.storage.documents import GenerationSettings, checked
from moebit.streaming.budget import PROCESS_BYTES


def sample(
    model: str | Path,
    out: str | Path,
    *,
    kind: str = "ebss",
    sequences: int = 128,
    length: int = 512,
    width: int = 4,
    temperature: float | None = None,
    scope: str = "set",
    oversample: int = 3,
    repetition_penalty: float | None = None,
    no_repeat_ngram: int | None = None,
    extend: str | None = None,
    group: int = 0,
    memory: Memory = DEFAULT_MEMORY,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Let a model write its own calibration text: a .jsonl with a sequence's `input_ids` and `text` a line, ready for `--text`.

    Args:
        model: directory or hub id of a checkpoint; all of it has to fit in memory.
        out: the .jsonl to write; what was found out about it is put beside it, in OUT.json.
        kind, sequences, length, width, temperature, scope, oversample, repetition_penalty, no_repeat_ngram, extend, group: see
            `Settings`.
        memory: bytes, or a size such as `4GiB`, that the work may take; it decides how many sequences advance together, and with it, in
            the last digit, the text.
        seed: of the first tokens and of the draws. The same model, settings and memory give the same file.
        resume: go on with an interrupted run behind its last finished group. overwrite: replace a file, or an interrupted run.
        progress: called with (what, done, total).

    Returns:
        What `describe_windows` says about the sample, with `settings`, `seconds` and `tokens_per_second` of the writing.

    Raises:
        BadInputError: numbers that make no sense, a model that does not fit, one whose cache does not follow.
    """
    settings = Settings(
        kind, sequences, length, width, temperature, scope, oversample, repetition_penalty, no_repeat_ngram, group, seed, extend
    ).complete()
    out = Path(out)
    if out.suffix != ".jsonl":
        raise BadInputError(f"-o {out}: call it something.jsonl, so that --text reads its token ids")
    path, allowed = resolve(model), memory_bytes(memory)
    identity = {"model": fingerprint(path), "memory": allowed, **asdict(settings)}
    with Partial.of(out, identity, resume=resume, overwrite=overwrite) as partial:
        began = time.perf_counter()
        windows, fresh = write_windows(path, settings, allowed, partial, progress)
        seconds = time.perf_counter() - began
        result = {"model": str(model), **_described(path, settings, windows, allowed, progress)}
        result |= {"seconds": round(seconds, 3), "tokens_per_second": round(fresh / seconds, 1) if fresh else None}
        write_sample(out, windows, load_tokenizer(path))
        write_whole(out.with_name(out.name + ".json"), json.dumps(result, indent=1) + "\n")
        partial.remove()
    return result


def _described(path: Path, settings: Settings, windows: Tensor, memory: int, progress: Progress | None) -> dict[str, Any]:
    """What a sample is, and how evenly it uses the experts."""
    checkpoint = open_hub_checkpoint(path, None)
    structure = find_structure(checkpoint.model)
    return {
        "settings": {**asdict(settings), "temperature": _temperature(settings, structure)},
        **describe_windows(checkpoint, structure, windows, end_ids(checkpoint), memory, progress),
    }


def describe_text(
    model: str | Path,
    text: Texts,
    *,
    sequences: int = 128,
    length: int = 512,
    memory: Memory = DEFAULT_MEMORY,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Describe windows of any text, chosen as calibration chooses them, as `sample` describes what a model wrote.

    Raises:
        BadInputError: texts too short for that.
    """
    path = resolve(model)
    checkpoint = open_hub_checkpoint(path, None)
    tokenizer = load_tokenizer(path)
    vocabulary = int(checkpoint.config.get_text_config().vocab_size)
    texts = [tokenize(name, file, tokenizer, vocabulary) for name, file in parse_texts(text).items()]
    windows = calibration_windows(texts, sequences, length, seed)
    structure = find_structure(checkpoint.model)
    return {"model": str(model), **describe_windows(checkpoint, structure, windows, end_ids(checkpoint), memory_bytes(memory), progress)}


def write_windows(path: Path, settings: Settings, memory: int, partial: Partial, progress: Progress | None = None) -> tuple[Tensor, int]:
    """The sequences, int64 [sequences, length], and how many tokens were written for them now (0: `partial` had them all).

    Args:
        settings: complete. partial: where finished groups are kept.

    Raises:
        BadInputError: as `sample`.
    """
    checkpoint = open_hub_checkpoint(path, None)
    structure = find_structure(checkpoint.model)
    check_fits(checkpoint, memory)
    _check_length(checkpoint, settings.length)
    decoder = Decoder(checkpoint, structure)
    done = sum(len(tokens) for tokens, _ in partial.groups)
    fresh = (settings.drawn - done) * settings.length
    if fresh:
        _write_groups(decoder, settings, _temperature(settings, structure), memory, partial, progress or (lambda what, done, total: None))
    tokens = torch.cat([tokens for tokens, _ in partial.groups])
    if settings.kind == "self-balanced":
        usage = torch.cat([usage for _, usage in partial.groups])
        tokens = tokens[balanced_subset(usage, decoder.experts, settings.sequences)]
    return tokens, fresh


def _temperature(settings: Settings, structure: Structure) -> float:
    return balancing_temperature(structure) if settings.temperature is None else settings.temperature


def _write_groups(decoder: Decoder, settings: Settings, temperature: float, memory: int, partial: Partial, progress: Progress) -> None:
    """Sequences group after group, each kept on disk as soon as it is whole."""
    restarts, uniform, rules = _randomness(decoder.checkpoint, settings)
    with decoder.loaded():
        size = _group_size(decoder, restarts, settings, memory)
        for start in range(sum(len(tokens) for tokens, _ in partial.groups), settings.drawn, size):
            rows = slice(start, min(start + size, settings.drawn))
            offset, steps = start * settings.length, (rows.stop - rows.start) * settings.length

            def within(what: str, done: int, total: int, offset: int = offset, steps: int = steps) -> None:
                progress(what, offset + steps * done // total, settings.drawn * settings.length)

            if settings.kind == "ebss":
                before = sum((usage.long().sum(0) for _, usage in partial.groups), start=torch.zeros((), dtype=torch.int64))
                written = ebss(
                    decoder, restarts[rows], rules, width=settings.width, temperature=temperature, scope=settings.scope,
                    done_ME=before if partial.groups else None, noise=_noise(settings, start), progress=within,
                )  # fmt: skip
            else:
                written = ancestral(decoder, restarts[rows], uniform[rows], rules, temperature=temperature, progress=within)
            partial.add(*written)


def kept_windows(path: Path, settings: Settings, memory: int, file: Path, *, whole: bool, progress: Progress | None = None) -> Tensor:
    """The sequences that `file` holds, written now unless it is `whole`.

    What is finished of them is kept beside it, in a file of the same name and `.partial`; whoever notes that `file` is whole removes it.
    """
    if whole:
        return tokenize(file.name, file, None, 2**31).ids.view(settings.sequences, settings.length)
    identity = {"memory": memory, **asdict(settings)}
    begun = file.with_name(file.name + ".partial")
    with Partial.take_up(begun, identity) if begun.exists() else Partial.begin(begun, identity) as partial:
        windows, _ = write_windows(path, settings, memory, partial, progress)
        write_sample(file, windows, load_tokenizer(path))
    return windows


def check_fits(checkpoint: Checkpoint, memory: int) -> None:
    """Refuse a model that cannot be in memory as a whole.

    Raises:
        BadInputError: saying what it takes.
    """
    needed = weight_bytes(checkpoint.model) + PROCESS_BYTES
    if needed >= memory:
        raise BadInputError(
            f"{checkpoint.path}: sampling needs the whole model in memory, {words.size(needed)} and its caches, "
            f"and --memory is {words.size(memory)}; give more, or sample on a larger machine and give the file as --text"
        )


def _check_length(checkpoint: Checkpoint, length: int) -> None:
    limit = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    if limit and length > limit:
        raise BadInputError(f"sequences of {length} tokens are longer than the model's context of {limit}; ask for shorter ones")


def _group_size(decoder: Decoder, restarts: Tensor, settings: Settings, memory: int) -> int:
    row = decoder.row_bytes(restarts.flatten(), settings.length, reorder=settings.kind == "ebss" and settings.width > 1)
    room = memory - PROCESS_BYTES - decoder.weight_bytes
    fitting = room // (row * settings.candidates)
    if fitting < 1:
        raise BadInputError(
            f"{decoder.checkpoint.path}: beside the model, --memory {words.size(memory)} leaves {words.size(room)}, "
            f"and the cache of one sequence with {settings.candidates} candidates of {settings.length} tokens "
            f"takes {words.size(row * settings.candidates)}; give more, or ask for shorter sequences or fewer candidates"
        )
    return min(fitting, settings.drawn, settings.group or settings.drawn)


def _randomness(checkpoint: Checkpoint, settings: Settings) -> tuple[Tensor, Tensor, Rules]:
    """Everything random, drawn at once so that it does not depend on groups: restarts [N, L], uniform float64 [N, L]; and the rules."""
    assert settings.repetition_penalty is not None
    assert settings.no_repeat_ngram is not None
    vocabulary, tokenizer = int(checkpoint.config.get_text_config().vocab_size), load_tokenizer(checkpoint.path)
    ends, special, unwritten = end_ids(checkpoint), _special_ids(tokenizer), _unwritten_ids(checkpoint.config, tokenizer, vocabulary)
    allowed = torch.tensor(sorted(set(range(vocabulary)) - set(ends) - special - unwritten))
    if not len(allowed):
        raise BadInputError(f"{checkpoint.path}: every token of the vocabulary is a special one; nothing to start from")
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.drawn, settings.length)
    restarts = allowed[torch.randint(len(allowed), shape, generator=generator)]
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    rules = Rules(tuple(ends), tuple(sorted(unwritten - set(ends))), settings.repetition_penalty, settings.no_repeat_ngram)
    return restarts, uniform, rules


def _noise(settings: Settings, start: int) -> torch.Generator | None:
    """What a group, by its first sequence, draws its extensions with."""
    if settings.extend == "likeliest":
        return None
    state = hashlib.sha256(f"{settings.seed} {start}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(state[:8], "big") >> 1)


def end_ids(checkpoint: Checkpoint) -> list[int]:
    """Tokens that end a text, as the generation settings or else the configuration name them."""
    file = checkpoint.path / "generation_config.json"
    stated = read_object(file, remedy="copy it again", infinite=True) if file.exists() else {}
    checked(GenerationSettings, stated, file, "copy it again")
    ends = stated.get("eos_token_id", getattr(checkpoint.config.get_text_config(), "eos_token_id", None))
    return sorted({int(i) for i in (ends if isinstance(ends, list) else [ends]) if isinstance(i, int) and i >= 0})


def _special_ids(tokenizer: Any | None) -> set[int]:
    """Tokens that are no text: what no sequence begins with."""
    if tokenizer is None:
        return set()
    added = {int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | {int(i) for i in tokenizer.all_special_ids}


def _unwritten_ids(config: Any, tokenizer: Any | None, vocabulary: int) -> set[int]:
    """Tokens that are never written: places for pictures and padding, and rows of the table that no token belongs to."""
    beyond = set(range(vocabulary)) - set(tokenizer.get_vocab().values()) if tokenizer is not None else set()
    return {i for i in named_tokens(config) if 0 <= i < vocabulary} | beyond
