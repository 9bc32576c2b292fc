"""Run as a program in an environment that has mlx: logits in mlx-lm, or dequantized weights.

`mlx_reader.py JOB.json OUT.npz`: the job is {"tokens": [[...]], "models": {name: directory},
"weights_only": [name]}. For each model: `NAME|logits`, and every
quantized matrix as MLX dequantizes it, `NAME|MODULE`. An error goes to standard output as a line of JSON.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model


def main(job_file: str, output: str) -> None:
    with open(job_file) as file:
        job = json.load(file)
    found = {}
    for name, directory in job["models"].items():
        try:
            model, _ = load_model(Path(directory))
            for path, module in tree_flatten(model.leaf_modules(), is_leaf=lambda m: hasattr(m, "weight")):
                if "scales" in module:
                    found[f"{name}|{path}"] = np.array(dequantized(module).astype(mx.float32))
            if name not in job.get("weights_only", ()):
                found[f"{name}|logits"] = np.array(model(mx.array(job["tokens"])).astype(mx.float32))
        except Exception as error:  # whatever it is: the caller wants to know which models run
            sys.stdout.write(json.dumps({name: f"{type(error).__name__}: {error}"}) + "\n")
    np.savez(output, **found)


def dequantized(module: object) -> mx.array:
    further = {} if module.get("global_scale") is None else {"global_scale": module["global_scale"]}
    grid = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    parts = [module["weight"], module["scales"], module.get("biases")]
    if further and module["weight"].ndim == 3:
        return mx.stack([mx.dequantize(w, s, global_scale=g, **grid) for w, s, g in zip(*parts[:2], further["global_scale"], strict=True)])
    return mx.dequantize(*parts, **grid, **further)


if __name__ == "__main__":
    main(*sys.argv[1:])
