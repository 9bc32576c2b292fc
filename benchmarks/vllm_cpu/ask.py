"""The vLLM side of check.py, run by the environment that setup.sh makes: next-token probabilities of one model directory.

    ask.py MODEL TOKENS.json PROBABILITIES.safetensors

TOKENS.json is a list of prompts (lists of ids). Written: `probabilities` [prompts, length - 1, vocabulary] float32, the model's
distribution of every token of a prompt but the first.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: its errors are ours
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # OMP_NUM_THREADS decides, not the machine's cores
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams


def main(model: str, tokens: str, output: str) -> None:
    with open(tokens) as file:
        prompts = json.load(file)
    with open(os.path.join(model, "config.json")) as file:
        vocabulary = json.load(file)["vocab_size"]
    llm = LLM(
        model, skip_tokenizer_init=True, enforce_eager=True, max_logprobs=vocabulary, max_model_len=256, dtype="bfloat16", max_num_seqs=8
    )
    wanted = SamplingParams(max_tokens=1, prompt_logprobs=vocabulary, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], wanted, use_tqdm=False)
    result = torch.zeros(len(prompts), len(prompts[0]) - 1, vocabulary)
    for prompt, answer in enumerate(answers):
        for position, logprobs in enumerate(answer.prompt_logprobs[1:]):
            for token, entry in logprobs.items():
                result[prompt, position, token] = entry.logprob
    save_file({"probabilities": result.exp()}, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
