"""How much is in memory: the plan's pieces, embeddings by the row, layers in bf16, and the whole process from outside."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moebit
from moebit.model import opening
from moebit.model.opening import fast_compute_type, open_hub_checkpoint
from moebit.model.structure import find_structure
from moebit.plan.plan import Plan
from moebit.streaming.budget import PROCESS_BYTES, make_budget
from moebit.streaming.stream import Stream
from tests.support.models import ARCHITECTURES, HIDDEN, Checkpoints, random_model, save, windows
from tests.support.observer import observed
from tests.support.outputs import dequantized, small_recipe, stored_tensors, token_file

SIZES = (2**20, 2**26, 2**31, 2**33)
DEEPSEEK, QWEN3 = ARCHITECTURES["deepseek_v3"], ARCHITECTURES["qwen3_moe"]


def test_more_memory_makes_larger_pieces(checkpoints: Checkpoints) -> None:
    checkpoint = open_hub_checkpoint(checkpoints.path(QWEN3))
    structure = find_structure(checkpoint.model)
    budgets = [make_budget(checkpoint, structure, size, 10**6, solve=True, hessians=True) for size in SIZES]
    for small, large in itertools.pairwise(budgets):
        assert small.batch_tokens <= large.batch_tokens
        assert small.slots <= large.slots
        assert small.activation_allowance < large.activation_allowance
        assert all(small.chunk[index] <= large.chunk[index] for index in small.chunk)
    assert budgets[0].spill
    assert not budgets[-1].spill
    assert set(budgets[0].chunk.values()) == {1}
    assert set(budgets[-1].chunk.values()) == {8}
    assert all(budget.peak_bytes <= size for budget, size in zip(budgets[2:], SIZES[2:], strict=True))
    assert budgets[0].peak_bytes > PROCESS_BYTES  # less than the process itself cannot be promised


def test_embeddings_are_read_by_the_row(checkpoints: Checkpoints) -> None:
    """Only the rows of tokens that occur are read, and the states are those of the whole table."""
    checkpoint = open_hub_checkpoint(checkpoints.path(QWEN3))
    structure = find_structure(checkpoint.model)
    few = windows()[:2, :4] % 5 + 60
    with observed("moebit.read") as read:
        stream = Stream(checkpoint, structure, few)
    assert {name for _, name, _, _ in read} == {"model.embed_tokens.weight"}
    width = 4 * HIDDEN  # bytes of a row
    rows = sorted(row for _, _, skip, size in read for row in range(skip // width, (skip + size) // width))
    assert rows == sorted({*few.unique().tolist(), checkpoint.config.eos_token_id})  # a token that the configuration names
    table = stored_tensors(checkpoints.path(QWEN3))["model.embed_tokens.weight"]
    assert torch.equal(stream.hidden, table.float()[few])


def test_bf16_where_it_is_stored_wide_and_fast(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def chosen(path: Path) -> torch.dtype:
        return open_hub_checkpoint(path, None).model.dtype

    wide = save(random_model(DEEPSEEK, hidden_size=512), tmp_path / "wide")
    for amx, avx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert chosen(wide) == (torch.bfloat16 if amx or avx else torch.float32)
        assert chosen(checkpoints.path(DEEPSEEK)) == torch.float32  # narrow
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert chosen(save(random_model(QWEN3, hidden_size=512), tmp_path / "float32")) == torch.float32
    assert fast_compute_type(open_hub_checkpoint(wide).config, {}) == torch.float32


def test_layers_in_bf16_give_nearly_the_same_codes(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Calibrated through bf16 layers, most weights land on the same grid point, and the others do no more harm."""
    text = token_file(tmp_path / "t.jsonl", 12 * 24)
    recipe = small_recipe("gptq", weights={"bits": 3})
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(opening, "fast_compute_type", lambda config, entries, dtype=dtype: dtype)
        out = tmp_path / str(dtype)
        assert isinstance(moebit.quantize(checkpoints.path(DEEPSEEK), out, recipe=recipe, text={"t": text}), moebit.Result)
        assert json.loads((out / "moebit.json").read_text())["compute"] == str(dtype).removeprefix("torch.")
        outputs.append(dequantized(out))
    for name, exact in outputs[0].items():
        same = (torch.from_numpy(exact - outputs[1][name]).abs() < 1e-6).double().mean()
        assert same > 0.6, (name, float(same))
    reports = [json.loads((tmp_path / str(dtype) / "report.json").read_text()) for dtype in (torch.float32, torch.bfloat16)]
    for exact, rounded in zip(*(report["layers"] for report in reports), strict=True):
        for name, row in exact["linears"].items():
            assert rounded["linears"][name]["weight_error"] == pytest.approx(row["weight_error"], rel=0.15)
    assert any((outputs[0][name] != outputs[1][name]).any() for name in outputs[0])  # and they did differ in something


WATCHED = """
import json, sys, moebit
done = moebit.quantize(sys.argv[1], sys.argv[2], recipe=json.loads(sys.argv[3]), text=[sys.argv[4]], memory=int(sys.argv[5]))
status = open("/proc/self/status").read()
print(json.dumps([int(status.split("VmHWM:")[1].split()[0]) * 1024, done.plan.peak_bytes]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_process_stays_below_the_limit(tmp_path: Path) -> None:
    """A model of 390 MB with 75 MB of activations each way, in a process of its own with 1 GiB, then with 1.5."""
    wide = {
        "hidden_size": 1024, "moe_intermediate_size": 1024, "num_experts": 16, "num_hidden_layers": 3, "intermediate_size": 2048,
        "head_dim": 64, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 20000, "max_position_embeddings": 1024,
    }  # fmt: skip
    model = save(random_model(QWEN3, **wide).bfloat16(), tmp_path / "model")
    text = token_file(tmp_path / "t.jsonl", 36 * 512, vocabulary=20000)
    recipe = {"weights": {"bits": 4}, "calibration": {"samples": 36, "seq_len": 512}}
    for number, limit in enumerate((2**30, 3 * 2**29)):
        command = [sys.executable, "-c", WATCHED, str(model), str(tmp_path / f"out{number}"), json.dumps(recipe), str(text), str(limit)]
        peak, planned = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert peak < limit, (peak, limit)
        assert planned < 1.2 * limit  # cautious about the process itself
        assert peak < 1.1 * planned


def test_the_plan_says_the_peak(checkpoints: Checkpoints) -> None:
    plan = moebit.quantize(checkpoints.path(QWEN3), "unused", recipe=small_recipe("rtn"), dry_run=True)
    assert isinstance(plan, Plan)
    assert plan.describe()["peak_memory_bytes"] == plan.peak_bytes > PROCESS_BYTES
