"""The charts of a report page, from the layers of report.json. A chart is drawn where its numbers are there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from moebit.report.facts import Documents, routing, short
from moebit.report.svg import LAYER, Axis, Series, bars, heat, lines, mark

EXPERT, LOAD = Axis("expert"), "tokens / even share"


@dataclass(frozen=True)
class Figure:
    """A chart with the words around it: `legend` is (kind, shape, name) of its lines, `note` a sentence under it."""

    title: str
    svg: str
    legend: Sequence[tuple[int, str, str]] = ()
    note: str = ""


def figures(documents: Documents) -> dict[str, list[Figure]]:
    """Charts by section: error, load, routing, bits, coactivation, cost."""
    layers = documents.layers
    made = {
        "error": list(_errors(layers)),
        "load": list(_load(layers)),
        "routing": list(_routing(documents)),
        "bits": list(_bits(layers)),
        "coactivation": list(_coactivation(layers)),
        "cost": list(_cost(layers)),
    }
    return {section: found for section, found in made.items() if found}


def legend(series: Sequence[Series]) -> list[tuple[int, str, str]]:
    """What the legend of some lines shows."""
    return [(one.kind, mark(one.kind), one.name) for one in series]


def _errors(layers: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    """Mean error per layer, and a heat map layers × experts for every projection."""
    names = list(dict.fromkeys(name for layer in layers for name in layer.get("experts", {})))
    series: list[Series] = []
    for name in names:
        points = [(layer["layer"], _mean(layer["experts"][name]["weight_error"])) for layer in layers if name in layer.get("experts", {})]
        series.append(Series(short(name), points, len(series)))
    linears = [
        (layer["layer"], _mean([row["weight_error"] for row in layer["linears"].values()])) for layer in layers if layer.get("linears")
    ]
    if linears:
        series.append(Series("other linears", linears, 3))
    if not any(y > 0 for one in series for _, y in one.points):
        return
    chart = lines(LAYER, Axis("mean |ΔW|² / |W|²", log=True), series)
    yield Figure("Error of the weights, by layer", chart, legend(series), "Mean over a layer's matrices; logarithmic.")
    ends = _ends([e for layer in layers for part in layer.get("experts", {}).values() for e in part["weight_error"]])
    for name in names:
        svg = _map(layers, partial(_column, name, "weight_error"), Axis("|ΔW|² / |W|²", True, ends))
        if svg:
            yield Figure(f"Error of {short(name)}, by expert", svg, note="Logarithmic, one scale for all projections.")


def _load(layers: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    """Tokens per expert as a share of an even load, before and after balancing where both are there."""
    routed = [layer for layer in layers if sum(layer.get("tokens_per_expert") or ())]
    if not routed:
        return
    drawn = any(_drawn(layer) for layer in layers)
    yield from _load_of(layers, _before, "Load before balancing" if drawn else "Load of the experts")
    if drawn:
        yield from _load_of(layers, _after, "Load after balancing")


def _before(layer: Mapping[str, Any]) -> list[int]:
    return list(layer.get("tokens_per_expert") or ())


def _drawn(layer: Mapping[str, Any]) -> list[int]:
    """Tokens that balancing added to each expert."""
    return list((layer.get("balance") or {}).get("drawn") or ())


def _after(layer: Mapping[str, Any]) -> list[int]:
    before, more = _before(layer), _drawn(layer)
    return [a + b for a, b in zip(before, more, strict=True)] if len(more) == len(before) else before


def _load_of(layers: Sequence[Mapping[str, Any]], counts: Callable[[Mapping[str, Any]], list[int]], title: str) -> Iterator[Figure]:
    shares = {layer["layer"]: _relative(counts(layer)) for layer in layers if sum(counts(layer))}
    spread = [(x, float(np.quantile(v, 0.1)), float(np.quantile(v, 0.9))) for x, v in shares.items()]
    series = [
        Series("most used", [(x, max(v)) for x, v in shares.items()], 0),
        Series("median", [(x, statistics.median(v)) for x, v in shares.items()], 1),
        Series("least used", [(x, min(v)) for x, v in shares.items()], 2),
    ]
    note = "1 is an even load. The area holds the middle eighty percent of the experts."
    high = max(max(v) for v in shares.values())
    chart = lines(LAYER, Axis(LOAD, ends=(0.0, 1.05 * high)), series, bands=[(1, spread)])
    yield Figure(f"{title}, by layer", chart, legend(series), note)
    svg = _map(layers, lambda layer: _relative(counts(layer)) if sum(counts(layer)) else [], Axis(LOAD, ends=(0.0, high)))
    if svg:
        yield Figure(f"{title}, by expert", svg)


def _relative(counts: Sequence[int]) -> list[float]:
    even = sum(counts) / len(counts)
    return [count / even for count in counts]


def _routing(documents: Documents) -> Iterator[Figure]:
    """Agreement of the routing with the reference: as evaluated, and what adjusting the router changed while it was made."""
    found = routing(documents)
    if found:
        series = [
            Series("all experts the same", [(x, row["routing_exact"]) for x, row in found.items()], 0),
            Series("experts in common", [(x, row["routing_overlap"]) for x, row in found.items()], 1),
        ]
        yield _agreement("Routing that stayed the same", series, "Of tokens, and of chosen experts; on the evaluated texts.")
    steps = [(layer["layer"], layer["router"]) for layer in documents.layers if isinstance(layer.get("router"), Mapping)]
    series = [
        Series(name, [(x, one[key]["routing_exact"]) for x, one in steps if isinstance(one.get(key), Mapping)], kind)
        for kind, (key, name) in enumerate({"before": "before", "after": "after"}.items())
    ]
    if all(one.points for one in series):
        against = ", ".join(dict.fromkeys(str(one["against"]) for _, one in steps if one.get("against")))
        note = f"Tokens with all experts the same as {against or 'before'}, on the calibration text."
        yield _agreement("Adjusting the router", series, note)


def _agreement(title: str, series: Sequence[Series], note: str) -> Figure:
    low = min(y for one in series for _, y in one.points)
    up = Axis("share", ends=(math.floor(low * 10 - 1e-9) / 10 if low > 0.1 else 0.0, 1.005))
    return Figure(title, lines(LAYER, up, series), legend(series), note)


def _bits(layers: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    """Widths by expert, where they are not all the same."""
    widths = {b for layer in layers for part in layer.get("experts", {}).values() for b in part["bits"]}
    if len(widths) < 2:
        return
    for name in dict.fromkeys(name for layer in layers for name in layer.get("experts", {})):
        svg = _map(layers, partial(_column, name, "bits"), Axis("bits per weight", ends=(min(widths), max(widths)), marks=sorted(widths)))
        if svg:
            yield Figure(f"Bits of {short(name)}, by expert", svg)


def _coactivation(layers: Sequence[Mapping[str, Any]], most: int = 8) -> Iterator[Figure]:
    """Experts chosen together, where they were profiled: [E, E] counts."""
    found = [(layer["layer"], layer["coactivation"]) for layer in layers if isinstance(layer.get("coactivation"), list)]
    for index, counts in found[:most]:
        matrix = np.array(counts, dtype=float)
        np.fill_diagonal(matrix, np.nan)
        if matrix.ndim == 2 and np.isfinite(matrix).any():
            svg = heat(matrix, EXPERT, EXPERT, Axis("tokens", ends=(0.0, float(np.nanmax(matrix)))))
            yield Figure(f"Chosen together, layer {index}", svg, note="Tokens that are sent to both experts.")


def _cost(layers: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    seconds = [(layer["layer"], float(layer.get("seconds", 0.0))) for layer in layers]
    if any(y for _, y in seconds):
        yield Figure("Time, by layer", bars(LAYER, Axis("seconds"), seconds))
    peaks = [(layer["layer"], layer["peak_memory_bytes"] / 1e9) for layer in layers if layer.get("peak_memory_bytes")]
    if peaks:
        svg = lines(LAYER, Axis("GB", ends=(0.0, 1.05 * max(y for _, y in peaks))), [Series("peak so far", peaks)])
        yield Figure("Peak memory of the process so far", svg, note="Resident memory, interpreter and libraries included.")


# --- heat maps layers × experts


def _column(projection: str, key: str, layer: Mapping[str, Any]) -> list[float]:
    """A number of every expert in one projection; none where the layer does not have it."""
    return list(layer.get("experts", {}).get(projection, {}).get(key, ()))


def _map(layers: Sequence[Mapping[str, Any]], values: Callable[[Mapping[str, Any]], Sequence[float]], colour: Axis) -> str | None:
    """A heat map of the layers that have such values, or None where no layer has any."""
    rows = [(layer["layer"], list(values(layer))) for layer in layers]
    rows = [(index, row) for index, row in rows if row]
    if not rows:
        return None
    columns = max(len(row) for _, row in rows)
    matrix = np.full((len(rows), columns), np.nan)
    for number, (_, row) in enumerate(rows):
        matrix[number, : len(row)] = row
    return heat(matrix, EXPERT, LAYER, colour, [str(index) for index, _ in rows])


def _ends(values: Sequence[float]) -> tuple[float, float]:
    good = [v for v in values if math.isfinite(v) and v > 0]
    return (min(good), max(max(good), 1.5 * min(good))) if good else (0.1, 1.0)


def _mean(values: Sequence[float]) -> float:
    good = [v for v in values if math.isfinite(v)]
    return statistics.fmean(good) if good else 0.0
