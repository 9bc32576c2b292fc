"""What is noted while a layer runs over a batch: what enters some of its modules, and what its experts are asked.

It is noted first and told afterwards, so that a batch that ran on another rank is told like one's own (`moebit.ranks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moebit.model.capture import Call, observed
from moebit.model.experts import ExpertWeights, add_outputs, dispatch
from moebit.model.layer_call import StopForward
from moebit.model.seam import ExpertsHandler
from moebit.ranks import Named

InputHook = Callable[[Tensor], None]


@dataclass(frozen=True)
class Watch:
    """Someone who wants to know what enters a module.

    Attributes:
        name: of the module in the layer. hook: is told. rows: as a matrix [rows, channels], not as the module gets it.
        stops: a forward need not go on when everyone with this mark has been called.
    """

    name: str
    hook: InputHook
    rows: bool = False
    stops: bool = False


@contextmanager
def recorded(layer: nn.Module, watches: Sequence[Watch], seen: dict[str, Tensor]) -> Iterator[None]:
    """Keep what enters the watched modules inside this context, as copies: what runs later may write into the tensor."""
    waiting = {watch.name for watch in watches if watch.stops}

    def note(call: Call) -> None:
        mine = [number for number, watch in enumerate(watches) if watch.name == call.name]
        for number in mine:
            x = call.rows if watches[number].rows else call.args[0]
            seen[f"{len(seen)}.{number}"] = x.clone()
        if any(watches[number].stops for number in mine):
            waiting.discard(call.name)
            if not waiting:
                raise StopForward

    with observed({watch.name: layer.get_submodule(watch.name) for watch in watches}, note):
        yield


def tell(watches: Sequence[Watch], seen: Named) -> None:
    """Call the hooks with what was recorded, in its order."""
    for key, x in seen.items():
        _, dot, number = key.partition(".")
        if dot:
            watches[int(number)].hook(x)


@dataclass
class Noted:
    """What the experts of a layer are asked, token by token; what is None is not kept.

    Attributes:
        x: [T, H]. ids, weights: [T, k]. found: of the batch that runs.
    """

    x: Tensor | None
    ids: Tensor
    weights: Tensor | None
    found: dict[str, Tensor] = field(default_factory=dict)

    def handler(self, module: nn.Module, states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Note what is asked, and answer with zeros."""
        self.found = {"x": states.clone(), "ids": top_k_index, "weights": top_k_weights.float()}
        return torch.zeros_like(states)

    def taken(self) -> dict[str, Tensor]:
        """What was found since the last time."""
        found, self.found = self.found, {}
        return found

    def put(self, span: slice, found: Named) -> None:
        """Keep what a batch's tokens ask."""
        for into, name in ((self.x, "x"), (self.ids, "ids"), (self.weights, "weights")):
            if into is not None:
                into[span] = found[name]


def answering(weights: ExpertWeights, slots: int, noted: Noted) -> ExpertsHandler:
    """A handler that runs all of a layer's experts on what they are asked, and notes which of them each token chose.

    Args:
        slots: routed slots that run through experts at a time.
    """
    experts = weights.down.shape[0]

    def answer(module: nn.Module, states: Tensor, ids: Tensor, affinity: Tensor) -> Tensor:
        noted.found = {"ids": ids}
        outputs = torch.zeros(states.shape, dtype=torch.float32)
        for piece in dispatch(ids, affinity, experts).pieces(0, experts, slots):
            add_outputs(module, states, weights, piece, outputs)
        return outputs.to(states.dtype)

    return answer
