"""`moebit imatrix`: per expert what a plain pass of transformers' model sees, and every expert covered."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import moebit
from moebit.cli import app
from moebit.errors import BadInputError
from moebit.formats.gguf.converter import Converter
from moebit.formats.gguf.imatrix import read_imatrix
from moebit.formats.gguf.rows import find_rows
from moebit.formats.opening import open_checkpoint
from moebit.profiling import importance
from moebit.profiling.profile import data_sets
from tests.formats.gguf.conftest import checkpoint, converter
from tests.support.gguf import TEXTS, loaded
from tests.support.models import quiet

__all__ = ["checkpoint", "converter"]
Get = Callable[[str], Path]
SAMPLES, LENGTH = 6, 16
LINEARS = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "calib.txt"
    file.write_text(" ".join(TEXTS) * 30)
    return file


class Naive:
    """Squares of inputs, token by token and expert by expert, from hooks in transformers' own model."""

    def __init__(self, directory: Path, windows: Tensor) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}
        self.model: Any = loaded(directory)
        for name, module in self.model.named_modules():
            if name.endswith("mlp.experts"):
                module.register_forward_pre_hook(self.experts(name.split(".")[2]))
            elif isinstance(module, nn.Linear) and ".self_attn." in name:
                stem = LINEARS[name.split(".", 3)[3]]
                module.register_forward_pre_hook(self.linear(f"blk.{name.split('.')[2]}.{stem}.weight"))
        with quiet(), torch.no_grad():
            for window in windows:
                self.model(input_ids=window[None], use_cache=False)

    def linear(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for row in args[0].reshape(-1, args[0].shape[-1]):
                self.add(name, 0, 1, row)

        return hook

    def experts(self, block: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            states, ids, _ = args
            for row, chosen in zip(states.reshape(-1, states.shape[-1]), ids, strict=True):
                for e in chosen.tolist():
                    gate, up = (module.gate_up_proj[e] @ row).chunk(2)
                    count = len(module.down_proj)
                    self.add(f"blk.{block}.ffn_gate_exps.weight", e, count, row)
                    self.add(f"blk.{block}.ffn_up_exps.weight", e, count, row)
                    self.add(f"blk.{block}.ffn_down_exps.weight", e, count, module.act_fn(gate) * up)

        return hook

    def add(self, name: str, expert: int, count: int, row: Tensor) -> None:
        self.sums.setdefault(name, np.zeros((count, len(row))))[expert] += row.double().numpy() ** 2
        self.counts.setdefault(name, np.zeros(count))[expert] += 1


@pytest.mark.parametrize("memory", ["4GiB", "64MiB"])
def test_sums_and_counts_are_those_of_a_plain_pass(
    converter: Converter, checkpoint: Get, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    monkeypatch.setattr(importance, "ENOUGH", 0)
    directory, file = checkpoint("olmoe"), tmp_path / "x.gguf"
    result = moebit.imatrix(directory, file, text={"t": text}, samples=SAMPLES, length=LENGTH, memory=memory)
    found = read_imatrix(converter.gguf, file)
    windows = data_sets(open_checkpoint(directory), {"t": text}, SAMPLES, LENGTH, 0)["t"]
    naive = Naive(directory, windows)
    assert {name for name in found.tensors if "gate_up" not in name} == set(naive.sums)
    assert (result.tokens, result.filled, result.missing) == (SAMPLES * LENGTH, {}, {})
    assert (found.datasets, found.chunks, found.chunk_size) == (("t",), SAMPLES, LENGTH)
    for name, sums in naive.sums.items():
        one, seen = found.tensors[name], naive.counts[name] > 0
        assert one.counts.tolist() == np.maximum(naive.counts[name], 1).tolist()
        assert np.allclose(one.sums.numpy()[seen], sums[seen], rtol=1e-4, atol=1e-9)


def test_rare_experts_are_filled_up_with_tokens_that_nearly_went_to_them(
    converter: Converter, checkpoint: Get, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against plain numpy: own squares, and squares of all tokens weighted by the router's probabilities, to ENOUGH tokens together."""
    enough = 2 * SAMPLES * LENGTH  # more than any expert gets
    monkeypatch.setattr(importance, "ENOUGH", enough)
    directory, file, inputs = checkpoint("olmoe"), tmp_path / "x.gguf", list[Tensor]()
    result = moebit.imatrix(directory, file, text={"t": text}, samples=SAMPLES, length=LENGTH)
    windows = data_sets(open_checkpoint(directory), {"t": text}, SAMPLES, LENGTH, 0)["t"]
    naive = Naive(directory, windows[:0])
    block = naive.model.model.layers[0].mlp
    block.gate.register_forward_pre_hook(lambda module, args: inputs.append(args[0].reshape(-1, args[0].shape[-1])))
    with quiet(), torch.no_grad():
        for window in windows:
            naive.model(input_ids=window[None], use_cache=False)
    x, one = torch.cat(inputs), read_imatrix(converter.gguf, file).tensors["blk.0.ffn_gate_exps.weight"]
    shares = (x @ block.gate.weight.T).softmax(-1).double()
    soft = ((shares / shares.sum(0)).T @ x.double().square()).detach().numpy()
    own, counts = naive.sums["blk.0.ffn_gate_exps.weight"], naive.counts["blk.0.ffn_gate_exps.weight"]
    expected = (own + (enough - counts)[:, None] * soft) / enough
    assert np.allclose(one.mean.numpy(), expected, rtol=1e-4)
    down = read_imatrix(converter.gguf, file).tensors["blk.0.ffn_down_exps.weight"]
    gate, up = torch.einsum("eoh,th->eto", block.experts.gate_up_proj, x).chunk(2, -1)
    h = (block.experts.act_fn(gate) * up).double().square()
    soft = torch.einsum("et,eto->eo", (shares / shares.sum(0)).T, h).detach().numpy()
    expected = (naive.sums["blk.0.ffn_down_exps.weight"] + (enough - counts)[:, None] * soft) / enough
    assert np.allclose(down.mean.numpy(), expected, rtol=1e-4)
    assert result.filled["model.layers.0.mlp.experts"] == {e: int(n) for e, n in enumerate(counts)}
    assert result.unweighted == []


def test_no_expert_is_left_to_ones_and_it_is_said(converter: Converter, checkpoint: Get, tmp_path: Path, text: Path) -> None:
    file = tmp_path / "x.gguf"
    given = ["imatrix", str(checkpoint("olmoe")), "-o", str(file), "--text", str(text), "--samples", "1", "--length", "2"]
    said = CliRunner().invoke(app, given)
    assert said.exit_code == 0, said.output
    assert "tokens that nearly went to them stand in for the rest" in " ".join(said.output.split())
    found = read_imatrix(converter.gguf, file)
    assert found.uncovered == {}
    assert all(bool((one.sums > 0).any(1).all()) for one in found.tensors.values())
    with pytest.raises(BadInputError, match=r"x\.gguf: exists; choose another -o"):
        moebit.imatrix(checkpoint("olmoe"), file, text=[str(text)])


def test_what_the_converter_computes_is_named(converter: Converter, checkpoint: Get, tmp_path: Path, text: Path) -> None:
    file = tmp_path / "x.gguf"
    result = moebit.imatrix(checkpoint("deepseek_v2"), file, text=[str(text)], samples=2, length=LENGTH)
    assert {name.split(".", 2)[2] for name in result.missing} == {"attn_k_b.weight"}
    assert result.describe()["missing"] == result.missing
    # llama-quantize refuses a tensor whose importance has not one row for each of its matrices.
    found, shapes = (
        read_imatrix(converter.gguf, file),
        {name: one.shape for name, one in find_rows(converter, checkpoint("deepseek_v2")).maps.items()},
    )
    assert any(name.endswith("attn_v_b.weight") for name in found.tensors)
    for name in found.tensors.keys() & shapes.keys():
        *leading, _, inputs = shapes[name]
        assert found.tensors[name].sums.shape == (math.prod(leading), inputs)
