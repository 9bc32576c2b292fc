"""`quantize`: a checkpoint in, a quantized checkpoint out. What cannot work is refused before the work begins."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebit.calibration.text import Texts
from moebit.device import checked_device
from moebit.errors import BadInputError
from moebit.formats.engines import ANY
from moebit.formats.opening import open_checkpoint, quantized_modules
from moebit.formats.output import check_free
from moebit.memory import DEFAULT_MEMORY, Memory, memory_bytes
from moebit.plan.bitplan import BitPlan, load_bit_plan
from moebit.plan.plan import Plan
from moebit.quantize.budget import budget_changes, budget_recipe
from moebit.quantize.context import Progress
from moebit.quantize.job import GgufChoice, Request, prepare_job
from moebit.quantize.report import Result
from moebit.ranks import joined
from moebit.recipe import Recipe, load_recipe
from moebit.report.command import python_call
from moebit.storage.checkpoint import Checkpoint


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    text: Texts = (),
    overrides: Mapping[str, Any] | None = None,
    size: Memory | None = None,
    bits: float | None = None,
    plan: str | Path | BitPlan | None = None,
    profile: str | Path | None = None,
    format: str | None = None,
    llama_cpp: str | Path | None = None,
    gguf_pre: str | None = None,
    shard_size: Memory | None = None,
    engine: str = ANY,
    device: str = "cpu",
    memory: Memory = DEFAULT_MEMORY,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    accept_unquantized: bool = False,
    follow_links: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> Result | Plan:
    """Quantize a checkpoint into the directory `out`; the plan alone with `dry_run`.

    Args:
        model: directory or hub id of a checkpoint, full-precision or shipped quantized (docs/inputs.md).
        recipe: preset name, YAML file, dict; default `gptq-w4`. `overrides`: {"weights.bits": 3, ...} on top.
        size: how large the output may be, bytes or a size such as `12GB`: all that an engine reads, met from below. bits: instead of
            it, the average on disk of everything quantized. Either finds the best choice of what the engine can vary (docs/budget.md).
        plan: bit widths that differ from the recipe's, a file or `BitPlan`; in the place of the recipe's allocation.
        profile: what `moebit profile` wrote, for allocation and switching; without one they profile the texts first.
        format: native, compressed-tensors, gptq, awq, mlx, gguf or dense, instead of the recipe's.
        llama_cpp: a clone of llama.cpp whose converter is asked about a GGUF file, instead of the one of the extra `gguf`.
        gguf_pre: llama.cpp's name of the pre-tokenizer, for a tokenizer that its converter does not recognise.
        shard_size: bytes, or a size such as `40GB`, that the tensors of one GGUF file may take; more of them become several files.
        engine: what has to run the output: transformers, vllm, sglang, or any of them (`formats/engines.py`).
        text: calibration texts, `[NAME=]FILE` items or a mapping; needed unless the recipe rounds to nearest or lets the model write its
            own. For such a recipe, text that is given takes the sample's place, or its share of the set.
        memory: bytes, or a size such as `4GiB`, that the work may take; bounds chunks, and spills activations to disk.
        seed: chooses the calibration windows. The same input, recipe, seed and memory give the same bytes (on the same kind of
            machine, with as many threads: float sums differ between them).
        resume: go on with an interrupted run after its last whole layer.
        accept_unquantized: go on even if more than 5% of the expert parameters would stay in full precision.
        follow_links: read and carry files of the checkpoint that are links out of its folder, too.
        progress: called with (what, done, total).
        command: what to write into the report as the way to make it again; by default, this call.

    Raises:
        BadInputError: before any work where it can be known before: the model, the recipe, the text, the output, the disk.
        InterruptedWorkError: the disk failed on the way; resume goes on.
    """
    began = time.perf_counter()
    asked = command or python_call(
        "moebit.quantize", model, out, recipe=recipe, text=text, overrides=overrides, size=size, bits=bits, plan=plan, format=format,
        llama_cpp=llama_cpp, gguf_pre=gguf_pre, shard_size=shard_size,
        engine=(engine, ANY),
        device=(device, "cpu"), memory=(memory_bytes(memory), DEFAULT_MEMORY), seed=(seed, 0), accept_unquantized=accept_unquantized,
    )  # fmt: skip
    budget = budget_changes(engine, size, bits)
    if budget and plan is not None:
        raise BadInputError("--plan has every width; leave --size and --bits out")
    changes = {**(overrides or {}), **({"format": format} if format else {})}
    chosen = load_recipe(recipe, changes) if not budget else None
    where = checked_device(device)
    out = Path(out).resolve() if not Path(out).name else Path(out)
    if not 0 <= seed < 2**63:
        raise BadInputError(f"--seed {seed}: a number from 0 to 2^63 - 1")
    checkpoint = open_checkpoint(model, compute=None, follow_links=follow_links)
    _check_input(model, checkpoint, out)
    given = load_bit_plan(plan) if isinstance(plan, str | Path) else plan
    chosen = chosen or budget_recipe(recipe, changes, budget, checkpoint)
    report = progress or (lambda what, done, total: None)
    asking = Request(chosen, given, engine, where, memory_bytes(memory), seed, out, asked, report, follow_links)
    job = prepare_job(asking, checkpoint, text, profile, accept_unquantized, GgufChoice.of(chosen, llama_cpp, gguf_pre, shard_size))
    if dry_run:
        check_free(out, resume=resume, overwrite=overwrite)
        return job.preview()
    if resume and not overwrite and (finished := job.finished()):
        return finished
    with joined() as ranks:
        return job.run(ranks, began, resume=resume, overwrite=overwrite)


def _check_input(model: str | Path, checkpoint: Checkpoint, out: Path) -> None:
    """The checkpoint must not be quantized by moebit, and the output must not be it, nor hold it, nor lie in it."""
    if quantized_modules(checkpoint) is not None:
        raise BadInputError(f"{model} is already quantized; give the full-precision checkpoint")
    target, origin = out.resolve(), checkpoint.path.resolve()
    if target == origin or target in origin.parents or origin in target.parents:  # --overwrite would delete the input
        raise BadInputError(f"-o {out}: the output and the checkpoint {checkpoint.path} must be apart; choose another -o")
