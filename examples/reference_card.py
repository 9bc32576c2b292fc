"""Write reference/README.md from the training.json files beside the reference models.

python examples/reference_card.py
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "reference"
TRAINED = ("wiki", "novels", "python", "speeches")
HEAD = """# Reference models

Two small Mixture-of-Experts language models with real, trained routing, so that every method can be tried and measured without a
download and none is judged on one architecture alone. Trained from scratch by `examples/train_reference.py` (`make reference`) with
the configurations beside it; weights in bfloat16, Apache-2.0.

- **olmoe**: OLMoE's architecture, 15.8 M parameters. 4 layers of 32 experts (128 × 256), top-4, softmax routing that is not
  renormalised; q/k norms, untied head.
- **qwen2_moe**: Qwen2-MoE's architecture, 12.1 M parameters. 4 layers of 24 experts (128 × 256), top-4, renormalised; a shared expert
  behind a sigmoid gate, grouped-query attention, q/k/v biases, tied head.

`text/DOMAIN.{calib,tune,eval}.txt` are the texts. `calib` is for calibration (from the training part, where the domain was trained
on); `tune` and `eval` are held out: `tune` for choosing between settings, `eval` for tables only. The models were trained on wiki
(WikiText-2), novels, python (the standard library) and speeches; shakespeare, c, german and french are novel to them. Sources and
licences: [NOTICE](../NOTICE).

## What they learnt

Bits per byte on the held-out `eval` texts, beside a unigram model of the training tokens and `xz -9e` on the same text. Expert load is
the share of routed slots of the least and the most used expert, over all layers; an even load would be one in the number of experts,
and with four experts per token no share can exceed a quarter. The routing was hardly regularised: some experts are used by almost
every token and some by none, which is what calibration has to cope with. Made by `python examples/reference_card.py` from the
`training.json` that training wrote.
"""

COLUMNS = ("text", "in the training mix", "model", "unigram", "xz", "least used expert", "most used expert")


def main() -> None:
    parts = [HEAD]
    for name in ("olmoe", "qwen2_moe"):
        record = json.loads((ROOT / name / "training.json").read_text())
        parts.append(f"### {name}\n\nAfter {record['steps']:,} steps, {record['tokens']:,} tokens:\n")
        parts.append(f"| {' | '.join(COLUMNS)} |\n|---|---|---:|---:|---:|---:|---:|")
        for domain in sorted(record["domains"], key=lambda d: (d not in TRAINED, d)):
            row = record["domains"][domain]
            load = [share for layer in row["expert_load"] for share in layer]
            parts.append(
                f"| {domain} | {'yes' if domain in TRAINED else 'no'} | {row['bits_per_byte']:.3f} | {row['unigram_bits_per_byte']:.3f} "
                f"| {row['xz_bits_per_byte']:.3f} | {min(load):.2%} | {max(load):.2%} |"
            )
        parts.append("")
    (ROOT / "README.md").write_text("\n".join(parts).replace("\n\n\n", "\n\n"))


if __name__ == "__main__":
    main()
