"""What widths are chosen by, against what happens: make bench-prices.

    python benchmarks/prices.py [--models olmoe qwen2_moe] [--jobs 1]

Two questions, on each shipped reference model. Does the price of a matrix predict the divergence of the whole model in which this matrix
alone is rounded? Every linear outside of the experts, every projection of all experts of a layer, and a layer's experts whole, at 2, 3
and 4 bits, to nearest: the profile's prediction on calibration text against KL divergence measured with transformers on other text. And
are widths that are chosen by solved prices better than one width for all, at the same bytes on disk, on texts of calibrated and of other
kinds?

Results go to benchmarks/results/prices.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
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
WIDTHS, WINDOW, TOKENS = (2, 3, 4), 256, 512
PRICED, SOLVED = 4, 16  # windows of every domain that prices are measured on: to nearest, and with GPTQ
EVALUATED = 2048  # tokens of every domain that widths are compared on
SIZES = {"calibration.samples": 64, "calibration.seq_len": 256}


def windows(model: Path) -> Tensor:
    """[N, WINDOW] token ids, TOKENS of every known domain's tuning text."""
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    rows = [tokenizer((TEXTS / f"{name}.tune.txt").read_text()[: 8 * TOKENS])["input_ids"][:TOKENS] for name in KNOWN]
    return torch.tensor(rows).view(-1, WINDOW)


def matrices(model: Any, profile: Profile) -> Iterator[tuple[str, str, list[Tensor]]]:
    """(name, kind, weights as views [E, out, in]) of everything that has a price."""
    for name, module in profile.modules.items():
        owner = model.get_submodule(name)
        if not module.experts:
            yield name, name.rpartition(".")[2], [owner.weight.data.unsqueeze(0)]
            continue
        half = owner.down_proj.shape[2]
        gate, up, down = owner.gate_up_proj.data[:, :half], owner.gate_up_proj.data[:, half:], owner.down_proj.data
        yield f"{name}.gate_proj", "experts' gate_proj", [gate]
        yield f"{name}.up_proj", "experts' up_proj", [up]
        yield f"{name}.down_proj", "experts' down_proj", [down]
        yield name, "experts, whole", [gate, up, down]


@torch.no_grad()
def measured(path: Path, profile: Profile) -> list[tuple[str, float, float]]:
    """(kind, predicted, measured) divergence in nats per token, one rounded matrix (or all experts' of a layer) at a time."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False).eval()
    ids = windows(path)
    plain = [model(input_ids=rows).logits.log_softmax(-1) for rows in ids.split(4)]
    grid, found = UniformGrid(int(profile.facts["group_size"]), bool(profile.facts["symmetric"])), []
    for full, kind, weights in matrices(model, profile):
        kept = [weight.clone() for weight in weights]
        error, sensitivity = profile.stacked(f"{full}.error").double(), profile.stacked(f"{full}.sensitivity").double()
        for bits in WIDTHS:
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(solve_rtn(value, bits, grid).dequantize())
            logits = [model(input_ids=rows).logits.log_softmax(-1) for rows in ids.split(4)]
            kl = torch.cat([(p.exp() * (p - q)).sum(-1).flatten() for p, q in zip(plain, logits, strict=True)]).mean()
            number = profile.widths.index(bits)
            price = error[:, number].reshape(len(error), -1).sum(1)
            found.append((kind, float((price * sensitivity[:, number]).mean()), float(kl)))
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)
    return found


def row(path: Path, out: Path, target: float | None, granularity: str, profile: Path | None) -> tuple[float, float, float]:
    """(bits on disk, KL x 1000 on known, on novel text) of GPTQ at one width, or at widths by the prices of a profile."""
    allocation = {} if target is None else {
        "allocation.kind": "knapsack", "allocation.target_bits": target, "allocation.granularity": granularity,
        "allocation.ladder": [2, 3, 4, 6, 8],
    }  # fmt: skip
    recipe = granularity if target is None else "gptq-w3"
    calibration = {n: TEXTS / f"{n}.calib.txt" for n in KNOWN}
    moebit.quantize(path, out, recipe=recipe, text=calibration, overrides={**SIZES, **allocation}, profile=profile)
    texts = {n: TEXTS / f"{n}.eval.txt" for n in (*KNOWN, *NOVEL)}
    judged = moebit.evaluate(out, against=path, text=texts, window=WINDOW, max_tokens=EVALUATED)
    known, novel = (1000 * sum(judged["texts"][n]["kl"] for n in names) / 4 for names in (KNOWN, NOVEL))
    return judged["average_bits"], known, novel


def predictions(name: str) -> list[str]:
    """What prices of rounding to nearest predict, against what it costs."""
    calibration, path = {n: TEXTS / f"{n}.calib.txt" for n in KNOWN}, ROOT / "reference" / name
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "profile"
        points = measured(path, moebit.profile(path, out, text=calibration, recipe="gptq-w3", samples=PRICED, length=WINDOW, widths=WIDTHS))
    _, predicted, kls = zip(*points, strict=True)
    ratios = torch.tensor([a / b for a, b in zip(predicted, kls, strict=True)])
    lines = [
        f"Predicted against measured divergence of {len(points)} roundings: rank correlation {spearmanr(predicted, kls)[0]:.3f};",
        f"the prediction is {float(ratios.median()):.2f} of the measurement in the median.", "",
    ]  # fmt: skip
    lines += ["| class | roundings | predicted / measured, median |", "|---|---:|---:|"]
    classes: dict[str, list[float]] = {}
    for (kind, _, _), ratio in zip(points, ratios.tolist(), strict=True):
        classes.setdefault(kind, []).append(ratio)
    return lines + [f"| {kind} | {len(values)} | {float(torch.tensor(values).median()):.2f} |" for kind, values in sorted(classes.items())]


def comparison(name: str) -> list[str]:
    """Widths by solved prices against one width for all."""
    path, lines = ROOT / "reference" / name, ["| widths | bits on disk | KL × 1000, known | KL × 1000, novel |", "|---|---:|---:|---:|"]
    calibration = {n: TEXTS / f"{n}.calib.txt" for n in KNOWN}
    with tempfile.TemporaryDirectory() as work:
        profile = Path(work) / "profile"
        moebit.profile(path, profile, text=calibration, recipe="gptq-w3", samples=SOLVED, length=WINDOW, solver="gptq")
        for recipe, target in (("gptq-w3", 3.125), ("gptq-w4", 4.125)):
            rows = [("knapsack, by layer", target, "layer"), ("uniform", None, recipe), ("knapsack, by projection", target, "projection")]
            for label, wanted, how in rows:
                made = Path(work) / f"{target}-{how}"
                bits, known, novel = row(path, made, wanted, how, profile if wanted else None)
                lines.append(f"| {label} | {bits:.3f} | {known:.2f} | {novel:.2f} |")
                print(name, lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["olmoe", "qwen2_moe"])
    parser.add_argument("--jobs", type=int, default=1, help="parts of the table that are made at the same time")
    options = parser.parse_args()
    began, lines = time.time(), ["# Prices of widths", ""]
    lines += [
        "Groups of 128, symmetric, all linears; one seed. Predictions: rounded to nearest. Widths: GPTQ, calibrated on 64 windows of 256",
        "tokens of four domains, prices measured with GPTQ. Novel domains were in neither the training text nor the calibration. KL",
        f"divergence to full precision, {EVALUATED:,} tokens a domain.", "",
    ]  # fmt: skip
    with ProcessPoolExecutor(options.jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        parts = {name: (pool.submit(comparison, name), pool.submit(predictions, name)) for name in options.models}
        for name, (compared, predicted) in parts.items():
            lines += [f"## {name}", "", *predicted.result(), "", *compared.result(), ""]
    lines.append(f"Took {(time.time() - began) / 60:.0f} minutes.")
    RESULTS.write_text("\n".join([*lines, "", facts(1)]) + "\n")


if __name__ == "__main__":
    main()
