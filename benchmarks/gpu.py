"""Does moebit do on a CUDA device what it does on a CPU, and how fast? `make bench-gpu`, or `python benchmarks/gpu.py --help`.

It needs a CUDA device, torch, Triton, transformers and moebit with what that depends on; no network, since models are made on the spot
from random numbers. Each part stores its result in runs/gpu as soon as it is done, and is not done again while that is there, so that a
run that was cut off goes on. All parts together take about eight minutes on an H100.

  kernels   Triton's kernels against their forms in plain torch: the solver's inner block, products with packed codes.
  codes     one small random model, quantized on the CPU and on the device: how many codes are equal, and the losses.
  solve     the batched solver beside the bare products that no such solver can do without.
  olmoe     OLMoE's real shapes, 16 layers, GPTQ at 4 bits, from 128 windows of 512 tokens.
  deepseek  one layer of DeepSeek-V3's real shapes, the same from 32 windows.
  decode    the packed OLMoE-shaped model writing tokens, one sequence, beside reading its bytes once per token.
  profile   where a layer's time goes, from torch's profiler.

The table is written to benchmarks/results/gpu.md, whole, when all parts have a result. `--toy` runs everything on shapes of a few
hundred numbers, which shows that the script runs and nothing else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours, wherever it is run from
from machine import ROOT, facts
from shapes import olmoe, write_fast
from synthetic import Model, deepseek_v3, write_tokens

import moebit
from moebit.device import checked_device, made_on
from moebit.tensor import UniformGrid, solve_gptq

Result = dict[str, Any]
BITS = 4
CLOSE = 1e-3  # by which losses on two devices may differ, relatively


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        windows, length: of calibration. solve: (matrices, outputs, inputs) of the solver's problem. tokens: that are written.
        repeats: of what is timed. memory: of a quantization.
    """

    olmoe: dict[str, int]
    deepseek: dict[str, int]
    windows: int
    deepseek_windows: int
    length: int
    solve: tuple[int, int, int]
    tokens: int
    repeats: int
    group: int
    memory: str


REAL = Size(
    {"layers": 16, "experts": 64, "top_k": 8, "hidden": 2048, "intermediate": 1024, "heads": 16, "vocabulary": 50304},
    {"layers": 1, "experts": 256, "top_k": 8, "hidden": 7168, "intermediate": 2048, "heads": 128, "vocabulary": 2048, "groups": 8,
     "top_groups": 4, "q_rank": 1536, "kv_rank": 512, "rope_dim": 64, "nope_dim": 128, "v_dim": 128},
    windows=128, deepseek_windows=32, length=512, solve=(16, 2048, 2048), tokens=64, repeats=3, group=128, memory="40GiB",
)  # fmt: skip
TOY = Size(
    {"layers": 2, "experts": 8, "top_k": 2, "hidden": 64, "intermediate": 32, "heads": 4, "vocabulary": 128},
    {"layers": 1, "experts": 8, "top_k": 2, "hidden": 64, "intermediate": 32, "heads": 4, "vocabulary": 128, "groups": 2,
     "top_groups": 1, "q_rank": 32, "kv_rank": 32, "rope_dim": 8, "nope_dim": 16, "v_dim": 16},
    windows=4, deepseek_windows=2, length=24, solve=(2, 32, 64), tokens=3, repeats=1, group=32, memory="4GiB",
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """One run of this script."""

    device: torch.device
    size: Size
    runs: Path
    triton: bool

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Median over repeats, behind one call that warms up."""
        work()
        times = []
        for _ in range(self.size.repeats):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def quantize(self, model: Path, out: Path, windows: int, device: torch.device) -> Result:
        """Quantize a model of random tokens' windows; seconds, and the most memory that the device had in use."""
        text = self.runs / f"tokens-{windows}.jsonl"
        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        write_tokens(text, windows, self.size.length, vocabulary)
        overrides = {"calibration.samples": windows, "calibration.seq_len": self.size.length, "weights.group_size": self.size.group}
        torch.cuda.reset_peak_memory_stats(self.device)
        began = time.perf_counter()
        made = moebit.quantize(
            model, out, recipe="gptq-w4", text={"random": text}, overrides=overrides, device=str(device), memory=self.size.memory,
            overwrite=True, accept_unquantized=True,
        )  # fmt: skip
        assert isinstance(made, moebit.Result)
        layers = [report.seconds for report in made.layers]
        peak = torch.cuda.max_memory_allocated(self.device)
        return {"seconds": time.perf_counter() - began, "layers": layers, "peak": peak, "bytes": made.size_after}


def kernels(bench: Bench) -> Result:
    """The largest deviation of Triton's kernels from plain torch; of the solver's codes, how many differ."""
    if not bench.triton:
        return {"skipped": "without Triton"}
    w, h = problem(bench, *bench.size.solve)
    grid = UniformGrid(bench.size.group, symmetric=True)
    solved = {backend: solve_gptq(w, h, BITS, grid, backend=backend)[0] for backend in ("torch", "triton")}
    differing = int((solved["torch"].codes != solved["triton"].codes).sum())
    return {"codes": solved["torch"].codes.numel(), "differing": differing, "products": packed_deviation(bench)}


def packed_deviation(bench: Bench) -> float:
    """|product with packed codes - product with the dequantized weights| / |product|, the largest over few and many rows."""
    from moebit.formats.native import PackedSpec
    from moebit.runtime import PackedLinear, use

    _, outputs, inputs = bench.size.solve
    linear = PackedLinear(
        PackedSpec((BITS,), (outputs, inputs), bench.size.group, True, torch.bfloat16, stacked=False), False, torch.bfloat16
    )
    generator = torch.Generator().manual_seed(0)
    linear.codes.copy_(torch.randint(0, 256, linear.codes.shape, generator=generator, dtype=torch.uint8))
    linear.scale.fill_(0.01)
    placed(linear, bench.device)
    worst = 0.0
    for rows in (1, 7, 300):
        x = torch.randn(rows, inputs, generator=generator).bfloat16().to(bench.device)
        found, wanted = (use(linear, path)(x).float() for path in ("triton", "reference"))
        worst = max(worst, float((found - wanted).norm() / wanted.norm()))
    return worst


def codes(bench: Bench) -> Result:
    """A small model on the CPU and on the device: the share of equal codes, and the largest relative difference of the layers' losses."""
    model = checkpoint(bench, "small", olmoe(**TOY.olmoe))
    small = Bench(bench.device, TOY, bench.runs, bench.triton)
    outputs = {}
    for device in (torch.device("cpu"), bench.device):
        out = bench.runs / f"small-{device.type}"
        small.quantize(model, out, TOY.windows, device)
        outputs[device.type] = out
    host, there = (stored(outputs[kind]) for kind in ("cpu", bench.device.type))
    names = [name for name in host if name.endswith(".codes")]
    equal = sum(int((host[name] == there[name]).sum()) for name in names)
    reports = [json.loads((out / "report.json").read_text()) for out in outputs.values()]
    errors = [[row for layer in report["layers"] for row in weight_errors(layer)] for report in reports]
    apart = max(abs(a - b) / max(a, 1e-30) for a, b in zip(*errors, strict=True))
    return {"bytes": sum(host[name].numel() for name in names), "equal": equal, "errors_apart": apart, "close": apart <= CLOSE}


def weight_errors(layer: Mapping[str, Any]) -> list[float]:
    experts = [error for rows in layer["experts"].values() for error in rows["weight_error"]]
    return [row["weight_error"] for row in layer["linears"].values()] + experts


def solve(bench: Bench) -> Result:
    """Seconds of the solver and of its bare operations, and the flops of the latter."""
    matrices, outputs, inputs = bench.size.solve
    w, h = problem(bench, matrices, outputs, inputs)
    grid = UniformGrid(bench.size.group, symmetric=True)

    def bare() -> None:
        torch.linalg.cholesky_ex(h)
        for stop in range(inputs - 128, 0, -128):
            torch.bmm(w[:, :, stop:], h[:, stop:, stop - 128 : stop])

    seconds = bench.seconds(lambda: solve_gptq(w, h, BITS, grid))
    return {"solver": seconds, "bare": bench.seconds(bare), "weights": matrices * outputs * inputs}


def real_olmoe(bench: Bench) -> Result:
    model = checkpoint(bench, "olmoe", olmoe(**bench.size.olmoe))
    return bench.quantize(model, bench.runs / "olmoe-w4", bench.size.windows, bench.device)


def real_deepseek(bench: Bench) -> Result:
    model = checkpoint(bench, "deepseek", deepseek_v3(**bench.size.deepseek))
    result = bench.quantize(model, bench.runs / "deepseek-w4", bench.size.deepseek_windows, bench.device)
    for name in ("deepseek", "deepseek-w4"):
        shutil.rmtree(bench.runs / name)  # tens of gigabytes
    return result


def decode(bench: Bench) -> Result:
    """Seconds per written token of the packed model, and of reading as many bytes as it has."""
    from transformers import AutoModelForCausalLM

    from moebit.runtime import use

    model = AutoModelForCausalLM.from_pretrained(bench.runs / "olmoe-w4", dtype=torch.bfloat16).eval()
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    placed(use(model, "auto" if bench.triton else "reference"), bench.device)
    with torch.no_grad(), made_on(bench.device):
        ids = torch.arange(8, device=bench.device).unsqueeze(0)
        cache = model(input_ids=ids, use_cache=True).past_key_values
        token, times = ids[:, :1], []
        for _ in range(bench.size.tokens):
            bench.wait()
            began = time.perf_counter()
            token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            bench.wait()
            times.append(time.perf_counter() - began)
    block = torch.empty(2**26 if bench.size is REAL else 2**10, dtype=torch.uint8, device=bench.device)
    rate = 2 * block.nbytes / bench.seconds(block.clone)
    return {"seconds": statistics.median(times), "bytes": size, "reading": size / rate}


def profile(bench: Bench) -> Result:
    """The kernels of one layer with the most time on the device, and what share of all of it they have."""
    one = {**bench.size.olmoe, "layers": 1}
    model = checkpoint(bench, "one-layer", olmoe(**one))
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.profiler.ProfilerActivity.CUDA in torch.profiler.supported_activities() else []
    with torch.profiler.profile(activities=kinds) as seen:
        bench.quantize(model, bench.runs / "one-layer-w4", max(1, bench.size.windows // 4), bench.device)
    on_device = len(kinds) > 1

    def spent(event: Any) -> float:
        return float(event.self_device_time_total if on_device else event.self_cpu_time_total)

    events = sorted(seen.key_averages(), key=spent, reverse=True)
    total = sum(map(spent, events)) or 1.0
    return {"on_device": on_device, "shares": [[event.key[:60], spent(event) / total] for event in events[:12]]}


PARTS: dict[str, Callable[[Bench], Result]] = {
    "kernels": kernels,
    "codes": codes,
    "solve": solve,
    "olmoe": real_olmoe,
    "deepseek": real_deepseek,
    "decode": decode,
    "profile": profile,
}


def problem(bench: Bench, matrices: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Weights [E, O, I] and Hessians [E, I, I] of correlated inputs, on the device."""
    generator = torch.Generator().manual_seed(0)
    w = 0.02 * torch.randn(matrices, outputs, inputs, generator=generator)
    mix = torch.randn(matrices, inputs // 4, inputs, generator=generator) / (inputs // 4) ** 0.5
    w, mix = w.to(bench.device), mix.to(bench.device)
    return w, torch.bmm(mix.mT, mix) + 0.1 * torch.eye(inputs, device=bench.device)


def checkpoint(bench: Bench, name: str, model: Model) -> Path:
    """A random model, written unless it is there."""
    directory = bench.runs / name
    if not (directory / "config.json").exists():
        write_fast(model, directory)
    return directory


def stored(directory: Path) -> dict[str, Tensor]:
    """All tensors of an output, on the host."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a module's tensors to a device, in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to(device), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model


def lines(results: Mapping[str, Result], size: Size) -> Iterator[str]:
    """The table's rows."""
    r = results
    if "skipped" in r["kernels"]:
        yield f"| kernels | {r['kernels']['skipped']} |"
    else:
        yield f"| kernels: solver's codes that differ from plain torch's | {r['kernels']['differing']} of {r['kernels']['codes']} |"
        yield f"| kernels: products with packed codes, largest deviation | {r['kernels']['products']:.1e} |"
    yield f"| small model, CPU and device: bytes of codes that are equal | {r['codes']['equal'] / r['codes']['bytes']:.4%} |"
    yield f"| small model: largest relative difference of a matrix's error | {r['codes']['errors_apart']:.1e} |"
    ratio = r["solve"]["solver"] / r["solve"]["bare"]
    rate = r["solve"]["weights"] / r["solve"]["solver"] / 1e6
    yield f"| solver, {' x '.join(map(str, size.solve))} | {rate:.1f} million weights/s, {ratio:.2f} times its bare operations |"
    for name, windows in (("olmoe", size.windows), ("deepseek", size.deepseek_windows)):
        row, shape = r[name], getattr(size, name)
        layers = f"{shape['layers']} layer{'s' if shape['layers'] > 1 else ''}"
        told = f"{row['seconds']:.1f} s, {statistics.median(row['layers']):.2f} s a layer, {row['peak'] / 2**30:.1f} GiB on the device"
        yield f"| {name}, {layers} of real shapes, {windows} windows of {size.length} | {told} |"
    told = f"{1 / r['decode']['seconds']:.1f} tokens/s; reading its bytes: {1 / r['decode']['reading']:.1f}"
    yield f"| packed model writes, one sequence | {told} |"
    where = "device" if r["profile"]["on_device"] else "CPU"
    for key, share in r["profile"]["shares"]:
        yield f"| share of one layer's time on the {where}: {key.replace('|', '/')} | {share:.1%} |"


def table(results: Mapping[str, Result], size: Size, device: torch.device, options: Sequence[str]) -> str:
    rows = "\n".join(lines(results, size))
    seconds = ", ".join(f"{name} {result['part_seconds']:.0f}" for name, result in results.items())
    head = f"# On a CUDA device\n\nWhat each row is stands in `benchmarks/gpu.py`.\n\n| {torch.cuda.get_device_name(device)} | |\n|---|---|"
    return f"{head}\n{rows}\n\n- seconds that the parts took: {seconds}\n{facts(torch.get_num_threads(), options)}\n"


@contextmanager
def kept(file: Path) -> Iterator[Result]:
    """A result that is stored when it is whole."""
    result: Result = {}
    yield result
    file.write_text(json.dumps(result, indent=1))


def main(options: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="tiny shapes: does the script run?")
    parser.add_argument("--without-triton", action="store_true", help="plain torch in the place of Triton's kernels")
    parser.add_argument("--only", choices=list(PARTS), action="append", help="only these parts")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.md")
    parser.add_argument("--again", action="store_true", help="forget the results that are there")
    asked = parser.parse_args(options)
    bench = Bench(checked_device(asked.device), TOY if asked.toy else REAL, asked.runs, not asked.without_triton)
    bench.runs.mkdir(parents=True, exist_ok=True)
    files = {name: bench.runs / f"{name}{'-toy' if asked.toy else ''}.json" for name in PARTS}
    for name in asked.only or PARTS:
        if asked.again or not files[name].exists():
            print(f"{name} ...", flush=True)
            began = time.perf_counter()
            with kept(files[name]) as result:
                result |= PARTS[name](bench)
                result["part_seconds"] = time.perf_counter() - began
            print(json.dumps(result)[:400], flush=True)
    if all(file.exists() for file in files.values()):
        text = table({name: json.loads(file.read_text()) for name, file in files.items()}, bench.size, bench.device, options)
        asked.results.write_text(text)
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
