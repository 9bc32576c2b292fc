"""How large, how long and in which pieces: what is known of the work from shapes alone."""

from __future__ import annotations

from typing import Any

import torch

from moebit.calibration.statistics import LAYER_SAMPLE
from moebit.formats.sink import Modules, Sink
from moebit.methods.awq import SAMPLE
from moebit.methods.input_drift import MUS
from moebit.methods.learned_rounding import EVALUATIONS
from moebit.methods.online import search_flops
from moebit.model.inputs import Activations
from moebit.model.structure import LayerSites, MoESite, Structure
from moebit.recipe import Recipe
from moebit.storage.checkpoint import Checkpoint
from moebit.streaming.budget import Budget, make_budget

# Of a weight whose rounding is learned: latent, what the descent remembers, value, gradients, what comes in between; of three candidates.
LEARNING_BYTES = {"none": 0, "straight_through": 40, "sign": 40, "gumbel": 120}
STEP_FLOPS = 500  # of a weight in a step of learned rounding: a dozen passes over memory, as operations that take as long
FLOPS_PER_THREAD = 50e9  # float32 products on an AVX-512 core, cautiously; only for the time estimate


def streamed_tokens(recipe: Recipe) -> int:
    """Tokens that run through the quantized layers: those of the calibration set and of the pool."""
    calibration = recipe.calibration
    tokens = calibration.samples * calibration.seq_len if recipe.needs_calibration else 0
    return tokens * (1 + calibration.pool if calibration.balance != "none" else 1)


def budget(checkpoint: Checkpoint, structure: Structure, recipe: Recipe, memory: int) -> Budget:
    """The pieces in which the work is done within `memory` bytes."""
    return make_budget(
        checkpoint,
        structure,
        memory,
        streamed_tokens(recipe),
        length=recipe.calibration.seq_len,
        solve=True,
        hessians=recipe.needs_hessians,
        streams=1 + recipe.needs_reference,
        drift=recipe.solver.drift != "none",
        refine=LEARNING_BYTES[recipe.refine.kind],
    )


def output_size(checkpoint: Checkpoint, modules: Modules, sink: type[Sink], activations: Activations) -> int:
    """Bytes of the output's tensors."""
    total = checkpoint.weights.plain_bytes + sum(spec.nbytes for spec in activations.transforms.values())
    for name, parts in modules.items():
        dtype = stored_dtype(checkpoint, f"{name}.weight" if "" in parts else f"{name}.down_proj")
        total += sum(sink.nbytes(spec, dtype) - spec.weights * dtype.itemsize for spec in parts.values())
    return total


def stored_dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    """The type in which a parameter is stored."""
    return checkpoint.weights.spec(name).dtype


def seconds(checkpoint: Checkpoint, structure: Structure, recipe: Recipe, activations: Activations) -> float:
    """A rough estimate from the floating-point operations of forwards, Hessians, solves, and searches for online transforms."""
    tokens, speed = streamed_tokens(recipe), FLOPS_PER_THREAD * torch.get_num_threads()
    flops = 0.0
    for layer in structure.layers:
        flops = _add_linears(flops, checkpoint, layer, recipe, tokens)
        flops = _add_experts(flops, layer.moe, recipe, tokens) if layer.moe else flops
    found = [spec for spec in activations.transforms.values() if spec.kind == "duquant"]
    return 1 + flops / speed + sum(search_flops(spec.channels, LAYER_SAMPLE, spec.count) for spec in found) / speed


def _passes(recipe: Recipe) -> tuple[int, int]:
    """(forwards, products of inputs): drift correction runs full precision beside, and multiplies its difference with the inputs."""
    return (2, 3) if recipe.solver.drift != "none" else (1, 1)


def _add_linears(flops: float, checkpoint: Checkpoint, layer: LayerSites, recipe: Recipe, tokens: int) -> float:
    runs, moments = _passes(recipe)
    for group in layer.groups:
        for name in group.names:
            module: Any = checkpoint.model.get_submodule(f"{layer.name}.{name}")
            weights = module.in_features * module.out_features
            flops += (4 + 2 * runs) * tokens * weights + _solve_flops(recipe, 1, module.out_features, module.in_features)
            flops += _learning_flops(recipe, weights, weights, tokens)
        flops += moments * tokens * group.in_features**2 if recipe.needs_hessians else 0
    return flops


def _add_experts(flops: float, moe: MoESite, recipe: Recipe, tokens: int) -> float:
    (runs, moments), layout, slots = _passes(recipe), moe.layout, tokens * moe.top_k
    flops += 2 * runs * slots * layout.parameters_per_expert + moments * slots * (layout.hidden**2 + layout.intermediate**2)
    flops += _solve_flops(recipe, layout.experts, 2 * layout.intermediate, layout.hidden)
    flops += _learning_flops(recipe, layout.experts * layout.parameters_per_expert, moe.top_k * layout.parameters_per_expert, tokens)
    return flops + _solve_flops(recipe, layout.experts, layout.hidden, layout.intermediate)


def _learning_flops(recipe: Recipe, weights: int, used: int, tokens: int) -> float:
    """Learned rounding: a forward and a backward of every batch, a forward of the held-back tokens now and then, Adam on every weight.

    Args:
        used: weights that a token is multiplied by.
    """
    refine = recipe.refine
    if not refine.active:
        return 0.0
    held = (EVALUATIONS + 1) * tokens / refine.held_out_every
    products = 6 * refine.steps * min(refine.tokens, tokens) + 2 * held
    return float(len(refine.rates) * (used * products + weights * STEP_FLOPS * refine.steps))


def _solve_flops(recipe: Recipe, count: int, out: int, inputs: int) -> float:
    search = 100 * out * inputs if recipe.solver.clip_search else 0
    if recipe.solver.method == "rtn":
        return float(count * (search + 10 * out * inputs))
    if recipe.solver.method == "awq":
        return float(count * (search + 20 * out * inputs * (10 + 2 * SAMPLE)))
    fits = len(MUS) + 1 if recipe.solver.drift != "none" else 0
    return float(count * (out * inputs**2 + 2 * inputs**3 + search + fits * (4 * out * inputs**2 + inputs**3 / 3)))
