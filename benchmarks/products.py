"""The bare matrix products of calibrated quantization on one MoE shape, each timed alone. Started by speed.py.

    python products.py SHAPE.json RESULT.json

What GPTQ cannot do without, however it is written, with the routed experts calibrated on the tokens that are routed to them:

  forward   every linear of a decoder layer once on the calibration tokens: its (quantized) output is what the next one sees. Experts
            on their own tokens, evenly spread; attention's two products on whole windows. bfloat16 where the processor has it.
  Hessian   X^T X for every set of inputs: one for query, key and value, one for the output projection, and for every expert
            one in front of gate and up and one in front of down. float32; the faster of the full product and BLAS's half (ssyrk).
  Cholesky  one factorisation of each of these. float32.
  solve     the products that carry the errors of finished columns into those that follow, block by block. float32.

No copying, gathering, activation function, rounding or packing is in here.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import has_bf16
from scipy.linalg.blas import ssyrk

BLOCK, REPEATS = 128, 3


@dataclass(frozen=True)
class Product:
    """`batch` products [m, k] x [k, n] in every layer; a Hessian has m = n inputs and k tokens, a Cholesky m = k = n."""

    part: str
    what: str
    batch: int
    m: int
    k: int
    n: int

    @property
    def flops(self) -> float:
        full = 2.0 * self.batch * self.m * self.k * self.n
        between_blocks = max(0.0, 1 - BLOCK / self.n) / 2
        return full * {"Cholesky": 1 / 6, "Hessian": 1 / 2, "solve": between_blocks}.get(self.part, 1.0)


def products(shape: dict[str, int]) -> list[Product]:
    hidden, intermediate, experts, length = shape["hidden"], shape["intermediate"], shape["experts"], shape["length"]
    tokens = shape["windows"] * length
    q, kv = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    each = tokens * shape["top_k"] // experts  # tokens of one expert
    scores = shape["windows"] * shape["heads"]
    return [
        Product("forward", "query, key, value", 1, tokens, hidden, q + 2 * kv),
        Product("forward", "attention scores", scores, length, shape["head_dim"], length),
        Product("forward", "attention values", scores, length, length, shape["head_dim"]),
        Product("forward", "output projection", 1, tokens, q, hidden),
        Product("forward", "router", 1, tokens, hidden, experts),
        Product("forward", "experts' gate and up", experts, each, hidden, 2 * intermediate),
        Product("forward", "experts' down", experts, each, intermediate, hidden),
        Product("Hessian", "query, key, value", 1, hidden, tokens, hidden),
        Product("Hessian", "output projection", 1, q, tokens, q),
        Product("Hessian", "experts' gate and up", experts, hidden, each, hidden),
        Product("Hessian", "experts' down", experts, intermediate, each, intermediate),
        Product("Cholesky", "query, key, value", 1, hidden, hidden, hidden),
        Product("Cholesky", "output projection", 1, q, q, q),
        Product("Cholesky", "experts' gate and up", experts, hidden, hidden, hidden),
        Product("Cholesky", "experts' down", experts, intermediate, intermediate, intermediate),
        Product("solve", "query, key, value", 1, q + 2 * kv, hidden, hidden),
        Product("solve", "output projection", 1, hidden, q, q),
        Product("solve", "experts' gate and up", experts, 2 * intermediate, hidden, hidden),
        Product("solve", "experts' down", experts, hidden, intermediate, intermediate),
    ]


def seconds_of(run: Callable[[], object]) -> float:
    """Median of the repeats after one that does not count."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def measure(p: Product, dtype: torch.dtype) -> float:
    """Seconds of one layer's."""
    if p.part == "forward":
        a, b = torch.randn(p.batch, p.m, p.k).to(dtype), torch.randn(p.batch, p.k, p.n).to(dtype)
        return seconds_of((lambda: a[0] @ b[0]) if p.batch == 1 else (lambda: a @ b))
    if p.part == "Hessian":
        x = torch.randn(p.batch, p.k, p.n)
        whole = seconds_of(lambda: [x_TN.T @ x_TN for x_TN in x])
        # ssyrk wants Fortran order: the transposed view of [k, n] is [n, k] in that order, so that nothing is copied.
        half = seconds_of(lambda: [ssyrk(1.0, x_TN.numpy().T) for x_TN in x])
        return min(whole, half)
    if p.part == "Cholesky":
        x = torch.randn(p.batch, p.n, p.n)
        h = x.mT @ x / p.n + torch.eye(p.n)
        return seconds_of(lambda: torch.linalg.cholesky_ex(h))
    w, h = torch.randn(p.batch, p.m, p.k), torch.randn(p.batch, p.k, p.n)

    def blocks() -> None:
        for start in range(BLOCK, p.n, BLOCK):
            torch.bmm(w[:, :, :start], h[:, :start, start : start + BLOCK])

    return seconds_of(blocks)


def main(shape_file: str, result: str) -> None:
    shape = json.loads(Path(shape_file).read_text())
    torch.manual_seed(0)
    dtype = torch.bfloat16 if has_bf16() else torch.float32
    rows: list[dict[str, Any]] = []
    for p in products(shape):
        used = dtype if p.part == "forward" else torch.float32
        seconds = measure(p, dtype) * shape["layers"]
        rows.append(
            {"part": p.part, "what": p.what, "dtype": str(used).removeprefix("torch."), "seconds": seconds,
             "rate": p.flops * shape["layers"] / seconds if seconds else 0.0}
        )  # fmt: skip
    Path(result).write_text(json.dumps({"rows": rows, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
