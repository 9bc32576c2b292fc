"""Which engines run what a recipe makes of a usual model: attention and gated experts whose sizes every kernel takes."""

from __future__ import annotations

from dataclasses import replace

import torch

from moebit.errors import BadInputError
from moebit.formats.engines import ENGINES, GPTQMODEL, LLAMA, MLX, Modules, verdicts
from moebit.formats.native import PackedSpec
from moebit.formats.sinks import SINKS
from moebit.model.experts import ExpertsLayout
from moebit.model.structure import LayerSites, LinearGroup, MoESite, Structure
from moebit.plan.grids import GridChooser
from moebit.recipe import Recipe, load_recipe, presets

EXPERTS, HIDDEN, INTERMEDIATE = 8, 4096, 1536
LAYER, ATTENTION, BLOCK = "model.layers.0", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "mlp.experts"
# The formats that an engine may read beside the recipe's own.
FORMATS = {**dict.fromkeys(ENGINES, ("compressed-tensors",)), MLX: ("mlx",), GPTQMODEL: ("gptq", "awq"), LLAMA: ()}


def recipes_for(engine: str) -> dict[str, str]:
    """Return the presets whose outputs an engine runs, with the format to write.

    The answer is for a usual model. `moebit inspect MODEL --recipe R --format F --engine E` says it of a model.

    Raises:
        BadInputError: an unknown engine.
    """
    if engine not in FORMATS:
        raise BadInputError(f"--engine {engine}: choose one of {', '.join(FORMATS)}")
    found = {}
    for name in presets():
        form = _form(name, engine)
        if form:
            found[name] = form
    return found


def _form(preset: str, engine: str) -> str | None:
    """The first format in which an engine runs what a preset makes: its own, or, of a native one, those that the engine reads."""
    own = load_recipe(preset).format
    for form in (own, *FORMATS[engine]) if own == "native" else (own,):
        try:
            recipe = load_recipe(preset, {"format": form})
        except BadInputError:
            continue  # the format does not hold it
        verdict = verdicts(form, _modules(recipe), _structure()).get(engine)
        if verdict is not None and verdict.runs and not _mixed(recipe, form):
            return form
    return None


def _mixed(recipe: Recipe, form: str) -> bool:
    """Whether widths are chosen expert by expert, which formats other than the native one have no place for."""
    return recipe.allocation.kind != "uniform" and recipe.allocation.engine == "any" and form not in ("native", "dense")


def _structure() -> Structure:
    layout = ExpertsLayout(EXPERTS, HIDDEN, INTERMEDIATE, gated=True, interleaved=False, transposed=False, bias=False)
    moe = MoESite(BLOCK, layout, "mlp.gate", "linear", 2, ())
    group = LinearGroup(ATTENTION, HIDDEN, moe_input=False)
    return Structure((LayerSites(0, LAYER, (group,), moe, {}),), "model.layers")


def _modules(recipe: Recipe) -> Modules:
    """What the recipe makes of these linears and experts."""
    sink, grids = SINKS[recipe.format], GridChooser(recipe)

    def spec(name: str, shape: tuple[int, int], count: int) -> PackedSpec:
        grid = grids.choose(name, [shape])
        assert not isinstance(grid, str)
        found = grids.spec(grid, shape, (grid.bits,) * count, sink.scale_dtype(torch.bfloat16), stacked=count > 1)
        input_bits = sink.input_bits(recipe.activations.bits)
        return replace(found, input_bits=input_bits, input_float8=input_bits == 8 and recipe.input_float8)

    first = dict.fromkeys(("gate_proj", "up_proj"), (INTERMEDIATE, HIDDEN))
    name = f"{LAYER}.{BLOCK}"
    experts = {p: spec(name, shape, EXPERTS) for p, shape in {**first, "down_proj": (HIDDEN, INTERMEDIATE)}.items()}
    names = () if recipe.weights.scope == "experts" else [f"{LAYER}.{one}" for one in ATTENTION]
    return {**{one: {"": spec(one, (HIDDEN, HIDDEN), 1)} for one in names}, name: experts}
