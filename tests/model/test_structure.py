"""The structure found by watching a trial forward on meta, against the configuration and against what real forwards of
transformers' model do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from moebit.errors import BadInputError
from moebit.model.experts import ExpertsLayout
from moebit.model.skeleton import skeleton
from moebit.model.structure import LayerSites, find_structure
from tests.support.models import EXPERTS, INTERMEDIATE, TOP_K, WINDOWS
from tests.support.opened import Opened


def linears(module: nn.Module, under: str = "") -> set[str]:
    return {name for name, child in module.named_modules() if isinstance(child, nn.Linear) and name.startswith(under)}


def grouped(layer: LayerSites) -> list[str]:
    return [name for group in layer.groups for name in group.names]


def test_layers(opened: Opened) -> None:
    structure, config = opened.structure, opened.checkpoint.config
    assert len(structure.layers) == config.num_hidden_layers
    assert structure.list_name == opened.reference.layers_name
    assert [(layer.index, layer.name) for layer in structure.layers] == [
        (i, f"{structure.list_name}.{i}") for i in range(len(structure.layers))
    ]
    assert tuple(layer.moe is not None for layer in structure.layers) == opened.architecture.moe
    assert structure.moe_layers == [layer for layer in structure.layers if opened.architecture.moe[layer.index]]


def test_experts(opened: Opened) -> None:
    known = opened.architecture
    layout = ExpertsLayout(EXPERTS, known.expert_hidden, INTERMEDIATE, known.gated, known.interleaved, known.transposed, known.bias)
    for layer in opened.structure.moe_layers:
        assert layer.moe is not None
        assert layer.moe.experts == f"{known.block}.experts"
        assert layer.moe.layout == layout
        assert layer.moe.top_k == TOP_K
        module = opened.reference.layers[layer.index].get_submodule(layer.moe.experts)
        stored = sum(p.numel() for n, p in module.named_parameters() if not n.endswith("_bias"))
        assert layer.moe.layout.parameters_per_expert * EXPERTS == stored


def test_router(opened: Opened) -> None:
    name = opened.architecture.router_name
    for layer in opened.structure.moe_layers:
        assert layer.moe is not None
        assert layer.moe.router == name
        assert layer.kept[name] == "router"
        assert layer.moe.router_kind == type(opened.reference.layers[layer.index].get_submodule(name)).__name__


def test_router_is_never_quantized(opened: Opened) -> None:
    module = f"{opened.architecture.block}.{opened.architecture.router}"
    for layer in opened.structure.layers:
        assert not [name for name in grouped(layer) if name == module or name.startswith(f"{module}.")]


def test_shared_experts(opened: Opened) -> None:
    known = opened.architecture
    for layer in opened.structure.moe_layers:
        assert layer.moe is not None
        expected = linears(opened.reference.layers[layer.index], f"{known.block}.{known.shared}.") if known.shared else set()
        assert bool(expected) == bool(known.shared)
        latent = {f"{known.block}.fc1_latent_proj", f"{known.block}.fc2_latent_proj"}  # in nemotron_h, in front of and behind the experts
        assert set(layer.moe.shared) - latent == expected
        assert set(layer.moe.shared) <= set(grouped(layer))


def test_gates_of_shared_experts_are_kept(opened: Opened) -> None:
    for layer in opened.structure.layers:
        gates = {name for name in linears(opened.reference.layers[layer.index]) if name.endswith("shared_expert_gate")}
        assert bool(gates) == (opened.architecture.shared == "shared_expert" and layer.moe is not None)
        assert {name for name, why in layer.kept.items() if why == "gate"} == gates


def test_every_linear_is_in_one_group_or_kept(opened: Opened) -> None:
    for layer in opened.structure.layers:
        module = opened.reference.layers[layer.index]
        names = grouped(layer)
        assert len(names) == len(set(names))
        assert set(names) | (set(layer.kept) & linears(module)) == linears(module)
        assert not set(names) & set(layer.kept)
        for group in layer.groups:
            assert {module.get_submodule(name).in_features for name in group.names} == {group.in_features}


def by_input(inputs: dict[str, Tensor]) -> list[list[str]]:
    """Names whose inputs hold the same values, in the order of the calls."""
    groups: list[list[str]] = []
    for name, x in inputs.items():
        for group in groups:
            if inputs[group[0]].shape == x.shape and torch.equal(inputs[group[0]], x):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def test_groups_share_their_input(opened: Opened) -> None:
    """Values decide here, identities there."""
    for layer in opened.structure.layers:
        inputs = opened.reference.linear_inputs(layer.index)
        assert [list(group.names) for group in layer.groups] == by_input({name: x for name, x in inputs.items() if name not in layer.kept})


def test_linears_kept_as_not_called_are_not_called(opened: Opened) -> None:
    for layer in opened.structure.layers:
        called = set(opened.reference.linear_inputs(layer.index))
        uncalled = {name for name, why in layer.kept.items() if why == "not called"}
        assert uncalled == linears(opened.reference.layers[layer.index]) - called


def test_moe_input(opened: Opened) -> None:
    """`moe_input` marks exactly the groups that get what the experts get."""
    for layer in opened.structure.layers:
        routed = opened.reference.routed.get(layer.index)
        for group in layer.groups:
            x = opened.reference.linear_inputs(layer.index, WINDOWS)[group.names[0]]
            same = routed is not None and x.shape == routed.x.shape and torch.equal(x, routed.x)
            assert group.moe_input == same, group


def test_replays_give_the_inputs_again(opened: Opened) -> None:
    """A `replay` module, called alone with the other group's input, calls the group with what it gets in a full forward."""
    for layer in opened.structure.layers:
        module = opened.reference.layers[layer.index]
        inputs = opened.reference.linear_inputs(layer.index)
        for group in layer.groups:
            if group.replay is None:
                continue
            assert group.replay_of is not None
            seen: list[Tensor] = []
            handle = module.get_submodule(group.names[0]).register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
            with torch.no_grad():
                module.get_submodule(group.replay)(inputs[layer.groups[group.replay_of].names[0]][None])
            handle.remove()
            torch.testing.assert_close(seen[0].reshape(inputs[group.names[0]].shape), inputs[group.names[0]], rtol=1e-5, atol=1e-6)


def test_replays_run_no_experts(opened: Opened) -> None:
    """What lies behind the experts cannot be replayed without running them again."""
    for layer in opened.structure.moe_layers:
        assert layer.moe is not None
        for group in layer.groups:
            assert group.replay is None or not layer.moe.experts.startswith(f"{group.replay}."), group


def test_down_projections_have_a_replay(opened: Opened) -> None:
    for layer in opened.structure.layers:
        for group in layer.groups:
            assert group.replay is not None or not any(name.endswith(".down_proj") for name in group.names), group


def test_the_stored_type_does_not_matter(opened: Opened) -> None:
    other = torch.float32 if opened.architecture.dtype == torch.bfloat16 else torch.bfloat16
    assert find_structure(skeleton(opened.architecture.make_config(dtype=other))) == opened.structure


def test_the_trial_forward_leaves_no_trace(opened: Opened) -> None:
    model = skeleton(opened.checkpoint.config)
    before = {name: (buffer.device, buffer.clone()) for name, buffer in model.named_buffers()}
    layers = list(model.get_submodule(opened.structure.list_name))  # type: ignore[call-overload]
    assert find_structure(model) == opened.structure
    assert list(model.get_submodule(opened.structure.list_name)) == layers  # type: ignore[call-overload]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    for name, buffer in model.named_buffers():
        device, value = before[name]
        assert buffer.device == device
        assert device.type == "meta" or torch.equal(buffer, value), name


# --- models that are refused


def tiny(model_type: str, **config: object) -> nn.Module:
    common = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return skeleton(AutoConfig.for_model(model_type, **{**common, **config}))


def test_dense_model_is_refused() -> None:
    with pytest.raises(BadInputError, match=r"LlamaForCausalLM has no routed experts .*a quantizer for dense models"):
        find_structure(tiny("llama"))  # type: ignore[arg-type]


def test_moe_model_with_dense_layers_only_is_refused() -> None:
    with pytest.raises(BadInputError, match=r"Qwen3MoeForCausalLM has no routed experts"):
        find_structure(tiny("qwen3_moe", mlp_only_layers=[0], num_experts=4, moe_intermediate_size=8))  # type: ignore[arg-type]
