"""`profile`: what data sets say about a model, one pass each, kept so that a further set costs one pass more and nothing again."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moebit.calibration.text import Texts, calibration_windows, digest, load_tokenizer, parse_texts, tokenize
from moebit.errors import BadInputError
from moebit.formats.opening import open_checkpoint, quantized_modules
from moebit.formats.profile import Profile, ProfiledModule, set_file
from moebit.memory import DEFAULT_MEMORY, Memory, memory_bytes
from moebit.model.structure import Structure, find_structure
from moebit.plan.plan import Plan, make_plan
from moebit.profiling.passes import Progress, run_pass
from moebit.profiling.prices import Measure
from moebit.recipe import BIT_WIDTHS, Recipe, load_recipe
from moebit.recipe.reading import is_there
from moebit.storage.checkpoint import Checkpoint, checkpoint_fingerprint
from moebit.streaming.budget import Budget, make_budget
from moebit.tensor import UniformGrid

LADDER = (2, 3, 4, 6, 8)
SAMPLES, LENGTH = 32, 512


def profile(
    model: str | Path,
    out: str | Path,
    *,
    text: Texts = (),
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    overrides: Mapping[str, Any] | None = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    widths: Sequence[int] = LADDER,
    solver: str = "rtn",
    errors: bool = True,
    memory: Memory = DEFAULT_MEMORY,
    seed: int = 0,
    progress: Progress | None = None,
) -> Profile:
    """Look at a full-precision model on data sets: how its experts are used, what they bring, what rounding them would cost.

    Sets that the profile in `out` has already are left as they are, so that an interrupted run is gone on with by the same call and a
    further set is added by naming it.

    Args:
        text: one data set each, `[NAME=]FILE` items or a mapping.
        recipe, overrides: whose grid (group size, symmetric), scope and ignored modules the errors are measured with; default `gptq-w4`.
        samples, length: windows of every text, and tokens of a window.
        widths: candidates. solver: `rtn` or `gptq`, what rounds for the errors. errors: False leaves them out (knapsack needs them).
        memory: bytes, or a size such as `4GiB`, that the work may take. seed: chooses the windows.

    Raises:
        BadInputError: no text, a model or recipe that does not fit, a profile in `out` that was measured otherwise.
    """
    report = progress or (lambda what, done, total: None)
    allowed = memory_bytes(memory)
    chosen = load_recipe(recipe, overrides)
    checkpoint = open_checkpoint(model, compute=None)
    if quantized_modules(checkpoint) is not None:
        raise BadInputError(f"{model} is already quantized; profile the full-precision checkpoint (`moebit drift` looks at outputs)")
    if Path(out).is_dir() and (Path(out) / "config.json").exists():
        raise BadInputError(f"-o {out}: this is a checkpoint; choose another directory for the profile")
    structure = find_structure(checkpoint.model)
    plan = make_plan(checkpoint, structure, chosen, allowed)
    sets = data_sets(checkpoint, text, samples, length, seed)
    return run_profile(checkpoint, structure, plan, sets, Path(out), _widths(widths), solver, errors, allowed, report)


def data_sets(checkpoint: Checkpoint, text: Texts, samples: int, length: int, seed: int) -> dict[str, Tensor]:
    """int64 [samples, length] windows of every text.

    Raises:
        BadInputError: no text, one that is too short, a window longer than the model's context.
    """
    files = parse_texts(text)
    if not files:
        raise BadInputError("give at least one --text [NAME=]FILE: a data set each")
    if samples < 1 or length < 1:
        raise BadInputError(f"{samples} windows of {length} tokens: at least one window of one token is needed")
    limit = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    if limit and length > limit:
        raise BadInputError(f"windows of {length} tokens are longer than the model's context of {limit}; take shorter ones")
    tokenizer, vocabulary = load_tokenizer(checkpoint.path), int(checkpoint.config.get_text_config().vocab_size)
    texts = {name: tokenize(name, file, tokenizer, vocabulary) for name, file in files.items()}
    for name in texts:
        set_file(name)
    return {name: calibration_windows([item], samples, length, seed) for name, item in texts.items()}


def run_profile(
    checkpoint: Checkpoint,
    structure: Structure,
    plan: Plan,
    sets: Mapping[str, Tensor],
    out: Path,
    widths: tuple[int, ...],
    solver: str,
    errors: bool,
    memory: int,
    progress: Progress,
) -> Profile:
    """Add the sets that the profile in `out` lacks; it is whole after every one of them.

    Raises:
        BadInputError: a profile that was measured otherwise, a set whose name another text has there.
    """
    found = _opened(checkpoint, structure, plan, out, widths, solver)
    measure = _measure(plan, found, widths, solver) if errors else None
    for number, (name, windows) in enumerate(sets.items()):
        progress("sets", number, len(sets))
        known, mark = found.sets.get(name), digest(windows)
        if known and known["sha256"] != mark:
            raise BadInputError(f"{out}: a data set {name!r} is there already, of another text or other windows; choose another NAME")
        if known and (known["errors"] or not errors):
            continue
        budget = _budget(checkpoint, structure, windows, memory, errors)
        store = budget.store(Path(tempfile.gettempdir()), checkpoint.weights.device)
        tensors = run_pass(checkpoint, structure, windows, budget, store, measure, progress)
        found.add(name, {"tokens": windows.numel(), "sha256": mark, "errors": errors}, tensors)
    progress("sets", len(sets), len(sets))
    return found


def _opened(checkpoint: Checkpoint, structure: Structure, plan: Plan, out: Path, widths: tuple[int, ...], solver: str) -> Profile:
    """The profile in `out`, or an empty one."""
    grid = plan.recipe.weights
    facts: dict[str, Any] = {
        "model": checkpoint.path.resolve().name,
        "input": checkpoint_fingerprint(checkpoint),
        "group_size": grid.group_size,
        "symmetric": grid.symmetric,
        "signed": grid.signed,
        "clip_search": plan.recipe.solver.clip_search,
        "widths": list(widths),
        "solver": solver,
    }
    found = Profile(out, facts, profiled_modules(structure, plan))
    if not (out / "profile.json").exists():
        if is_there(out) and (not out.is_dir() or {file.name for file in out.iterdir()} - {"profile.json.writing"}):
            raise BadInputError(f"{out}: holds files, and no profile; choose another -o, so that none of them is overwritten")
        return found
    known = Profile.read(out)
    other = sorted(key for key in facts if known.facts.get(key) != facts[key])
    if other:
        shown = ", ".join(f"{key} {known.facts.get(key)}, now {facts[key]}" for key in other)
        raise BadInputError(f"{out}: was measured otherwise ({shown}); choose another -o, or give the same again")
    if known.modules != found.modules:
        raise BadInputError(f"{out}: was measured with another scope or other ignored modules; choose another -o, or give the same again")
    return known


def profiled_modules(structure: Structure, plan: Plan) -> dict[str, ProfiledModule]:
    """What the recipe quantizes, with sizes."""
    modules = {}
    for layer in structure.layers:
        for number, group in enumerate(layer.groups):
            for name in (f"{layer.name}.{name}" for name in group.names):
                if name in plan.linears:
                    spec = plan.linears[name]
                    modules[name] = ProfiledModule(layer.index, 0, number, {"": spec.shape}, spec.scale_dtype)
        name = layer.experts if layer.moe else ""
        if name in plan.experts:
            specs = plan.experts[name]
            parts = {projection: spec.shape for projection, spec in specs.items()}
            modules[name] = ProfiledModule(layer.index, len(specs["down_proj"].bits), 0, parts, specs["down_proj"].scale_dtype)
    return modules


def _measure(plan: Plan, found: Profile, widths: tuple[int, ...], solver: str) -> Measure:
    grid = plan.recipe.weights
    scheme = UniformGrid(grid.group_size, grid.symmetric, grid.signed)
    dtypes = {name: module.scale_dtype for name, module in found.modules.items()}
    return Measure(widths, scheme, solver, plan.recipe.solver.clip_search, frozenset(found.linears), dtypes)


def _budget(checkpoint: Checkpoint, structure: Structure, windows: Tensor, memory: int, errors: bool) -> Budget:
    return make_budget(checkpoint, structure, memory, windows.numel(), length=windows.shape[1], solve=errors, hessians=errors)


def _widths(widths: Sequence[int]) -> tuple[int, ...]:
    """Rising candidates.

    Raises:
        BadInputError: none, twice the same, one that does not exist.
    """
    wrong = [width for width in widths if width not in BIT_WIDTHS]
    if wrong or not widths or len(set(widths)) < len(widths):
        raise BadInputError(f"widths {', '.join(map(str, widths))}: choose some of {', '.join(map(str, BIT_WIDTHS))}, each once")
    return tuple(sorted(widths))
