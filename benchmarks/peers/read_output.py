"""A peer's reader on an output of moebit: run with a peer's own interpreter (benchmarks/peers/setup.sh), not with moebit's.

    runs/peers/llmcompressor/bin/python benchmarks/peers/read_output.py PACKED DENSE

PACKED and DENSE are one checkpoint quantized by one recipe, to `--format compressed-tensors` and to `--format dense`. Prints how far the
logits of the first are from those of the second, relative to their norm; what dense weights lose in bfloat16 is in that.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def logits(path: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = torch.randint(0, model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    return model(input_ids=tokens).logits.double()


def main(packed: str, dense: str) -> None:
    found, wanted = logits(packed), logits(dense)
    assert "moebit" not in sys.modules
    print(f"relative difference {float((found - wanted).norm() / wanted.norm()):.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
