"""Learned rounding on a report page: losses by layer and by step, from documents that are written down here."""

from __future__ import annotations

from typing import Any

from moebit.report.learning import figures


def course(rate: float, *held: float) -> dict[str, Any]:
    return {"rate": rate, "steps": [10 * i for i in range(len(held))], "held_back": list(held), "train": [0.9 * h for h in held[1:]]}


def row(kind: dict[str, Any], rate: float, *tries: dict[str, Any]) -> dict[str, Any]:
    kept = next(one for one in tries if one["rate"] == rate)
    held = kept["held_back"]
    return {**kind, "rate": [rate], "step": [20], "before": [held[0]], "after": [min(held)], "tries": [list(tries)]}


LAYERS = [
    {
        "layer": number,
        "refine": {
            "a.q_proj": row({"linears": [["q_proj"]]}, 0.006, course(0.002, 0.4, 0.39, 0.38), course(0.006, 0.4, 0.3, 0.2)),
            "a.experts": row({"first_expert": [0]}, 0.002, course(0.002, 0.5, 0.45, 0.4), course(0.006, 0.5, 0.6, 0.7)),
            "a.more": {"first_expert": [8], "skipped": ["no tokens"]},
        },
    }
    for number in range(3)
]


def test_both_losses_are_drawn_by_step_and_what_it_brought_by_layer() -> None:
    by_layer, linears, experts = figures(LAYERS)
    assert [name for _, _, name in by_layer.legend] == [
        "linears, before", "linears, after", "routed experts, before", "routed experts, after",
    ]  # fmt: skip
    assert "linears, after, layer 2: 0.2" in by_layer.svg
    assert "held back, step 20: 0.5" in linears.svg  # 0.2 of 0.4
    assert "learned from, step 20: 0.45" in linears.svg
    assert "held back, step 20: 0.8" in experts.svg  # of the rate that was kept


def test_without_it_nothing_is_drawn() -> None:
    assert figures([{"layer": 0}, {"layer": 1, "refine": {}}]) == []
    assert figures([{"layer": 0, "refine": {"a.experts": {"first_expert": [0], "skipped": ["why"]}}}]) == []
