"""Fewer experts: the output computes what transformers computes with the others masked by hand; who goes is who is missed least."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import moebit
from moebit.errors import BadInputError
from moebit.quantize.prune import kept_experts
from tests.support.models import ARCHITECTURES, EXPERTS, Checkpoints, quiet, windows
from tests.support.outputs import file_bytes, read_config

SIZES: dict[str, Any] = {"samples": 5, "length": 24}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The very windows that the references run."""
    file = tmp_path_factory.mktemp("text") / "t.jsonl"
    file.write_text(json.dumps({"input_ids": windows().flatten().tolist()}) + "\n")
    return {"t": file}


def loaded(directory: Path) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    with quiet():
        return model(input_ids=windows(), use_cache=False).logits  # type: ignore[no-any-return]


def masked(model: Any, removed: dict[int, list[int]]) -> Any:
    """Mixtral's own router with the removed experts' logits at minus infinity."""
    for index, experts in removed.items():
        router = model.model.layers[index].mlp.gate

        def forward(hidden: Tensor, router: Any = router, experts: list[int] = experts) -> tuple[Tensor, Tensor, Tensor]:
            scores = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
            scores[:, experts] = -torch.inf
            values, ids = scores.softmax(-1).topk(router.top_k, dim=-1)
            return scores, values / values.sum(-1, keepdim=True), ids

        router.forward = forward
    return model


def test_the_output_is_the_model_with_experts_masked(checkpoints: Checkpoints, text: dict[str, Path], tmp_path: Path) -> None:
    path = checkpoints.path(ARCHITECTURES["mixtral"])
    found = moebit.prune(path, tmp_path / "o", remove=0.25, text=text, **SIZES)
    assert found.experts == (EXPERTS, 6)
    assert {len(experts) for experts in found.removed.values()} == {2}
    assert read_config(tmp_path / "o")["num_local_experts"] == 6
    wanted = logits(masked(loaded(path), found.removed))
    assert torch.allclose(logits(loaded(tmp_path / "o")), wanted, atol=1e-5)
    assert not torch.allclose(logits(loaded(path)), wanted, atol=1e-3)
    assert json.loads((tmp_path / "o" / "moebit.json").read_text())["removed"] == {str(k): v for k, v in found.removed.items()}
    moebit.quantize(tmp_path / "o", tmp_path / "q", recipe={"weights": {"group_size": 32}, "solver": {"method": "rtn"}})


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_moe", "gpt_oss"])
def test_rows_biases_and_shared_experts_stay_in_step(checkpoints: Checkpoints, text: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Every tensor of transformers' own model, loaded from both: experts' and routers' are the kept rows, all others are equal."""
    path = checkpoints.path(ARCHITECTURES[name])
    found = moebit.prune(path, tmp_path / "o", remove=0.5, by="frequency", text=text, **SIZES)
    before, after = loaded(path).state_dict(), loaded(tmp_path / "o").state_dict()
    assert before.keys() == after.keys()
    changed = set()
    for key, value in before.items():
        layer = next((index for index in found.removed if f"layers.{index}." in key), None)
        if layer is not None and value.shape != after[key].shape:
            kept = torch.tensor([e for e in range(EXPERTS) if e not in found.removed[layer]])
            value = value.index_select(list(value.shape).index(EXPERTS), kept)
            changed.add(key.rpartition(".")[2])
        assert torch.equal(value, after[key]), key
    biases = {"deepseek_v3": {"e_score_correction_bias"}, "gpt_oss": {"bias", "gate_up_proj_bias", "down_proj_bias"}}
    assert changed == {"weight", "gate_up_proj", "down_proj"} | biases.get(name, set())
    if name == "deepseek_v3":  # four groups of two
        assert all(sorted(e // 2 for e in experts) == [0, 1, 2, 3] for experts in found.removed.values())


def test_saliencies_are_those_of_a_loop(checkpoints: Checkpoints, text: dict[str, Path], tmp_path: Path) -> None:
    model = checkpoints.reference(ARCHITECTURES["mixtral"])
    path = checkpoints.path(ARCHITECTURES["mixtral"])
    reap = moebit.prune(path, tmp_path / "r", remove=0.25, by="reap", text=text, **SIZES)
    frequency = moebit.prune(path, tmp_path / "f", remove=0.25, by="frequency", text=text, **SIZES)
    for index, routed in model.routed.items():
        experts = model.experts(index)
        lengths, counts = torch.zeros(EXPERTS), torch.zeros(EXPERTS)
        for x, ids, weights in zip(routed.x, routed.ids, routed.weights, strict=True):
            for e, g in zip(ids.tolist(), weights.tolist(), strict=True):
                gate, up = experts.gate_up_proj[e].detach().chunk(2)
                h = torch.nn.functional.silu(gate @ x) * (up @ x)
                lengths[e] += g * (experts.down_proj[e].detach() @ h).norm()
                counts[e] += 1
        assert reap.removed[index] == sorted((lengths / counts.clamp(min=1)).argsort()[:2].tolist())
        assert counts[frequency.removed[index]].max() <= counts[[e for e in range(EXPERTS) if e not in frequency.removed[index]]].min()


def test_measured_and_random_remove_as_many(checkpoints: Checkpoints, text: dict[str, Path], tmp_path: Path) -> None:
    path = checkpoints.path(ARCHITECTURES["mixtral"])
    for by in ("measured", "random"):
        runs = [moebit.prune(path, tmp_path / f"{by}{n}", remove=0.25, by=by, text=text, **SIZES) for n in range(2)]
        assert {len(experts) for experts in runs[0].removed.values()} == {2}
        assert file_bytes(tmp_path / f"{by}0") == file_bytes(tmp_path / f"{by}1")


def test_groups_keep_as_many_each() -> None:
    saliency = torch.tensor([9.0, 8.0, 7.0, 1.0, 2.0, 3.0])
    assert kept_experts(saliency, 4, 1) == [0, 1, 2, 5]
    assert kept_experts(saliency, 4, 2) == [0, 1, 4, 5]


def test_what_cannot_be_is_refused(checkpoints: Checkpoints, text: dict[str, Path], tmp_path: Path) -> None:
    path = checkpoints.path(ARCHITECTURES["mixtral"])
    for options, said in (
        ({"remove": 1.5}, "share above 0"),
        ({"remove": 0.01}, "not one of 8"),
        ({"remove": 0.9}, "a token is sent to 2"),
        ({"remove": 0.5, "by": "luck"}, "choose one of reap"),
    ):
        with pytest.raises(BadInputError, match=said):
            moebit.prune(path, tmp_path / "o", text=text, **options)  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="--text"):
        moebit.prune(path, tmp_path / "o", remove=0.5)
    with pytest.raises(BadInputError, match="must be apart"):
        moebit.prune(path, path, remove=0.5, text=text, overwrite=True)
