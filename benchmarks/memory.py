"""How much memory moebit keeps resident, measured from outside, on checkpoints of real shapes. `make bench-memory`.

  qwen3-30b     13 layers of Qwen3-30B-A3B (128 experts of 768 x 2048, the real vocabulary) at --memory 3GiB: within 4 GB.
  deepseek-v3   one layer of DeepSeek-V3 (256 experts of 2048 x 7168, latent attention, a shared expert, the real vocabulary): within 6 GB.
  layers        layers like Qwen3-30B-A3B's with a small vocabulary: 1, 2, 4, 8 of them.
  experts       two of them with 16, 32, 64, 128 experts.
  memory        two of them at --memory 1.5, 3 and 6 GiB: more memory is never slower.

Each checkpoint is random, written piece by piece before its case and deleted after it. moebit quantizes it in a process of its own,
whose resident memory is read from /proc while it works: the high-water mark (VmHWM), and over time the part that it owns (RssAnon) and
the part that is pages of files (RssFile). Every measurement is kept in runs/memory under a hash of what it depends on (shape, settings,
threads, moebit's own code), so that an interrupted benchmark goes on where it was. Writes benchmarks/results/memory.md and memory.svg.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from machine import ROOT, environment, facts
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from synthetic import Model, deepseek_v3, qwen3_moe, write_checkpoint, write_tokens

HERE = Path(__file__).resolve().parent
GIB, GB = 2**30, 1e9
INTERVAL = 0.2  # seconds between two looks at the process
DRAWN = 300  # samples kept of each run
NOISE = 0.05  # two runs of the same work differ by so much
COLOURS = ("#0072b2", "#d55e00", "#009e73")  # Okabe and Ito
CASES = ("qwen3-30b", "deepseek-v3", "layers", "experts", "memory")

QWEN = {
    "layers": 2, "experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 768, "heads": 32, "kv_heads": 4, "head_dim": 128,
    "vocabulary": 4096,
}  # fmt: skip
DEEPSEEK = {
    "layers": 1, "experts": 256, "top_k": 8, "hidden": 7168, "intermediate": 2048, "heads": 128, "vocabulary": 129280, "groups": 8,
    "top_groups": 4, "q_rank": 1536, "kv_rank": 512, "rope_dim": 64, "nope_dim": 128, "v_dim": 128,
}  # fmt: skip
SMALL = {"hidden": 256, "intermediate": 128, "heads": 4, "vocabulary": 512}
SMALL_QWEN = {**QWEN, **SMALL, "experts": 8, "top_k": 2, "kv_heads": 2, "head_dim": 64}
SMALL_DEEPSEEK = {
    **DEEPSEEK, **SMALL, "experts": 16, "top_k": 2, "q_rank": 128, "kv_rank": 128, "groups": 4, "top_groups": 2, "rope_dim": 32,
    "nope_dim": 32, "v_dim": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One checkpoint quantized once.

    Attributes:
        kind: which of CASES it is for. shape: arguments of the architecture's function in synthetic.py.
        memory: GiB, as --memory. windows, length: of the calibration. limit: bytes that may be resident, where there is a limit.
    """

    kind: str
    shape: dict[str, int]
    memory: float
    windows: int
    length: int
    recipe: str
    limit: float | None = None

    @property
    def model(self) -> Model:
        return deepseek_v3(**self.shape) if "q_rank" in self.shape else qwen3_moe(**self.shape)

    @property
    def title(self) -> str:
        return f"{self.kind}: {self.shape['layers']} layers, {self.shape['experts']} experts, --memory {self.memory:g}GiB"

    def key(self, threads: int, code: str) -> str:
        """What the measurement depends on; not which curve it is for, so that curves share points."""
        parts = {k: v for k, v in asdict(self).items() if k not in ("kind", "limit")}
        return hashlib.sha256(json.dumps([parts, threads, code], sort_keys=True).encode()).hexdigest()[:16]


def cases(arguments: argparse.Namespace) -> list[Case]:
    small = arguments.small
    qwen, deepseek = (SMALL_QWEN, SMALL_DEEPSEEK) if small else (QWEN, DEEPSEEK)
    recipe, length = arguments.recipe, 64 if small else arguments.length
    real = Case(
        "qwen3-30b", {**qwen, "layers": 3 if small else 13, "vocabulary": 512 if small else 151936}, 3,
        arguments.qwen_windows, length, recipe, 4 * GB,
    )  # fmt: skip
    curve = Case("layers", qwen, 3, arguments.curve_windows, length, recipe)
    most = qwen["experts"]
    return [
        real,
        Case("deepseek-v3", deepseek, arguments.deepseek_memory, arguments.deepseek_windows, length, recipe, 6 * GB),
        *(replace(curve, shape={**qwen, "layers": count}) for count in (1, 2, 4, 8)),
        *(replace(curve, kind="experts", shape={**qwen, "experts": count}) for count in (most // 8, most // 4, most // 2, most)),
        *(replace(curve, kind="memory", memory=size) for size in ((0.01, 0.1, 1) if small else (1.5, 3, 6))),
    ]


def measure(case: Case, scratch: Path, threads: int) -> dict[str, Any]:
    """Write the checkpoint, quantize it under observation, delete both."""
    model, source, out = case.model, scratch / "model", scratch / "out"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    need, free = 1.4 * model.bytes + 2 * GB, shutil.disk_usage(scratch).free
    if free < need:
        raise SystemExit(
            f"{case.title}: needs about {need / GB:.0f} GB in {scratch} for the checkpoint and its quantized copy, {free / GB:.0f} GB are "
            "free; free some, choose another place with --scratch, or leave the case out with --only"
        )
    try:
        log(f"  writing {model.bytes / GB:.1f} GB")
        write_checkpoint(model, source)
        write_tokens(scratch / "tokens.jsonl", case.windows, case.length, case.shape["vocabulary"])
        log("  quantizing")
        more = {
            "recipe": case.recipe,
            "overrides": {"calibration.samples": case.windows, "calibration.seq_len": case.length},
            "memory": int(case.memory * GIB),
        }
        command = [sys.executable, str(HERE / "run_moebit.py"), str(source), str(scratch / "tokens.jsonl"), str(out)]
        seen = observe([*command, str(scratch / "result.json"), json.dumps(more)], scratch / "log.txt", threads)
        if seen["code"]:
            words = (scratch / "log.txt").read_text(errors="replace")[-2000:]
            raise SystemExit(f"{case.title}: moebit ended with {seen['code']} at {seen['peak'] / GB:.2f} GB resident:\n{words}")
        result = json.loads((scratch / "result.json").read_text())
        return {"case": asdict(case), "checkpoint_bytes": model.bytes, **result, "seconds": seen["seconds"], "samples": seen["samples"]}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def observe(command: Sequence[str], log_file: Path, threads: int) -> dict[str, Any]:
    """Run a command; its exit code, seconds, high-water mark, and samples [seconds, resident, anonymous, files] in bytes."""
    samples: list[tuple[float, int, int, int]] = []
    peak, began = 0, time.perf_counter()
    with (
        log_file.open("w") as handle,
        subprocess.Popen(command, stdout=handle, stderr=subprocess.STDOUT, env=environment(threads)) as process,
    ):
        try:
            while process.poll() is None:
                now = resident(process.pid)
                if "VmRSS" in now:
                    samples.append((round(time.perf_counter() - began, 2), now["VmRSS"], now["RssAnon"], now["RssFile"] + now["RssShmem"]))
                    peak = max(peak, now["VmHWM"])
                try:
                    process.wait(INTERVAL)
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            process.kill()
            raise
    return {"code": process.returncode, "seconds": time.perf_counter() - began, "peak": peak, "samples": thin(samples)}


def resident(pid: int) -> dict[str, int]:
    """The Vm* and Rss* lines of /proc/PID/status in bytes; nothing of a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("Vm", "Rss"))}


def thin(samples: Sequence[tuple[float, int, int, int]]) -> list[tuple[float, int, int, int]]:
    """At most DRAWN samples: of neighbours the one with most resident."""
    size = -(-len(samples) // DRAWN) or 1
    return [max(samples[start : start + size], key=lambda sample: sample[1]) for start in range(0, len(samples), size)]


def per_layer(result: dict[str, Any]) -> float:
    return float(sum(result["layer_seconds"]) / len(result["layer_seconds"]))


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| case | layers | experts | checkpoint, GB | --memory, GiB | peak resident, GB | at the peak: own / files, GB | allowed, GB | "
        "seconds per layer | seconds in all |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        case = result["case"]
        at = max(result["samples"], key=lambda sample: sample[1], default=(0, 0, 0, 0))
        allowed = f"{case['limit'] / GB:.0f}" if case["limit"] else ""
        lines.append(
            f"| {case['kind']} | {case['shape']['layers']} | {case['shape']['experts']} | {result['checkpoint_bytes'] / GB:.1f} "
            f"| {case['memory']:g} | {result['peak_bytes'] / GB:.2f} | {at[2] / GB:.2f} / {at[3] / GB:.2f} | {allowed} "
            f"| {per_layer(result):.1f} | {result['seconds']:.0f} |"
        )
    return lines


def findings(results: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """(what the table says, computed from it; what it should not say)."""
    lines, missed = [], []
    for result in results:
        case = result["case"]
        if case["limit"]:
            within = result["peak_bytes"] <= case["limit"]
            lines.append(
                f"{case['kind']}: {result['peak_bytes'] / GB:.2f} GB resident at most, "
                f"{'within' if within else '**not** within'} the {case['limit'] / GB:.0f} GB allowed."
            )
            missed += [] if within else [lines[-1]]
    for kind, what in (("layers", "layers"), ("experts", "experts")):
        curve = [result for result in results if result["case"]["kind"] == kind]
        if len(curve) > 1:
            first, last = curve[0], curve[-1]
            lines.append(
                f"From {first['case']['shape'][what]} to {last['case']['shape'][what]} {what}: peak {first['peak_bytes'] / GB:.2f} -> "
                f"{last['peak_bytes'] / GB:.2f} GB, {per_layer(first):.1f} -> {per_layer(last):.1f} s a layer."
            )
    curve = [result for result in results if result["case"]["kind"] == "memory"]
    slower = [more for less, more in pairwise(curve) if per_layer(more) > (1 + NOISE) * per_layer(less)]
    if len(curve) > 1:
        times = ", ".join(f"{result['case']['memory']:g} GiB {per_layer(result):.1f} s" for result in curve)
        verdict = "**more memory was slower**" if slower else f"more memory is never slower (by more than {NOISE:.0%})"
        lines.append(f"Seconds a layer by --memory: {times}: {verdict}.")
        missed += [lines[-1]] if slower else []
    return lines, missed


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """The runs over time, then the curves, two charts in a row."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "moebit", "axes.grid": True, "grid.color": "#dddddd"})
        curves = [(kind, curve) for kind in CASES[2:] if len(curve := [one for one in results if one["case"]["kind"] == kind]) > 1]
        runs = [one for one in results if one["case"]["kind"] in CASES[:2] and one["samples"]]
        rows = (len(runs) + 1) // 2 + len(curves)
        figure = Figure(figsize=(9, 3.2 * rows), layout="constrained")
        for number, result in enumerate(runs):
            axes = figure.add_subplot(rows, 2, number + 1)
            seconds, *parts = zip(*result["samples"], strict=True)
            for name, colour, dash, part in zip(("resident", "its own", "files"), COLOURS, ("-", "--", ":"), parts, strict=True):
                axes.plot(seconds, [size / GB for size in part], dash, color=colour, label=name)
            _named(axes, f"{result['case']['kind']}, --memory {result['case']['memory']:g}GiB", "seconds", "GB")
            axes.legend(loc="lower right")
        for row, (kind, curve) in enumerate(curves, rows - len(curves)):
            across = [one["case"]["memory"] if kind == "memory" else one["case"]["shape"][kind] for one in curve]
            for column, (title, up, values) in enumerate((
                ("Peak resident", "GB", [one["peak_bytes"] / GB for one in curve]),
                ("Time", "seconds per layer", [per_layer(one) for one in curve]),
            )):  # fmt: skip
                axes = figure.add_subplot(rows, 2, 2 * row + column + 1)
                axes.plot(across, values, "o-", color=COLOURS[0])
                _named(axes, f"{title} over {kind}", "--memory, GiB" if kind == "memory" else kind, up)
        figure.savefig(file, metadata={"Date": None})


def _named(axes: Axes, title: str, across: str, up: str) -> None:
    axes.set(title=title, xlabel=across, ylabel=up)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])


def document(results: list[dict[str, Any]], foot: str, options: argparse.Namespace) -> str:
    return "\n".join(
        [
            "# Resident memory",
            "",
            *(["**Tiny shapes (--small): this only shows that the benchmark works.**", ""] if options.small else []),
            f"Random checkpoints of real shapes, recipe {options.recipe}. `qwen3-30b` is 13 layers of Qwen3-30B-A3B, `deepseek-v3` one",
            "layer of DeepSeek-V3, both with embeddings and head of the real vocabulary; the curves are layers like Qwen3-30B-A3B's with",
            f"a small vocabulary. Calibrated on {options.qwen_windows}, {options.deepseek_windows} and {options.curve_windows} windows of "
            f"{options.length} random tokens.",
            "The peak is the process's VmHWM, imports included; `own` is anonymous memory, `files` are pages of mapped files, which the",
            "system can take back at any time.",
            "",
            *table(results),
            "",
            *(f"- {line}" for line in findings(results)[0]),
            "",
            "![resident memory over time, and the curves](memory.svg)",
            "",
            foot,
        ]
    ) + "\n"  # fmt: skip


def package_digest() -> str:
    """sha256 over moebit's sources, found without importing it."""
    command = [sys.executable, "-c", "import importlib.util as u; print(u.find_spec('moebit').submodule_search_locations[0])"]
    package = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    state = hashlib.sha256()
    for file in sorted(file for file in package.rglob("*") if file.suffix in (".py", ".yaml")):
        state.update(file.read_bytes())
    return state.hexdigest()


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CASES,
        default=list(CASES),
        help="measure these cases alone; the table also has what was measured before",
    )
    parser.add_argument("--recipe", default="gptq-w4")
    parser.add_argument("--qwen-windows", type=int, default=32, help="calibration windows of qwen3-30b")
    parser.add_argument("--deepseek-windows", type=int, default=16, help="calibration windows of deepseek-v3")
    parser.add_argument("--deepseek-memory", type=float, default=4, help="GiB, as --memory for deepseek-v3")
    parser.add_argument("--curve-windows", type=int, default=32, help="calibration windows of the curves")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs", help="directory where the checkpoints are while they are needed")
    parser.add_argument("--small", action="store_true", help="tiny models, to see whether everything works; writes into runs/memory")
    arguments = parser.parse_args()
    if not Path("/proc/self/status").exists():
        raise SystemExit("this benchmark reads /proc, which only Linux has")
    kept = ROOT / "runs" / "memory"
    kept.mkdir(parents=True, exist_ok=True)
    code, results, warm = package_digest(), [], False
    scratch = arguments.scratch.resolve() / "moebit-bench-memory"
    for case in cases(arguments):
        file = kept / f"{case.key(arguments.threads, code)}.json"
        if case.kind not in arguments.only and not file.exists():
            continue
        log(f"{case.title}{' (measured before)' if file.exists() else ''}")
        if not file.exists():
            if not warm:  # what is compiled once per installation is compiled here and not in a measured layer
                measure(Case("warm-up", SMALL_QWEN, 1, 4, 64, arguments.recipe), scratch, arguments.threads)
                warm = True
            measured = measure(case, scratch, arguments.threads)
            file.write_text(json.dumps(measured))
        results.append(json.loads(file.read_text()) | {"case": asdict(case)})
        log(f"  {results[-1]['peak_bytes'] / GB:.2f} GB, {per_layer(results[-1]):.1f} s a layer")
    given = [f"--{key.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, list) else value}"
             for key, value in vars(arguments).items() if value != parser.get_default(key) and key != "small"]  # fmt: skip
    options = ["--small"] * arguments.small + given
    text = document(results, facts(arguments.threads, options), arguments)
    target = kept if arguments.small else HERE / "results"
    (target / "memory.md").write_text(text)
    draw(results, target / "memory.svg")
    print(text)
    return 1 if findings(results)[1] and not arguments.small else 0


if __name__ == "__main__":
    sys.exit(main())
