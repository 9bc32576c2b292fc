"""Give a small model the outliers of a large one, without changing what it computes.

    python benchmarks/outliers.py MODEL OUT [--seed 0]

Large models have few channels whose activations are many times the others', and few neurons in each expert; small ones have none, so that
rounding their activations is too easy a test. Here a few channels of every norm of the hidden states (in front of attention and of the
experts) get a larger gain, what reads them is divided by as much, and a few neurons of every expert are moved from down to up:

  4 channels of each norm       gain times f, columns of all readers (q, k, v; router, gates, experts, shared experts) divided by f
  2 neurons of each expert      row of up times f, column of down divided by f
  f                             log-uniform in 8 to 64, drawn for each channel by itself

Where that is possible is found and proved as for moebit's own transforms (`model/sites.py`). OUT is written in float32, in which the logits
stay the same to its precision; the largest difference is printed.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moebit.formats.opening import open_checkpoint
from moebit.model.proof.sites import find_scales, scale_behind_norm, scale_down
from moebit.model.structure import find_structure
from moebit.storage.edits import Edits, apply_edits

CHANNELS, NEURONS, LEAST, MOST = 4, 2, 8.0, 64.0
ALLOWED = 1e-4  # of the logits' norm


def factors(shape: tuple[int, ...], count: int, generator: torch.Generator) -> Tensor:
    """1 / f in `count` places of every row, 1 elsewhere: what divides multiplies its counterpart."""
    s = torch.ones(shape)
    for row in s.view(-1, shape[-1]):
        places = torch.randperm(shape[-1], generator=generator)[:count]
        span = math.log(MOST / LEAST)
        row[places] = 1 / (LEAST * torch.exp(span * torch.rand(count, generator=generator)))
    return s


def outliers(model: Path, seed: int) -> Iterator[Edits]:
    """The edits of every layer."""
    checkpoint = open_checkpoint(model)
    structure = find_structure(checkpoint.model)
    generator = torch.Generator().manual_seed(seed)
    layouts = {f"{sites.name}.{sites.moe.experts}": sites.moe.layout for sites in structure.layers if sites.moe}
    for sites, scales in zip(structure.layers, find_scales(checkpoint, structure), strict=True):
        for site in scales.norms:
            if site.of_hidden:
                yield scale_behind_norm(site, factors((site.size,), CHANNELS, generator), layouts)
        if scales.experts and sites.moe:
            layout = sites.moe.layout
            yield scale_down(
                f"{sites.name}.{sites.moe.experts}", layout, factors((layout.experts, layout.intermediate), NEURONS, generator)
            )


@torch.no_grad()
def inject(model: Path, out: Path, seed: int) -> float:
    """Write the model with outliers; returns how far its logits are from the original's, relative to their norm."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens = torch.randint(0, network.config.get_text_config().vocab_size, (4, 64), generator=torch.Generator().manual_seed(seed))
    before = network(input_ids=tokens).logits
    for edits in outliers(model, seed):
        for name, steps in edits.items():
            parameter = network.get_parameter(name)
            parameter.copy_(apply_edits(steps, parameter))
    away = float((network(input_ids=tokens).logits - before).norm() / before.norm())
    if away > ALLOWED:
        raise SystemExit(f"the logits moved by {away:.1e} of their norm: something that was scaled is read elsewhere too")
    network.save_pretrained(out)
    for file in model.iterdir():
        if file.name.startswith("tokenizer"):
            shutil.copy(file, out / file.name)
    return away


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{args.out}: logits moved by {inject(args.model, args.out, args.seed):.1e} of their norm")


if __name__ == "__main__":
    main()
