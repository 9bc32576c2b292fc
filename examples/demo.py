"""The main job on a shipped model: quantize it on real text, load the result back, and say what it cost and what it saved.

make demo          (or: .venv/bin/python examples/demo.py --recipe gptq-w4)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
KNOWN, NOVEL = ("wiki", "python"), ("c",)
# In a process of its own, so that the measured memory is that of the loaded model and of nothing that made it.
LOAD = """
import json, os, sys
import torch, transformers
def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
transformers.utils.logging.disable_progress_bar()
import moebit
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
before = resident()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
grown = resident() - before
held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
ids = tokenizer("The history of the", return_tensors="pt").input_ids
text = tokenizer.decode(model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0])
print(json.dumps({"held": held, "text": text, "grown": grown}))
"""


def loaded(model: Path) -> dict[str, Any]:
    """Load a model with transformers' from_pretrained in a fresh process: bytes its tensors hold, by how
    much the process grew, and a sentence it writes."""
    run = subprocess.run([sys.executable, "-c", LOAD, str(model)], capture_output=True, text=True, check=True)
    return dict(json.loads(run.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "reference" / "olmoe")
    parser.add_argument("--recipe", default="gptq-w3")
    parser.add_argument("--out", type=Path, help="keep the quantized model here")
    parser.add_argument("--max-tokens", type=int, default=30_000, help="evaluated tokens of each text")
    args = parser.parse_args()

    import moebit

    console = Console()
    texts = ROOT / "reference" / "text"
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch) / f"{args.model.name}-{args.recipe}"
        with console.status(f"quantizing {args.model.name} with {args.recipe} on {', '.join(KNOWN)} …"):
            calibration = {name: texts / f"{name}.calib.txt" for name in KNOWN}
            result = moebit.quantize(args.model, out, recipe=args.recipe, text=calibration, overwrite=True)
        assert isinstance(result, moebit.Result)
        evaluation = {name: texts / f"{name}.eval.txt" for name in (*KNOWN, *NOVEL)}
        with console.status("loading it back and comparing it with the original …"):
            before = moebit.evaluate(args.model, text=evaluation, max_tokens=args.max_tokens)
            after = moebit.evaluate(out, against=args.model, text=evaluation, max_tokens=args.max_tokens)
            full, packed = loaded(args.model), loaded(out)

        summary = Table("", "before", "after", title=f"{args.model.name}, {args.recipe}, {result.seconds:.0f} s")
        summary.add_row("size on disk", f"{result.size_before / 1e6:.1f} MB", f"{result.size_after / 1e6:.1f} MB")
        summary.add_row("bits per quantized weight", "16", f"{after['average_bits']:.2f}")
        summary.add_row("weights in memory, loaded", f"{int(full['held']) / 1e6:.1f} MB", f"{int(packed['held']) / 1e6:.1f} MB")
        summary.add_row("process grew by loading", f"{int(full['grown']) / 1e6:.1f} MB", f"{int(packed['grown']) / 1e6:.1f} MB")
        console.print(summary)
        quality = Table("held-out text", "perplexity before", "after", "KL x 1000", "tokens with the same experts", title="what it cost")
        for name, row in after["texts"].items():
            label = f"{name} ({'calibrated on' if name in KNOWN else 'novel'})"
            ppl = f"{before['texts'][name]['perplexity']:.3f}", f"{row['perplexity']:.3f}"
            quality.add_row(label, *ppl, f"{1000 * row['kl']:.2f}", f"{row['routing_exact']:.1%}")
        console.print(quality)
        console.print(f"[dim]original:  [/dim] {full['text']!r}\n[dim]quantized: [/dim] {packed['text']!r}")
        if args.out:
            console.print(f"kept in {out}")


if __name__ == "__main__":
    main()
