"""The one seam to the experts of every transformers model: an experts implementation whose behaviour the caller provides.

transformers dispatches an experts module's forward by `config._experts_implementation`; moebit's skeletons name `SEAM`, and the
handler that is active in the current context is called with (module, hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k]).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

SEAM = "moebit-stream"
ExpertsHandler = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
_handler: ContextVar[ExpertsHandler | None] = ContextVar("moebit_experts_handler", default=None)


def _dispatch(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    handler = _handler.get()
    if handler is None:
        raise RuntimeError("experts ran outside of a moebit pass: wrap the forward in `experts_handler(...)`")
    return handler(module, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(SEAM, _dispatch)


@contextmanager
def experts_handler(handler: ExpertsHandler) -> Iterator[None]:
    """Let `handler` stand for the experts of skeleton models inside this context."""
    token = _handler.set(handler)
    try:
        yield
    finally:
        _handler.reset(token)


def silent(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """A handler whose experts put out zero."""
    return torch.zeros_like(hidden_states)


def is_experts(module: nn.Module) -> bool:
    """Whether a module's experts go through transformers' experts interface."""
    return hasattr(module, "is_concatenated") and hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")
