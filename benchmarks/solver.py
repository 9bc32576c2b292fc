"""How fast is the batched solver? `make bench-solver`, or `python benchmarks/solver.py --help`.

One problem, solved four ways in one process: random weights, correlated inputs, 4 bits, groups of 128, static min-max scales.

  textbook            GPTQ as published (2210.17323) in plain torch: Cholesky, `cholesky_inverse`, Cholesky; a loop over columns, lazy
                      updates block by block; one matrix after the other.
  textbook, solves    the same with the inverse from triangular solves and one product, which BLAS can block.
  moebit              `solve_gptq`, all matrices in one call; also with the options that it has on by default.
  bare operations     what no such solver can do without: the Cholesky factorisations and the products between blocks.

The textbook's two forms are written here from the paper; they share nothing with moebit but the scales, so that all must reach
the same loss (checked to 1%; the run fails otherwise). Prints a table and writes it to benchmarks/results/solver.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# A cache of its own, so that the first call really compiles. numba reads this when it is imported, hence before moebit.
_CACHE = tempfile.TemporaryDirectory(prefix="moebit-bench-")
os.environ["NUMBA_CACHE_DIR"] = _CACHE.name

import numba  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from moebit.tensor import UniformGrid, minmax_grid, solve_gptq  # noqa: E402

BITS, GROUP, BLOCK, DAMPING = 4, 128, 128, 0.01
SCHEME = UniformGrid(GROUP, symmetric=False)
RESULTS = Path(__file__).parent / "results" / "solver.md"


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds for all matrices, and the Hessian loss where weights came out."""

    name: str
    seconds: float
    loss: float | None = None
    note: str = ""


def problem(matrices: int, size: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Weights [E, N, N] and Hessians [E, N, N] of inputs that a quarter as many directions nearly explain."""
    generator = torch.Generator().manual_seed(0)
    w_ENN = 0.02 * torch.randn(matrices, size, size, generator=generator)
    h_ENN = torch.empty(matrices, size, size)
    for h_NN in h_ENN:
        mix_RN = torch.randn(size // 4, size, generator=generator) / (size // 4) ** 0.5
        x_TN = torch.randn(tokens, size // 4, generator=generator) @ mix_RN + 0.3 * torch.randn(tokens, size, generator=generator)
        x_TN *= torch.exp(0.5 * torch.randn(size, generator=generator))
        torch.matmul(x_TN.T, x_TN, out=h_NN)
        h_NN /= tokens
    return w_ENN, h_ENN


def inverse_by_library(h_NN: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(h_NN))


def inverse_by_solves(h_NN: Tensor) -> Tensor:
    lower = torch.linalg.cholesky(h_NN)
    inverse_lower = torch.linalg.solve_triangular(lower, torch.eye(len(h_NN)), upper=False)
    return inverse_lower.T @ inverse_lower


def textbook(w_ON: Tensor, h_NN: Tensor, scale_OG: Tensor, zero_OG: Tensor, inverse: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
    """(dequantized weights, seconds spent on the factor) of one matrix. Paper, Algorithm 1."""
    began = time.perf_counter()
    damped = h_NN + DAMPING * h_NN.diagonal().mean() * torch.eye(len(h_NN))
    factor = torch.linalg.cholesky(inverse(damped), upper=True)
    factored = time.perf_counter() - began
    work, result = w_ON.clone(), torch.empty_like(w_ON)
    for start in range(0, work.shape[1], BLOCK):
        stop = min(start + BLOCK, work.shape[1])
        inside, corner = work[:, start:stop].clone(), factor[start:stop, start:stop]
        errors = torch.empty_like(inside)
        for i in range(stop - start):
            scale_O, zero_O = scale_OG[:, (start + i) // GROUP], zero_OG[:, (start + i) // GROUP]
            column = inside[:, i]
            rounded = scale_O * ((torch.round(column / scale_O) + zero_O).clamp(0, 2**BITS - 1) - zero_O)
            result[:, start + i] = rounded
            errors[:, i] = (column - rounded) / corner[i, i]
            inside[:, i + 1 :] -= torch.outer(errors[:, i], corner[i, i + 1 :])
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return result, factored


def hessian_loss(w_ENN: Tensor, result_ENN: Tensor, h_ENN: Tensor) -> float:
    d_ENN = result_ENN - w_ENN
    return float(sum(((d @ h) * d).sum(dtype=torch.float64) for d, h in zip(d_ENN, h_ENN, strict=True)))


def seconds_of(run: Callable[[], object], repeats: int) -> float:
    """Median over repeats."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def textbook_row(name: str, inverse: Callable[[Tensor], Tensor], w_ENN: Tensor, h_ENN: Tensor, count: int) -> tuple[Row, float]:
    """The row, and the same matrices' loss per matrix for the comparison (all matrices unless only `count` were run)."""
    scale, zero = minmax_grid(w_ENN, torch.full((len(w_ENN),), BITS), SCHEME)
    results, in_factor = [], 0.0
    began = time.perf_counter()
    for e in range(count):
        result, factored = textbook(w_ENN[e], h_ENN[e], scale[e], zero[e], inverse)
        results.append(result)
        in_factor += factored
    seconds = time.perf_counter() - began
    scaled = len(w_ENN) / count
    note = f"{in_factor * scaled:.1f} s of it for the factor" + (
        "" if count == len(w_ENN) else f"; timed on {count} and scaled ×{scaled:g}"
    )
    loss = hessian_loss(w_ENN[:count], torch.stack(results), h_ENN[:count])
    return Row(name, seconds * scaled, loss * scaled if count == len(w_ENN) else None, note), loss


def bare_rows(w_ENN: Tensor, h_ENN: Tensor, repeats: int) -> list[Row]:
    size = w_ENN.shape[-1]
    damped = h_ENN + DAMPING * torch.diag_embed(h_ENN.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(-1, size))

    def products() -> None:
        for start in range(BLOCK, size, BLOCK):
            torch.bmm(w_ENN[:, :, :start], h_ENN[:, :start, start : start + BLOCK])

    factoring = seconds_of(lambda: torch.linalg.cholesky_ex(damped), repeats)
    multiplying = seconds_of(products, repeats)
    return [
        Row("bare operations: Cholesky", factoring),
        Row("bare operations: products between blocks", multiplying),
        Row("bare operations, both", factoring + multiplying),
    ]


def our_rows(w_ENN: Tensor, h_ENN: Tensor, repeats: int) -> list[Row]:
    def solve(clip_search: bool, act_order: bool, backend: str = "numba") -> Tensor:
        result, _ = solve_gptq(
            w_ENN, h_ENN, BITS, SCHEME, act_order=act_order, clip_search=clip_search, damping=DAMPING, block=BLOCK, backend=backend
        )
        return result.dequantize()

    rows = []
    for name, clip_search, act_order in (
        ("moebit", False, False),
        ("moebit, act_order", False, True),
        ("moebit, clipping search", True, False),
        ("moebit, both (its defaults)", True, True),
    ):
        log(name)
        loss = hessian_loss(w_ENN, solve(clip_search, act_order), h_ENN)  # also the warm-up
        rows.append(Row(name, seconds_of(lambda c=clip_search, a=act_order: solve(c, a), repeats), loss))
    log("moebit, torch backend")
    began = time.perf_counter()
    result = solve(False, False, "torch")
    rows.append(
        Row("moebit without the compiled kernel", time.perf_counter() - began, hessian_loss(w_ENN, result, h_ENN), "`backend='torch'`")
    )
    return rows


def compile_seconds() -> float:
    """The first call in a fresh process with an empty cache, on a matrix so small that only compiling counts."""
    w, h = torch.randn(1, 4, GROUP), torch.eye(GROUP)[None]
    began = time.perf_counter()
    solve_gptq(w, h, BITS, SCHEME, clip_search=True, backend="numba")
    return time.perf_counter() - began


def table(rows: list[Row], reference_loss: float, ours: float, bare: float) -> str:
    lines = [
        "| | seconds | × moebit | × bare operations | loss ÷ textbook's | |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        loss = "" if row.loss is None else f"{row.loss / reference_loss:.4f}"
        lines.append(f"| {row.name} | {row.seconds:.2f} | {row.seconds / ours:.2f} | {row.seconds / bare:.2f} | {loss} | {row.note} |")
    return "\n".join(lines)


def machine() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next((line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} CPUs"


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, default=8)
    parser.add_argument("--size", type=int, default=2048, help="inputs and outputs of each matrix")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5, help="of everything but the textbook forms; the median counts")
    parser.add_argument("--textbook-matrices", type=int, default=None, help="run the textbook on so many only, and scale its time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    count = min(arguments.textbook_matrices or arguments.matrices, arguments.matrices)

    compiling = compile_seconds()
    log(f"compiling took {compiling:.1f} s; making the problem")
    w_ENN, h_ENN = problem(arguments.matrices, arguments.size, arguments.tokens)
    bare = bare_rows(w_ENN, h_ENN, arguments.repeats)
    ours = our_rows(w_ENN, h_ENN, arguments.repeats)
    log("the textbook")
    plain, plain_loss = textbook_row("textbook", inverse_by_library, w_ENN, h_ENN, count)
    log("the textbook with triangular solves")
    solves, solves_loss = textbook_row("textbook, inverse by triangular solves", inverse_by_solves, w_ENN, h_ENN, count)

    result, _ = solve_gptq(w_ENN[:count], h_ENN[:count], BITS, SCHEME, act_order=False, clip_search=False)
    same_loss = hessian_loss(w_ENN[:count], result.dequantize(), h_ENN[:count])
    reference_loss = plain_loss * ours[0].loss / same_loss if count < arguments.matrices else plain_loss
    candidates = {
        "triangular solves": solves_loss / plain_loss,
        "moebit": same_loss / plain_loss,
        "moebit, torch": ours[-1].loss / ours[0].loss,
    }
    apart = {name: ratio for name, ratio in candidates.items() if not abs(ratio - 1) <= 0.01}

    options = [
        f"--{key.replace('_', '-')} {value}" for key, value in vars(arguments).items() if key != "out" and value != parser.get_default(key)
    ]
    text = f"""# The batched solver against the textbook

{arguments.matrices} matrices of {arguments.size}×{arguments.size}, {BITS} bits, groups of {GROUP}, \
static min-max scales unless said otherwise, Hessians of {arguments.tokens} correlated inputs, float32.

{table([plain, solves, *ours, *bare], reference_loss, ours[0].seconds, bare[-1].seconds)}

Compiling the kernels took {compiling:.1f} s; they are cached on disk, so that happens once per installation, \
and is in no row above.
moebit and the bare operations: median of {arguments.repeats}; the other rows: one run. \
The rows without act_order and clipping search solve the same problem; their losses agree to 1%: {"no" if apart else "yes"}.
The textbook takes {plain.seconds / bare[-1].seconds:.1f} times the bare operations: that is the most that any solver built on these \
products could gain over it on this machine. torch's batched Cholesky is counted as torch delivers it, with the other half set to zero.

- command: `{" ".join(["python benchmarks/solver.py", *options])}`
- torch {torch.__version__}, numba {numba.__version__}, Python {platform.python_version()}
- {machine()}; torch uses {torch.get_num_threads()} threads, numba {numba.get_num_threads()}
"""
    print(text)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)
    if apart:
        log(f"losses differ from the textbook's by more than 1%: {apart}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
