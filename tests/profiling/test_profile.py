"""Profiles of tiny models against transformers' own forward and plain loops; what is added, refused, allocated, drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import moebit
from moebit.errors import BadInputError
from moebit.formats.profile import Profile
from moebit.profiling import profile as verb
from moebit.profiling.prices import token_weights
from moebit.profiling.sensitivity import SEED
from tests.support import reference
from tests.support.models import ARCHITECTURES, EXPERTS, HIDDEN, INTERMEDIATE, LENGTH, WINDOWS, Checkpoints, Reference, windows
from tests.support.observer import observed
from tests.support.outputs import Outputs, stored_tensors, token_file

MIXTRAL, QWEN3 = ARCHITECTURES["mixtral"], ARCHITECTURES["qwen3_moe"]
QWEN3_RECIPE = {"weights": {"bits": 3, "group_size": -1}, "solver": {"method": "rtn"}}
RECIPE = {"weights": {"bits": 3, "group_size": 32}, "solver": {"method": "rtn"}}
SIZES = {"samples": WINDOWS, "length": LENGTH}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`a` are the very windows that the reference runs; `b` others."""
    folder = tmp_path_factory.mktemp("text")
    a = folder / "a.jsonl"
    a.write_text(json.dumps({"input_ids": windows().flatten().tolist()}) + "\n")
    return {"a": a, "b": token_file(folder / "b.jsonl", WINDOWS * LENGTH, seed=3)}


def profiled(path: Path, out: Path, texts: dict[str, Path], **options: Any) -> Profile:
    return moebit.profile(path, out, **{"text": texts, "recipe": RECIPE, **SIZES, **options})


@pytest.fixture(scope="module")
def mixtral(checkpoints: Checkpoints, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return profiled(checkpoints.path(MIXTRAL), tmp_path_factory.mktemp("profile") / "p", texts)


def test_what_is_kept_is_what_transformers_routes(checkpoints: Checkpoints, mixtral: Profile) -> None:
    """Tokens, affinity, co-activation and S_ch of every layer, token by token from transformers' router and the experts' weights."""
    model = checkpoints.reference(MIXTRAL)
    found = load_file(mixtral.path / "a.safetensors")
    for index, routed in model.routed.items():
        name = f"{model.layers_name}.{index}.mlp.experts"
        experts = model.experts(index)
        tokens, affinity = np.zeros(EXPERTS, dtype=np.int64), np.zeros(EXPERTS)
        both, significance = np.zeros((EXPERTS, EXPERTS), dtype=np.int64), np.zeros((EXPERTS, INTERMEDIATE))
        for x, ids, weights in zip(routed.x, routed.ids, routed.weights, strict=True):
            for e, g in zip(ids.tolist(), weights.tolist(), strict=True):
                gate, up = experts.gate_up_proj[e].detach().chunk(2)
                h = torch.nn.functional.silu(gate @ x) * (up @ x)
                lengths = experts.down_proj[e].detach().norm(dim=0)
                significance[e] += (g * h.abs() * lengths).numpy()
                tokens[e] += 1
                affinity[e] += g
                for other in ids.tolist():
                    both[e, other] += 1
        assert found[f"{name}.tokens"].tolist() == tokens.tolist()
        assert found[f"{name}.coactivation"].tolist() == both.tolist()
        assert np.allclose(found[f"{name}.affinity"].numpy(), affinity, rtol=1e-4)
        assert np.allclose(found[f"{name}.significance"].numpy(), significance, rtol=1e-3, atol=1e-6)


def layer_change(model: Reference, index: int, change: Callable[[], AbstractContextManager[None]]) -> float:
    """The mean over tokens of |change of a layer's output|^2 / |its output|^2, from transformers' own forward of the whole model."""
    seen: list[torch.Tensor] = []

    def note(module: torch.nn.Module, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).detach().double().flatten(0, 1))

    hook = model.layers[index].register_forward_hook(note)
    try:
        with torch.no_grad():
            model.model(input_ids=windows(), use_cache=False)
            with change():
                model.model(input_ids=windows(), use_cache=False)
    finally:
        hook.remove()
    plain, changed = seen
    return float(((changed - plain).square().sum(1) / plain.square().sum(1)).mean())


@contextmanager
def rounded(weight: torch.Tensor, bits: int, group: int) -> Iterator[None]:
    """A weight [out, in], a view of a parameter, rounded by the oracle and then put back."""
    value = reference.rtn(weight.detach().double().numpy(), reference.Grid(bits, group, True, False, "float32")).weight_OI
    with replaced(weight, value):
        yield


@contextmanager
def replaced(weight: torch.Tensor, value: np.ndarray) -> Iterator[None]:
    """Other values in a weight, until its own are put back."""
    kept = weight.detach().clone()
    try:
        weight.data.copy_(torch.from_numpy(value).float())
        yield
    finally:
        weight.data.copy_(kept)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("bits", [2, 4])
def test_prices_of_experts_are_what_the_layer_puts_out(index: int, bits: int, checkpoints: Checkpoints, mixtral: Profile) -> None:
    """Every projection of every expert, one at a time, rounded in transformers' model."""
    model = checkpoints.reference(MIXTRAL)
    experts, found = model.experts(index), load_file(mixtral.path / "a.safetensors")
    name = f"{model.layers_name}.{index}.mlp.experts"
    for projection in ("gate_proj", "up_proj", "down_proj"):
        prices = found[f"{name}.{projection}.error"][verb.LADDER.index(bits)]
        for e in range(EXPERTS):
            gate, up = experts.gate_up_proj.data[e].chunk(2)
            weight = {"gate_proj": gate, "up_proj": up, "down_proj": experts.down_proj.data[e]}[projection]
            wanted = layer_change(model, index, lambda weight=weight: rounded(weight, bits, 32))
            assert float(prices[e]) == pytest.approx(wanted, rel=0.02, abs=1e-9), (projection, e)


@contextmanager
def whole_experts(model: Reference, index: int, bits: int, group: int, only: int | None = None) -> Iterator[None]:
    """All projections of a layer's experts (or of one) rounded by the oracle, and then put back."""
    experts = model.experts(index)
    with ExitStack() as stack:
        for e in range(EXPERTS) if only is None else (only,):
            for weight in (*experts.gate_up_proj.data[e].chunk(2), experts.down_proj.data[e]):
                stack.enter_context(rounded(weight, bits, group))
        yield


@pytest.mark.parametrize("bits", [2, 3])
def test_prices_of_whole_experts(bits: int, checkpoints: Checkpoints, mixtral: Profile) -> None:
    """All projections of one expert rounded at once in transformers' model: more than the sum of one at a time."""
    model, found = checkpoints.reference(MIXTRAL), load_file(mixtral.path / "a.safetensors")
    name = f"{model.layers_name}.1.mlp.experts"
    for e in range(EXPERTS):
        wanted = layer_change(model, 1, lambda e=e: whole_experts(model, 1, bits, 32, e))
        assert float(found[f"{name}.error"][verb.LADDER.index(bits), e]) == pytest.approx(wanted, rel=0.02, abs=1e-9), e


@pytest.mark.parametrize("bits", [2, 3])
def test_a_layers_experts_move_the_prediction_together(bits: int, checkpoints: Checkpoints, mixtral: Profile) -> None:
    """Prices times sensitivity: 1/2 mean (g . D)^2 with autograd's g and transformers' D, every expert of the layer rounded at once."""
    model, found = checkpoints.reference(MIXTRAL), load_file(mixtral.path / "a.safetensors")
    seen: list[torch.Tensor] = []
    hook = model.layers[1].register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    try:
        log_prob = model.model(input_ids=windows(), use_cache=False).logits.float().log_softmax(-1)
        generator = torch.Generator().manual_seed(SEED)
        labels = torch.stack([torch.multinomial(row.detach().exp(), 1, generator=generator) for row in log_prob])
        (gradient,) = torch.autograd.grad(log_prob.gather(2, labels).sum(), seen[0])
        with torch.no_grad(), whole_experts(model, 1, bits, 32):
            model.model(input_ids=windows(), use_cache=False)
    finally:
        hook.remove()
    wanted = 0.5 * float((gradient * (seen[1] - seen[0])).detach().double().sum(-1).square().mean())
    name, number = f"{model.layers_name}.1.mlp.experts", verb.LADDER.index(bits)
    price = found[f"{name}.error"][number].double().sum() * found[f"{name}.sensitivity"][number]
    assert float(price) == pytest.approx(wanted, rel=0.03)


def test_linears_are_priced_as_gptq_rounds_them(checkpoints: Checkpoints, texts: dict[str, Path], tmp_path: Path) -> None:
    """The oracle's GPTQ on the inputs that transformers delivers, put into transformers' model."""
    found = profiled(checkpoints.path(MIXTRAL), tmp_path / "p", {"a": texts["a"]}, solver="gptq", widths=[3])
    tensors, model = load_file(found.path / "a.safetensors"), checkpoints.reference(MIXTRAL)
    linear, seen = model.layers[1].self_attn.o_proj, []
    hook = linear.register_forward_hook(lambda module, args, out: seen.append(args[0].detach().flatten(0, 1).double().numpy()))
    try:
        with torch.no_grad():
            model.model(input_ids=windows(), use_cache=False)
    finally:
        hook.remove()
    grid = reference.Grid(3, 32, True, False, "float32")
    value = reference.gptq(linear.weight.detach().double().numpy(), seen[0].T @ seen[0], grid).weight_OI
    wanted = layer_change(model, 1, lambda: replaced(linear.weight, value))
    assert float(tensors[f"{model.layers_name}.1.self_attn.o_proj.error"][0]) == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("bits", [2, 3])
def test_prices_of_linears_go_through_routing_and_experts(bits: int, checkpoints: Checkpoints, mixtral: Profile) -> None:
    """A rounded linear of attention changes the experts' inputs and which of them are chosen: all of it is in the price."""
    model = checkpoints.reference(MIXTRAL)
    found = load_file(mixtral.path / "a.safetensors")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weight = model.layers[1].self_attn.get_submodule(name).weight
        wanted = layer_change(model, 1, lambda weight=weight: rounded(weight, bits, 32))
        price = float(found[f"{model.layers_name}.1.self_attn.{name}.error"][verb.LADDER.index(bits)])
        assert price == pytest.approx(wanted, rel=0.02), name


def test_a_token_of_huge_norm_does_not_dominate() -> None:
    outputs = torch.ones(2, 3, 4)
    outputs[0, 0] *= 1e4
    weights = token_weights(outputs)
    assert float(weights[0] * outputs[0, 0].double().square().sum()) == pytest.approx(
        float(weights[1] * outputs[0, 1].double().square().sum())
    )
    assert float(weights @ outputs.flatten(0, 1).double().square().sum(1)) == pytest.approx(1.0)


def test_more_bits_cost_less(mixtral: Profile) -> None:
    for name, module in mixtral.modules.items():
        for part in module.parts:
            error = mixtral.stacked(f"{name}.{part}.error" if part else f"{name}.error").sum(0).view(len(verb.LADDER), -1).sum(1)
            assert bool((error[:-1] > error[1:]).all()), name


@pytest.mark.parametrize("solver", ["rtn", pytest.param("gptq", marks=pytest.mark.slow)])
def test_a_further_set_recomputes_nothing(solver: str, checkpoints: Checkpoints, texts: dict[str, Path], tmp_path: Path) -> None:
    path = checkpoints.path(QWEN3)
    both = profiled(path, tmp_path / "both", texts, solver=solver, recipe=QWEN3_RECIPE)
    with observed("moebit.pass") as passes:
        profiled(path, tmp_path / "one", {"a": texts["a"]}, solver=solver, recipe=QWEN3_RECIPE)
        added = profiled(path, tmp_path / "one", {"b": texts["b"]}, solver=solver, recipe=QWEN3_RECIPE)
        assert len(passes) == 2
        again = profiled(path, tmp_path / "one", texts, solver=solver, recipe=QWEN3_RECIPE)
        assert len(passes) == 2
    for name in ("a", "b"):
        assert (added.path / f"{name}.safetensors").read_bytes() == (both.path / f"{name}.safetensors").read_bytes()
    assert json.loads((again.path / "profile.json").read_text()) == json.loads((both.path / "profile.json").read_text())


def test_the_memory_limit_changes_pieces_and_nothing_else(checkpoints: Checkpoints, texts: dict[str, Path], tmp_path: Path) -> None:
    path = checkpoints.path(QWEN3)
    whole, pieces = (profiled(path, tmp_path / str(m), {"a": texts["a"]}, memory=m, recipe=QWEN3_RECIPE) for m in (2**32, 2**17))
    for name, tensor in load_file(whole.path / "a.safetensors").items():
        other = load_file(pieces.path / "a.safetensors")[name]
        assert torch.allclose(tensor.double(), other.double(), rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize(
    "name", ["gpt_oss", "nemotron_h", *(pytest.param(n, marks=pytest.mark.slow) for n in ("deepseek_v3", "olmoe", "qwen2_moe"))]
)
def test_other_architectures(name: str, checkpoints: Checkpoints, texts: dict[str, Path], tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    recipe = {"weights": {"bits": 3, "group_size": -1}, "solver": {"method": "rtn"}}
    found = profiled(checkpoints.path(architecture), tmp_path / "p", {"a": texts["a"]}, recipe=recipe, widths=[2, 4])
    assert len(found.experts) == sum(architecture.moe)
    for key, tensor in load_file(found.path / "a.safetensors").items():
        assert bool(torch.isfinite(tensor.double()).all()), key
        assert bool((tensor >= 0).all()), key
    plan = moebit.allocate(found, target_bits=3.6, method="knapsack", ladder=[2, 4], granularity="projection")
    assert plan.average_bits <= 3.6


# --- what is refused


def test_refusals(checkpoints: Checkpoints, outputs: Outputs, mixtral: Profile, texts: dict[str, Path], tmp_path: Path) -> None:
    path = checkpoints.path(MIXTRAL)

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(BadInputError, match=message):
            moebit.profile(options.pop("model", path), options.pop("out", tmp_path / "p"), **{"recipe": RECIPE, **SIZES, **options})

    refused("--text")
    refused("already quantized", model=outputs.rtn(MIXTRAL), text=texts)
    refused("another text", out=mixtral.path, text={"a": texts["b"]})
    refused("group_size 32, now -1", out=mixtral.path, text=texts, recipe={"weights": {"bits": 3, "group_size": -1}})
    refused("ignored modules", out=mixtral.path, text=texts, overrides={"weights.ignore": ["*.q_proj"]})
    refused("widths 2, 7", text=texts, widths=[2, 7])
    refused("plain NAME", text={"../a": texts["a"]})
    refused("is a checkpoint", out=path, text=texts)
    assert not (tmp_path / "p").exists()
    with pytest.raises(BadInputError, match=r"no profile\.json"):
        moebit.allocate(tmp_path, target_bits=3)


# --- widths


@pytest.mark.parametrize("method", ["fuzzy", "knapsack", "frequency", "uniform"])
@pytest.mark.parametrize("target", [3.5, 4.5])
def test_an_output_has_the_size_that_its_plan_said(
    method: str, target: float, checkpoints: Checkpoints, mixtral: Profile, tmp_path: Path
) -> None:
    """Counted from the bytes on disk: codes and scales of everything that is quantized."""
    result = moebit.allocate(mixtral, tmp_path / "plan.json", target_bits=target, method=method)
    moebit.quantize(checkpoints.path(MIXTRAL), tmp_path / "out", recipe=RECIPE, plan=tmp_path / "plan.json")
    packed = {n: t for n, t in stored_tensors(tmp_path / "out").items() if n.endswith((".codes", ".scale"))}
    weights = 2 * (EXPERTS * 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2)
    on_disk = 8 * sum(t.nbytes for t in packed.values()) / weights
    assert on_disk == pytest.approx(result.average_bits, abs=1e-9)
    assert on_disk <= target
    if method != "uniform":
        step = 8 * 2 * 3 * HIDDEN * INTERMEDIATE / 8 / weights  # two bits of one expert: the ladder's largest step
        assert on_disk > target - max(0.02, step)


def test_a_plan_says_how_it_was_made_and_can_be_edited(checkpoints: Checkpoints, mixtral: Profile, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    moebit.allocate(mixtral, file, target_bits=3.5, method="knapsack", granularity="projection")
    plan = json.loads(file.read_text())
    assert (plan["made"]["method"], plan["made"]["target_bits"], set(plan["made"]["sets"])) == ("knapsack", 3.5, {"a", "b"})
    name = next(iter(plan["experts"]))
    plan["experts"][name]["down_proj"] = 8
    file.write_text(json.dumps(plan))
    moebit.quantize(checkpoints.path(MIXTRAL), tmp_path / "out", recipe=RECIPE, plan=file)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["modules"][name]["projections"]["down_proj"]["bits"] == 8


def test_granularity(mixtral: Profile) -> None:
    by = {g: moebit.allocate(mixtral, target_bits=4.0, method="knapsack", granularity=g).plan for g in ("layer", "expert", "projection")}
    for parts in by["layer"].experts.values():
        assert all(isinstance(width, int) for width in parts.values())
        assert len(set(parts.values())) == 1
    for parts in by["expert"].experts.values():
        assert parts["gate_proj"] == parts["up_proj"] == parts["down_proj"]
    assert any(parts["gate_proj"] != parts["down_proj"] for parts in by["projection"].experts.values())


def test_finer_choices_cost_less(mixtral: Profile) -> None:
    """The knapsack's own error: projections may do what experts do, and experts what layers do."""
    errors = []
    for granularity in ("layer", "expert", "projection"):
        plan = moebit.allocate(mixtral, target_bits=4.0, method="knapsack", granularity=granularity).plan
        total = 0.0
        for name, module in mixtral.modules.items():
            for part in module.parts:
                error = mixtral.stacked(f"{name}.{part}.error" if part else f"{name}.error").double()
                bits = plan.widths(name, part, module.experts, 0) if part else (plan.linears[name],)
                shares = error.view(len(error), len(verb.LADDER), -1).mean(0)
                total += sum(float(shares[verb.LADDER.index(width), e]) for e, width in enumerate(bits))
        errors.append(total)
    assert errors[2] <= errors[1] * 1.01 <= errors[0] * 1.03


def test_what_vllm_serves(mixtral: Profile) -> None:
    plan = moebit.allocate(mixtral, target_bits=6.5, method="knapsack", engine="vllm").plan
    assert all(len(set(parts.values())) == 1 and set(parts.values()) <= {4, 8} for parts in plan.experts.values())
    for layer in range(2):
        assert len({width for name, width in plan.linears.items() if f".{layer}.self_attn" in name and "o_proj" not in name}) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_bits": 1.9}, r"the lowest widths take 3\.0.*linears outside of the experts at 2"),
        ({"target_bits": 3, "method": "magic"}, "fuzzy, knapsack"),
        ({"target_bits": 3.1, "linear_bits": 3}, r"the lowest widths take 3\.2.*linears outside of the experts at 3"),
        ({"target_bits": 3, "linear_bits": 7}, "2, 3, 4, 5, 6, 8"),
        ({"target_bits": 3, "granularity": "layer"}, "compares the experts of one layer"),
        ({"target_bits": 3, "method": "knapsack", "ladder": [2, 5]}, "no errors were measured at 5"),
        ({"target_bits": 3, "engine": "tgi"}, "any, transformers, vllm"),
        ({"target_bits": 5, "method": "knapsack", "engine": "vllm", "granularity": "expert"}, "one width for all experts"),
        ({"target_bits": 5, "method": "knapsack", "engine": "vllm", "ladder": [2, 3]}, "none of 4, 8"),
        ({"target_bits": 2.1, "method": "uniform"}, r"2 bits take 3\.0"),
    ],
)
def test_what_cannot_be_allocated(options: dict[str, Any], says: str, mixtral: Profile) -> None:
    with pytest.raises(BadInputError, match=says):
        moebit.allocate(mixtral, **options)


def test_without_errors_there_is_no_knapsack(checkpoints: Checkpoints, texts: dict[str, Path], tmp_path: Path) -> None:
    found = profiled(checkpoints.path(MIXTRAL), tmp_path / "p", texts, errors=False)
    with pytest.raises(BadInputError, match="errors were not measured"):
        moebit.allocate(found, target_bits=3.5, method="knapsack")
    assert moebit.allocate(found, target_bits=4.0).average_bits <= 4.0
    measured = profiled(checkpoints.path(MIXTRAL), tmp_path / "p", texts)  # the same sets again, with errors
    assert measured.has_errors


# --- drawn


@pytest.mark.slow
def test_heat_maps(mixtral: Profile, tmp_path: Path) -> None:
    plan = moebit.allocate(mixtral, target_bits=4.0).plan
    files = moebit.heatmaps(mixtral, tmp_path / "one", widths=plan.experts)
    assert {file.stem for file in files} == {
        "tokens-a", "tokens-b", "significance-a", "significance-b", "dynamics-of-significance-over-data-sets", "bits",
    }  # fmt: skip
    again = moebit.heatmaps(mixtral, tmp_path / "two", widths=plan.experts)
    assert [f.read_bytes() for f in files] == [f.read_bytes() for f in again]
    assert all(f.read_text().startswith("<?xml") for f in files)
