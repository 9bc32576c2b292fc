"""Rotations that cost nothing at run time: QuaRot's R1 and R2 (2404.00456), absorbed in the weights.

R1: hidden states live in another basis, `x R` in place of `x`. Gains of norms go into what reads them (a norm without a gain commutes with
R), readers become `W R`, writers `R^T W`, embeddings `E R`; the final norm's gain goes into the head, which is untied for that. R2: the
values of every attention head are rotated where they are made, and back where the output linear takes them.
R is a randomised Hadamard matrix of any size (`tensor/rotation.py`).

Departures: gains of further norms with linear readers (the latents of MLA) are folded too; R2 has random signs per kv head; nothing is
rotated online. Every model has to show that it allows all this, with random values in float64 (`model/proof/rehearsal.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moebit.errors import BadInputError
from moebit.model.experts import ExpertsLayout
from moebit.model.proof.flow import LayerFlow, NormSite, find_flow, gain_offset
from moebit.model.proof.rehearsal import InDouble, Rehearsal, difference
from moebit.model.proof.sites import TOLERANCE, HeadSite, find_heads, head_rotation
from moebit.model.replay import outside
from moebit.model.skeleton import dematerialize, materialize
from moebit.model.structure import Structure
from moebit.storage.checkpoint import Checkpoint
from moebit.storage.conversion import tied_names
from moebit.storage.edits import Constant, Edit, EditedWeights, Rotate, Scale, joined
from moebit.storage.weights import Weights
from moebit.tensor.rotation import randomised_hadamard

# Operations on the way of attention's values that are no rearrangement: what they are called in messages.
GATES = {"Sigmoid": "an elementwise gate", "Silu": "an elementwise gate", "Clamp": "a clip", "Tanh": "an elementwise function"}


@dataclass(frozen=True)
class RotationPlan:
    """What is rotated, and found to be allowed.

    Attributes:
        size: of the hidden states.
        flows: how hidden states go through every layer. heads: R2's places; none for R1 alone.
        embeddings, head: full names. final: the norm in front of the head.
        untie: the head's weight, where it was tied to the embeddings.
        notes: what was left as it is, and why.
    """

    size: int
    flows: tuple[LayerFlow, ...]
    heads: tuple[HeadSite, ...]
    embeddings: str
    head: str
    final: NormSite
    untie: tuple[str, ...]
    layouts: Mapping[str, ExpertsLayout]
    biased: frozenset[str]
    notes: Mapping[str, str]

    def edits(self, weights: Weights, seed: int) -> dict[str, tuple[Edit, ...]]:
        """Every parameter's edits; the gains that are folded are read from `weights`."""
        generator = torch.Generator().manual_seed(seed)
        turn = Rotate(randomised_hadamard(self.size, generator))
        parts: list[dict[str, tuple[Edit, ...]]] = [{f"{self.embeddings}.weight": (turn,)}]
        parts += [self._layer(flow, turn, weights) for flow in self.flows]
        parts += [head_rotation(site, generator) for site in self.heads]
        return joined(*parts, self._folded(self.final, weights, turn))

    def _folded(self, site: NormSite, weights: Weights, turn: Rotate) -> dict[str, tuple[Edit, ...]]:
        """A norm's gain in its readers, which are rotated where the norm reads hidden states."""
        gain = weights.parameter(f"{site.norm}.weight").double() + site.offset
        edits: dict[str, tuple[Edit, ...]] = {f"{site.norm}.weight": (Constant(1 - site.offset),)}
        for reader in site.readers:
            edits[f"{reader}.weight"] = (Scale(gain), turn) if site.of_hidden else (Scale(gain),)
        if site.experts is not None:
            layout = self.layouts[site.experts]
            axis = layout.input_axis
            edits[f"{site.experts}.{layout.first}"] = (Scale(gain, axis), *((replace(turn, axis=axis),) if site.of_hidden else ()))
        return edits

    def _layer(self, flow: LayerFlow, turn: Rotate, weights: Weights) -> dict[str, tuple[Edit, ...]]:
        edits = [self._folded(site, weights, turn) for site in flow.norms]
        for name in flow.raw:
            layout = self.layouts.get(name)
            edits.append({f"{name}.{layout.first}": (replace(turn, axis=layout.input_axis),)} if layout else {f"{name}.weight": (turn,)})
        for name in flow.writers:
            edits.append({f"{name}.weight": (replace(turn, axis=0),)})
            edits.append({f"{name}.bias": (turn,)} if name in self.biased else {})
        if flow.experts_write:
            name, layout = next((name, layout) for name, layout in self.layouts.items() if name.startswith(f"{flow.name}."))
            edits.append({f"{name}.down_proj": (replace(turn, axis=layout.output_axis),)})
            edits.append({f"{name}.down_proj_bias": (turn,)} if layout.bias else {})
        return joined(*edits)

    def applied(self, weights: Weights, seed: int) -> EditedWeights:
        """A checkpoint's weights as they are after the rotation."""
        tied = (*self.untie, f"{self.embeddings}.weight") if self.untie else ()  # one of the two is stored
        own = [name for name in tied if name not in weights.available()]
        return EditedWeights(weights, self.edits(weights, seed), own, self.untie)

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        norms = sum(len(flow.norms) for flow in self.flows) + 1
        return {
            "size": self.size,
            "folded_norms": norms,
            "rotated_heads": len(self.heads),
            "untied": list(self.untie),
            "notes": dict(self.notes),
        }


def plan_rotation(checkpoint: Checkpoint, structure: Structure, kind: str) -> RotationPlan:
    """Find what an absorbed rotation has to touch, and prove on random values that nothing else is needed.

    Args:
        kind: r1, or r1r2.

    Raises:
        BadInputError: the model does not allow it, with the module and the reason.
    """
    _check_towers(checkpoint, structure)
    rehearsal = Rehearsal(checkpoint, structure)
    plan = _find(checkpoint, structure, rehearsal, kind)
    _prove(rehearsal, plan)
    return plan


def _refuse(what: str, why: str) -> BadInputError:
    return BadInputError(f"rotation.absorbed: {what}: {why}; set rotation.absorbed: none")


def _check_towers(checkpoint: Checkpoint, structure: Structure) -> None:
    """What does not run for text (towers for pictures or sound) may write to the hidden states unseen."""
    known = {*structure.front, *structure.back}
    layers = structure.list_name
    unseen = [n for n, m in outside(checkpoint.model, layers) if n not in known and any(p is not None for p in m._parameters.values())]
    if unseen:
        raise _refuse("r1", f"{unseen[0]} does not run for text, so that it cannot be shown what it does with hidden states")


def _find(checkpoint: Checkpoint, structure: Structure, rehearsal: Rehearsal, kind: str) -> RotationPlan:
    model, passage = rehearsal.model, rehearsal.passage()
    names = {id(module): name for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embeddings, nn.Embedding) or not isinstance(head, nn.Linear):
        raise _refuse("r1", f"{type(model).__name__} has no plain table of embeddings or no linear head")
    flows: dict[int, LayerFlow] = {}
    heads: dict[int, list[HeadSite]] = {}
    notes: dict[str, str] = {}
    for index in rehearsal.representatives:
        flow = flows[index] = find_flow(rehearsal, passage, index)
        _check_flow(flow)
        if kind == "r1r2":
            heads[index] = find_heads(rehearsal, passage, index, flow)
            _check_heads(flow, heads[index])
        rehearsal.step(passage, index)
    unused = checkpoint.weights.unused
    if unused:
        notes["as_stored"] = f"{len(unused)} stored tensors that the model class does not use are not rotated, first {unused[0]}"
    layer_names = [sites.name for sites in structure.layers]
    weight = f"{names[id(head)]}.weight"
    return RotationPlan(
        int(passage.hidden.shape[-1]),
        tuple(flows[kind].renamed(layer_names[i]) for i, kind in enumerate(rehearsal.kinds)),
        tuple(s.renamed(layer_names[kind], layer_names[i]) for i, kind in enumerate(rehearsal.kinds) for s in heads.get(kind, ())),
        names[id(embeddings)],
        names[id(head)],
        _final_norm(rehearsal, names[id(head)], int(passage.hidden.shape[-1])),
        (weight,) if weight in tied_names(checkpoint.model) else (),
        rehearsal.layouts,
        frozenset(name for name, module in model.named_modules() if isinstance(module._parameters.get("bias"), Tensor)),
        notes,
    )


def _check_flow(flow: LayerFlow) -> None:
    if flow.behind:
        raise _refuse("r1", f"{flow.behind[0]} stands behind its block: its gain acts on what is added to the hidden states")
    for site in flow.norms:
        if site.of_hidden and site.bias:
            raise _refuse("r1", f"{site.norm} subtracts the mean or adds a bias (a LayerNorm), which no rotation leaves alone")


def _check_heads(flow: LayerFlow, heads: list[HeadSite]) -> None:
    """Attention whose values cannot be rotated is refused; layers without attention have no R2."""
    for output, between in flow.attention:
        if all(site.output != output for site in heads):
            why = next((f"{text} is on the way of attention's values to {output}" for kind, text in GATES.items() if kind in between), None)
            raise _refuse("r1r2", why or f"values do not reach {output} from one linear, head by head and unchanged")


def _final_norm(rehearsal: Rehearsal, head: str, size: int) -> NormSite:
    """The norm behind the layers, with its offset."""
    model = rehearsal.model
    found = []
    for name in rehearsal.structure.back:
        weight = model.get_submodule(name)._parameters.get("weight")
        if isinstance(weight, Tensor) and tuple(weight.shape) == (size,):
            found.append(name)
    if len(found) != 1:
        raise _refuse("r1", f"{len(found)} norms stand between the layers and the head, expected one")
    module = model.get_submodule(found[0])
    if isinstance(module._parameters.get("bias"), Tensor):
        raise _refuse("r1", f"{found[0]} subtracts the mean or adds a bias (a LayerNorm), which no rotation leaves alone")
    offset = _offset(rehearsal, found[0], size)
    if offset is None:
        raise _refuse("r1", f"{found[0]} does something else with its gain than multiply")
    return NormSite(found[0], size, offset, False, (head,), None, True)


def _offset(rehearsal: Rehearsal, name: str, size: int) -> float | None:
    module = rehearsal.model.get_submodule(name)
    try:
        materialize(module, name, rehearsal.weights, recurse=False)
        with InDouble():
            return gain_offset(module, torch.randn(2, 3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    finally:
        dematerialize(module, recurse=False)


def _prove(rehearsal: Rehearsal, plan: RotationPlan) -> None:
    """Run the model as it is and rotated, on random values: hidden states must be rotated and logits the same."""
    edits = plan.edits(rehearsal.weights, 0)
    rotation = randomised_hadamard(plan.size, torch.Generator().manual_seed(0))
    plain, turned = rehearsal.passage(), rehearsal.passage(edits)
    if (far := difference(rotation.apply(plain.hidden), turned.hidden)) > TOLERANCE:
        raise _refuse("r1", f"what enters the first layer is not the rotated embeddings alone (difference {far:.1e})")
    for index in rehearsal.representatives:
        rehearsal.step(plain, index)
        rehearsal.step(turned, index)
        if (far := difference(rotation.apply(plain.hidden), turned.hidden)) > TOLERANCE:
            name = rehearsal.structure.layers[index].name
            raise _refuse("r1", f"{name} does more with hidden states than norms, linears and sums (difference {far:.1e} on random values)")
    if (far := difference(rehearsal.logits(plain), rehearsal.logits(turned))) > TOLERANCE:
        raise _refuse("r1", f"the head does more with hidden states than a norm and a linear (difference {far:.1e} on random values)")
