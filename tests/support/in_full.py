"""Does a model type work in full? A tiny random checkpoint of it goes the whole way, and transformers without moebit is the judge.

save_pretrained -> quantize (GPTQ on a token text, everything) -> load in transformers -> logits, against the original model in plain
transformers with the quantized weights put in as dense values (tests/support/outputs.py reads them value by value). Beside that: every
parameter
of the routed experts is quantized, everything else is as it was, and moebit's streaming gives the original's logits.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

import moebit
from moebit.formats.opening import open_checkpoint
from moebit.model.structure import find_structure
from moebit.streaming.stream import Stream
from tests.support.architectures import Tiny
from tests.support.models import EXPERTS, MEANT, TOP_K, VOCABULARY, quiet, save, windows
from tests.support.outputs import as_parameters, dequantized, replace_weights, small_recipe, token_file

TOLERANCE = 2e-4  # of the largest logit, float32


@dataclass(frozen=True)
class Storage:
    """How a type's experts are stored, as its own modules say."""

    gated: bool
    interleaved: bool
    transposed: bool


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Attributes:
        share: of the routed experts' parameters that are quantized.
        logits: largest difference of the loaded output's logits from the reference's, as a share of the largest logit.
        streamed: the same for the original's logits by streaming.
        changed: parameters that are not quantized and not what they were.
    """

    share: float
    logits: float
    streamed: float
    changed: list[str]

    @property
    def difference(self) -> float:
        return max(self.logits, self.streamed)

    @property
    def exact(self) -> bool:
        """What is quantized is right, and the rest is untouched."""
        return self.difference <= TOLERANCE and not self.changed

    @property
    def works(self) -> bool:
        return self.exact and self.share == 1.0


def auto_class(tiny: Tiny) -> Any:
    """The auto class a user would load this type with."""
    config = type(AutoConfig.for_model(tiny.model_type))
    if config in MODEL_FOR_CAUSAL_LM_MAPPING and tiny.wrapper is None:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText if config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModelForMultimodalLM


def build(tiny: Tiny, directory: Path) -> Path:
    """A random checkpoint."""
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = auto_class(tiny).from_config(AutoConfig.for_model(tiny.model_type, **tiny.arguments))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _randomize(name, parameter, generator)
        for name, buffer in model.named_buffers():
            if name.endswith(("correction_bias", "expert_bias", "balancing_biases")):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
            if name.endswith("tid2eid"):
                buffer.copy_(torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(len(buffer))]))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(tiny.dtype)
    return save(model.eval(), directory)


def _randomize(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    leaf = name.rpartition(".")[2]
    noise = torch.randn(tensor.shape, generator=generator)
    if leaf in MEANT:
        return
    if leaf.endswith("correction_bias"):
        tensor.copy_(0.2 * noise)
    elif tensor.ndim < 2:
        tensor.add_(0.1 * noise)
    elif tensor.ndim == 2 and EXPERTS <= len(tensor) <= EXPERTS + 2:
        tensor.copy_(0.5 * noise)  # routers: no routing is decided by rounding
    else:
        tensor.copy_((0.3 if "conv" in name else 0.05) * noise)


def load(tiny: Tiny, directory: Path, **options: Any) -> PreTrainedModel:
    with quiet():
        model: PreTrainedModel = auto_class(tiny).from_pretrained(directory, dtype=torch.float32, **options)
    return model.eval()


def expert_modules(model: nn.Module) -> dict[str, Storage]:
    """The modules that hold stacked experts, found by their parameters."""
    found = {}
    for name, module in model.named_modules():
        down = getattr(module, "down_proj", None)
        if isinstance(down, nn.Parameter) and down.ndim == 3 and "shared" not in name.rpartition(".")[2]:
            known = hasattr(module, "is_concatenated")
            transposed = module.is_transposed if known else type(module).__name__ == "Llama4TextExperts"
            found[name] = Storage(hasattr(module, "gate_up_proj"), known and not module.is_concatenated, transposed)
    return found


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    return model(input_ids=windows(), use_cache=False).logits.float()


def streamed_logits(directory: Path) -> Tensor:
    """By moebit's own streaming, three experts at a time."""
    checkpoint = open_checkpoint(directory)
    stream = Stream(checkpoint, find_structure(checkpoint.model), windows())
    for layer in stream.structure.layers:
        stream.step(layer.index, 3)
    return torch.cat([logits for _, logits in stream.logits()])


def difference(mine: Tensor, theirs: Tensor) -> float:
    assert mine.shape == theirs.shape
    assert bool(theirs.isfinite().all() and mine.isfinite().all())
    return float((mine - theirs).abs().max() / theirs.abs().max())


def run(tiny: Tiny, work: Path, **options: Any) -> Outcome:
    """The whole way, in `work`, which is left empty."""
    try:
        source, out = build(tiny, work / "source"), work / "out"
        text = token_file(work / "text.jsonl", 200, vocabulary=min(VOCABULARY, 100))
        reference = load(tiny, source, experts_implementation="eager")
        streamed = difference(streamed_logits(source), logits_of(reference))
        moebit.quantize(source, out, recipe=small_recipe(samples=6), text={"text": text}, **options)
        loaded = load(tiny, out)
        stored = expert_modules(reference)
        replaced = as_parameters(next(iter(stored.values())), dequantized(out))
        theirs = {f"{name}.{leaf}" for name, kind in stored.items() for leaf in ("gate_up_proj" if kind.gated else "up_proj", "down_proj")}
        sizes = {name: parameter.numel() for name, parameter in reference.named_parameters()}
        share = sum(sizes[name] for name in theirs & set(replaced)) / sum(sizes[name] for name in theirs)
        kept, now = dict(reference.state_dict()), dict(loaded.state_dict())
        changed = [name for name, value in kept.items() if name not in replaced and not (name in now and torch.equal(now[name], value))]
        original = logits_of(reference)
        replace_weights(reference, replaced)
        expected = logits_of(reference)
        assert difference(expected, original) > 1e-3, "quantization that changes nothing proves nothing"
        apart = max(difference(logits_of(loaded), expected), difference(streamed_logits(out), expected))
        return Outcome(share, apart, streamed, changed)
    finally:
        shutil.rmtree(work, ignore_errors=True)
