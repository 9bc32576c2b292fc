"""Codes that are drawn: every code is one of its neighbours or itself, with probabilities that are learned and grow sharp.

A weight's three candidates (the solver's code, one less, one more) have logits. A step takes the softmax of logits plus Gumbel noise,
over a temperature that falls, as if it were the choice, and the mean of the candidates' numbers under it as the weight; the gradient
passes through that mean. What is judged, and kept, is the likeliest candidate.

Sources: the Gumbel-softmax relaxation (Jang et al., 2016, arXiv 1611.01144; Maddison et al., 2016, arXiv 1611.00712), for codes and scales
together as in GSQ (Dadgarnia et al., 2026, arXiv 2604.18556). Departures from GSQ: three candidates around the solver's code instead of all
levels, so that the memory does not grow with the width; the loss and its held-back tokens are this project's.

Shape suffixes: E matrices, O outputs, I inputs, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebit.methods.latent import Latent
from moebit.tensor import QTensor

SHARPNESS = 8.0  # of the first logits, per squared code step of distance from the weight: a neighbour at half a step is as likely
WARM, COLD = 1.0, 0.1  # temperatures of the first and of the last step
NEIGHBOURS = (-1, 0, 1)
RATE = 20.0  # logits that the rate of a whole code step stands for


class GumbelLatent(Latent):
    """A stack of matrices whose codes are drawn from three candidates each."""

    def __init__(self, q: QTensor, w_EOI: Tensor) -> None:
        super().__init__(q, w_EOI)
        begun = q.codes.unflatten(-1, (self.groups, -1)).float()
        candidates = begun.unsqueeze(-1) + torch.tensor(NEIGHBOURS, device=begun.device)  # [E, O, G, I / G, 3]
        inside = (candidates >= 0) & (candidates <= self.top.unsqueeze(-1))
        self.logits = (self.u.unsqueeze(-1) - candidates).square_().mul_(-SHARPNESS).masked_fill_(~inside, -torch.inf)
        self.begun_codes, self.u = begun, begun[..., :0]
        self.shares, self.temperature = self.logits.softmax(-1), WARM

    def codes(self) -> Tensor:
        """[E, O, G, I / G] the likeliest, in float32."""
        return self.begun_codes + (self.logits.argmax(-1) - 1)

    def _candidates(self) -> Tensor:
        """[E, O, G, I / G, 3] numbers of the candidates; those outside of the grid are never likely and count as the nearest inside."""
        codes = self.begun_codes.unsqueeze(-1) + torch.tensor(NEIGHBOURS, device=self.begun_codes.device)
        codes = codes.clamp(min=0).minimum(self.top.unsqueeze(-1))
        return codes - self.zero.unsqueeze(-1) if self.levels is None else self.levels[codes.long()]

    def tried(self, left: float, generator: torch.Generator) -> Tensor:
        self.temperature = COLD + (WARM - COLD) * left
        noise = torch.empty(self.logits.shape).exponential_(generator=generator).clamp_(min=1e-30).log_().neg_().to(self.logits.device)
        self.shares = noise.add_(self.logits).div_(self.temperature).softmax(-1)
        return self._scaled((self._candidates() * self.shares).sum(-1))

    def slopes(self, gradient_EOI: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients in the logits [E, O, G, I / G, 3] and in the factors, at the numbers that were tried last."""
        gradient, numbers = gradient_EOI.unflatten(-1, (self.groups, -1)), self._candidates()
        mean = (numbers * self.shares).sum(-1)
        step = self._columns(self.params())[0]
        to_logits = (numbers - mean.unsqueeze(-1)).mul_(self.shares).mul_((gradient * step).unsqueeze(-1)).div_(self.temperature)
        return to_logits, self._to_factors(gradient, mean)

    def move(self, gradient_EOI: Tensor, codes: bool, scales: bool, rate: float, step: int) -> None:
        to_logits, to_factors = self.slopes(gradient_EOI)
        if codes:
            self.descents["u"].move(self.logits, to_logits, RATE * rate, step)
        self._move_factors(to_factors if scales else {}, rate, step)
