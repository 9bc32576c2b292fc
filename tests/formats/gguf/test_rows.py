"""Row maps: what they say is what the converter does to random weights, and what has no map has none for a reason."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moebit.formats.gguf.converter import Converter, find_converter, stored_tensors
from moebit.formats.gguf.rows import Rows, exchanged_experts, expert_orders, find_rows
from moebit.storage.files import TensorSpec
from tests.support.gguf import CASES, PRE, checkpoint_of

Get = Callable[[str], Path]


def lines_of(checkpoint: Path, rows: Rows, name: str) -> dict[str, torch.Tensor]:
    """The lines of a map's sources, by an independent reading of what a line is."""
    found = rows.maps[name]
    result = {}
    for source in found.sources:
        stored = stored_tensors(checkpoint)[source].load().float()
        stored = stored[:, None] if stored.ndim < 2 else stored
        result[source] = (stored.transpose(-1, -2) if found.transposed else stored).reshape(
            -1, stored.shape[-2 if found.transposed else -1]
        )
    return result


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next", "granitemoe"])
def test_maps_are_what_the_converter_does(converter: Converter, checkpoint: Get, name: str) -> None:
    directory = checkpoint(name)
    rows = find_rows(converter, directory)
    prepared = converter.prepare(directory, pre=PRE)
    assert set(rows.maps) | set(rows.computed) == set(prepared.tensors) - {"rope_freqs.weight"}
    for tensor, found in rows.maps.items():
        wanted = torch.from_numpy(prepared.tensors[tensor].load())
        got = found.gather(lines_of(directory, rows, tensor)).reshape(wanted.shape)
        assert torch.equal(got, wanted), tensor


def test_what_is_not_rows_is_said(converter: Converter, checkpoint: Get) -> None:
    rows = find_rows(converter, checkpoint("deepseek_v3"))
    assert {name.split(".", 2)[2] for name in rows.computed} == {"attn_k_b.weight"}
    assert "transposed" in rows.computed["blk.0.attn_k_b.weight"].why
    assert not rows.packable("model.layers.0.self_attn.kv_b_proj.weight")
    assert rows.packable("model.layers.1.mlp.experts.3.down_proj.weight")
    rows = find_rows(converter, checkpoint("qwen3_next"))
    assert rows.computed["blk.0.ssm_a"].sources == ("model.layers.0.linear_attn.A_log",)
    assert rows.computed["output_norm.weight"].sources == ("model.norm.weight",)  # plus one
    assert rows.maps["blk.0.attn_qkv.weight"].row.tolist() != list(range(len(rows.maps["blk.0.attn_qkv.weight"].row)))


def test_experts_stored_transposed_have_columns_for_lines(converter: Converter, checkpoint: Get) -> None:
    found = find_rows(converter, checkpoint("gpt_oss")).maps["blk.0.ffn_up_exps.weight"]
    assert found.transposed
    assert found.row[:4].tolist() == [1, 3, 5, 7]  # every second column of gate_up_proj


def test_many_large_experts_take_the_memory_of_their_numbers(converter: Converter, checkpoint: Get) -> None:
    specs = {name: tensor.spec for name, tensor in stored_tensors(checkpoint("olmoe")).items()}
    large = {
        name: TensorSpec(spec.dtype, tuple(n * 64 if n == 256 else n for n in spec.shape)) if ".experts." in name else spec
        for name, spec in specs.items()
    }
    assert sum(4 * math.prod(spec.shape) for spec in large.values()) > 48 * 2**30
    rows = find_rows(converter, checkpoint("olmoe"), large)
    assert rows.maps["blk.0.ffn_down_exps.weight"].shape == (8, 64 * 256, 64 * 256)
    assert not rows.unread


def test_a_converter_that_exchanges_experts_is_noticed(converter: Converter, checkpoint: Get, tmp_path: Path) -> None:
    for part in ("conversion", "gguf-py"):
        shutil.copytree(converter.root / part, tmp_path / part)
    file = tmp_path / "conversion" / "olmo.py"
    source = file.read_text()
    merge = "data_torch = torch.stack(datas, dim=0)"
    assert source.count(merge) == 1
    file.write_text(source.replace(merge, "datas[2], datas[5] = datas[5], datas[2]; " + merge))
    broken = find_converter(tmp_path)
    rows = find_rows(broken, checkpoint("olmoe"))
    assert expert_orders(rows)["blk.1.ffn_up_exps.weight"] == (0, 1, 5, 3, 4, 2, 6, 7)
    assert any("blk.1.ffn_up_exps.weight: expert 5 stands in place 2" in wrong for wrong in exchanged_experts(rows))
    assert exchanged_experts(find_rows(converter, checkpoint("olmoe"))) == []


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_orders_of_experts_agree(converter: Converter, tmp_path: Path, name: str) -> None:
    directory, _ = checkpoint_of(CASES[name], tmp_path / name)
    rows = find_rows(converter, directory)
    assert exchanged_experts(rows) == []
    assert set(expert_orders(rows).values()) == {tuple(range(8))}
