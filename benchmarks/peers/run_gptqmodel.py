"""GPTQModel on one checkpoint with its defaults. Started by speed.py in an environment of its own.

python run_gptqmodel.py MODEL TOKENS.jsonl OUT RESULT.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

# It wants two of its own worker threads on the processor and by default gives itself half as many as there are processors: with two
# it stops with "requests 2 workers but parent 'cpu' only has 1".
if (os.cpu_count() or 1) < 3:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import outcome
from gptqmodel import GPTQModel, QuantizeConfig


def main(model_path: str, tokens: str, out: str, result: str) -> None:
    began = time.perf_counter()
    model = GPTQModel.load(model_path, QuantizeConfig(bits=4, group_size=128, sym=True), device="cpu")
    loaded = time.perf_counter()
    windows = [json.loads(line)["input_ids"] for line in Path(tokens).read_text().splitlines()]
    calibration = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows]
    model.quantize(calibration)
    model.save(out)
    outcome.write(result, began, loaded, time.perf_counter(), ("gptqmodel", "transformers", "torch"))


if __name__ == "__main__":
    main(*sys.argv[1:])
