"""Which steps a layer takes, from its recipe and from whether it has experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moebit.quantize.layer import steps
from moebit.recipe import Recipe

EXPERTS = ["linears_beside_experts", "quantize_experts", "linears_behind_experts"]
ROUTING = ["capture_routing", "capture_pool"]


def names(recipe: dict[str, Any], moe: object, calibrated: bool) -> list[str]:
    context: Any = SimpleNamespace(recipe=Recipe.model_validate(recipe), sites=SimpleNamespace(moe=moe))
    return [step.__name__ for step in steps(context, calibrated)]


def test_a_layer_that_is_rounded_without_data() -> None:
    recipe = {"solver": {"method": "rtn"}}
    assert names(recipe, object(), False) == ["linears_before_experts", *EXPERTS, "write_rest"]
    assert names(recipe, None, False) == ["linears_before_experts", "write_rest"]


def test_a_calibrated_layer() -> None:
    assert names({}, object(), True) == ["linears_before_experts", *ROUTING, *EXPERTS, "write_rest", "advance"]
    assert names({}, None, True) == ["linears_before_experts", "write_rest", "advance"]


@pytest.mark.parametrize(
    ("recipe", "step", "following"),
    [
        ({"smoothing": {"kind": "smoothquant"}}, "smooth", "linears_before_experts"),
        ({"solver": {"method": "awq"}}, "scale", "linears_before_experts"),
        ({"router": {"bits": 8}}, "adjust_router", "capture_routing"),
    ],
)
def test_what_a_recipe_asks_for_has_its_place(recipe: dict[str, Any], step: str, following: str) -> None:
    found = names(recipe, object(), True)
    assert found[found.index(step) + 1] == following
    assert [name for name in found if name != step] == names({}, object(), True)
