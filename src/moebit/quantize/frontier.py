"""`frontier`: what every size of a model would cost, for every engine, before anything is quantized."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebit.calibration.text import Texts, parse_texts
from moebit.errors import BadInputError
from moebit.formats.gguf.target import GgufTarget
from moebit.formats.opening import open_checkpoint, quantized_modules
from moebit.formats.profile import Profile
from moebit.memory import DEFAULT_MEMORY, Memory, memory_bytes
from moebit.model.structure import Structure, find_structure
from moebit.plan.bitplan import BitPlan
from moebit.plan.disk import DiskSize
from moebit.plan.plan import Plan, make_plan
from moebit.plan.transforms import transformed
from moebit.profiling.passes import Progress
from moebit.profiling.prepare import check_profile, priced, pricing_solver
from moebit.profiling.profile import LENGTH, SAMPLES, data_sets, run_profile
from moebit.profiling.spend import Spender, measured_widths
from moebit.quantize.budget import budget_changes, budget_recipe
from moebit.recipe import Recipe
from moebit.report.frontier import Curve, frontier_page, measure_outputs
from moebit.report.page import write_page
from moebit.storage.checkpoint import Checkpoint

ENGINES = ("transformers", "vllm", "llama.cpp")  # that are drawn where none is named
POINTS = 32  # of a curve


@dataclass(frozen=True)
class Frontier:
    """What was found.

    Attributes:
        page: the file that was written. curves: predicted, by engine. measured: outputs, as `report.frontier.measure_outputs` tells them.
    """

    page: Path
    curves: tuple[Curve, ...]
    measured: tuple[Mapping[str, Any], ...]


def frontier(
    model: str | Path,
    output: str | Path,
    *,
    text: Texts = (),
    engines: Sequence[str] = (),
    outputs: Sequence[str | Path] = (),
    profile: str | Path | None = None,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    overrides: Mapping[str, Any] | None = None,
    llama_cpp: str | Path | None = None,
    gguf_pre: str | None = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    window: int = 512,
    max_tokens: int | None = 8192,
    memory: Memory = DEFAULT_MEMORY,
    seed: int = 0,
    progress: Progress | None = None,
) -> Frontier:
    """Write a page with predicted loss against size, one curve an engine, knees and measured outputs marked.

    Args:
        text: what prices are measured on, and outputs are judged on; prices are not needed where a profile is given.
        engines: transformers, vllm, llama.cpp; all that can be, if none is named. An engine that cannot run the model is named on the page.
        outputs: finished outputs of this model, judged and drawn among the curves.
        profile: what `moebit profile` wrote. recipe, overrides: as for `quantize --size`.
        samples, length: windows of every text for prices. window, max_tokens: for judging.

    Raises:
        BadInputError: no text and no profile, outputs without a text, a page that cannot be written, no engine that could be drawn.
    """
    if not Path(output).absolute().parent.is_dir():
        raise BadInputError(f"-o {output}: no such directory")
    if profile is None and not parse_texts(text):
        raise BadInputError("give --text FILE to measure prices on, or --profile")
    if outputs and not parse_texts(text):
        raise BadInputError("--outputs: give --text FILE to judge them on")
    report = progress or (lambda what, done, total: None)
    checkpoint = open_checkpoint(model, compute=None)
    if quantized_modules(checkpoint) is not None:
        raise BadInputError(f"{model} is already quantized; give the full-precision checkpoint")
    asked = _Asked(checkpoint, find_structure(checkpoint.model), recipe, dict(overrides or {}), memory_bytes(memory), seed)
    gguf = (Path(llama_cpp) if llama_cpp else None, gguf_pre)
    with tempfile.TemporaryDirectory() as directory:
        given = Profile.read(profile) if profile is not None else None
        sets = data_sets(checkpoint, text, samples, length, seed) if given is None else {}
        curves, unit = [], ""
        for number, engine in enumerate(engines or ENGINES):
            report("engines", number, len(engines or ENGINES))
            try:
                ready = asked.ready(engine, gguf)
            except BadInputError as error:
                curves.append(Curve(engine, "", refused=str(error)))
                continue
            given = given or _profiled(asked, ready.plan, sets, Path(directory) / "profile", report)
            check_profile(given, checkpoint, ready.plan.recipe)
            found = priced(ready.plan, given, ready.disk)
            curves.append(Curve(engine, ready.plan.recipe.format, _points(found)))
            unit = found.unit
    if given is None:
        raise BadInputError(f"no engine can run this model: {'; '.join(f'{one.engine}: {one.refused}' for one in curves)}")
    measured = measure_outputs(outputs, model, text, window=window, max_tokens=max_tokens, memory=memory, progress=progress)
    page = frontier_page(str(model), checkpoint.size_bytes, unit, list(given.sets), curves, measured)
    return Frontier(write_page(Path(output), page), tuple(curves), tuple(measured))


@dataclass(frozen=True)
class _Ready:
    """One engine's plan before anything is chosen, and the sizes of its outputs."""

    plan: Plan
    disk: DiskSize


@dataclass(frozen=True)
class _Asked:
    """What all engines have in common."""

    checkpoint: Checkpoint
    structure: Structure
    recipe: str | Path | Mapping[str, Any] | Recipe | None
    overrides: Mapping[str, Any]
    memory: int
    seed: int

    def ready(self, engine: str, gguf: tuple[Path | None, str | None]) -> _Ready:
        """The plan for an engine.

        Raises:
            BadInputError: an engine that cannot run the model, or is not known; for llama.cpp, a converter that is not there.
        """
        original = self.checkpoint.size_bytes // 4
        recipe = budget_recipe(self.recipe, self.overrides, budget_changes(engine, max(original, 1), None), self.checkpoint)
        checkpoint, weights, transforms = transformed(self.checkpoint, self.structure, recipe, self.seed)
        target = GgufTarget.find(checkpoint.path, weights.stored_specs, *gguf) if recipe.format == "gguf" else None

        def planned(bits: BitPlan) -> Plan:
            return make_plan(checkpoint, self.structure, recipe, self.memory, bits, engine, transforms, target)

        return _Ready(planned(BitPlan()), DiskSize.find(checkpoint, weights, planned))


def _profiled(asked: _Asked, plan: Plan, sets: Mapping[str, Any], where: Path, progress: Progress) -> Profile:
    section = plan.recipe.allocation
    widths = measured_widths(section)
    return run_profile(
        asked.checkpoint, asked.structure, plan, sets, where, widths, pricing_solver(plan.recipe), True, asked.memory, progress
    )


def _points(found: Spender) -> tuple[tuple[int, float], ...]:
    """Sizes between the smallest and the largest, equally far apart on a logarithmic axis, each with its predicted loss."""
    ratio = found.largest / found.smallest
    sizes = [round(found.smallest * ratio ** (number / (POINTS - 1))) for number in range(POINTS)]
    points = [found.predicted(min(max(size, found.smallest), found.largest)) for size in sizes]
    return tuple(dict.fromkeys((point.size_bytes, point.loss) for point in points if point is not None))
