"""Experts that do not go through transformers' experts interface, put behind it: one declared adapter per architecture.

An adapter names the module it replaces and the stand-in that does the same through the interface, with the same parameters under the
same names. Skeletons get the stand-ins when they are built, models when a native output is loaded into them; no class is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from moebit.errors import BadInputError


class _Experts(nn.Module):
    """Takes over the parameters and the gating of experts that are stacked as [E, out, in] or, in a subclass, [E, in, out]."""

    def __init__(self, config: Any, original: Any) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = original.gate_up_proj, original.down_proj, original.act_fn
        self.num_experts = self.down_proj.shape[0]
        if hasattr(original, "_apply_gate"):
            self._apply_gate = original._apply_gate

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        raise RuntimeError("experts behind an adapter run through moebit's experts implementations only")


@use_experts_implementation
class StackedExperts(_Experts):
    """Experts [E, out, in]: called as the interface calls them, only without it (Step 3.7)."""


@use_experts_implementation(is_transposed=True)
class TransposedExperts(_Experts):
    """Experts [E, in, out]."""


class ScaledInputBlock(nn.Module):
    """Llama 4: every token goes to one expert, its score multiplies the expert's *input*, and a shared expert is added.

    transformers runs all experts on all tokens, with the input of those not chosen multiplied by zero; here they are not run.
    """

    def __init__(self, config: Any, original: Any) -> None:
        super().__init__()
        if original.top_k != 1:
            raise BadInputError(
                f"num_experts_per_tok {original.top_k}: moebit understands Llama 4's experts with one expert per token, "
                "as its released models have"
            )
        self.router, self.shared_expert = original.router, original.shared_expert
        self.experts = TransposedExperts(config, original.experts)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = self.router(x)
        score, chosen = scores.max(dim=1, keepdim=True)
        return self.experts(x * score, chosen, torch.ones_like(score)) + self.shared_expert(x), logits


ADAPTERS: dict[str, Callable[[Any, Any], nn.Module]] = {
    "transformers.models.llama4.modeling_llama4.Llama4TextMoe": ScaledInputBlock,
    "transformers.models.step3p7.modeling_step3p7.Step3p7Experts": StackedExperts,
}


def adapt(model: Any) -> None:
    """Put the stand-ins in place, in a skeleton or in a model whose weights are about to be loaded.

    Raises:
        BadInputError: a configuration that an adapter does not cover.
    """
    for name, module in list(model.named_modules()):
        stand_in = ADAPTERS.get(f"{type(module).__module__}.{type(module).__qualname__}")
        if stand_in is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, stand_in(model.config.get_text_config(), module).train(model.training))
