"""A quantization that is decided: what is checked before the work, the work, and how it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch

from moebit.calibration.sampling import check_fits
from moebit.calibration.text import Texts, digest
from moebit.device import made_on
from moebit.errors import BadInputError, InterruptedWorkError, is_out_of_memory
from moebit.formats.carried import carried_files
from moebit.formats.followed import FollowedOutput, Output
from moebit.formats.gguf.sink import GgufSink
from moebit.formats.gguf.target import GgufTarget
from moebit.formats.output import JOURNAL, OutputDirectory, check_space, disk_error, partial_of, read_journal
from moebit.formats.sink import Sink
from moebit.formats.sinks import SINKS
from moebit.memory import Memory, memory_bytes, peak_resident_bytes
from moebit.model.structure import find_structure
from moebit.plan.bitplan import BitPlan
from moebit.plan.disk import DiskSize, output_config
from moebit.plan.plan import Plan, make_plan
from moebit.plan.transforms import transformed
from moebit.profiling.prepare import Prepared, prepare
from moebit.quantize.budget import preview
from moebit.quantize.context import Progress
from moebit.quantize.data import Data, Sources, Windows, calibration_set, gather
from moebit.quantize.documents import RunFacts, documents
from moebit.quantize.identity import check_unchanged, circumstances, identity, is_finished, seen_contents
from moebit.quantize.report import LayerReport, Result
from moebit.quantize.run import Work, run
from moebit.ranks import Ranks
from moebit.recipe import Recipe
from moebit.storage.checkpoint import Checkpoint
from moebit.storage.contents import Seen
from moebit.storage.documents import one_line
from moebit.storage.edits import EditedWeights
from moebit.storage.files import sync_file
from moebit.storage.shipped.entries import check_shipped
from moebit.streaming.store import freed_memory_kept
from moebit.tensor import kernels

Done = TypeVar("Done")


@dataclass(frozen=True)
class GgufChoice:
    """What was said about the GGUF file, where one is written."""

    llama_cpp: Path | None
    pre: str | None
    shard_bytes: int

    @classmethod
    def of(cls, recipe: Recipe, llama_cpp: str | Path | None, pre: str | None, shard_size: Memory | None) -> GgufChoice | None:
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
class Request:
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


def prepare_job(
    asking: Request,
    checkpoint: Checkpoint,
    text: Texts,
    profile: str | Path | None,
    accept_unquantized: bool,
    gguf: GgufChoice | None,
) -> Job:
    """Find the structure, decide the plan and gather the data: everything that can be refused before the work begins."""
    structure = find_structure(checkpoint.model)
    checkpoint, weights, transforms = transformed(checkpoint, structure, asking.recipe, asking.seed)
    weights = weights.on(asking.device)
    checkpoint = replace(checkpoint, weights=weights)
    target = gguf.target(checkpoint, weights) if gguf else None
    plan = make_plan(checkpoint, structure, asking.recipe, asking.memory, asking.bits, asking.engine, transforms, target)
    disk = _disk(asking, checkpoint, weights, plan, target)
    plan.coverage.check(accept_unquantized)
    data = gather(checkpoint, asking.recipe, Sources(text, profile, asking.bits, asking.seed))
    if data.sampled:
        check_fits(checkpoint, asking.memory)
    return Job(asking, checkpoint, weights, plan, data, disk)


def _disk(asking: Request, checkpoint: Checkpoint, weights: EditedWeights, plan: Plan, target: GgufTarget | None) -> DiskSize | None:
    """The sizes of the outputs among which a budget chooses; None without a budget."""
    if asking.recipe.allocation.kind != "budget":
        return None

    def planned(bits: BitPlan) -> Plan:
        return make_plan(checkpoint, plan.structure, asking.recipe, asking.memory, bits, asking.engine, plan.transforms, target)

    return DiskSize.find(checkpoint, weights, planned, follow_links=asking.follow_links)


@dataclass(frozen=True)
class Job:
    """A quantization that is decided.

    Attributes:
        weights: those of the checkpoint, to which edits are added layer by layer. disk: sizes of outputs, for a budget.
    """

    asking: Request
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
            self.checkpoint, asking.recipe, self.data, asking.bits, memory=asking.memory, seed=asking.seed, device=str(asking.device)
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
        facts = self._identity()
        known = {**facts, **circumstances(str(asking.device), seen, asking.recipe)}
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
            prepared = _led(ranks, output, asking, lambda: prepare(output, checkpoint, plan, asking.bits, sets, asking.progress, self.disk))
            plan = self._decided(prepared)
            facts, coactivation = {**facts, "profile": prepared.facts}, prepared.coactivation
        sink = SINKS[asking.recipe.format](self.weights, plan.modules, plan.activations)
        work = Work(checkpoint, plan, output, sink, str(asking.device), asking.progress, asking.seed, ranks)
        with made_on(asking.device):
            reports = run(work, Windows(windows, self.data.pool))
        return _Worked(plan, sink, reports, facts, coactivation)

    def _finish(self, output: OutputDirectory, worked: _Worked, seen: Seen, began: float) -> Result:
        """Documents, and the output's name."""
        asking, checkpoint, plan = self.asking, self.checkpoint, worked.plan
        files = self._write_gguf(output, worked.sink, plan) or list(output.partial.glob("model-*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        told = RunFacts(
            asking.out.name, size, time.perf_counter() - began, asking.command, peak_resident_bytes(), worked.coactivation, self.data.texts
        )
        written = documents(checkpoint, plan, worked.facts, worked.reports, told)
        check_unchanged(checkpoint, seen)
        if plan.gguf:
            output.finish_files([file.name for file in files], written)
        else:
            config = worked.sink.config(output_config(checkpoint, self.weights))
            output.finish(checkpoint.path, config, written, follow_links=asking.follow_links)
        return Result(asking.out, plan, checkpoint.size_bytes, size, worked.reports, time.perf_counter() - began, texts=self.data.texts)

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


def _led(ranks: Ranks, output: Output, asking: Request, work: Callable[[], Done]) -> Done:
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
