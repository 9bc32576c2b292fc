"""`evaluate`: a model, and a reference in lockstep with it, over texts, within a memory limit.

Both models run layer by layer in float32, so that a model larger than memory can be judged. The primary measure is the KL divergence to
the reference; perplexity moves by fractions of a percent where KL shows the difference at a glance.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebit.calibration.text import Texts, TokenText, consecutive_windows, load_tokenizer, parse_texts, tokenize
from moebit.device import checked_device, made_on
from moebit.errors import BadInputError
from moebit.evaluate.gguf import llama_engine, token_remarks
from moebit.evaluate.tasks import check_tasks, run_tasks
from moebit.formats.gguf.locate import gguf_file, open_gguf
from moebit.formats.opening import average_bits, open_checkpoint
from moebit.memory import DEFAULT_MEMORY, Memory, memory_bytes
from moebit.model.structure import Structure, find_structure
from moebit.storage.checkpoint import Checkpoint
from moebit.storage.edits import placed
from moebit.streaming.budget import make_budget
from moebit.streaming.stream import Stream

Progress = Callable[[str, int, int], None]
SCORED_LOGITS = 2**22  # so many at a time: scoring takes several copies


@dataclass
class _Scores:
    """Sums over the scored tokens of one text."""

    tokens: int = 0
    nats: float = 0.0
    kl: float = 0.0
    agree: int = 0


@dataclass(frozen=True)
class _Part:
    """One text's windows inside the joint stream."""

    text: TokenText
    rows: slice
    bytes: int


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: Texts = (),
    window: int = 512,
    max_tokens: int | None = None,
    memory: Memory = DEFAULT_MEMORY,
    device: str = "cpu",
    tasks: Sequence[str] = (),
    task_data: str | Path | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity and bits per byte of a model on texts; with a reference, KL, top-1 and routing agreement.

    Windows do not overlap and the first token of each is not scored. KL is that of the reference's distribution from the model's, in nats
    over the full softmax, mean per scored token. `routing_exact` is the share of tokens whose set of experts is the reference's,
    `routing_overlap` the mean share of experts in common.

    Args:
        model, against: checkpoints or native outputs. A GGUF file, or an output that holds one, is run by llama.cpp itself; it needs
            `against`, whose tokenizer reads the texts, and its routing is not compared.
        text: `[NAME=]FILE` items or a mapping.
        window: tokens per window. max_tokens: of each text.
        memory: bytes, or a size such as `4GiB`, that the work may take; for tasks, the model is loaded whole.
        device: where texts run through the models, cpu, cuda or cuda:N; tasks and GGUF files run on the CPU.
        tasks, task_data, limit: of lm-evaluation-harness, local items, and how many of each (evaluate/tasks.py).

    Returns:
        The document of `moebit evaluate --json`: {"model", "reference", "size_bytes", "average_bits", "texts": {NAME: {...}}};
        with tasks also "tasks": {NAME: {"items", "metrics"}}.

    Raises:
        BadInputError: models that don't belong together, a text shorter than a window.
    """
    report = progress or (lambda what, done, total: None)
    allowed, where = memory_bytes(memory), checked_device(device)
    files = parse_texts(text)
    if not files and not tasks:
        raise BadInputError("give at least one --text FILE to evaluate on")
    if tasks:
        check_tasks(tasks, task_data, limit)
    if window < 2:
        raise BadInputError(f"--window {window}: at least 2 tokens, the first of which is not scored")
    file = gguf_file(model)
    if file is not None and (against is None or tasks):
        raise BadInputError(f"{model}: a GGUF file is judged on texts, against its original; give --against MODEL and no --tasks")
    candidate, reference = None if file else open_checkpoint(model), open_checkpoint(against) if against else None
    checkpoints = [checkpoint for checkpoint in (candidate, reference) if checkpoint]
    structures = [find_structure(checkpoint.model) for checkpoint in checkpoints]
    _check_pair(checkpoints, structures)
    facts = {
        "model": str(model),
        "reference": str(against) if against else None,
        **(_gguf_facts(file) if candidate is None else {"size_bytes": candidate.size_bytes, "average_bits": _average_bits(candidate)}),
    }
    answered = {"tasks": run_tasks(model, tasks, against=against, data=task_data, limit=limit)} if tasks else {}
    if not files:
        return {**facts, "texts": {}, **answered}
    if max_tokens is not None and max_tokens < window:
        raise BadInputError(f"--max-tokens {max_tokens}: at least one window of {window}")
    limit = getattr(checkpoints[0].config.get_text_config(), "max_position_embeddings", None)
    if limit and window > limit:
        raise BadInputError(f"--window {window} is longer than the model's context of {limit}; use --window {limit} or less")
    tokenizer = next((t for t in map(load_tokenizer, [c.path for c in checkpoints]) if t is not None), None)
    vocabulary = int(checkpoints[0].config.get_text_config().vocab_size)
    parts, windows = _join([tokenize(name, file, tokenizer, vocabulary) for name, file in files.items()], window, max_tokens)

    if file is not None:
        routing = _Lockstep(checkpoints, structures, windows, parts, allowed, report)
        with llama_engine(file, window, vocabulary) as (llama, engine):
            facts["remarks"] = token_remarks(llama, tokenizer, files)
            scores = routing.run(engine)
    else:
        with made_on(where):
            routing = _Lockstep([placed(each, where) for each in checkpoints], structures, windows, parts, allowed, report)
            scores = routing.run()
    return {
        **facts,
        "texts": {part.text.name: _row(scores[i], part, routing.agreement[i], bool(reference)) for i, part in enumerate(parts)},
        **answered,
    }


def _check_pair(checkpoints: list[Checkpoint], structures: list[Structure]) -> None:
    if len(checkpoints) < 2:
        return
    (a, b), (left, right) = checkpoints, structures
    facts = [
        (type(c.model).__name__, len(s.layers), int(c.config.get_text_config().vocab_size))
        for c, s in zip(checkpoints, structures, strict=True)
    ]
    if facts[0] != facts[1] or len(left.moe_layers) != len(right.moe_layers):
        raise BadInputError(
            f"{a.path} ({facts[0]}) and {b.path} ({facts[1]}) are not the same model: architecture, layers and vocabulary must agree"
        )


def _join(texts: list[TokenText], window: int, max_tokens: int | None) -> tuple[list[_Part], Tensor]:
    """All texts' windows in one stream: each layer is read once for all of them."""
    parts, rows, begin = [], [], 0
    for text in texts:
        windows = consecutive_windows(text, window, max_tokens)
        size = sum(text.bytes_between(start + 1, start + window) for start in range(0, windows.numel(), window))
        parts.append(_Part(text, slice(begin, begin + len(windows)), size))
        rows.append(windows)
        begin += len(windows)
    return parts, torch.cat(rows)


class _Lockstep:
    """One or two models streaming over the same windows."""

    def __init__(
        self, checkpoints: list[Checkpoint], structures: list[Structure], windows: Tensor, parts: list[_Part], memory: int, report: Progress
    ) -> None:
        self.structures, self.windows, self.parts, self.report = structures, windows, parts, report
        self.budgets = [
            make_budget(c, s, memory, windows.numel(), length=windows.shape[1], solve=False, hessians=False, streams=len(checkpoints))
            for c, s in zip(checkpoints, structures, strict=True)
        ]
        directory = Path(tempfile.gettempdir())
        self.streams = [
            Stream(c, s, windows, b.store(directory, c.weights.device), b.batch_tokens, b.slots)
            for c, s, b in zip(checkpoints, structures, self.budgets, strict=True)
        ]
        # agreement[part][moe layer] = (exact, overlap)
        self.agreement: list[list[tuple[int, float, float]]] = [[] for _ in parts]

    def run(self, engine: Callable[[Tensor], Tensor] | None = None) -> list[_Scores]:
        """The scores of every text; of an engine's logits, where one stands in the candidate's place."""
        layers = len(self.structures[0].layers)
        for index in range(layers):
            self.report("layers", index, layers)
            routed = [stream.step(index, budget.chunk.get(index, 1)) for stream, budget in zip(self.streams, self.budgets, strict=True)]
            if len(routed) == 2 and routed[0] is not None and routed[1] is not None:
                self._compare(index, routed[0], routed[1])
        self.report("layers", layers, layers)
        return self._score(engine)

    def _compare(self, index: int, mine_Tk: Tensor, theirs_Tk: Tensor) -> None:
        common = (mine_Tk.unsqueeze(2) == theirs_Tk.unsqueeze(1)).any(2).float().mean(1)
        length = self.windows.shape[1]
        for number, part in enumerate(self.parts):
            span = common[part.rows.start * length : part.rows.stop * length]
            self.agreement[number].append((index, float((span == 1).float().mean()), float(span.mean())))

    def _score(self, engine: Callable[[Tensor], Tensor] | None) -> list[_Scores]:
        scores = [_Scores() for _ in self.parts]
        generators = [stream.logits() for stream in self.streams]
        done = 0
        for pieces in zip(*generators, strict=True):
            rows, logits = pieces[0]
            reference = pieces[1][1] if len(pieces) == 2 else None
            if engine is not None:
                logits, reference = engine(self.windows[rows]), logits
            for number, part in enumerate(self.parts):
                begin, end = max(rows.start, part.rows.start), min(rows.stop, part.rows.stop)
                if begin < end:
                    inside = slice(begin - rows.start, end - rows.start)
                    theirs = reference[inside] if reference is not None else None
                    add_scores(scores[number], self.streams[0].windows[begin:end], logits[inside], theirs)
            done = rows.stop
            self.report("scoring", done, len(self.windows))
        return scores


def add_scores(scores: _Scores, windows_BL: Tensor, logits_BLV: Tensor, reference_BLV: Tensor | None) -> None:
    """Add the scored tokens (all but the first) of some windows."""
    step = max(1, SCORED_LOGITS // logits_BLV.shape[-1])
    for window, logits in enumerate(logits_BLV):
        for start in range(0, len(logits) - 1, step):
            rows = slice(start, min(start + step, len(logits) - 1))
            targets = windows_BL[window, 1:][rows]
            mine = logits[rows].log_softmax(-1)
            scores.tokens += len(targets)
            scores.nats -= float(mine.gather(1, targets.unsqueeze(1)).sum(dtype=torch.float64))
            if reference_BLV is not None:
                theirs = reference_BLV[window, rows].log_softmax(-1)
                scores.kl += float((theirs.exp() * (theirs - mine)).sum(-1).sum(dtype=torch.float64))
                scores.agree += int((theirs.argmax(-1) == mine.argmax(-1)).sum())


def _row(scores: _Scores, part: _Part, agreement: list[tuple[int, float, float]], compared: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "tokens": scores.tokens,
        "perplexity": math.exp(scores.nats / scores.tokens),
        "bits_per_byte": scores.nats / math.log(2) / part.bytes if part.bytes else None,
    }
    if compared:
        row |= {
            "kl": scores.kl / scores.tokens,
            "top1_agreement": scores.agree / scores.tokens,
        }
    if compared and agreement:
        row |= {
            "routing_exact": sum(exact for _, exact, _ in agreement) / len(agreement),
            "routing_overlap": sum(overlap for _, _, overlap in agreement) / len(agreement),
            "per_layer": [{"layer": layer, "routing_exact": exact, "routing_overlap": overlap} for layer, exact, overlap in agreement],
        }
    return row


def _gguf_facts(file: Path | None) -> dict[str, Any]:
    assert file is not None
    found = open_gguf(file)
    return {"size_bytes": found.size_bytes, "average_bits": found.bits_per_weight}


def _average_bits(checkpoint: Checkpoint) -> float:
    """Bits per quantized weight of a packed output or of what is shipped quantized; of every stored weight otherwise."""
    if checkpoint.shipped:
        return checkpoint.shipped.average_bits
    packed = average_bits(checkpoint)
    if packed is not None:
        return packed
    entries = checkpoint.entries.values()
    return 8 * sum(e.spec.nbytes for e in entries) / sum(math.prod(e.shape) for e in entries)
