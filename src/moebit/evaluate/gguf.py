"""A GGUF file judged by what llama.cpp itself computes with it, beside the checkpoint that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebit.calibration.rows import Chosen, beginnings
from moebit.errors import BadInputError
from moebit.evaluate.llama import LlamaModel, open_llama, token_difference

SAMPLE = 20_000  # characters of each text on which tokenizers are compared


@contextmanager
def llama_engine(file: Path, window: int, vocabulary: int) -> Iterator[tuple[LlamaModel, Callable[[Tensor], Tensor]]]:
    """llama.cpp with a file, and a function from windows [B, L] to logits [B, L, V].

    Args:
        vocabulary: of the checkpoint; a file may have more tokens behind them, which its converter added.

    Raises:
        BadInputError: a file that llama.cpp does not load, or of a model with fewer tokens.
    """
    with open_llama(file, window, torch.get_num_threads()) as llama:
        if llama.vocabulary < vocabulary:
            raise BadInputError(f"{file}: {llama.vocabulary} tokens, and the reference has {vocabulary}: not the same model")
        yield llama, lambda rows: torch.stack([llama.logits(row)[:, :vocabulary] for row in rows])


def token_remarks(llama: LlamaModel, tokenizer: Any | None, files: Mapping[str, Path | Chosen]) -> list[str]:
    """What differs between the checkpoint's tokenizer, which the numbers are taken with, and the file's."""
    texts = [beginning for source in files.values() for beginning in beginnings(source, SAMPLE)]
    if tokenizer is None or not texts:
        return []
    difference = token_difference(llama, tokenizer, texts)
    return [str(difference)] if difference else []
