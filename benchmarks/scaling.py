"""How long would one DeepSeek-V3 layer take on many GPUs? A calculation, no measurement: `python benchmarks/scaling.py --help`.

It counts what `moebit quantize` does for GPTQ at 4 bits in one layer with routed experts, and what its ranks tell each other
(`src/moebit/ranks.py`): operations divided by rates, bytes by bandwidths, nothing overlapped. The rates are assumptions until `make
bench-gpu` has run on a device; give its figures as options. Writes benchmarks/results/scaling.md.

What is shared out: forwards by batches, strips of second moments, the experts. What every rank does alike: solving attention and
shared experts, and adding up what the experts of all ranks put out. Every rank gets: the inputs of every group of linears and of the
experts, the experts' outputs by routed slot in float32, the hidden states, and the packed experts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import facts

RESULTS = Path(__file__).parent / "results" / "scaling.md"
LAYERS = 58  # with routed experts; three more are dense
PARTS = 16  # into which a layer's experts are cut (quantize/context.py): so many ranks have some


@dataclass(frozen=True)
class Layer:
    """DeepSeek-V3's shapes: hidden, intermediate, experts, experts per token; attention's linears as (outputs, inputs), by shared input."""

    hidden: int = 7168
    intermediate: int = 2048
    experts: int = 256
    top_k: int = 8

    @property
    def groups(self) -> list[tuple[int, int]]:
        return [(1536 + 576, self.hidden), (128 * 192, 1536), (128 * 256, 512), (self.hidden, 128 * 128)]

    @property
    def expert(self) -> int:
        return 3 * self.hidden * self.intermediate


@dataclass(frozen=True)
class Machine:
    """Assumed rates.

    Attributes:
        bf16, fp32: operations per second of large products. memory: of adding up, inside, outside, disk: bytes per second.
    """

    bf16: float
    fp32: float
    memory: float
    inside: float
    outside: float
    disk: float


def seconds(layer: Layer, tokens: int, machine: Machine, gpus: int, hosts: int) -> dict[str, float]:
    """Seconds of the parts of one layer."""
    ranks = gpus * hosts
    shared = 1 / min(ranks, PARTS)
    slots, square = tokens * layer.top_k, layer.hidden**2 + layer.intermediate**2
    attention = sum(out * inputs for out, inputs in layer.groups)
    forward = 2 * tokens * (2 * attention + layer.expert) + 2 * slots * layer.expert
    moments = 1.25 * (slots * square + tokens * (sum(inputs**2 for _, inputs in layer.groups) + 2 * layer.hidden**2))
    expert_solve = layer.experts * (2 * layer.intermediate * layer.hidden**2 + layer.hidden * layer.intermediate**2)
    expert_solve += layer.experts * (layer.hidden**3 + layer.intermediate**3) / 3
    alike = sum(out * inputs**2 + inputs**3 / 3 for out, inputs in layer.groups)
    link = machine.outside if hosts > 1 else machine.inside
    return {
        "forwards": forward / machine.bf16 / ranks,
        "second moments": moments / machine.fp32 * shared,
        "solving experts": expert_solve / machine.fp32 * shared,
        "solving the rest": alike / machine.fp32,
        "adding up": 3 * 4 * slots * layer.hidden / machine.memory,
        "exchange": sum(moved(layer, tokens).values()) * (1 - 1 / ranks) / link,
        "reading and writing": 2.5 * layer.experts * layer.expert / machine.disk,
    }


def moved(layer: Layer, tokens: int) -> dict[str, float]:
    """Bytes that reach every rank in one layer, those it has itself included."""
    return {
        "inputs of linears": 2.0 * tokens * sum(inputs for _, inputs in layer.groups),
        "inputs of experts": 2.0 * tokens * layer.hidden,
        "outputs of experts": 4.0 * tokens * layer.top_k * layer.hidden,
        "hidden states": 2.0 * tokens * layer.hidden,
        "packed experts": 0.52 * layer.experts * layer.expert,
        "strips of second moments": 2.5 * (sum(inputs**2 for _, inputs in layer.groups) + layer.hidden**2),
    }


def rows(layer: Layer, tokens: int, machine: Machine) -> Iterator[str]:
    places = {"1 GPU": (1, 1), "8 GPUs": (8, 1), "4 hosts of 8": (8, 4)}
    found = {name: seconds(layer, tokens, machine, *place) for name, place in places.items()}
    yield "| seconds of one layer | " + " | ".join(places) + " |\n|---|" + "---:|" * len(places)
    for part in found["1 GPU"]:
        yield f"| {part} | " + " | ".join(f"{times[part]:.2f}" for times in found.values()) + " |"
    totals = [sum(times.values()) for times in found.values()]
    yield "| together | " + " | ".join(f"{total:.1f}" for total in totals) + " |"
    yield f"| minutes of {LAYERS} layers | " + " | ".join(f"{total * LAYERS / 60:.0f}" for total in totals) + " |"
    yield "| most of it | " + " | ".join(max(times, key=lambda part, t=times: t[part]) for times in found.values()) + " |"  # type: ignore[misc]
    yield ""
    yield "| bytes that reach every rank in one layer | GB |\n|---|---:|"
    for what, count in moved(layer, tokens).items():
        yield f"| {what} | {count / 1e9:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128 * 2048)
    for name, value, told in (
        ("bf16", 400e12, "operations/s"), ("fp32", 30e12, "operations/s"), ("memory", 2e12, "bytes/s"), ("inside", 200e9, "bytes/s"),
        ("outside", 40e9, "bytes/s"), ("disk", 5e9, "bytes/s"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=float, default=value, help=f"{told} (default {value:.0e})")
    asked = parser.parse_args()
    machine = Machine(asked.bf16, asked.fp32, asked.memory, asked.inside, asked.outside, asked.disk)
    text = "\n".join(rows(Layer(), asked.tokens, machine))
    stated = ", ".join(f"{name} {value:.0e}" for name, value in vars(machine).items())
    RESULTS.write_text(
        f"# One DeepSeek-V3 layer on many GPUs, calculated\n\nNothing here is measured: `benchmarks/scaling.py` says what is counted.\n\n"
        f"{text}\n\n- assumed per second: {stated}; {asked.tokens} tokens\n{facts(1, sys.argv[1:])}\n"
    )
    print(text)


if __name__ == "__main__":
    main()
