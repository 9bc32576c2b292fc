"""Train a model on for a while, so that its experts are used about evenly on the texts it knows, as those of large models are.

    python benchmarks/balanced.py MODEL OUT [--steps 200] [--coefficient 0.2]

The reference models were trained with next to no pressure towards an even use of experts: some are never chosen, whatever the text. Large
models are trained with such a pressure. Here a model is trained on, all of its parameters, on the calibration texts of the domains it knows
(reference/text/DOMAIN.calib.txt, which were part of its training), with next-token cross entropy and `coefficient` times the load balancing
loss of the Switch Transformer (Fedus et al., arXiv 2101.03961, Eq. 4) as examples/train_reference.py has it. Perplexity on held-out text
and the imbalance on text of the four domains are printed before and after.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moebit.calibration.sampling import describe_text

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))

from train_reference import batch_at, encode, loss_on, make_optimizer  # noqa: E402

KNOWN = ("wiki", "novels", "python", "speeches")
TRAINING: dict[str, Any] = {
    "weights": dict.fromkeys(KNOWN, 1.0), "batch": 16, "length": 256, "learning_rate": 5e-4, "weight_decay": 0.1, "seed": 0,
}  # fmt: skip
STEPS, COEFFICIENT = 200, 0.2


def train_on(source: Path, out: Path, *, steps: int = STEPS, coefficient: float = COEFFICIENT) -> None:
    """Write to `out` the model at `source`, trained on for `steps` steps; the learning rate falls linearly to zero."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = {
        name: encode(tokenizer.backend_tokenizer, name, (ROOT / "reference" / "text" / f"{name}.calib.txt").read_text(encoding="utf-8"))
        for name in KNOWN
    }
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    optimizer = make_optimizer(model, TRAINING)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = TRAINING["learning_rate"] * (1 - step / steps)
        loss, balance = loss_on(model, batch_at(step, tokens, TRAINING), amp=True, device="cpu")
        (loss + coefficient * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step + 1}/{steps}: loss {float(loss.detach()):.3f}, balance {float(balance.detach()):.3f}", flush=True)
    working = out.with_name(out.name + ".partial")
    shutil.rmtree(working, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(working)
    tokenizer.save_pretrained(working)
    working.rename(out)


def described(model: Path, split: str) -> dict[str, Any]:
    """Imbalance and perplexity of random windows of the known domains."""
    files = {name: ROOT / "reference" / "text" / f"{name}.{split}.txt" for name in KNOWN}
    found = describe_text(model, files, sequences=32, length=256, seed=0)
    return {key: found[key] for key in ("sigma", "unseen", "perplexity")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--coefficient", type=float, default=COEFFICIENT)
    args = parser.parse_args()
    train_on(args.model, args.out, steps=args.steps, coefficient=args.coefficient)
    for name, model in (("before", args.model), ("after", args.out)):
        print(f"{name}: " + json.dumps(described(model, "tune")))


if __name__ == "__main__":
    main()
