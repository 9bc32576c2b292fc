"""llm-compressor on one checkpoint, as its MoE examples run it. Started by speed.py in an environment of its own.

python run_llmcompressor.py MODEL TOKENS.jsonl OUT RESULT.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import outcome
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM


def main(model_path: str, tokens: str, out: str, result: str) -> None:
    began = time.perf_counter()
    # Not inside `load_quantizable_moe`, which loads the experts un-stacked: it makes transformers import its image processors, and
    # these need torchvision, whose ordinary Linux wheel cannot be imported beside a CPU build of torch. Un-stacking counts as loading.
    model = linearize_moe(AutoModelForCausalLM.from_pretrained(model_path, dtype="auto"))
    loaded = time.perf_counter()
    windows = [json.loads(line)["input_ids"] for line in Path(tokens).read_text().splitlines()]
    dataset = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]})
    oneshot(
        model=model,
        processor=None,
        dataset=dataset,
        recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head", "re:.*mlp.gate$"]),
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
    )
    model.save_pretrained(out, save_compressed=True)
    outcome.write(result, began, loaded, time.perf_counter(), ("llmcompressor", "compressed-tensors", "transformers", "torch"))


if __name__ == "__main__":
    main(*sys.argv[1:])
