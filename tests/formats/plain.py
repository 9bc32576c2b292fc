"""Run as a program: logits of checkpoint directories in transformers alone. `plain.py JOB.json LOGITS.safetensors`

The job is {"tokens": [[...]], "models": {name: [directory, dtype]}}; a model that does not load is left out, its error goes to standard
output as a line of JSON.
"""

import json
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def main(job_file: str, output: str) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with open(job_file) as file:
        job = json.load(file)
    tokens, result = torch.tensor(job["tokens"]), {}
    for name, (directory, dtype) in job["models"].items():
        try:
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
            with torch.no_grad():
                result[name] = model(input_ids=tokens, use_cache=False).logits.float()
        except Exception as error:  # whatever it is: the caller wants to know which models run
            sys.stdout.write(json.dumps({name: f"{type(error).__name__}: {error}"}) + "\n")
    assert "moebit" not in sys.modules
    save_file(result, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
