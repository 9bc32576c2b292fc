"""The frontier of a model: predicted loss against size for several engines, measured outputs among them, as one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebit import words
from moebit.calibration.text import Texts
from moebit.evaluate.judging import judge
from moebit.evaluate.streaming import Progress
from moebit.formats.seal import SEALED
from moebit.memory import Memory
from moebit.recipe.reading import read_object
from moebit.report.compare import labels
from moebit.report.page import render
from moebit.report.plots import Figure
from moebit.report.svg import DASHES, KINDS, Axis, Series, curves, mark

SHARP = 0.02  # how far a knee stands out of the straight line between a curve's ends, as a share of its height, to be called one
KNEE, MEASURED = "D", "o"
DECADES = 4  # of loss that are drawn, below the highest of all curves


@dataclass(frozen=True)
class Curve:
    """What is predicted for one engine.

    Attributes:
        engine, output_format: what reads the output, and which. points: (bytes, loss), rising in bytes; none where it is refused.
        whole: bytes of the smallest and the largest output. refused: why there are none.
    """

    engine: str
    output_format: str
    points: tuple[tuple[int, float], ...] = ()
    refused: str = ""

    @property
    def knee(self) -> tuple[int, float] | None:
        """Where the curve bends: the point furthest below the straight line between its ends, both axes linear (Satopaa et al., 2011).

        Below it, bytes buy much of the loss back; above it, little. None where the curve is nearly straight.
        """
        if len(self.points) < 3:
            return None
        (first, highest), (last, lowest) = self.points[0], self.points[-1]
        if last <= first or highest <= lowest:
            return None
        below = [(highest - loss) / (highest - lowest) - (size - first) / (last - first) for size, loss in self.points]
        best = max(range(len(below)), key=lambda number: below[number])
        return self.points[best] if below[best] > SHARP else None


def measure_outputs(
    outputs: Sequence[str | Path],
    reference: str | Path,
    text: Texts,
    *,
    window: int,
    max_tokens: int | None,
    memory: Memory,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Judge outputs on texts: {"name", "format", "size_bytes", "kl", "predicted", "refused"}, KL the mean over the texts."""
    found: list[dict[str, Any]] = []
    if not outputs:
        return found
    for number, (name, output) in enumerate(zip(labels([str(output) for output in outputs]), outputs, strict=True)):
        if progress:
            progress("outputs", number, len(outputs))
        judged = judge(output, reference, text, window=window, max_tokens=max_tokens, memory=memory, progress=progress)
        kls = [told["kl"] for told in judged.texts.values() if "kl" in told]
        sealed = read_object(Path(output) / SEALED) if (Path(output) / SEALED).is_file() else {}
        budget = sealed.get("plan", {}).get("budget", {})
        found.append(
            {
                "name": name,
                "format": sealed.get("format", judged.made_by),
                "size_bytes": budget.get("size_bytes", judged.size_bytes),
                "kl": sum(kls) / len(kls) if kls else None,
                "predicted": budget.get("predicted_loss"),
                "refused": judged.refused,
            }
        )
    return found


def frontier_page(
    model: str, whole: int, unit: str, texts: Sequence[str], curves_: Sequence[Curve], measured: Sequence[Mapping[str, Any]]
) -> str:
    """The page as HTML text.

    Args:
        whole: bytes of the original. unit: of the predicted loss. texts: what prices were measured on.
    """
    drawn = [curve for curve in curves_ if curve.points]
    return render(
        "frontier.html",
        title=f"{Path(model).name}: loss against size",
        whole=whole,
        unit=unit,
        texts=list(texts),
        rows=[_row(curve) for curve in drawn],
        refused=[(curve.engine, curve.refused) for curve in curves_ if curve.refused],
        measured=measured,
        figures=[_figure(drawn, measured, whole, unit)] if drawn else [],
    )


def _row(curve: Curve) -> dict[str, Any]:
    return {
        "engine": curve.engine,
        "format": curve.output_format,
        "smallest": curve.points[0],
        "largest": curve.points[-1],
        "knee": curve.knee,
    }


def _figure(drawn: Sequence[Curve], measured: Sequence[Mapping[str, Any]], whole: int, unit: str) -> Figure:
    """All curves in one chart, knees and measured outputs on it."""
    scale, name = (1e9, "GB") if whole >= 1e10 else (1e6, "MB")
    highest = max(loss for curve in drawn for _, loss in curve.points)
    lines, dots, shapes, legend = [], [], [], []
    for number, curve in enumerate(drawn):
        kind = number % KINDS
        shown = [(size / scale, 1000 * loss) for size, loss in curve.points if loss > highest * 10.0**-DECADES]
        lines.append(Series(curve.engine, shown, kind))
        legend.append((kind, dash(kind), f"{curve.engine} ({curve.output_format})"))
        if knee := curve.knee:
            dots.append(Series(f"knee, {curve.engine}", [(knee[0] / scale, 1000 * knee[1])], kind))
            shapes.append(KNEE)
    kinds = {curve.output_format: number % KINDS for number, curve in enumerate(drawn)}
    for one in measured:
        if one["kl"]:
            dots.append(Series(one["name"], [(one["size_bytes"] / scale, 1000 * one["kl"])], kinds.get(one["format"], KINDS - 1)))
            shapes.append(MEASURED)
    if any(shape == KNEE for shape in shapes):
        legend.append((0, mark(0, KNEE), "knee"))
    if any(shape == MEASURED for shape in shapes):
        legend.append((0, mark(0, MEASURED), "measured output"))
    svg = curves(Axis(f"size on disk, {name}", log=True), Axis(f"loss × 1000, {unit}", log=True), lines, dots, shapes)
    return Figure("Predicted loss against size", svg, legend, f"Both axes are logarithmic. The original has {words.size(whole)}.")


def dash(kind: int) -> str:
    """What a legend shows of a line of a kind."""
    return ("━━", "╍╍", "┅┅", "━╍", "┉┉", "━ ━")[kind % len(DASHES)]
