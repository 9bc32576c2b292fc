"""The input embeddings of a skeleton: of a plain table only the rows of tokens that occur are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig

from moebit.errors import BadInputError
from moebit.model.capture import put_in_front
from moebit.model.skeleton import materialize
from moebit.storage.weights import Weights


def materialize_embeddings(
    module: nn.Module, name: str, weights: Weights, ids: Tensor, further: Iterable[int] = ()
) -> RemovableHandle | None:
    """Fill the input embeddings; of a plain table only the rows of tokens that occur.

    The others are left untouched, and memory that is never touched is never taken: the tables of large vocabularies have gigabytes.

    Args:
        further: tokens that the model may look up beside those of the text (in place of a picture, say).

    Returns:
        What watches over that, to be removed with the table; None where the whole table was read.
    """
    if not isinstance(module, nn.Embedding) or len(module._parameters) > 1:
        materialize(module, name, weights)
        return None
    used = torch.cat(
        [ids.flatten().cpu(), torch.tensor([i for i in further if 0 <= i < len(module.weight)], dtype=torch.int64, device="cpu")]
    ).unique()
    table = torch.empty(module.weight.shape, dtype=module.weight.dtype, device=weights.device)
    for low, high in _runs(used.tolist()):
        table[low:high] = weights.rows(f"{name}.weight", low, high).to(table.dtype)
    module.weight = nn.Parameter(table, requires_grad=False)
    read = torch.zeros(len(table), dtype=torch.bool, device=weights.device)
    read[used.to(weights.device)] = True
    return put_in_front(module, partial(_only_read, name, read))


def _only_read(name: str, read: Tensor, module: nn.Module, args: tuple[Any, ...]) -> None:
    """Rows that were not read hold nothing: a model that looks one up is told so, instead of going on with what lies there."""
    if args and isinstance(args[0], Tensor) and not bool(read[args[0]].all()):
        token = int(args[0][~read[args[0]]].flatten()[0])
        raise BadInputError(f"{name}: the model looks up token {token}, which is not in the text; moebit does not understand this model")


def named_tokens(config: Any) -> list[int]:
    """Every token that a configuration, or one inside it, names: padding, ends, places for pictures."""
    found = []
    for key, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            found += named_tokens(value)
        elif re.search(r"token_(id|index|ids)$", key):
            found += [i for i in (value if isinstance(value, list | tuple) else [value]) if isinstance(i, int)]
    return found


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Ranges [low, high) of consecutive numbers in a sorted list."""
    start = 0
    for position in range(1, len(numbers) + 1):
        if position == len(numbers) or numbers[position] != numbers[position - 1] + 1:
            yield numbers[start], numbers[position - 1] + 1
            start = position
