"""Calibration text that the model writes itself: `ebss` (beam.py), `self` (plain sampling), `self-balanced` (plain sampling of several
times too many sequences, of which those are kept that use the experts most evenly together).

The whole model is in memory, in full precision. Sequences advance together, as many as the memory holds with the caches of all their
candidates; where that is not all of them, group after group. A finished group is on disk: an interrupted run goes on behind it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebit.calibration.beam import Rules, ancestral, ebss
from moebit.calibration.text import Texts, calibration_windows, load_tokenizer, parse_texts, tokenize
from moebit.calibration.usage import Progress, balanced_subset, describe_windows
from moebit.errors import BadInputError
from moebit.model.decoder import Decoder, weight_bytes
from moebit.model.structure import Structure, find_structure
from moebit.recipe import Recipe
from moebit.recipe.reading import TEXT_BYTES, parse_json, read_object, read_text
from moebit.storage.checkpoint import Checkpoint, open_hub_checkpoint, resolve
from moebit.storage.documents import GenerationSettings, checked, understood
from moebit.storage.durable import replace_text
from moebit.streaming.budget import PROCESS_BYTES
from moebit.streaming.stream import named_tokens

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
        """With the kind's own values where none is given.

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
            (self.temperature is None or self.temperature > 0, f"--temperature {self.temperature}: a positive number"),
            (self.oversample >= 1, f"--oversample {self.oversample}: at least 1"),
            (self.repetition_penalty >= 1, f"--repetition-penalty {self.repetition_penalty}: 1 (none) or more"),
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
    memory: int = 4 * 2**30,
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
        memory: bytes that the work may take; decides how many sequences advance together, and with it, in the last digit, the text.
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
    path = resolve(model)
    partial = Partial.of(out, {"model": fingerprint(path), "memory": memory, **asdict(settings)}, resume=resume, overwrite=overwrite)
    began = time.perf_counter()
    windows, fresh = write_windows(path, settings, memory, partial, progress)
    seconds = time.perf_counter() - began
    checkpoint = open_hub_checkpoint(path, None)
    structure = find_structure(checkpoint.model)
    described = describe_windows(checkpoint, structure, windows, end_ids(checkpoint), memory, progress)
    result = {
        "model": str(model),
        "settings": {**asdict(settings), "temperature": _temperature(settings, structure)},
        **described,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(fresh / seconds, 1) if fresh else None,
    }
    write_sample(out, windows, load_tokenizer(path))
    _replace(out.with_name(out.name + ".json"), json.dumps(result, indent=1) + "\n")
    partial.remove()
    return result


def describe_text(
    model: str | Path,
    text: Texts,
    *,
    sequences: int = 128,
    length: int = 512,
    memory: int = 4 * 2**30,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The same about windows of any text, chosen as calibration chooses them: what to compare a sample with.

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
    return {"model": str(model), **describe_windows(checkpoint, structure, windows, end_ids(checkpoint), memory, progress)}


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


def balancing_temperature(structure: Structure) -> float:
    """tau at which what a token usually does to the imbalance counts as much as `NATS` of its log-probability.

    With usage spread as sigma says, one more token changes a layer's sigma by about 1 / (|c| sqrt(k E)), k experts a token of E, up or
    down, and sigma's mean over layers by the root of the squares' sum over their number; the mean log-probability changes by nats / |c|.
    """
    layers = [(layer.moe.top_k, layer.moe.layout.experts) for layer in structure.layers if layer.moe]
    return math.sqrt(sum(1 / (top_k * experts) for top_k, experts in layers)) / len(layers) / NATS


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


def kept_windows(path: Path, settings: Settings, memory: int, file: Path, *, whole: bool, progress: Progress | None = None) -> Tensor:
    """The sequences that `file` holds, written now unless it is `whole`.

    What is finished of them is kept beside it, in a file of the same name and `.partial`; whoever notes that `file` is whole removes it.
    """
    if whole:
        return tokenize(file.name, file, None, 2**31).ids.view(settings.sequences, settings.length)
    identity = {"memory": memory, **asdict(settings)}
    begun = file.with_name(file.name + ".partial")
    partial = Partial.take_up(begun, identity) if begun.exists() else Partial.begin(begun, identity)
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
            f"{checkpoint.path}: sampling needs the whole model in memory, {_gib(needed)} and its caches, and --memory is {_gib(memory)}; "
            "give more, or sample on a larger machine and give the file as --text"
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
            f"{decoder.checkpoint.path}: beside the model, --memory {_gib(memory)} leaves {_gib(room)}, and the cache of one sequence "
            f"with {settings.candidates} candidates of {settings.length} tokens takes {_gib(row * settings.candidates)}; "
            "give more, or ask for shorter sequences or fewer candidates"
        )
    return min(fitting, settings.drawn, settings.group or settings.drawn)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


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


def fingerprint(path: Path) -> str:
    """sha256 over a checkpoint's configuration and its shards' names, sizes and times."""
    state = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        state.update(json.dumps([file.name, file.stat().st_size, file.stat().st_mtime_ns]).encode())
    return state.hexdigest()


@dataclass
class Partial:
    """Groups that are finished, in a file beside the one that will be written: what it belongs to, then a line a group.

    Attributes:
        groups: (tokens [n, L], usage [n, M, E]) of each.
    """

    file: Path
    groups: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, out: Path, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> Partial:
        """Begin, or go on.

        Raises:
            BadInputError: the output exists, an interrupted run that would have to be decided about, or one of something else.
        """
        file = out.with_name(out.name + ".partial")
        if not overwrite and not (resume and file.exists()):  # a run that ended after writing OUT, before it tidied up, left both
            for there in (out, out.with_name(out.name + ".json")):
                if os.path.lexists(there):
                    raise BadInputError(f"{there} exists; choose another -o, or --overwrite to replace it")
        if file.exists() and not (resume or overwrite):
            raise BadInputError(f"{file} holds an interrupted run; --resume goes on with it, --overwrite starts again")
        return cls.take_up(file, identity) if file.exists() and resume else cls.begin(file, identity)

    @classmethod
    def begin(cls, file: Path, identity: dict[str, Any]) -> Partial:
        """An empty one, in place of whatever is there."""
        _replace(file, json.dumps({"started": identity}) + "\n")
        return cls(file, [])

    @classmethod
    def take_up(cls, file: Path, identity: dict[str, Any]) -> Partial:
        """What an interrupted run has finished; a line that it did not finish is dropped.

        Raises:
            BadInputError: the run was another one.
        """
        lines = list(_whole_lines(file))
        if not lines:
            return cls.begin(file, identity)
        started = lines[0].get("started", {})
        changed = sorted(key for key in {*started, *identity} if started.get(key) != identity.get(key))
        if changed:
            raise BadInputError(f"{file} was started with another {', '.join(changed)}; give the same again, or --overwrite starts again")
        _replace(file, "".join(json.dumps(line) + "\n" for line in lines))
        with understood(file, "--overwrite starts again"):
            groups = [(torch.tensor(line["input_ids"]), torch.tensor(line["usage"], dtype=torch.int32)) for line in lines[1:]]
        return cls(file, groups)

    def add(self, tokens_NL: Tensor, usage_NME: Tensor) -> None:
        """Keep a finished group."""
        self.groups.append((tokens_NL, usage_NME))
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"input_ids": tokens_NL.tolist(), "usage": usage_NME.tolist()}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """What it was for is written."""
        self.file.unlink(missing_ok=True)


def _whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in read_text(file, limit=TEXT_BYTES).splitlines():
        try:
            found = parse_json(line)
        except ValueError:
            return
        if not isinstance(found, dict):
            return
        yield found


def write_sample(file: Path, windows_SL: Tensor, tokenizer: Any | None) -> None:
    """A .jsonl with a line per window: its ids and, where there is a tokenizer, their text."""
    lines = []
    for ids in windows_SL.tolist():
        text = {} if tokenizer is None else {"text": tokenizer.decode(ids, skip_special_tokens=False)}
        lines.append(json.dumps({**text, "input_ids": ids}))
    _replace(file, "".join(line + "\n" for line in lines))


def _replace(file: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        BadInputError: it cannot be written.
    """
    try:
        replace_text(file, text)
    except OSError as error:
        raise BadInputError(f"cannot write {file}: {error.strerror}; choose another place") from error
