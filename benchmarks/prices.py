"""What widths are chosen by, against what happens: make bench-prices.

    python benchmarks/prices.py [--models olmoe qwen2_moe]

Two questions, on each shipped reference model. Does the price of a matrix predict the divergence of the whole model in which this matrix
alone is rounded? Every linear outside of the experts, and every projection of all experts of a layer, at 2, 3 and 4 bits: the profile's
prediction on calibration text against KL divergence measured with transformers on other text. And are widths that are chosen by these
prices better than one width for all, at the same bytes on disk, on texts of calibrated and of other kinds?

Results go to benchmarks/results/prices.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import moebit
from benchmarks.machine import facts
from moebit.formats.profile import Profile
from moebit.tensor import UniformGrid, solve_rtn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "prices.md"
TEXTS = ROOT / "reference" / "text"
KNOWN, NOVEL = ("wiki", "novels", "python", "speeches"), ("shakespeare", "c", "german", "french")
WIDTHS, WINDOW, TOKENS = (2, 3, 4), 256, 1024
SIZES = {"calibration.samples": 64, "calibration.seq_len": 256}


def windows(model: Path) -> Tensor:
    """[N, WINDOW] token ids, TOKENS of every known domain's tuning text."""
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    rows = [tokenizer((TEXTS / f"{name}.tune.txt").read_text()[: 8 * TOKENS])["input_ids"][:TOKENS] for name in KNOWN]
    return torch.tensor(rows).view(-1, WINDOW)


def matrices(model: Any, profile: Profile) -> Iterator[tuple[str, str, Tensor]]:
    """(name, projection or "", weight as a view [E, out, in]) of everything that has a price."""
    for name, module in profile.modules.items():
        owner = model.get_submodule(name)
        if not module.experts:
            yield name, "", owner.weight.data.unsqueeze(0)
            continue
        half = owner.down_proj.shape[2]
        yield name, "gate_proj", owner.gate_up_proj.data[:, :half]
        yield name, "up_proj", owner.gate_up_proj.data[:, half:]
        yield name, "down_proj", owner.down_proj.data


@torch.no_grad()
def measured(path: Path, profile: Profile) -> list[tuple[str, str, int, float, float]]:
    """(name, projection, bits, predicted, measured) divergence in nats per token, one rounded matrix (or projection) at a time."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False).eval()
    ids = windows(path)
    plain = [model(input_ids=rows).logits.log_softmax(-1) for rows in ids.split(4)]
    grid, found = UniformGrid(int(profile.facts["group_size"]), bool(profile.facts["symmetric"])), []
    for name, projection, weight in matrices(model, profile):
        full, kept = f"{name}.{projection}" if projection else name, weight.clone()
        error, sensitivity = profile.stacked(f"{full}.error").double(), profile.stacked(f"{full}.sensitivity").double()
        for bits in WIDTHS:
            weight.copy_(solve_rtn(kept, bits, grid).dequantize())
            logits = [model(input_ids=rows).logits.log_softmax(-1) for rows in ids.split(4)]
            kl = torch.cat([(p.exp() * (p - q)).sum(-1).flatten() for p, q in zip(plain, logits, strict=True)]).mean()
            price = error[:, profile.widths.index(bits)].reshape(len(error), -1).sum(1)
            found.append((name, projection, bits, float((price * sensitivity.flatten()).mean()), float(kl)))
        weight.copy_(kept)
    return found


def row(path: Path, out: Path, target: float | None, granularity: str) -> tuple[float, float, float]:
    """(bits on disk, KL x 1000 on known, on novel text) of GPTQ at one width, or at widths by prices."""
    allocation = {} if target is None else {
        "allocation.kind": "knapsack", "allocation.target_bits": target, "allocation.granularity": granularity,
        "allocation.ladder": [2, 3, 4, 6, 8],
    }  # fmt: skip
    recipe = granularity if target is None else "gptq-w3"
    calibration = {n: TEXTS / f"{n}.calib.txt" for n in KNOWN}
    moebit.quantize(path, out, recipe=recipe, text=calibration, overrides={**SIZES, **allocation}, overwrite=True)
    texts = {n: TEXTS / f"{n}.eval.txt" for n in (*KNOWN, *NOVEL)}
    judged = moebit.evaluate(out, against=path, text=texts, window=WINDOW, max_tokens=4096)
    known, novel = (1000 * sum(judged["texts"][n]["kl"] for n in names) / 4 for names in (KNOWN, NOVEL))
    return judged["average_bits"], known, novel


def section(name: str, work: Path) -> list[str]:
    path = ROOT / "reference" / name
    calibration = {n: TEXTS / f"{n}.calib.txt" for n in KNOWN}
    profile = moebit.profile(path, work / f"{name}-profile", text=calibration, recipe="gptq-w3", samples=16, length=256)
    points = measured(path, profile)
    predicted, kls = [p[3] for p in points], [p[4] for p in points]
    ratios = torch.tensor([a / b for a, b in zip(predicted, kls, strict=True)])
    lines = [
        f"## {name}", "",
        f"Predicted against measured divergence of {len(points)} roundings: rank correlation {spearmanr(predicted, kls)[0]:.3f};",
        f"the prediction is {float(ratios.median()):.2f} of the measurement in the median.", "",
    ]  # fmt: skip
    lines += ["| class | roundings | predicted / measured, median |", "|---|---:|---:|"]
    classes: dict[str, list[float]] = {}
    for (full, projection, _, _, _), ratio in zip(points, ratios.tolist(), strict=True):
        classes.setdefault(f"experts' {projection}" if projection else full.rpartition(".")[2], []).append(ratio)
    lines += [f"| {kind} | {len(values)} | {float(torch.tensor(values).median()):.2f} |" for kind, values in sorted(classes.items())]
    lines += ["", "| widths | bits on disk | KL × 1000, known | KL × 1000, novel |", "|---|---:|---:|---:|"]
    for recipe, target in (("gptq-w3", 3.125), ("gptq-w4", 4.125)):
        rows = [("uniform", None, recipe), ("knapsack, by projection", target, "projection"), ("knapsack, by layer", target, "layer")]
        for label, wanted, how in rows:
            bits, known, novel = row(path, work / f"{name}-out", wanted, how)
            lines.append(f"| {label} | {bits:.3f} | {known:.2f} | {novel:.2f} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["olmoe", "qwen2_moe"])
    names = parser.parse_args().models
    began, lines = time.time(), ["# Prices of widths", ""]
    lines += [
        "GPTQ, symmetric, groups of 128, all linears; calibrated on 64 windows of 256 tokens of four domains; one seed. Novel domains",
        "were in neither the training text nor the calibration. KL divergence to full precision, 4,096 tokens a domain.", "",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        for name in names:
            lines += section(name, Path(work))
            print("\n".join(lines), flush=True)
            took = f"Took {(time.time() - began) / 60:.0f} minutes."
        RESULTS.write_text("\n".join([*lines, took, "", facts(torch.get_num_threads())]) + "\n")


if __name__ == "__main__":
    main()
