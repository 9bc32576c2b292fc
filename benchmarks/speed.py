"""moebit from end to end, beside the bare matrix products of the same shapes and beside other quantizers. `make bench-speed`.

One random Qwen3-MoE checkpoint, one set of random token windows, GPTQ to 4 bits, symmetric, groups of 128, the same number of threads for
all; one after the other, each in a process of its own:

  bare products   what no such method can do without (products.py lists them).
  moebit          its preset gptq-w4, and the same without the clipping search, which the others do not do.
  llm-compressor  GPTQModifier, W4A16, as its MoE examples: every expert is calibrated on every token (its default).
  GPTQModel       its defaults: experts are calibrated on the tokens that are routed to them.

The peers run with their own defaults in environments made by benchmarks/peers/setup.sh. Everybody first quantizes a tiny model, which
is not counted: what is compiled once per installation is compiled there. Bare products and moebit are measured several times in turn,
since a machine that is shared with others is not always as fast. From every output the experts are read back, so that nothing
is compared with a model whose experts were left out: how many matrices were packed, and how far some of them are from the original.
Prints a table and writes it to benchmarks/results/speed.md; everybody's log stays in runs/speed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, environment, facts
from safetensors import safe_open
from synthetic import qwen3_moe, write_checkpoint, write_tokens
from torch import Tensor

HERE = Path(__file__).resolve().parent
GROUP = 128
CHECKED = 4  # experts of the first layer that are compared with the original


@dataclass(frozen=True)
class Shape:
    """The model and the calibration."""

    layers: int = 2
    experts: int = 32
    top_k: int = 4
    hidden: int = 1024
    intermediate: int = 512
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 64
    vocabulary: int = 4096
    windows: int = 64
    length: int = 512

    @property
    def matrices(self) -> int:
        return self.layers * self.experts * 3

    def write(self, directory: Path) -> None:
        model = asdict(self)
        del model["windows"], model["length"]
        write_checkpoint(qwen3_moe(**model), directory / "model")
        write_tokens(directory / "tokens.jsonl", self.windows, self.length, self.vocabulary)
        (directory / "shape.json").write_text(json.dumps(asdict(self)))


SMALL = Shape(experts=4, top_k=2, hidden=128, intermediate=128, heads=4, kv_heads=2, head_dim=32, vocabulary=512, windows=16, length=64)


@dataclass(frozen=True)
class Contender:
    """Somebody who quantizes: `python script MODEL TOKENS OUT RESULT [more]`; `needs` is there once the environment is complete."""

    name: str
    python: str
    script: Path
    more: tuple[str, ...] = ()
    needs: Path | None = None

    @property
    def key(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.name)


@dataclass
class Outcome:
    """What one run gave; `error` where it did not finish."""

    contender: Contender
    wall: float
    facts: dict[str, Any] = field(default_factory=dict)
    packed: int = 0
    weight_error: float | None = None
    error: str = ""

    @property
    def seconds(self) -> float:
        """Of quantizing and saving."""
        return float(self.facts["quantize_seconds"])


@dataclass(frozen=True)
class Round:
    """What was measured one after the other: a shared machine is not as fast at every moment, so that only neighbours are compared."""

    rows: list[dict[str, Any]]
    outcomes: list[Outcome]

    @property
    def bare(self) -> float:
        return float(sum(row["seconds"] for row in self.rows))

    def of(self, name: str) -> Outcome | None:
        return next((o for o in self.outcomes if o.contender.name == name and not o.error), None)


def contenders(peers: Path, shape: Shape) -> list[Contender]:
    settings = {"calibration.samples": shape.windows, "calibration.seq_len": shape.length}
    ours = json.dumps({"recipe": "gptq-w4", "overrides": settings})
    plain = json.dumps({"recipe": "gptq-w4", "overrides": {**settings, "solver.clip_search": False}})
    runner = HERE / "run_moebit.py"
    return [
        Contender("moebit", sys.executable, runner, (ours,)),
        Contender("moebit, no clipping search", sys.executable, runner, (plain,)),
        *(
            Contender(name, str(peers / folder / "bin" / "python"), HERE / "peers" / f"run_{folder}.py", (), peers / folder / "pinned.txt")
            for name, folder in (("llm-compressor", "llmcompressor"), ("GPTQModel", "gptqmodel"))
        ),
    ]


def quantize(contender: Contender, inputs: Path, work: Path, threads: int, limit: float) -> Outcome:
    """Run one contender; what it prints goes to work/KEY.log."""
    out, result, log_file = work / f"{contender.key}.out", work / f"{contender.key}.json", work / f"{contender.key}.log"
    shutil.rmtree(out, ignore_errors=True)
    result.unlink(missing_ok=True)
    if contender.needs and not contender.needs.exists():
        return Outcome(contender, 0.0, error=f"not installed: {contender.needs} is not there; benchmarks/peers/setup.sh makes it")
    command = [contender.python, str(contender.script), str(inputs / "model"), str(inputs / "tokens.jsonl"), str(out), str(result)]
    began = time.perf_counter()
    with log_file.open("w") as log_handle:
        try:
            code = subprocess.run(
                [*command, *contender.more], stdout=log_handle, stderr=subprocess.STDOUT, env=environment(threads), cwd=work, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            return Outcome(contender, limit, error=f"stopped after {limit:.0f} s")
    wall = time.perf_counter() - began
    if code or not result.exists():
        return Outcome(contender, wall, error=f"ended with {code}: {last_words(log_file)}")
    packed, weight_error = read_back(out, inputs / "model")
    return Outcome(contender, wall, json.loads(result.read_text()), packed, weight_error)


def last_words(log_file: Path) -> str:
    lines = [line.strip() for line in log_file.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def tensors_of(directory: Path) -> dict[str, Path]:
    result: dict[str, Path] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            result |= dict.fromkeys(tensors.keys(), file)
    return result


def read(where: dict[str, Path], name: str) -> Tensor:
    with safe_open(where[name], "pt") as tensors:
        return tensors.get_tensor(name)


def read_back(out: Path, model: Path) -> tuple[int, float | None]:
    """(packed matrices of experts in the output, |dW| / |W| of the first layer's first experts), by the formats' descriptions."""
    where, original = tensors_of(out), tensors_of(model)
    native = [name for name in where if ".experts." in name and name.endswith(".codes")]
    single = [name for name in where if ".experts." in name and name.endswith((".weight_packed", ".qweight"))]
    packed = len(single) + sum(read(where, name.removesuffix("codes") + "scale").shape[0] for name in native)
    if not packed:
        return 0, None
    wrong = whole = 0.0
    for expert in range(CHECKED):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.0.mlp.experts.{expert}.{projection}"
            w_OI = read(original, f"{name}.weight").double()
            wrong += float((dequantized(where, name, w_OI.shape) - w_OI).square().sum())
            whole += float(w_OI.square().sum())
    return packed, (wrong / whole) ** 0.5


def dequantized(where: dict[str, Path], name: str, shape: torch.Size) -> Tensor:
    """One matrix [out, in] of four bits, float64, from any of the three formats."""
    owner, expert, projection = name.rsplit(".", 2)
    if f"{name}.weight_packed" in where:  # compressed-tensors: eight codes in an int32, along the inputs; 8 stands for zero
        codes_OI = nibbles(read(where, f"{name}.weight_packed"))
        return (codes_OI - 8) * read(where, f"{name}.weight_scale").double().repeat_interleave(GROUP, 1)
    if f"{name}.qweight" in where:  # GPTQ: the same transposed; the stored zero point is one less than the true one
        codes_IO = nibbles(read(where, f"{name}.qweight").T).T
        zero_GO, scale_GO = nibbles(read(where, f"{name}.qzeros")) + 1, read(where, f"{name}.scales").double()
        group_I = read(where, f"{name}.g_idx").long()
        return ((codes_IO - zero_GO[group_I]) * scale_GO[group_I]).T
    codes = read(where, f"{owner}.{projection}.codes").view(-1, *shape[:1], shape[1] // 2)[int(expert)]
    codes_OI = torch.stack([codes & 15, codes >> 4], -1).flatten(1).double()
    return (codes_OI - 8) * read(where, f"{owner}.{projection}.scale")[int(expert)].double().repeat_interleave(GROUP, 1)


def nibbles(packed: Tensor) -> Tensor:
    """int32 [R, C] -> float64 [R, 8 C], the lowest four bits first."""
    return torch.stack([(packed >> (4 * i)) & 15 for i in range(8)], -1).flatten(1).double()


def bare_products(inputs: Path, work: Path, threads: int) -> list[dict[str, Any]]:
    result = work / "products.json"
    subprocess.run(
        [sys.executable, str(HERE / "products.py"), str(inputs / "shape.json"), str(result)], check=True, env=environment(threads)
    )
    return list(json.loads(result.read_text())["rows"])


def times_bare(rounds: list[Round], name: str) -> list[float]:
    """Time over that of the bare products of the same round, in order of size."""
    return sorted(o.seconds / r.bare for r in rounds if (o := r.of(name)))


def spread(values: list[float]) -> str:
    """The median, and the range where there are several."""
    text = f"{statistics.median(values):.2f}"
    return text if len(values) < 2 else f"{text} ({values[0]:.2f} to {values[-1]:.2f})"


def outcome_line(outcome: Outcome, rounds: list[Round], shape: Shape) -> str:
    name = outcome.contender.name
    if outcome.error:
        return f"| {name} | | | | | | | {outcome.error.replace('|', '/')} |"
    known = outcome.facts
    load = "in it" if known["load_seconds"] is None else f"{known['load_seconds']:.1f}"
    error = "" if outcome.weight_error is None else f"{outcome.weight_error:.3f}"
    return (
        f"| {name} | {outcome.wall:.1f} | {load} | {outcome.seconds:.1f} | {spread(times_bare(rounds, name))} "
        f"| {known['peak_bytes'] / 1e9:.2f} | {outcome.packed} of {shape.matrices} | {error} |"
    )


def document(shape: Shape, rounds: list[Round], foot: str) -> str:
    rows, outcomes = rounds[0].rows, rounds[0].outcomes
    parts = {part: sum(row["seconds"] for row in rows if row["part"] == part) for part in dict.fromkeys(row["part"] for row in rows)}
    done = {o.contender.name: o for o in outcomes if not o.error}
    lines = [
        "# From end to end",
        "",
        *(["**Tiny shapes (--small): this only shows that the benchmark works.**", ""] if shape == SMALL else []),
        f"Qwen3-MoE of random weights: {shape.layers} layers, hidden {shape.hidden}, {shape.experts} experts of intermediate "
        f"{shape.intermediate}, top-{shape.top_k}, {shape.heads} heads of {shape.head_dim} ({shape.kv_heads} for keys and values), "
        f"vocabulary {shape.vocabulary}, bfloat16. GPTQ, 4 bits, symmetric, groups of {GROUP}, all linears of the decoder layers, "
        f"calibrated on {shape.windows} windows of {shape.length} random tokens.",
        "",
        "| | process, s | loading, s | quantizing and saving, s | × bare products | peak resident, GB | experts' matrices packed | "
        "weights' relative error |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        f"| bare products | | | {rounds[0].bare:.1f} | 1.00 | | | |",
        *(outcome_line(outcome, rounds, shape) for outcome in outcomes),
        "",
        "`process` is everything, starting Python and importing included. moebit reads the checkpoint while it works, so that loading is",
        "in its time; the others load all of it first. A tiny model that is not counted went first (kernels that are compiled once per",
        f"installation). The rows are those of the first round of {len(rounds)} in which bare products and moebit took turns; `× bare",
        "products` is the median over the rounds, and the range where there are several. The relative error is |ΔW| / |W| of",
        f"{CHECKED} experts of the first layer, read back from the output: it shows that these are the quantized weights; GPTQ trades it",
        "for the error of the outputs, so that less is not better.",
        "",
        *(f"- {line}" for line in findings(done, rounds)),
        "",
        "## The bare products",
        "",
        f"{', '.join(f'{part} {seconds:.2f} s' for part, seconds in parts.items())}. "
        "What they are, and what is not in them: [products.py](../products.py).",
        "",
        "| part | of | type | seconds | GFLOP/s |",
        "|---|---|---|---:|---:|",
        *(f"| {row['part']} | {row['what']} | {row['dtype']} | {row['seconds']:.3f} | {row['rate'] / 1e9:.0f} |" for row in rows),
        "",
        "## How it was measured",
        "",
        foot,
        *(f"- {o.contender.name}: {', '.join(f'{k} {v}' for k, v in o.facts['versions'].items())}" for o in done.values()),
        "- llm-compressor: `GPTQModifier(targets='Linear', scheme='W4A16')`, all experts on all tokens; its experts are un-stacked after "
        "loading, as `oneshot` does by itself, because its other way needs torchvision, which has no build for processors in the registry.",
        "- GPTQModel: `QuantizeConfig(bits=4, group_size=128, sym=True)`; on one or two processors also GPTQMODEL_CPU_WORKERS=2, "
        "without which it stops.",
    ]
    return "\n".join(lines) + "\n"


def findings(done: dict[str, Outcome], rounds: list[Round]) -> list[str]:
    """What the table says, computed from it."""
    ours = done.get("moebit")
    if ours is None:
        return ["moebit did not finish."]
    lines = [f"moebit takes {spread(times_bare(rounds, 'moebit'))} times its bare products."]
    for name in ("llm-compressor", "GPTQModel"):
        if name in done:
            with_loading = done[name].seconds + float(done[name].facts["load_seconds"])
            ratio, whole = done[name].seconds / ours.seconds, with_loading / ours.seconds
            lines.append(f"{name} takes {ratio:.1f} times as long as moebit ({whole:.1f} with its loading).")
    return lines


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, to see whether everything works; writes runs/speed/speed.md")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    parser.add_argument("--peers", type=Path, default=ROOT / "runs" / "peers", help="where benchmarks/peers/setup.sh put them")
    parser.add_argument("--rounds", type=int, default=3, help="of bare products and moebit, in turn")
    parser.add_argument("--limit", type=float, default=7200, help="seconds that one contender may take")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    shape = SMALL if arguments.small else Shape()
    work = ROOT / "runs" / "speed"
    for name, each in (("small", SMALL), ("inputs", shape)):
        shutil.rmtree(work / name, ignore_errors=True)
        each.write(work / name)

    every = contenders(arguments.peers.resolve(), shape)
    ready = {}
    for contender in contenders(arguments.peers.resolve(), SMALL):
        log(f"{contender.name}: a tiny model, not counted")
        ready[contender.name] = quantize(contender, work / "small", work, arguments.threads, arguments.limit)
    rounds: list[Round] = []
    for number in range(arguments.rounds):
        log(f"round {number + 1}: bare products")
        rows, outcomes = bare_products(work / "inputs", work, arguments.threads), []
        for contender in every:
            if number and contender.needs:  # the others take minutes: once
                continue
            outcome = ready[contender.name]
            if not outcome.error:
                outcome = quantize(contender, work / "inputs", work, arguments.threads, arguments.limit)
            outcomes.append(outcome)
            log(
                f"  {contender.name}: "
                + (outcome.error or f"{outcome.seconds:.1f} s, {outcome.packed} of {shape.matrices} matrices packed")
            )
            shutil.rmtree(work / f"{contender.key}.out", ignore_errors=True)
        rounds.append(Round(rows, outcomes))
    shutil.rmtree(work / "inputs" / "model")

    options = ["--small"] * arguments.small + [f"--threads {arguments.threads}", f"--rounds {arguments.rounds}"]
    text, outcomes = document(shape, rounds, facts(arguments.threads, options)), rounds[0].outcomes
    print(text)
    target = arguments.out or (work if arguments.small else HERE / "results") / "speed.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    skipped = [o.contender.name for o in outcomes if not o.error and o.packed != shape.matrices]
    if skipped:
        log(f"not all experts were packed by {', '.join(skipped)}: their rows are no comparison")
    return 1 if skipped or outcomes[0].error else 0


if __name__ == "__main__":
    sys.exit(main())
