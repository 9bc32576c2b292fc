"""`quantize`: a checkpoint in, a quantized checkpoint out. What cannot work is refused before the work begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch

from moebit.calibration.sampling import check_fits
from moebit.calibration.text import Texts, digest
from moebit.device import checked_device, made_on
from moebit.errors import BadInputError, InterruptedWorkError, is_out_of_memory
from moebit.formats.carried import carried_files
from moebit.formats.engines import ANY
from moebit.formats.followed import FollowedOutput, Output
from moebit.formats.gguf.sink import GgufSink
from moebit.formats.gguf.target import GgufTarget
from moebit.formats.opening import open_checkpoint, quantized_modules
from moebit.formats.output import JOURNAL, OutputDirectory, check_free, check_space, disk_error, partial_of, read_journal
from moebit.formats.sink import Sink
from moebit.memory import DEFAULT_MEMORY, Memory, memory_bytes, peak_resident_bytes
from moebit.model.structure import find_structure
from moebit.plan.bitplan import BitPlan, load_bit_plan
from moebit.plan.plan import SINKS, Plan, make_plan
from moebit.plan.transforms import transformed
from moebit.profiling.prepare import prepare
from moebit.quantize.context import Progress
from moebit.quantize.data import Data, Sources, Windows, calibration_set, gather
from moebit.quantize.documents import RunFacts, documents
from moebit.quantize.identity import check_unchanged, circumstances, identity, seen_contents
from moebit.quantize.report import LayerReport, Result
from moebit.quantize.run import Work, run
from moebit.ranks import Ranks, joined
from moebit.recipe import Recipe, load_recipe
from moebit.report.command import python_call
from moebit.storage.checkpoint import Checkpoint
from moebit.storage.config import read_config
from moebit.storage.contents import Seen
from moebit.storage.documents import one_line
from moebit.storage.edits import EditedWeights, untied_config
from moebit.storage.files import sync_file
from moebit.storage.shipped.entries import check_shipped
from moebit.storage.shipped.reading import plain_config
from moebit.streaming.store import freed_memory_kept
from moebit.tensor import kernels

Done = TypeVar("Done")


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    text: Texts = (),
    overrides: Mapping[str, Any] | None = None,
    plan: str | Path | BitPlan | None = None,
    profile: str | Path | None = None,
    format: str | None = None,
    llama_cpp: str | Path | None = None,
    gguf_pre: str | None = None,
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
        plan: bit widths that differ from the recipe's, a file or `BitPlan`; in the place of the recipe's allocation.
        profile: what `moebit profile` wrote, for allocation and switching; without one they profile the texts first.
        format: native, compressed-tensors, dense or gguf, instead of the recipe's.
        llama_cpp: a clone of llama.cpp whose converter is asked about a GGUF file, instead of the one of the extra `gguf`.
        gguf_pre: llama.cpp's name of the pre-tokenizer, for a tokenizer that its converter does not recognise.
        engine: what has to run the output: transformers, vllm, or any of them (`formats/engines.py`).
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
        "moebit.quantize", model, out, recipe=recipe, text=text, overrides=overrides, plan=plan, format=format,
        llama_cpp=llama_cpp, gguf_pre=gguf_pre,
        engine=(engine, ANY),
        device=(device, "cpu"), memory=(memory_bytes(memory), DEFAULT_MEMORY), seed=(seed, 0), accept_unquantized=accept_unquantized,
    )  # fmt: skip
    chosen = load_recipe(recipe, {**(overrides or {}), **({"format": format} if format else {})})
    where = checked_device(device)
    out = Path(out).resolve() if not Path(out).name else Path(out)
    if not 0 <= seed < 2**63:
        raise BadInputError(f"--seed {seed}: a number from 0 to 2^63 - 1")
    checkpoint = open_checkpoint(model, compute=None, follow_links=follow_links)
    _check_input(model, checkpoint, out)
    bits = load_bit_plan(plan) if isinstance(plan, str | Path) else plan
    report = progress or (lambda what, done, total: None)
    asking = _Request(chosen, bits, engine, where, memory_bytes(memory), seed, out, asked, report, follow_links)
    job = _prepare(asking, checkpoint, text, profile, accept_unquantized, _Gguf.of(chosen, llama_cpp, gguf_pre))
    if dry_run:
        check_free(out, resume=resume, overwrite=overwrite)
        return job.plan
    with joined() as ranks:
        return job.run(ranks, began, resume=resume, overwrite=overwrite)


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

    @classmethod
    def of(cls, recipe: Recipe, llama_cpp: str | Path | None, pre: str | None) -> _Gguf | None:
        if recipe.format == "gguf":
            return cls(Path(llama_cpp) if llama_cpp else None, pre)
        if llama_cpp or pre:
            raise BadInputError(f"--llama-cpp and --gguf-pre: the recipe's format is {recipe.format}; add --format gguf")
        return None

    def target(self, checkpoint: Checkpoint, weights: EditedWeights) -> GgufTarget:
        """What llama.cpp's converter makes of the checkpoint.

        Raises:
            BadInputError: what the converter does not know; a rotation that unties the head.
        """
        if weights.untied:
            raise BadInputError("format gguf: rotation.absorbed unties the head from the embeddings; set rotation.absorbed: none")
        target = GgufTarget.find(checkpoint.path, weights.stored_specs, self.llama_cpp, self.pre)
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
    device: torch.device
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
    weights = weights.on(asking.device)
    checkpoint = replace(checkpoint, weights=weights)
    target = gguf.target(checkpoint, weights) if gguf else None
    plan = make_plan(checkpoint, structure, asking.recipe, asking.memory, asking.bits, asking.engine, transforms, target)
    plan.coverage.check(accept_unquantized)
    data = gather(checkpoint, asking.recipe, Sources(text, profile, asking.bits, asking.seed))
    if data.sampled:
        check_fits(checkpoint, asking.memory)
    return _Job(asking, checkpoint, weights, plan, data)


@dataclass(frozen=True)
class _Job:
    """A quantization that is decided.

    Attributes:
        weights: those of the checkpoint, to which edits are added layer by layer.
    """

    asking: _Request
    checkpoint: Checkpoint
    weights: EditedWeights
    plan: Plan
    data: Data

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

    def run(self, ranks: Ranks, began: float, *, resume: bool, overwrite: bool) -> Result:
        """Do the work and finish the output."""
        asking = self.asking
        try:
            with freed_memory_kept():
                if not ranks.leads:
                    ranks.wait()  # for the one who writes: the input is good, and the output is theirs
                    return self._follow(ranks, FollowedOutput(partial_of(asking.out)), began)
                return self._lead(ranks, began, resume=resume, overwrite=overwrite)
        except OSError as error:
            raise disk_error(error, partial_of(asking.out)) from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise InterruptedWorkError(
                f"memory ran out ({one_line(error)}); what is finished is kept in {partial_of(asking.out)}: close other programs and go on "
                "with --resume, or start again with a smaller --memory and --overwrite"
            ) from error

    def _lead(self, ranks: Ranks, began: float, *, resume: bool, overwrite: bool) -> Result:
        """The part of the rank that checks the input and writes the output."""
        asking, seen = self.asking, self.check_before_work(resume)
        facts = identity(
            self.checkpoint, asking.recipe, self.data, asking.bits, memory=asking.memory, seed=asking.seed, device=str(asking.device)
        )
        if self.plan.gguf:
            facts = {**facts, "gguf_pre": self.plan.gguf.target.pre}
        known = {**facts, **circumstances(str(asking.device), seen)}
        with OutputDirectory(asking.out, known, resume=resume, overwrite=overwrite) as output:
            ranks.wait()
            worked = self._work(ranks, output, facts)
            return self._finish(output, worked, seen, began)

    def _follow(self, ranks: Ranks, output: FollowedOutput, began: float) -> Result:
        """The part of a rank that only works."""
        worked = self._work(ranks, output, {})
        return Result(self.asking.out, worked.plan, self.checkpoint.size_bytes, 0, worked.reports, time.perf_counter() - began)

    def _work(self, ranks: Ranks, output: Output, facts: dict[str, Any]) -> _Worked:
        """Calibration set, profile and layers."""
        asking, checkpoint, plan, coactivation = self.asking, self.checkpoint, self.plan, dict[int, list[list[int]]]()
        if asking.device.type == "cpu" and asking.recipe.needs_hessians:
            Thread(target=kernels.load).start()
        windows = _led(ranks, output, asking, lambda: calibration_set(output, checkpoint, self.data, asking.memory, asking.progress))
        if self.data.sampled and windows is not None:
            facts = {**facts, "calibration": digest(windows)}
        if (sets := self.data.sets) is not None:
            prepared = _led(ranks, output, asking, lambda: prepare(output, checkpoint, plan, asking.bits, sets, asking.progress))
            plan = make_plan(checkpoint, plan.structure, asking.recipe, asking.memory, prepared.bits, asking.engine, plan.transforms)
            facts, coactivation = {**facts, "profile": prepared.facts}, prepared.coactivation
        sink = SINKS[asking.recipe.format](self.weights, plan.modules, plan.activations)
        work = Work(checkpoint, plan, output, sink, str(asking.device), asking.progress, asking.seed, ranks)
        with made_on(asking.device):
            reports = run(work, Windows(windows, self.data.pool))
        return _Worked(plan, sink, reports, facts, coactivation)

    def _finish(self, output: OutputDirectory, worked: _Worked, seen: Seen, began: float) -> Result:
        """Documents, and the output's name."""
        asking, checkpoint, plan = self.asking, self.checkpoint, worked.plan
        size = self._write_gguf(output, worked.sink) or sum(file.stat().st_size for file in output.partial.glob("model-*.safetensors"))
        told = RunFacts(asking.out.name, size, time.perf_counter() - began, asking.command, peak_resident_bytes(), worked.coactivation)
        written = documents(checkpoint, plan, worked.facts, worked.reports, told)
        check_unchanged(checkpoint, seen)
        if plan.gguf:
            output.finish_file(self._gguf_name, written)
        else:
            config = worked.sink.config(_config(checkpoint, self.weights))
            output.finish(checkpoint.path, config, written, follow_links=asking.follow_links)
        return Result(asking.out, plan, checkpoint.size_bytes, size, worked.reports, time.perf_counter() - began)

    @property
    def _gguf_name(self) -> str:
        return f"{self.asking.out.name}.gguf"

    def _write_gguf(self, output: OutputDirectory, sink: Sink) -> int:
        """The size of the GGUF file, made of the shards; 0 where the format is another one."""
        if self.plan.gguf is None:
            return 0
        assert isinstance(sink, GgufSink)
        output.announce(self._gguf_name)
        file = output.partial / self._gguf_name
        sink.write(output.partial, file, self.plan.gguf)
        sync_file(file)
        return file.stat().st_size


@dataclass(frozen=True)
class _Worked:
    """What came of the work.

    Attributes:
        facts: for moebit.json. coactivation: by layer, for the report.
    """

    plan: Plan
    sink: Sink
    reports: list[LayerReport]
    facts: dict[str, Any]
    coactivation: dict[int, list[list[int]]]


def _led(ranks: Ranks, output: Output, asking: _Request, work: Callable[[], Done]) -> Done:
    """Work that is not shared out: rank 0 does it, and the others then find its results in the output."""
    with made_on(asking.device):
        if ranks.leads:
            result = work()
            ranks.wait()
            return result
        ranks.wait()
        if isinstance(output, FollowedOutput):
            output.refresh()
        return work()


def _config(checkpoint: Checkpoint, weights: EditedWeights) -> dict[str, Any]:
    """config.json without what it says about how the checkpoint was shipped: the output is no longer stored like that.

    Nor does it say that the head is tied to the embeddings, where it is its own now.
    """
    config = plain_config(read_config(checkpoint.path))
    return untied_config(config) if weights.untied else config
