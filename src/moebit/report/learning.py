"""The charts of learned rounding, from the layers of report.json: what it brought by layer, and how the losses fell."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moebit.report.plots import Figure, legend
from moebit.report.svg import LAYER, Axis, Series, lines

EXPERTS, LINEARS = "routed experts", "linears"


def figures(layers: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The held-back loss before and after by layer, and both losses by step; nothing where no rounding was learned."""
    return [*_by_layer(layers), *(figure for what in (LINEARS, EXPERTS) for figure in _by_step(layers, what))]


def _rows(layer: Mapping[str, Any], what: str) -> Iterator[Mapping[str, Any]]:
    """The report's entries about experts or about linears that were learned."""
    for row in (layer.get("refine") or {}).values():
        if ("first_expert" in row) == (what == EXPERTS) and row.get("before"):
            yield row


def _by_layer(layers: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    series = list[Series]()
    for what in (LINEARS, EXPERTS):
        for when in ("before", "after"):
            points = [(layer["layer"], _mean(row[when] for row in _rows(layer, what))) for layer in layers if any(_rows(layer, what))]
            series.append(Series(f"{what}, {when}", points, len(series)))
    series = [one for one in series if one.points]
    if series:
        chart = lines(LAYER, Axis("held-back loss", log=True), series)
        yield Figure("Learned rounding, by layer", chart, legend(series), "Squared error of the layer's output relative to its size.")


def _by_step(layers: Sequence[Mapping[str, Any]], what: str) -> Iterator[Figure]:
    kept = [course for layer in layers for row in _rows(layer, what) for course in _kept(row)]
    if not kept:
        return
    steps, held, train = kept[0]["steps"], [], []
    for place, step in enumerate(steps):
        held.append((step, _mean([course["held_back"][place] / course["held_back"][0] for course in kept if len(course["steps"]) > place])))
        if place:
            shares = [course["train"][place - 1] / course["held_back"][0] for course in kept if len(course["train"]) >= place]
            train.append((step, _mean([shares])))
    series = [Series("tokens that are held back", held, 0), Series("tokens that are learned from", train, 1)]
    note = "Relative to the held-back loss before the first step, mean over layers; of each layer, the try that was kept."
    yield Figure(f"Learned rounding of {what}", lines(Axis("step"), Axis("loss, relative"), series), legend(series), note)


def _kept(row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Chunk by chunk, the try whose rate was kept."""
    for tries, rate in zip(row["tries"], row["rate"], strict=True):
        found = next((course for course in tries if course["rate"] == rate), None)
        if found is not None and found["held_back"][0] > 0:
            yield found


def _mean(values: Any) -> float:
    flat = [number for value in values for number in (value if isinstance(value, list) else [value])]
    return statistics.fmean(flat)
