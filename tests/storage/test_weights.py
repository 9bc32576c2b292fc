"""The one interface of weights, over all that implements it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moebit.errors import BadInputError
from moebit.formats.opening import open_checkpoint
from moebit.model.capture import Call, observed, put_in_front
from moebit.storage.edits import Constant, EditedWeights
from moebit.storage.weights import Weights
from tests.support.models import ARCHITECTURES, Checkpoints
from tests.support.outputs import Outputs


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("format", ["checkpoint", "native", "compressed-tensors", "dense"])
def test_every_kind_answers_alike(checkpoints: Checkpoints, outputs: Outputs, name: str, format: str) -> None:
    """Types and shapes as announced, rows and pieces as cut from the whole, and a wrapper without edits changes nothing."""
    if format == "compressed-tensors" and name == "gpt_oss":
        pytest.skip("its experts are stored stacked, which that format does not hold")
    architecture = ARCHITECTURES[name]
    path = checkpoints.path(architecture) if format == "checkpoint" else outputs.rtn(architecture, format=format)
    checkpoint = open_checkpoint(path)
    for parameter in checkpoint.model.state_dict():
        check(checkpoint.weights, parameter)
        check(EditedWeights(checkpoint.weights), parameter)


def check(weights: Weights, name: str) -> None:
    whole, spec = weights.parameter(name), weights.spec(name)
    assert (whole.dtype, tuple(whole.shape)) == (spec.dtype, spec.shape)
    if whole.ndim and len(whole) > 1:
        assert torch.equal(weights.rows(name, 1, len(whole)), whole[1:])
    if whole.ndim == 3 and name in weights.available():
        assert torch.equal(weights.expert_rows(name, 1, 3), whole[1:3])
    places = [(start, piece.contiguous().flatten().view(torch.uint8)) for start, piece in weights.pieces(name)]
    joined = torch.cat([piece for _, piece in places])
    assert torch.equal(joined, whole.contiguous().flatten().view(torch.uint8))
    assert [start for start, _ in places] == [0, *torch.tensor([len(piece) for _, piece in places]).cumsum(0).tolist()[:-1]]


def test_packed_weights_have_no_way_back(outputs: Outputs) -> None:
    weights = open_checkpoint(outputs.rtn(ARCHITECTURES["mixtral"])).weights
    name = next(name for name in weights.available() if name.endswith("q_proj.weight"))
    with pytest.raises(BadInputError, match="stored quantized"):
        weights.stored_form(name, weights.parameter(name))


def test_a_wrapper_leaves_what_it_wraps(checkpoints: Checkpoints) -> None:
    weights = open_checkpoint(checkpoints.path(ARCHITECTURES["mixtral"])).weights
    edited = EditedWeights(weights, {"lm_head.weight": (Constant(2.0),)})
    assert bool((edited.parameter("lm_head.weight") == 2).all())
    assert not bool((weights.parameter("lm_head.weight") == 2).any())


def test_observed_calls() -> None:
    """Calls in order, before and behind a step that changes the input; nothing is seen outside of the context."""
    layer = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False))
    x, seen = torch.ones(1, 4, 3), list[Call]()
    handle = put_in_front(layer[0], lambda module, args: (2 * args[0],))
    with observed({"early": layer[0]}, seen.append, first=True), observed(dict(layer.named_children()), seen.append):
        out = layer(x)
    with observed({"out": layer[1]}, seen.append, outputs=True):
        layer(x)
    handle.remove()
    layer(x)
    assert [call.name for call in seen] == ["early", "0", "1", "out"]
    assert torch.equal(seen[0].rows, torch.ones(4, 3))
    assert torch.equal(seen[1].rows, 2 * torch.ones(4, 3))
    assert torch.equal(seen[3].output, out)
