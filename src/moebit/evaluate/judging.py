"""Judge any quantized model against its original, or refuse to, with the reason.

moebit reads its own outputs and several others' formats from the files and streams them. What it does not read, transformers loads whole.
"It loaded" is not enough: fused experts that a quantizer walked past are still in full precision, and experts whose tensors have names that
the model class does not know are random, both without more than a warning. So the experts of every such model are compared with the
original's before a number is taken from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from moebit.calibration.text import Texts, consecutive_windows, load_tokenizer, parse_texts, tokenize
from moebit.errors import BadInputError
from moebit.evaluate.streaming import Progress, _Scores, add_scores, evaluate
from moebit.formats.gguf.locate import gguf_file, open_gguf
from moebit.formats.gguf.shipped import gguf_source
from moebit.formats.opening import open_checkpoint, quantized_modules
from moebit.memory import DEFAULT_MEMORY, Memory
from moebit.model.seam import is_experts
from moebit.storage.checkpoint import Checkpoint, resolve
from moebit.storage.shipped.reading import declared, shipped_config

SAME = 3e-6  # |dW|^2 / |W|^2 of a change of type alone (float32 to bfloat16 gives 1e-6, 8-bit integers 2e-5)
OTHER = 0.5  # from here on the weights are not the original's: independent ones of the same size have 2
WHOLE_SHARE = 0.05  # of the expert parameters that may stay whole in something that calls itself quantized
UNREADABLE = "which transformers loads and moebit does not read; routing is not compared"


@dataclass
class Judgement:
    """What is known about one model.

    Attributes:
        refused: why no number is taken from it; None where numbers are. remarks: what to know about them.
        texts: as in `evaluate --json`; without routing where transformers ran the model.
    """

    model: str
    size_bytes: int = 0
    average_bits: float | None = None
    made_by: str = ""
    refused: str | None = None
    remarks: list[str] = field(default_factory=list)
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)


def judge(
    model: str | Path,
    reference: str | Path,
    text: Texts,
    *,
    window: int = 512,
    max_tokens: int | None = None,
    memory: Memory = DEFAULT_MEMORY,
    progress: Progress | None = None,
) -> Judgement:
    """Compare a model with its original on texts.

    Args:
        model: a checkpoint, an output of moebit or of another library. reference: the original.
        text, window, max_tokens, memory: as for `evaluate`; what transformers has to load is loaded whole, whatever `memory` is.

    Raises:
        BadInputError: no such directory. What is wrong with a model that is there is a judgement, not an error.
    """
    if (file := gguf_file(model)) is not None:
        return _judge_gguf(file, reference, text, window=window, max_tokens=max_tokens, memory=memory, progress=progress)
    path = resolve(model)
    found = Judgement(str(model), sum(file.stat().st_size for file in path.glob("*.safetensors")), made_by=_made_by(path))
    original = open_checkpoint(reference)
    try:
        checkpoint = open_checkpoint(path)
    except BadInputError as error:
        _judge_loaded(found, path, original, text, window, max_tokens, str(error))
        return found
    found.size_bytes = checkpoint.size_bytes  # what is loaded: without the side file of switchable channels
    found.refused = _walked_past(checkpoint, original)
    found.remarks += list(_remarks(path, checkpoint))
    if found.refused is None and text:
        try:
            result = evaluate(path, against=reference, text=text, window=window, max_tokens=max_tokens, memory=memory, progress=progress)
        except BadInputError as error:
            found.refused = str(error)
            return found
        found.texts, found.average_bits = result["texts"], result["average_bits"]
    return found


def _judge_gguf(file: Path, reference: str | Path, text: Texts, **how: Any) -> Judgement:
    """A GGUF file by what llama.cpp computes with it."""
    made_by = "moebit" if (file.parent / "moebit.json").is_file() else "GGUF"
    found = Judgement(str(file), open_gguf(file).size_bytes, made_by=made_by)
    try:
        result = evaluate(file, against=reference, text=text, **how) if text else None
    except BadInputError as error:
        found.refused = str(error)
        return found
    if result is not None:
        found.texts, found.average_bits, found.remarks = result["texts"], result["average_bits"], ["run by llama.cpp", *result["remarks"]]
    return found


def _made_by(path: Path) -> str:
    if (path / "moebit.json").is_file():
        return "moebit"
    if gguf_source(path) is not None:
        return "GGUF"
    quantization = declared(path)
    return str(quantization.get("quant_method", "unknown")) if quantization else "full precision"


# --- what moebit reads


def _walked_past(checkpoint: Checkpoint, original: Checkpoint) -> str | None:
    """Why a readable model is not what it says it is: quantized by its configuration, with experts in full precision."""
    if declared(checkpoint.path) is None or quantized_modules(checkpoint) is not None:
        return None  # nothing claimed, or an output of moebit's, whose plan says what is quantized
    assert checkpoint.shipped is not None
    packed = {id(entry) for entry in checkpoint.shipped.quantized}
    total = whole = 0
    for name in _expert_parameters(original.model):
        for entry in _parts(checkpoint, name):
            size = math.prod(entry.shape)
            total += size
            whole += 0 if id(entry) in packed else size
    return _whole(whole / total) if total and whole / total > WHOLE_SHARE else None


def _whole(share: float) -> str:
    return (
        f"its configuration says that it is quantized, but {share:.0%} of the expert parameters are in full precision: "
        "its quantizer walked past fused experts, or was told to leave them out"
    )


def _parts(checkpoint: Checkpoint, name: str) -> list[Any]:
    """The stored tensors, under their plain names, that make up a parameter."""
    weights = checkpoint.weights
    return [weights.entries[stored] for stored in weights.stored_names(name)]


def _expert_parameters(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if is_experts(module):
            yield from (
                f"{name}.{leaf}" for leaf in ("gate_up_proj", "up_proj", "down_proj") if isinstance(getattr(module, leaf, None), Tensor)
            )


def _remarks(path: Path, checkpoint: Checkpoint) -> Iterator[str]:
    """What to know about numbers that come from the files of another library."""
    quantization = declared(path) or {}
    groups = quantization.get("config_groups")
    if (path / "moebit.json").is_file() or checkpoint.shipped is None:
        return
    if isinstance(groups, Mapping):
        widths = {group.get("weights", {}).get("num_bits") for group in groups.values() if isinstance(group, Mapping)}
        named = [t for g in groups.values() if isinstance(g, Mapping) for t in g.get("targets", ()) if "experts" in str(t)]
        if len(widths) > 1 and named:
            yield "experts of several widths: transformers would read them all with one; the numbers are those of the files"
        if any(isinstance(g, Mapping) and g.get("input_activations") for g in groups.values()):
            yield "activations are not rounded here as an engine would"
    if checkpoint.shipped.average_bits:
        yield f"read by moebit from its files ({checkpoint.shipped.scheme})"


# --- what transformers loads


def _judge_loaded(
    found: Judgement,
    path: Path,
    original: Checkpoint,
    text: Texts,
    window: int,
    max_tokens: int | None,
    unreadable: str,
) -> None:
    """Load with transformers, look at the experts, and score; fills `found`."""
    try:
        model, info = _load(path)
    except Exception as error:  # whatever a quantizer's loader raises about a model that is not understood here
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        found.refused = f"neither moebit ({unreadable}) nor transformers ({first}) reads it"
        return
    found.refused = _not_loaded(info) or _wrong_experts(model, original)
    if found.refused is None and text:
        found.remarks.append(f"{found.made_by}, {UNREADABLE}")
        found.texts = _score(model, original, path, text, window, max_tokens)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings: what they tell is looked at."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _load(path: Path) -> tuple[Any, dict[str, Any]]:
    with _quiet():
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True, trust_remote_code=False)
    return model.eval(), info


def _not_loaded(info: Mapping[str, Any]) -> str | None:
    """Tensors of the model that the files do not have: transformers fills them with random numbers."""
    missing = [str(key) for key in info.get("missing_keys", ())]
    wrong = [str(key[0] if isinstance(key, tuple) else key) for key in info.get("mismatched_keys", ())]
    if missing or wrong:
        names = sorted(missing + wrong)
        return f"transformers fills {len(names)} tensors with random numbers, because the files do not have them, first {names[0]}"
    return None


@torch.no_grad()
def _wrong_experts(model: nn.Module, original: Checkpoint) -> str | None:
    """Experts that are the original's own, or nothing like them. What is packed in a way of its own is not looked into."""
    total = whole = 0
    modules = dict(model.named_modules())
    for name in _expert_parameters(original.model):
        owner, _, leaf = name.rpartition(".")
        held = getattr(modules.get(owner), leaf, None)
        if not isinstance(held, Tensor):
            continue
        value = _values(held)
        wanted = original.weights.parameter(name).float()
        if value is None or value.shape != wanted.shape:
            continue
        missed = (value - wanted).square().sum((1, 2)) / wanted.square().sum((1, 2)).clamp(min=1e-30)
        if float(missed.max()) > OTHER:
            worst = int(missed.argmax())
            return (
                f"expert {worst} of {name} is nothing like the original's (|ΔW|² / |W|² = {float(missed[worst]):.2g}): "
                "it was loaded as random numbers, with a scale missing, or belongs to another model"
            )
        total += wanted.numel()
        whole += wanted[0].numel() * int((missed < SAME).sum())
    if shipped_config(model.config.to_dict()) is not None and total and whole / total > WHOLE_SHARE:  # type: ignore[union-attr, operator]
        return _whole(whole / total)
    return None


def _values(held: Tensor) -> Tensor | None:
    """float32 of a parameter; None of codes whose meaning is somewhere else."""
    if type(held) not in (Tensor, nn.Parameter) and hasattr(held, "dequantize"):
        return held.dequantize().float()
    return held.float() if held.is_floating_point() and held.element_size() >= 2 else None


@torch.no_grad()
def _score(model: Any, original: Checkpoint, path: Path, text: Texts, window: int, max_tokens: int | None) -> dict[str, dict[str, Any]]:
    """Perplexity, KL and top-1 agreement, one window at a time, with both models whole in memory."""
    with _quiet():
        reference: Any = AutoModelForCausalLM.from_pretrained(original.path, dtype=torch.float32, trust_remote_code=False).eval()
    tokenizer = load_tokenizer(original.path) or load_tokenizer(path)
    vocabulary = int(original.config.get_text_config().vocab_size)
    result = {}
    for name, file in parse_texts(text).items():
        scores, tokens = _Scores(), tokenize(name, file, tokenizer, vocabulary)
        windows = consecutive_windows(tokens, window, max_tokens)
        for rows in windows.split(1):
            mine = model(input_ids=rows, use_cache=False).logits.float()
            add_scores(scores, rows, mine, reference(input_ids=rows, use_cache=False).logits.float())
        result[name] = {
            "tokens": scores.tokens,
            "perplexity": math.exp(scores.nats / scores.tokens),
            "bits_per_byte": None,
            "kl": scores.kl / scores.tokens,
            "top1_agreement": scores.agree / scores.tokens,
        }
    return result
