"""`generate`: what a model writes after a prompt, how fast, and where a reference writes something else."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from moebit.calibration.text import load_tokenizer
from moebit.errors import BadInputError, is_out_of_memory
from moebit.memory import resident_bytes
from moebit.runtime.packed import PackedModule, multiplied, use
from moebit.runtime.paths import PATHS, Path
from moebit.storage.checkpoint import resolve
from moebit.storage.config import load_config
from moebit.storage.documents import one_line, understood

WARM_UP_TOKENS = 2


@dataclass(frozen=True)
class Generated:
    """What one model wrote.

    Attributes:
        model: as it was named. text: the continuation, without the prompt. tokens: its ids.
        prompt_tokens: length of the prompt.
        prefill, decode: tokens per second of reading the prompt and of writing; `decode` is None for a single token.
        weights_bytes: parameters and buffers. resident_bytes: the whole process, behind the last token (not what lies on a GPU).
        products: the ways in which packed matrices were multiplied (`moebit.runtime.multiplied`); empty if none are packed.
    """

    model: str
    text: str
    tokens: list[int]
    prompt_tokens: int
    prefill: float
    decode: float | None
    weights_bytes: int
    resident_bytes: int
    products: tuple[Path, ...]


@dataclass(frozen=True)
class Generation:
    """What `generate` found. `differ_at`: the first token, counted from 0, at which the reference wrote another; None if it never did."""

    model: Generated
    reference: Generated | None = None
    differ_at: int | None = None


@dataclass
class _Clock(BaseStreamer):
    """When each token came; transformers hands over the prompt first."""

    times: list[float] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(
    model: str | File,
    *,
    prompt: str,
    against: str | File | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    path: Path = "auto",
    device: str = "cpu",
) -> Generation:
    """Continue a prompt with transformers' own loop.

    Both models are warmed up first and never in memory together. A native output stays packed.

    Args:
        model, against: checkpoints or outputs that transformers loads, with a tokenizer; `against` writes with the same settings.
        max_new_tokens: at most so many; an end token stops earlier.
        temperature: 0 takes the likeliest token, more draws from the distribution. seed: of the draws, the same for both.
        path: how packed matrices are multiplied (`moebit.runtime.PATHS`); of no effect on what is not packed.
        device: where the models run, `cpu` or `cuda`.

    Raises:
        BadInputError: no tokenizer, an empty prompt, numbers that make no sense, a model that does not load.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise BadInputError("the prompt is not UTF-8 text; write it in a terminal or a file that is") from error
    if max_new_tokens < 1:
        raise BadInputError(f"{max_new_tokens} new tokens: ask for one at least")
    if not 0 <= temperature < math.inf:
        raise BadInputError(f"temperature {temperature}: 0 for the likeliest token, or a positive number")
    if path not in PATHS:
        raise BadInputError(f"no way of multiplying is called {path!r}: choose from {', '.join(PATHS)}")
    if device != "cpu" and not torch.cuda.is_available():
        raise BadInputError(f"--device {device}: this torch sees no CUDA device; use --device cpu")
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    ours = _run(model, prompt, max_new_tokens, sampling, seed, path, device)
    if against is None:
        return Generation(ours)
    gc.collect()  # modules of transformers refer to each other in circles
    theirs = _run(against, prompt, max_new_tokens, sampling, seed, "auto", device)
    return Generation(ours, theirs, _first_difference(ours.tokens, theirs.tokens))


def _first_difference(a: list[int], b: list[int]) -> int | None:
    for position, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return position
    return None if len(a) == len(b) else min(len(a), len(b))


def _run(name: str | File, prompt: str, max_new_tokens: int, sampling: dict[str, Any], seed: int, path: Path, device: str) -> Generated:
    if str(name).endswith(".partial"):
        raise BadInputError(f"{name}: unfinished output of an interrupted run; finish it with `moebit quantize ... --resume`")
    directory = resolve(name)
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise BadInputError(f"{name}: no tokenizer files here, so that a prompt cannot be read; copy the model's tokenizer to it")
    with understood(f"{name}: what its tokenizer makes of the prompt", "copy the tokenizer's files again"):
        ids: Tensor = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise BadInputError("the prompt is empty: give at least one token to go on from")
    _check_length(load_config(directory), name, ids.shape[1], max_new_tokens)
    model, ids = _load(directory).to(device), ids.to(device)
    if path != "auto" and any(isinstance(module, PackedModule) for module in model.modules()):
        use(model, path)
    clock = _Clock()
    with (
        torch.random.fork_rng(devices=[] if device == "cpu" else [device]),
        torch.no_grad(),
    ):  # transformers draws from the global generators
        _continue(model, ids, WARM_UP_TOKENS, sampling, None)
        torch.manual_seed(seed)
        tokens = _continue(model, ids, max_new_tokens, sampling, clock)
    begun, first, last = clock.times[0], clock.times[1], clock.times[-1]
    return Generated(
        model=str(name),
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        tokens=tokens,
        prompt_tokens=ids.shape[1],
        prefill=ids.shape[1] / (first - begun),
        decode=(len(tokens) - 1) / (last - first) if len(tokens) > 1 else None,
        weights_bytes=sum({t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}.values()),
        resident_bytes=resident_bytes(),
        products=multiplied(model),
    )


def _check_length(config: Any, name: str | File, prompt: int, new: int) -> None:
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not context or prompt + new <= context:
        return
    if prompt >= context:
        raise BadInputError(f"the prompt has {prompt} tokens, and the context of {name} is {context}; shorten the prompt")
    raise BadInputError(
        f"the prompt has {prompt} tokens and {new} are to follow, but the context of {name} is {context}; "
        f"ask for {context - prompt} new tokens or fewer, or shorten the prompt"
    )


def _load(directory: File) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(directory, dtype="auto", trust_remote_code=False).eval()
    except Exception as error:  # whatever a library raises about files that it does not understand
        if is_out_of_memory(error):
            raise
        raise BadInputError(f"{directory}: transformers does not load it ({one_line(error)})") from error


def _continue(model: Any, ids: Tensor, count: int, sampling: dict[str, Any], clock: _Clock | None) -> list[int]:
    """The new tokens' ids."""
    end = model.generation_config.eos_token_id
    padding = end[0] if isinstance(end, list) else end  # nothing is padded, but transformers warns where it has none
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, pad_token_id=padding or 0, streamer=clock, **sampling
    )
    new: list[int] = output[0, ids.shape[1] :].tolist()
    return new
