"""Hidden states streamed layer by layer against transformers' forward of the whole model, and routed tokens against naive loops."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moebit.model import replay
from moebit.model.experts import ExpertWeights, Slots, add_outputs, dispatch, grouped_linear, read_experts, row_blocks
from moebit.model.opening import open_hub_checkpoint
from moebit.model.seam import ExpertsHandler, experts_handler, is_experts
from moebit.streaming import stream
from moebit.streaming.shortcut import KeptInput
from moebit.streaming.store import ActivationStore
from moebit.streaming.stream import Stream
from tests.support.models import ARCHITECTURES, EXPERTS, HIDDEN, LENGTH, TOP_K, VOCABULARY, WINDOWS, Checkpoints, windows
from tests.support.opened import Opened

BATCH = 2  # windows at a time: 2, 2 and 1 of the 5
CHUNK = 3  # experts at a time: 3, 3 and 2 of the 8
RUN_AGAIN = {"gpt_oss", "minimax"}  # attention returns more than its outputs (weights, a state): it runs on every batch again


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LOGIT_BYTES", BATCH * 4 * VOCABULARY * LENGTH)


def stream_of(opened: Opened, tokens: Tensor | None = None, directory: Path | None = None) -> Stream:
    store = ActivationStore(directory)
    return Stream(opened.checkpoint, opened.structure, windows() if tokens is None else tokens, store, BATCH * LENGTH, slots=7)


def run_through(
    opened: Opened, chunk: int = CHUNK, directory: Path | None = None, tokens: Tensor | None = None
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits, and the chosen experts of every MoE layer."""
    through = stream_of(opened, tokens, directory)
    chosen = {index: through.step(index, chunk) for index in range(len(opened.structure.layers))}
    parts = list(through.logits())
    assert [rows for rows, _ in parts] == list(through.batches())
    return torch.cat([logits for _, logits in parts]), {index: ids for index, ids in chosen.items() if ids is not None}


def left_in_memory(opened: Opened) -> list[str]:
    return [name for name, tensor in opened.checkpoint.model.state_dict().items() if tensor.device.type != "meta"]


# --- every architecture


@pytest.mark.parametrize("chunk", [CHUNK, EXPERTS], ids=["chunks", "at_once"])
def test_stream_equals_the_whole_model(opened: Opened, chunk: int) -> None:
    logits, chosen = run_through(opened, chunk)
    assert (logits.shape, logits.dtype) == ((WINDOWS, LENGTH, VOCABULARY), torch.float32)
    torch.testing.assert_close(logits, opened.reference.logits, rtol=0, atol=1e-5)
    assert chosen.keys() == opened.reference.routed.keys()
    for index, seen in opened.reference.routed.items():
        assert torch.equal(chosen[index], seen.ids), index
    assert left_in_memory(opened) == []


def test_captured_routing(opened: Opened) -> None:
    """What the experts are called with, against hooks on the whole model's router and experts."""
    through = stream_of(opened)
    for index in range(len(opened.structure.layers)):
        if index in opened.reference.routed:
            seen, before = opened.reference.routed[index], through.hidden.clone()
            with through.loaded(index):
                routed = through.capture_routing(index)
            assert torch.equal(routed.ids, seen.ids), index
            torch.testing.assert_close(routed.weights, seen.weights, rtol=0, atol=1e-5)
            torch.testing.assert_close(routed.x, seen.x, rtol=0, atol=1e-5)
            assert routed.counts(EXPERTS).tolist() == [int((seen.ids == e).sum()) for e in range(EXPERTS)]
            assert torch.equal(through.hidden, before)
        through.step(index, EXPERTS)


def captured(through: Stream, index: int, kept: KeptInput | None, block: str) -> tuple[list[Tensor], int]:
    """What `capture_routing` finds and puts out, and how often the layer's own `block` ran for that."""
    calls: list[nn.Module] = []
    outputs = torch.empty_like(through.hidden)
    hook = through.layer(index).get_submodule(block).register_forward_pre_hook(lambda module, args: calls.append(module))
    routed = through.capture_routing(index, outputs, kept)
    hook.remove()
    return [routed.x, routed.ids, routed.weights, outputs], len(calls)


def test_routing_from_kept_inputs(opened: Opened) -> None:
    """Bit for bit the same, with the module around the linear run on the first batch alone; on all where the inputs are other ones."""
    through, index = stream_of(opened), opened.architecture.first_moe
    for earlier in range(index):
        through.step(earlier, CHUNK)
    own = (opened.architecture.block or "-") + "."
    before = [group for group in opened.structure.layers[index].groups if not group.names[0].startswith(own) and not group.behind_experts]
    if not before:
        pytest.skip("nothing stands before the experts")
    linear, width = before[-1].names[0], before[-1].in_features
    block, inputs = linear.rpartition(".")[0], torch.empty(WINDOWS, LENGTH, width)
    with through.loaded(index) as layer:
        modules = dict(layer.named_modules())
        parts: list[Tensor] = []
        through.run(index, inputs={linear: lambda x: parts.append(x.clone())})
        torch.cat(parts, out=inputs)
        wanted, often = captured(through, index, None, block)
        found, seldom = captured(through, index, KeptInput(linear, inputs.flatten(0, 1)), block)
        assert (often, seldom) == (3, 3 if opened.architecture.name in RUN_AGAIN else 1)
        wrong, again = captured(through, index, KeptInput(linear, inputs.flatten(0, 1) + 1), block)
        assert again == 3
        assert dict(layer.named_modules()) == modules
    assert all(map(torch.equal, found, wanted))
    assert all(map(torch.equal, wrong, wanted))


def test_the_experts_matter_to_these_logits(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above would notice a wrong expert: without experts the logits are hundreds of tolerances away."""
    monkeypatch.setattr(stream, "add_outputs", lambda *args: None)
    logits, _ = run_through(opened)
    assert (logits - opened.reference.logits).abs().max() > 3e-3


def test_activations_in_files_give_the_same_bits(opened: Opened, tmp_path: Path) -> None:
    logits, chosen = run_through(opened)
    again, mapped = run_through(opened, directory=tmp_path)
    assert torch.equal(logits, again)
    assert all(torch.equal(ids, mapped[index]) for index, ids in chosen.items())
    assert os.listdir(tmp_path) == [], "the files have no name, so nothing is left after a crash"


def test_one_token(opened: Opened) -> None:
    """The shortest stream there is: most experts get nothing, and no shape may collapse."""
    tokens = windows()[:1, :1]
    with torch.no_grad():
        expected = opened.reference.model(input_ids=tokens, use_cache=False).logits
    for chunk in (CHUNK, EXPERTS):
        logits, chosen = run_through(opened, chunk, tokens=tokens)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert all(ids.shape == (1, TOP_K) for ids in chosen.values())


@pytest.mark.parametrize("chunk", [1, 2 * EXPERTS])
@pytest.mark.parametrize("architecture", [ARCHITECTURES["gpt_oss"], ARCHITECTURES["nemotron_h"]], ids=str)
def test_chunk_size_does_not_matter(opened: Opened, chunk: int) -> None:
    logits, _ = run_through(opened, chunk)
    torch.testing.assert_close(logits, opened.reference.logits, rtol=0, atol=1e-5)


def test_inputs_of_linears(opened: Opened) -> None:
    """What the hooks of `run` see, for every group of every layer, is what the linears get in the whole model."""
    through = stream_of(opened)
    for sites in opened.structure.layers:
        expected = opened.reference.linear_inputs(sites.index, WINDOWS)
        names = [group.names[0] for group in sites.groups]
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        before = through.hidden.clone()
        with through.loaded(sites.index) as layer:
            outputs = None
            if sites.moe is not None:
                routed = through.capture_routing(sites.index)
                outputs = torch.zeros_like(routed.x)
                weights = read_experts(opened.weights, f"{sites.name}.{sites.moe.experts}", sites.moe.layout, 0, EXPERTS)
                slots = dispatch(routed.ids, routed.weights, EXPERTS)
                add_outputs(layer.get_submodule(sites.moe.experts), routed.x, weights, slots.chunk(0, EXPERTS), outputs)
            hooks = {name: lambda x, parts=parts: parts.append(x.clone().reshape(-1, x.shape[-1])) for name, parts in seen.items()}
            through.run(sites.index, experts=None if outputs is None else through.replay(outputs), inputs=hooks)
            assert torch.equal(through.hidden, before), "a run that does not advance changes nothing"
        for name in names:
            torch.testing.assert_close(torch.cat(seen[name]), expected[name], rtol=1e-5, atol=1e-5)
        through.step(sites.index, CHUNK)
    assert left_in_memory(opened) == []


def test_attention_inputs_need_no_experts(opened: Opened) -> None:
    """A run for inputs alone stops before it reaches the experts, which would raise outside of a handler."""
    through = stream_of(opened)
    for sites in opened.structure.layers:
        names = [group.names[0] for group in sites.groups if not group.names[0].startswith(f"{opened.architecture.block}.")]
        if names:
            calls: list[tuple[int, ...]] = []
            with through.loaded(sites.index):
                through.run(sites.index, inputs={name: lambda x, calls=calls: calls.append(tuple(x.shape)) for name in names})
            assert len(calls) == 3 * len(names)
        through.step(sites.index, CHUNK)


def test_errors_leave_nothing_behind(opened: Opened) -> None:
    through = stream_of(opened)
    index = opened.architecture.first_moe
    for earlier in range(index):
        through.step(earlier, CHUNK)
    before = through.hidden.clone()

    def fail(x: Tensor) -> None:
        raise RuntimeError("out of luck")

    def zeros(rows: slice) -> ExpertsHandler:
        return lambda module, x, ids, weights: torch.zeros_like(x)

    with pytest.raises(RuntimeError, match="out of luck"), through.loaded(index):
        through.run(index, experts=zeros, inputs={opened.structure.layers[index].groups[0].names[0]: fail})
    with pytest.raises(RuntimeError, match=r"outside of a moebit pass"), through.loaded(index):
        through.run(index, advance=True)
    assert left_in_memory(opened) == []
    assert torch.equal(through.hidden, before)
    assert not any(module._forward_pre_hooks for module in opened.checkpoint.model.modules())


@pytest.mark.parametrize("architecture", [ARCHITECTURES["mixtral"]], ids=str)
def test_abandoned_logits_leave_nothing_behind(opened: Opened) -> None:
    through = stream_of(opened)
    for index in range(len(opened.structure.layers)):
        through.step(index, CHUNK)
    parts = through.logits()
    next(parts)
    parts.close()  # type: ignore[attr-defined]
    assert left_in_memory(opened) == []


def test_first_hidden_states_and_layer_calls(opened: Opened) -> None:
    through = stream_of(opened)
    with torch.no_grad():
        expected = opened.reference.model(input_ids=windows(), use_cache=False, output_hidden_states=True).hidden_states
    torch.testing.assert_close(through.hidden, expected[0], rtol=0, atol=1e-6)
    assert through.hidden.dtype == torch.float32
    assert [len(calls) for calls in through._calls] == [len(opened.structure.layers)] * 3


# --- routed tokens, by hand


def naive_slots(ids: Tensor, weights: Tensor, experts: int) -> list[list[tuple[int, float]]]:
    """For every expert, the tokens routed to it and their weights, in the order of the tokens."""
    slots: list[list[tuple[int, float]]] = [[] for _ in range(experts)]
    for token in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            if 0 <= int(ids[token, k]) < experts:
                slots[int(ids[token, k])].append((token, float(weights[token, k])))
    return slots


def routings() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    random = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(20)])
    return {
        "random": random,
        "one token": torch.tensor([[5, 2]]),
        "one expert each": random[:, :1],
        "an expert with one token": torch.tensor([[0, 1], [1, 0], [0, 1], [7, 1]]),
        "all to two": torch.tensor([[7, 3]] * 6),
        "unused slots": torch.where(torch.rand(20, TOP_K, generator=generator) < 0.3, EXPERTS, random),
        "unused slots below": torch.where(torch.rand(20, TOP_K, generator=generator) < 0.3, -1, random),
        "nothing used": torch.full((3, TOP_K), EXPERTS),
        "no tokens": torch.empty(0, TOP_K, dtype=torch.int64),
    }


@pytest.fixture(params=routings())
def ids(request: pytest.FixtureRequest) -> Tensor:
    return routings()[request.param]


def some_weights(ids: Tensor) -> Tensor:
    return torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) + 0.1


def test_dispatch(ids: Tensor) -> None:
    weights = some_weights(ids)
    slots = dispatch(ids, weights, EXPERTS)
    expected = naive_slots(ids, weights, EXPERTS)
    assert len(slots.bounds) == EXPERTS + 1
    for expert in range(EXPERTS):
        span = slice(slots.bounds[expert], slots.bounds[expert + 1])
        assert list(zip(slots.tokens[span].tolist(), slots.affinity[span].tolist(), strict=True)) == expected[expert]
    for start in range(EXPERTS):
        for stop in range(start + 1, EXPERTS + 1):
            chunk = slots.chunk(start, stop)
            flat = [slot for expert in expected[start:stop] for slot in expert]
            assert list(zip(chunk.tokens.tolist(), chunk.affinity.tolist(), strict=True)) == flat
            assert chunk.bounds == [sum(map(len, expected[start:e])) for e in range(start, stop + 1)]
            if stop - start == 3:
                assert_pieces(slots, expected[start:stop], start, stop)


def assert_pieces(slots: Slots, expected: list[list[tuple[int, float]]], start: int, stop: int) -> None:
    """Pieces of at most five slots hold every slot once, in order, each with its own expert."""
    found: list[list[tuple[int, float]]] = [[] for _ in expected]
    at = 0
    for piece in slots.pieces(start, stop, 5):
        assert piece.place == slice(at, at + len(piece.tokens))
        assert 0 < len(piece.tokens) <= 5
        assert (piece.bounds[0], piece.bounds[-1], len(piece.bounds)) == (0, len(piece.tokens), len(expected) + 1)
        at += len(piece.tokens)
        for own, low, high in zip(found, piece.bounds, piece.bounds[1:], strict=False):
            own += zip(piece.tokens[low:high].tolist(), piece.affinity[low:high].tolist(), strict=True)
    assert found == expected


@pytest.mark.parametrize("counts", [[0, 3, 1, 0, 2], [1], [0], [0, 0, 1], [4, 0, 0]])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_linear(counts: list[int], bias: bool, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), 6, generator=generator)
    w = torch.randn(len(counts), 4, 6, generator=generator)
    w = w.transpose(1, 2).contiguous().transpose(1, 2) if transposed else w  # the same values, stored [C, in, out]
    b = torch.randn(len(counts), 4, generator=generator) if bias else None
    y = grouped_linear(x, w, b, [sum(counts[:i]) for i in range(len(counts) + 1)])
    assert y.shape == (sum(counts), 4)
    row = 0
    for c, count in enumerate(counts):
        for _ in range(count):
            for o in range(4):
                expected = sum(float(w[c, o, i]) * float(x[row, i]) for i in range(6)) + (float(b[c, o]) if b is not None else 0.0)
                assert float(y[row, o]) == pytest.approx(expected, abs=1e-5)
            row += 1


@pytest.mark.parametrize("count", [*range(0, 70), 127, 128, 129, 255, 256, 257, 511, 512, 513, 767, 769, 1000, 1300, 4096, 4099])
def test_row_blocks_cover_all_rows_with_few_sizes(count: int) -> None:
    blocks = list(row_blocks(7, 7 + count))
    assert sorted({row for low, high in blocks for row in range(low, high)}) == list(range(7, 7 + count))
    sizes = [high - low for low, high in blocks]
    assert set(sizes) <= ({512, 256, 128, 64, 32} if count >= 32 else {count})
    assert sum(sizes) - count < (256 if count >= 256 else 32)  # rows that are computed twice


def test_grouped_linear_of_large_groups() -> None:
    """Groups that are cut into several products, the last of which overlap, in float64."""
    counts = [700, 0, 33, 300, 1, 1025]
    bounds = [sum(counts[:i]) for i in range(len(counts) + 1)]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(counts), 5, generator=generator, dtype=torch.float64)
    w = torch.randn(len(counts), 3, 5, generator=generator, dtype=torch.float64)
    b = torch.randn(len(counts), 3, generator=generator, dtype=torch.float64)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    expected = torch.einsum("si,soi->so", x, w[owner]) + b[owner]
    torch.testing.assert_close(grouped_linear(x, w, b, bounds), expected, rtol=1e-12, atol=1e-12)


def test_experts_equal_transformers_experts(opened: Opened) -> None:
    """The forward over routed tokens for made-up routings, against the eager experts of the same module."""
    known = opened.architecture
    sites = opened.structure.layers[known.first_moe]
    assert sites.moe is not None
    module = opened.reference.experts(known.first_moe)
    skeleton_module = opened.checkpoint.model.get_submodule(f"{sites.name}.{sites.moe.experts}")
    for what, ids in routings().items():
        x = torch.randn(len(ids), known.expert_hidden, generator=torch.Generator().manual_seed(5))
        weights = some_weights(ids)
        used = (ids >= 0) & (ids < EXPERTS)
        with torch.no_grad():  # not every eager forward knows unused slots, but all know weights of zero
            expected = module(x, ids.where(used, 0), weights.where(used, 0.0))
        outputs = torch.zeros_like(x)
        slots = dispatch(ids, weights, EXPERTS)
        for start in range(0, EXPERTS, CHUNK):
            stop = min(start + CHUNK, EXPERTS)
            chunk = read_experts(opened.weights, f"{sites.name}.{sites.moe.experts}", sites.moe.layout, start, stop)
            add_outputs(skeleton_module, x, chunk, slots.chunk(start, stop), outputs)
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6, msg=what)


def test_read_experts(opened: Opened) -> None:
    """[C, out, in] whatever is stored, and `rows` finds gate and up in it."""
    known = opened.architecture
    sites = opened.structure.layers[known.first_moe]
    assert sites.moe is not None
    layout = sites.moe.layout
    module = opened.reference.experts(known.first_moe)
    chunk = read_experts(opened.weights, f"{sites.name}.{sites.moe.experts}", layout, 3, 6)
    assert isinstance(chunk, ExpertWeights)
    first, down = module.get_parameter("gate_up_proj" if known.gated else "up_proj"), module.get_parameter("down_proj")
    x = torch.randn(known.expert_hidden, generator=torch.Generator().manual_seed(0))
    for c in range(3):
        expected = x @ first[3 + c] if known.transposed else first[3 + c] @ x
        torch.testing.assert_close(chunk.first[c] @ x, expected, rtol=0, atol=1e-6)
        if known.gated:
            gate, up = (expected[0::2], expected[1::2]) if known.interleaved else expected.chunk(2)
            torch.testing.assert_close((chunk.first[c] @ x)[layout.rows("gate_proj")], gate, rtol=0, atol=1e-6)
            torch.testing.assert_close((chunk.first[c] @ x)[layout.rows("up_proj")], up, rtol=0, atol=1e-6)
        else:
            assert layout.projections == ("up_proj", "down_proj")
        torch.testing.assert_close(chunk.down[c], (down[3 + c].T if known.transposed else down[3 + c]).float(), rtol=0, atol=0)
    assert (chunk.first_bias is not None) == (chunk.down_bias is not None) == known.bias
    for projection in layout.projections:
        stacked = chunk.down if projection == "down_proj" else chunk.first[:, layout.rows(projection)]
        assert tuple(stacked.shape) == (3, *layout.features(projection))


# --- the seam and the stubs


def test_experts_outside_of_a_handler_raise() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    run = ALL_EXPERTS_FUNCTIONS["moebit-stream"]
    x, ids, weights = torch.ones(1, 2), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    with pytest.raises(RuntimeError, match="outside of a moebit pass"):
        run(nn.Module(), x, ids, weights)
    with experts_handler(lambda module, states, *_: states + 1):
        with experts_handler(lambda module, states, *_: states + 2):
            assert run(nn.Module(), x, ids, weights).tolist() == [[3.0, 3.0]]
        with pytest.raises(ZeroDivisionError), experts_handler(lambda *_: 1 / 0):  # type: ignore[arg-type, return-value]
            run(nn.Module(), x, ids, weights)
        assert run(nn.Module(), x, ids, weights).tolist() == [[2.0, 2.0]], "the outer handler is back"
    with pytest.raises(RuntimeError, match="outside of a moebit pass"):
        run(nn.Module(), x, ids, weights)


def test_is_experts(opened: Opened) -> None:
    found = {name for name, module in opened.checkpoint.model.named_modules() if is_experts(module)}
    known = opened.architecture
    assert found == {f"{opened.structure.list_name}.{i}.{known.block}.experts" for i, moe in enumerate(known.moe) if moe}


def test_layers_are_back_after_an_error_in_the_forward(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = open_hub_checkpoint(checkpoints.path(ARCHITECTURES["mixtral"])).model
    layers = list(model.model.layers)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(model.model.rotary_emb, "forward", fail)
    hidden = torch.zeros(1, 2, HIDDEN)
    with pytest.raises(RuntimeError, match="out of luck"):
        replay.record(model, "model.layers", inputs_embeds=hidden)
    assert list(model.model.layers) == layers
    with pytest.raises(RuntimeError, match="out of luck"):
        replay.head(model, "model.layers", hidden)
    assert list(model.model.layers) == layers


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_activations(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for directory in (None, tmp_path):
        store = ActivationStore(directory)
        tensor = store.allocate(shape, dtype)
        assert (tensor.shape, tensor.dtype) == (shape, dtype)
        tensor.fill_(3)
        store.release()
        assert bool((tensor == 3).all())
    assert os.listdir(tmp_path) == []
