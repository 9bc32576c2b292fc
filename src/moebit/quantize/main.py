"""`quantize`: a checkpoint in, a quantized checkpoint out. What cannot work is refused before the work begins."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from moebit.calibration.sampling import check_fits
from moebit.calibration.text import Texts, digest
from moebit.errors import BadInputError, InterruptedWorkError, is_out_of_memory
from moebit.formats.carried import carried_files
from moebit.formats.engines import ANY
from moebit.formats.gguf.sink import GgufSink
from moebit.formats.gguf.target import GgufTarget
from moebit.formats.opening import open_checkpoint, quantized_modules
from moebit.formats.output import JOURNAL, OutputDirectory, check_free, check_space, disk_error, partial_of, read_journal
from moebit.formats.sink import Sink
from moebit.memory import DEFAULT_MEMORY, Memory, memory_bytes, peak_resident_bytes
from moebit.model.structure import find_structure
from moebit.plan.bitplan import BitPlan, load_bit_plan
from moebit.plan.disk import DiskSize, output_config
from moebit.plan.plan import SINKS, Plan, make_plan
from moebit.plan.transforms import transformed
from moebit.profiling.prepare import Prepared, prepare
from moebit.quantize.budget import budget_changes, budget_recipe, preview
from moebit.quantize.context import Progress
from moebit.quantize.data import Data, Sources, Windows, calibration_set, gather
from moebit.quantize.documents import RunFacts, documents
from moebit.quantize.identity import check_unchanged, circumstances, identity, is_finished, seen_contents
from moebit.quantize.report import Result
from moebit.quantize.run import Work, run
from moebit.recipe import Recipe, load_recipe
from moebit.report.command import python_call
from moebit.storage.checkpoint import Checkpoint
from moebit.storage.contents import Seen
from moebit.storage.documents import one_line
from moebit.storage.edits import EditedWeights
from moebit.storage.files import sync_file
from moebit.storage.shipped.entries import check_shipped
from moebit.streaming.store import freed_memory_kept
from moebit.tensor import kernels


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
    if device != "cpu" and not torch.cuda.is_available():
        raise BadInputError(f"--device {device}: this torch sees no CUDA device; use --device cpu")
    out = Path(out).resolve() if not Path(out).name else Path(out)
    if not 0 <= seed < 2**63:
        raise BadInputError(f"--seed {seed}: a number from 0 to 2^63 - 1")
    checkpoint = open_checkpoint(model, compute=None, follow_links=follow_links)
    _check_input(model, checkpoint, out)
    given = load_bit_plan(plan) if isinstance(plan, str | Path) else plan
    chosen = chosen or budget_recipe(recipe, changes, budget, checkpoint)
    report = progress or (lambda what, done, total: None)
    asking = _Request(chosen, given, engine, device, memory_bytes(memory), seed, out, asked, report, follow_links)
    job = _prepare(asking, checkpoint, text, profile, accept_unquantized, _Gguf.of(chosen, llama_cpp, gguf_pre, shard_size))
    if dry_run:
        check_free(out, resume=resume, overwrite=overwrite)
        return job.preview()
    if resume and not overwrite and (finished := job.finished()):
        return finished
    seen = job.check_before_work(resume)
    return job.run(began, seen, resume=resume, overwrite=overwrite)


def _check_input(model: str | Path, checkpoint: Checkpoint, out: Path) -> None:
    """The checkpoint must not be quantized by moebit, and the output must not be it, nor hold it, nor lie in it."""
    if quantized_modules(checkpoint) is not None:
        raise BadInputError(f"{model} is already quantized; give the full-precision checkpoint")
    target, origin = out.resolve(), checkpoint.path.resolve()
    if target == origin or target in origin.parents or origin in target.parents:  # --overwrite would delete the input
        raise BadInputError(f"-o {out}: the output and the checkpoint {checkpoint.path} must be apart; choose another -o")


@dataclass(frozen=True)
class _Gguf:
    """What was said about the GGUF file, where one is written."""

    llama_cpp: Path | None
    pre: str | None
    shard_bytes: int

    @classmethod
    def of(cls, recipe: Recipe, llama_cpp: str | Path | None, pre: str | None, shard_size: Memory | None) -> _Gguf | None:
        if recipe.format == "gguf":
            return cls(Path(llama_cpp) if llama_cpp else None, pre, memory_bytes(shard_size, "--shard-size") if shard_size else 0)
        if llama_cpp or pre or shard_size:
            raise BadInputError(f"--llama-cpp, --gguf-pre and --shard-size: the recipe's format is {recipe.format}; add --format gguf")
        return None

    def target(self, checkpoint: Checkpoint, weights: EditedWeights) -> GgufTarget:
        """What llama.cpp's converter makes of the checkpoint.

        Raises:
            BadInputError: what the converter does not know; a rotation that unties the head.
        """
        if weights.untied:
            raise BadInputError("format gguf: rotation.absorbed unties the head from the embeddings; set rotation.absorbed: none")
        target = GgufTarget.find(checkpoint.path, weights.stored_specs, self.llama_cpp, self.pre, self.shard_bytes)
        target.check_tokenizer()
        return target


@dataclass(frozen=True)
class _Request:
    """What was asked for.

    Attributes:
        bits: widths that were given. out: the output's directory. command: the way to make it again.
    """

    recipe: Recipe
    bits: BitPlan | None
    engine: str
    device: str
    memory: int
    seed: int
    out: Path
    command: str
    progress: Progress
    follow_links: bool


def _prepare(
    asking: _Request,
    checkpoint: Checkpoint,
    text: Texts,
    profile: str | Path | None,
    accept_unquantized: bool,
    gguf: _Gguf | None,
) -> _Job:
    """Find the structure, decide the plan and gather the data: everything that can be refused before the work begins."""
    structure = find_structure(checkpoint.model)
    checkpoint, weights, transforms = transformed(checkpoint, structure, asking.recipe, asking.seed)
    target = gguf.target(checkpoint, weights) if gguf else None
    plan = make_plan(checkpoint, structure, asking.recipe, asking.memory, asking.bits, asking.engine, transforms, target)
    disk = _disk(asking, checkpoint, weights, plan, target)
    plan.coverage.check(accept_unquantized)
    data = gather(checkpoint, asking.recipe, Sources(text, profile, asking.bits, asking.seed))
    if data.sampled:
        check_fits(checkpoint, asking.memory)
    return _Job(asking, checkpoint, weights, plan, data, disk)


def _disk(asking: _Request, checkpoint: Checkpoint, weights: EditedWeights, plan: Plan, target: GgufTarget | None) -> DiskSize | None:
    """The sizes of the outputs among which a budget chooses; None without a budget."""
    if asking.recipe.allocation.kind != "budget":
        return None

    def planned(bits: BitPlan) -> Plan:
        return make_plan(checkpoint, plan.structure, asking.recipe, asking.memory, bits, asking.engine, plan.transforms, target)

    return DiskSize.find(checkpoint, weights, planned, follow_links=asking.follow_links)


@dataclass(frozen=True)
class _Job:
    """A quantization that is decided.

    Attributes:
        weights: those of the checkpoint, to which edits are added layer by layer. disk: sizes of outputs, for a budget.
    """

    asking: _Request
    checkpoint: Checkpoint
    weights: EditedWeights
    plan: Plan
    data: Data
    disk: DiskSize | None = None

    def preview(self) -> Plan:
        """The plan that would be carried out; for a budget, what it would be spent on."""
        if self.disk is None or self.data.sets is None:
            return self.plan
        return preview(self.checkpoint, self.plan, self.disk, self.data.sets, self.asking.progress)

    def _identity(self) -> dict[str, Any]:
        asking = self.asking
        facts = identity(
            self.checkpoint, asking.recipe, self.data, asking.bits, memory=asking.memory, seed=asking.seed, device=asking.device
        )
        if self.plan.gguf is None:
            return facts
        target = self.plan.gguf.target
        return {**facts, "gguf_pre": target.pre, **({"shard_bytes": target.shard_bytes} if target.shard_bytes else {})}

    def finished(self) -> Result | None:
        """The output that this run would make, if it is there and whole: job scripts are run twice.

        Raises:
            BadInputError: a whole output is there that another run made.
        """
        asking = self.asking
        unknown = {"profile", *(["calibration"] if self.data.sampled else [])}
        if not is_finished(asking.out, self._identity(), asking.recipe, unknown):
            return None
        files = [*asking.out.glob("*.safetensors"), *asking.out.glob("*.gguf")]
        return Result(asking.out, self.plan, self.checkpoint.size_bytes, sum(file.stat().st_size for file in files), [], 0.0, already=True)

    def check_before_work(self, resume: bool) -> Seen:
        """Return the content of the input; refuse a disk that is too small, files that cannot be carried, values that are not finite.

        Raises:
            BadInputError: naming the disk, or the tensor.
        """
        out, width = self.asking.out, int(self.checkpoint.config.get_text_config().hidden_size)
        carried_files(self.checkpoint.path, follow_links=self.asking.follow_links)  # refused now, and not after hours
        # A GGUF file is made of the layers' shards, which are removed when it is whole.
        check_space(out, self.plan.size_bytes * (2 if self.plan.gguf else 1) + self.data.streamed(self.asking.recipe) * width * 4 * 2)
        seen = seen_contents(self.checkpoint, read_journal(partial_of(out) / JOURNAL) if resume else [])
        check_shipped(self.checkpoint.weights.entries.values())
        return seen

    def run(self, began: float, seen: Seen, *, resume: bool, overwrite: bool) -> Result:
        """Do the work and finish the output."""
        asking, facts = self.asking, self._identity()
        try:
            directory = OutputDirectory(
                asking.out, {**facts, **circumstances(asking.device, seen, asking.recipe)}, resume=resume, overwrite=overwrite
            )
            with directory as output, freed_memory_kept():
                return self._fill(output, facts, seen, began)
        except OSError as error:
            raise disk_error(error, partial_of(asking.out)) from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise InterruptedWorkError(
                f"memory ran out ({one_line(error)}); what is finished is kept in {partial_of(asking.out)}: close other programs and go on "
                "with --resume, or start again with a smaller --memory and --overwrite"
            ) from error

    def _fill(self, output: OutputDirectory, facts: dict[str, Any], seen: Seen, began: float) -> Result:
        asking, checkpoint, plan, coactivation = self.asking, self.checkpoint, self.plan, dict[int, list[list[int]]]()
        if asking.device == "cpu" and asking.recipe.needs_hessians:
            Thread(target=kernels.load).start()
        windows = calibration_set(output, checkpoint, self.data, asking.memory, asking.progress)
        if self.data.sampled and windows is not None:
            facts = {**facts, "calibration": digest(windows)}
        if self.data.sets is not None:
            prepared = prepare(output, checkpoint, plan, asking.bits, self.data.sets, asking.progress, self.disk)
            plan = self._decided(prepared)
            facts, coactivation = {**facts, "profile": prepared.facts}, prepared.coactivation
        sink = SINKS[asking.recipe.format](self.weights, plan.modules, plan.activations)
        work = Work(checkpoint, plan, output, sink, asking.device, asking.progress, asking.seed)
        reports = run(work, Windows(windows, self.data.pool))
        files = self._write_gguf(output, sink, plan) or list(output.partial.glob("model-*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        told = RunFacts(
            asking.out.name, size, time.perf_counter() - began, asking.command, peak_resident_bytes(), coactivation, self.data.texts
        )
        written = documents(checkpoint, plan, facts, reports, told)
        check_unchanged(checkpoint, seen)
        if plan.gguf:
            output.finish_files([file.name for file in files], written)
        else:
            output.finish(checkpoint.path, sink.config(output_config(checkpoint, self.weights)), written, follow_links=asking.follow_links)
        return Result(asking.out, plan, checkpoint.size_bytes, size, reports, time.perf_counter() - began, texts=self.data.texts)

    def _decided(self, prepared: Prepared) -> Plan:
        """The plan with the widths or types that were chosen."""
        plan, asking = self.plan, self.asking
        target = plan.gguf.target if plan.gguf else None
        found = make_plan(
            self.checkpoint, plan.structure, asking.recipe, asking.memory, prepared.bits, asking.engine, plan.transforms, target
        )
        return replace(found, spent=prepared.facts["allocation"]) if self.disk is not None else found

    def _write_gguf(self, output: OutputDirectory, sink: Sink, plan: Plan) -> list[Path]:
        """The GGUF file, or the files that it is cut into, made of the shards; nothing where the format is another one."""
        if plan.gguf is None:
            return []
        assert isinstance(sink, GgufSink)
        whole = output.partial / f"{self.asking.out.name}.gguf"
        files = sink.write(output.partial, whole, plan.gguf, lambda files: output.announce([file.name for file in files]))
        for file in files:
            sync_file(file)
        return files
