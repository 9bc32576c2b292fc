"""The straight line: checkpoint in, quantized checkpoint out, one decoder layer at a time.

    plan -> embed calibration windows -> for each layer: attention, routing, experts chunk by chunk, advance -> finish

Each layer is calibrated on what the quantized layers before it produce. Each expert is read once for it, and once before to look for
NaN, and written once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn

from moebit.calibration.sampling import Settings, check_fits, kept_windows, sampling_settings
from moebit.calibration.text import Texts, calibration_windows, digest, load_tokenizer, parse_texts, tokenize
from moebit.errors import BadInputError, InterruptedWorkError, is_out_of_memory
from moebit.formats.carried import carried_files
from moebit.formats.compressed_tensors import CompressedWeights
from moebit.formats.engines import ANY, verdicts
from moebit.formats.inputs_config import describe_activations
from moebit.formats.opening import activations_of, average_bits, open_checkpoint, quantized_modules
from moebit.formats.output import JOURNAL, SAMPLE, OutputDirectory, check_free, check_space, disk_error, partial_of, read_journal
from moebit.formats.profile import Profile
from moebit.formats.sink import SINKS, Sink, put_stored
from moebit.methods.balance import further_windows
from moebit.model.structure import LayerSites, find_structure
from moebit.plan.plan import BitPlan, Plan, describe_structure, load_bit_plan, make_plan
from moebit.plan.transforms import transformed
from moebit.profiling.prepare import check_profile, prepare
from moebit.profiling.profile import data_sets
from moebit.quantize.documents import documents
from moebit.quantize.layer import LayerJob, LayerReport, Progress, drifting
from moebit.recipe import Recipe, load_recipe
from moebit.report.command import python_call
from moebit.storage.checkpoint import Checkpoint, HubWeights, checkpoint_fingerprint, read_config
from moebit.storage.contents import Seen, changed, look_through
from moebit.storage.documents import one_line
from moebit.storage.edits import EditedWeights, untied_config
from moebit.storage.files import TensorSpec, read_header
from moebit.storage.shipped import check_shipped, plain_config
from moebit.streaming.reference import captured_inputs
from moebit.streaming.routing import Routing, reference_step
from moebit.streaming.store import freed_memory_kept, peak_resident_bytes
from moebit.streaming.stream import Stream
from moebit.streaming.streams import Streams
from moebit.tensor import backend_of, kernels

DEFAULT_MEMORY = 4 * 2**30


@dataclass(frozen=True)
class Result:
    """A finished quantization."""

    path: Path
    plan: Plan
    size_before: int
    size_after: int
    layers: list[LayerReport]
    seconds: float

    @property
    def fallbacks(self) -> int:
        return sum(layer.fallbacks for layer in self.layers)

    @property
    def unseen_experts(self) -> int:
        return sum(layer.unseen_experts for layer in self.layers)

    @property
    def skipped(self) -> dict[str, int]:
        """What the recipe asks for and was left, as "what: reason" with the number of places."""
        left = [f"{what}: {reason}" for layer in self.layers for what, reason in layer.router.get("skipped", {}).items()]
        left += [f"smoothing: {reason}" for layer in self.layers for reason in layer.smoothing.get("skipped", {}).values()]
        left += [f"solver.drift: {row['skipped']}" for layer in self.layers for row in layer.drift.values() if "skipped" in row]
        left += [f"calibration.coverage: {layer.coverage['skipped']}" for layer in self.layers if "skipped" in layer.coverage]
        return dict(Counter(left))


def inspect(
    model: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    format: str | None = None,
    engine: str = ANY,
    memory: int = DEFAULT_MEMORY,
    follow_links: bool = False,
) -> dict[str, Any]:
    """Structure, sizes and, with a recipe, what it would make of the model. Reads headers, no weights.

    Raises:
        BadInputError: not a model that moebit understands, or a recipe that does not fit it.
    """
    checkpoint = open_checkpoint(model, follow_links=follow_links)
    structure = find_structure(checkpoint.model)
    result = describe_structure(checkpoint, structure)
    packed = quantized_modules(checkpoint)
    if packed is not None:
        merged = checkpoint.weights.merged() if isinstance(checkpoint.weights, CompressedWeights) else ()
        activations = activations_of(checkpoint)
        result["quantized"] = {
            "average_bits": average_bits(checkpoint),
            "format": packed[0],
            "engines": {name: verdict.describe() for name, verdict in verdicts(*packed, structure, merged, activations).items()},
            **({"activations": describe_activations(activations)} if activations else {}),
        }
        if recipe is not None:
            raise BadInputError(f"{model} is already quantized; give the full-precision checkpoint")
    elif recipe is not None:
        chosen = load_recipe(recipe, {"format": format} if format else {})
        checkpoint, transforms = transformed(checkpoint, structure, chosen, 0)
        result["plan"] = make_plan(checkpoint, structure, chosen, memory, engine=engine, transforms=transforms).describe()
    return result


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
    engine: str = ANY,
    device: str = "cpu",
    memory: int = DEFAULT_MEMORY,
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
        format: native, compressed-tensors or dense, instead of the recipe's.
        engine: what has to run the output: transformers, vllm, or any of them (`formats/engines.py`).
        text: calibration texts, `[NAME=]FILE` items or a mapping; needed unless the recipe rounds to nearest or lets the model write its
            own. For such a recipe, text that is given takes the sample's place, or its share of the set.
        memory: bytes that the work may take; bounds chunks, and spills activations to disk.
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
        "moebit.quantize", model, out, recipe=recipe, text=text, overrides=overrides, plan=plan, format=format, engine=(engine, ANY),
        device=(device, "cpu"), memory=(memory, DEFAULT_MEMORY), seed=(seed, 0), accept_unquantized=accept_unquantized,
    )  # fmt: skip
    chosen = load_recipe(recipe, {**(overrides or {}), **({"format": format} if format else {})})
    if device != "cpu" and not torch.cuda.is_available():
        raise BadInputError(f"--device {device}: this torch sees no CUDA device; use --device cpu")
    out = Path(out).resolve() if not Path(out).name else Path(out)
    if not 0 <= seed < 2**63:
        raise BadInputError(f"--seed {seed}: a number from 0 to 2^63 - 1")
    checkpoint = open_checkpoint(model, compute=None, follow_links=follow_links)
    if not isinstance(weights := checkpoint.weights, HubWeights):
        raise BadInputError(f"{model} is already quantized; give the full-precision checkpoint")
    _check_output(out, checkpoint.path)
    structure = find_structure(checkpoint.model)
    bits = load_bit_plan(plan) if isinstance(plan, str | Path) else plan
    checkpoint, transforms = transformed(checkpoint, structure, chosen, seed)
    decided = make_plan(checkpoint, structure, chosen, memory, bits, engine, transforms)
    decided.coverage.check(accept_unquantized)
    data = _data(checkpoint, chosen, text, seed, profile, bits)
    if data.sampled:
        check_fits(checkpoint, memory)
    if dry_run:
        check_free(out, resume=resume, overwrite=overwrite)
        return decided
    carried_files(checkpoint.path, follow_links=follow_links)  # refused now, and not after hours
    check_space(out, decided.size_bytes + _streamed(chosen, data) * _width(checkpoint) * 4 * 2)
    seen = _seen(checkpoint, read_journal(partial_of(out) / JOURNAL) if resume else [])
    check_shipped(weights.entries.values())
    identity = _identity(checkpoint, chosen, data, bits, memory, seed, device)
    try:
        directory = OutputDirectory(out, {**identity, **_circumstances(device, seen)}, resume=resume, overwrite=overwrite)
        with directory as output, freed_memory_kept():
            if device == "cpu" and chosen.needs_hessians:
                Thread(target=kernels.load).start()
            report = progress or (lambda what, done, total: None)
            windows = data.windows
            if data.sampled:
                windows = _sampled(output, checkpoint, data.sampled, windows, memory, report)
                identity["calibration"] = digest(windows)
            together: dict[int, list[list[int]]] = {}
            if data.sets is not None:
                prepared = prepare(output, checkpoint, decided, bits, data.sets, report)
                decided = make_plan(checkpoint, structure, chosen, memory, prepared.bits, engine, transforms)
                identity["profile"], together = prepared.facts, prepared.together
            assert isinstance(checkpoint.weights, HubWeights)
            sink = SINKS[chosen.format](checkpoint.weights, decided.modules, decided.activations)
            reports = _Work(checkpoint, decided, output, sink, device, report, seed).run(windows, data.pool)
            size = sum(file.stat().st_size for file in output.partial.glob("model-*.safetensors"))
            run = {
                "output": out.name,
                "size_after": size,
                "command": asked,
                "peak_memory_bytes": peak_resident_bytes(),
                "together": together,
            }
            written = documents(checkpoint, decided, identity, reports, time.perf_counter() - began, run)
            _check_unchanged(checkpoint, seen)
            output.finish(checkpoint.path, sink.config(_config(checkpoint)), written, follow_links=follow_links)
    except OSError as error:
        raise disk_error(error, partial_of(out)) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InterruptedWorkError(
            f"memory ran out ({one_line(error)}); what is finished is kept in {partial_of(out)}: close other programs and go on with "
            "--resume, or start again with a smaller --memory and --overwrite"
        ) from error
    return Result(out, decided, checkpoint.size_bytes, size, reports, time.perf_counter() - began)


def _check_output(out: Path, source: Path) -> None:
    """The output must not be the checkpoint, nor hold it, nor lie in it: --overwrite would delete the input."""
    target, origin = out.resolve(), source.resolve()
    if target == origin or target in origin.parents or origin in target.parents:
        raise BadInputError(f"-o {out}: the output and the checkpoint {source} must be apart; choose another -o")


@dataclass(frozen=True)
class _Data:
    """What a model is calibrated on, and what is decided from.

    Attributes:
        windows: of given text; None where there are none to be. sampled: how the model writes its own, or None.
        pool: further windows, for experts that get too few tokens. sets: what widths and switchable channels are decided from.
    """

    windows: Tensor | None
    sampled: Settings | None
    pool: Tensor | None
    sets: dict[str, Tensor] | Profile | None


def _data(checkpoint: Checkpoint, recipe: Recipe, text: Texts, seed: int, profile: str | Path | None, bits: BitPlan | None) -> _Data:
    return _Data(
        _calibration(checkpoint, recipe, text, seed),
        sampling_settings(recipe, bool(text), seed),
        _pool(checkpoint, recipe, text, seed),
        _data_sets(checkpoint, recipe, text, seed, profile, bits),
    )


def _streamed(recipe: Recipe, data: _Data) -> int:
    """Tokens that go through the layers, in all streams."""
    base = recipe.calibration.samples * recipe.calibration.seq_len if recipe.needs_calibration else 0
    return base * (2 if recipe.needs_reference else 1) + (data.pool.numel() if data.pool is not None else 0)


def _calibration(checkpoint: Checkpoint, recipe: Recipe, text: Texts, seed: int) -> Tensor | None:
    """The windows of given text; None where there are none to be."""
    files = parse_texts(text)
    if not recipe.needs_calibration:
        return None
    sampled, share = sampling_settings(recipe, bool(files), seed), recipe.calibration.text_share
    if sampled and not share:
        return None
    if not files:
        if share:
            raise BadInputError(
                f"calibration.text_share: {share}: give the text that is to be so much of the calibration set with --text FILE"
            )
        raise BadInputError(
            "this recipe calibrates on text: give --text FILE (plain UTF-8 or .jsonl), or use an rtn recipe, which needs none"
        )
    tokenizer = load_tokenizer(checkpoint.path)
    vocabulary = int(checkpoint.config.get_text_config().vocab_size)
    texts = [tokenize(name, file, tokenizer, vocabulary) for name, file in files.items()]
    limit = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    if limit and recipe.calibration.seq_len > limit:
        raise BadInputError(
            f"calibration.seq_len {recipe.calibration.seq_len} is longer than the model's context of {limit}; set a smaller one"
        )
    count = recipe.calibration.samples - (sampled.sequences if sampled else 0)
    return calibration_windows(texts, count, recipe.calibration.seq_len, seed)


def _sampled(
    output: OutputDirectory, checkpoint: Checkpoint, settings: Settings, text: Tensor | None, memory: int, progress: Progress
) -> Tensor:
    """What the model writes itself, and the text's windows behind it. The sample is journaled: a resumed run reads it."""
    known = any(entry["kind"] == "sample" for entry in output.entries)
    windows = kept_windows(checkpoint.path, settings, memory, output.partial / SAMPLE, whole=known, progress=progress)
    if not known:
        output.record("sample", [SAMPLE])
    output.remove(f"{SAMPLE}.partial")  # only now: the journal has the whole sample
    return windows if text is None else torch.cat([windows, text])


def _pool(checkpoint: Checkpoint, recipe: Recipe, text: Texts, seed: int) -> Tensor | None:
    """Further windows of the calibration texts, for experts that get too few tokens; None where the recipe does not balance."""
    chosen = recipe.calibration
    if chosen.balance == "none":
        return None
    files = parse_texts(text)
    if not files:
        raise BadInputError("calibration.balance draws further windows from given text: give --text FILE, or set calibration.balance: none")
    tokenizer, vocabulary = load_tokenizer(checkpoint.path), int(checkpoint.config.get_text_config().vocab_size)
    texts = [tokenize(name, file, tokenizer, vocabulary) for name, file in files.items()]
    return further_windows(texts, chosen.samples, chosen.seq_len, seed, chosen.pool)


def _data_sets(
    checkpoint: Checkpoint, recipe: Recipe, text: Texts, seed: int, profile: str | Path | None, bits: BitPlan | None
) -> dict[str, Tensor] | Profile | None:
    """What widths and switchable channels are decided from: a profile, or windows of every text; None where nothing is to be decided."""
    if profile is not None:
        found = Profile.read(profile)
        check_profile(found, checkpoint, recipe)
        return found
    if not recipe.needs_profile or (bits is not None and not recipe.switching.share):
        return None
    texts = parse_texts(text)
    if recipe.switching.share and len(texts) < 2:
        raise BadInputError(
            f"switching.share {recipe.switching.share}: which channels change with the data takes two texts or more to see; "
            "give --text NAME=FILE several times, or --set switching.share=0"
        )
    each = max(1, recipe.calibration.samples // max(1, len(texts)))
    return data_sets(checkpoint, texts, each, recipe.calibration.seq_len, seed)


def _digest_of(sets: dict[str, Tensor] | Profile) -> dict[str, Any]:
    if isinstance(sets, Profile):
        return {name: facts["sha256"] for name, facts in sets.sets.items()}
    return {name: digest(windows) for name, windows in sets.items()}


def _width(checkpoint: Checkpoint) -> int:
    return int(checkpoint.config.get_text_config().hidden_size)


def _identity(
    checkpoint: Checkpoint, recipe: Recipe, data: _Data, bits: BitPlan | None, memory: int, seed: int, device: str
) -> dict[str, Any]:
    """What the bytes of the result depend on; a resumed run must agree in all of it."""
    return {
        "moebit": version("moebit"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "input": checkpoint_fingerprint(checkpoint),
        "recipe": recipe.digest(),
        "calibration": digest(data.windows) if data.windows is not None else None,
        "memory": memory,
        "seed": seed,
        "compute": str(checkpoint.model.dtype).removeprefix("torch."),
        **({"bit_plan": bits.digest()} if bits else {}),
        **({"pool": digest(data.pool)} if data.pool is not None else {}),
        **({"profile": _digest_of(data.sets)} if data.sets is not None else {}),
        **({"solver_kernel": backend_of(torch.device(device))} if device != "cpu" else {}),
    }


def _circumstances(device: str, seen: Seen) -> dict[str, Any]:
    """What the bytes may depend on besides the identity: sums of floats differ with the number of threads that add them up."""
    return {"device": device, "threads": torch.get_num_threads(), "shards": seen}


def _seen(checkpoint: Checkpoint, records: list[dict[str, Any]]) -> Seen:
    """The content of the input, looked through once; a run that is resumed has looked, and knows the files again if they are the same."""
    known = records[0].get("started", {}).get("shards") if records else None
    if isinstance(known, dict) and not changed(checkpoint.entries, known):
        return known
    return look_through(checkpoint.entries.values())


def _check_unchanged(checkpoint: Checkpoint, seen: Seen) -> None:
    """Refuse to finish what was read from two versions of the input."""
    if other := changed(checkpoint.entries, seen):
        raise BadInputError(
            f"{checkpoint.path}: {', '.join(other)} changed while it was being read, the result would mix two versions of it; "
            "--overwrite starts again"
        )


@dataclass
class _Work:
    """One run over the layers of a checkpoint."""

    checkpoint: Checkpoint
    plan: Plan
    output: OutputDirectory
    sink: Sink
    device: str
    progress: Progress
    seed: int = 0

    def run(self, windows: Tensor | None, pool: Tensor | None = None) -> list[LayerReport]:
        """All layers that the journal does not have yet, then the rest of the model."""
        layers = self.plan.structure.layers
        reports = [LayerReport(**entry["report"]) for entry in self.output.entries if entry["kind"] == "layer"]
        streams = self._streams(windows, pool, len(reports)) if windows is not None and len(reports) < len(layers) else None
        for sites in layers[len(reports) :]:
            self.progress("layers", sites.index, len(layers))
            reports.append(self._layer(sites, streams))
        self.progress("layers", len(layers), len(layers))
        if not any(entry["kind"] == "rest" for entry in self.output.entries):
            self._rest()
        return reports

    def _streams(self, windows: Tensor, pool: Tensor | None, done: int) -> Streams:
        """The calibration windows behind the layers that are done, with what the recipe wants beside them."""
        budget = self.plan.budget
        store = budget.store(self.output.partial)

        def stream(rows: Tensor) -> Stream:
            return Stream(self.checkpoint, self.plan.structure, rows, store, budget.batch_tokens, budget.slots)

        compared, more = self.plan.recipe.needs_reference, pool is not None and len(pool) > 0
        streams = Streams(stream(windows), stream(windows) if compared else None, stream(pool) if pool is not None and more else None)
        if done:
            streams.take_up(read_header(self.output.partial / _stream_file(done - 1)))
        return streams

    def _layer(self, sites: LayerSites, streams: Streams | None) -> LayerReport:
        """Quantize, write and pass one decoder layer; from the journal entry on it need not be done again."""
        began = time.perf_counter()
        stream = streams.calibration if streams else None
        compared = streams.reference if streams else None
        reference, exact = self._reference(compared, sites) if compared else (None, {})
        files = [self._shard_name(sites.index)]
        report = LayerReport(sites.index)
        loaded: AbstractContextManager[nn.Module | None] = stream.loaded(sites.index) if stream else nullcontext()
        names = self.sink.parameters(sites.name + ".")
        with self.output.shard(files[0], self.sink.specs(names)) as shard, loaded as layer:
            job = LayerJob(self.plan, self.sink, sites, shard, report, stream, layer, self.device, self.progress, self.seed)
            job.reference, job.exact, job.pool = reference, exact, streams.pool if streams else None
            job.run()
        report.seconds = round(time.perf_counter() - began, 3)
        report.peak_memory_bytes = peak_resident_bytes()
        if streams and stream:
            files.append(_stream_file(sites.index))
            state = streams.state()
            with self.output.shard(files[1], {name: TensorSpec(value.dtype, tuple(value.shape)) for name, value in state.items()}) as saved:
                for name, value in state.items():
                    for start, piece in stream.store.pieces(value):
                        saved.write(name, piece, skip=start)
        self.output.record("layer", files, index=sites.index, report=asdict(report))
        if sites.index:
            self.output.remove(_stream_file(sites.index - 1))
        return report

    def _reference(self, stream: Stream, sites: LayerSites) -> tuple[Routing | None, dict[str, Tensor]]:
        """Full precision through a layer: what its router says, and what arrives where weights are to be corrected for drift."""
        recipe = self.plan.recipe
        names = drifting(self.plan, sites) if recipe.solver.drift != "none" else []
        with captured_inputs(stream, sites.index, names) as exact:
            routing = reference_step(stream, sites.index, self.plan.chunk.get(sites.index, 1))
        return (routing if recipe.router.realign != "none" else None), exact

    def _shard_name(self, number: int) -> str:
        return self.output.shard_name(number, len(self.plan.structure.layers) + 1)

    def _rest(self) -> None:
        """Embeddings, final norm, head, and stored tensors that the model class does not use (kept, never dropped)."""
        weights = self.sink.weights
        prefixes = tuple(layer.name + "." for layer in self.plan.structure.layers)
        names = [name for name in self.sink.parameters("") if not name.startswith(prefixes)]
        specs = self.sink.specs(names) | {stored: weights.entries[stored].spec for stored in weights.unused}
        name = self._shard_name(len(self.plan.structure.layers))
        with self.output.shard(name, specs) as shard:
            self.sink.put_plain(shard, names)
            for stored in weights.unused:
                put_stored(shard, weights.entries[stored])
        self.output.record("rest", [name])


def _stream_file(index: int) -> str:
    return f"stream-{index:05d}.safetensors"


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json without what it says about how the checkpoint was shipped: the output is no longer stored like that.

    Nor does it say that the head is tied to the embeddings, where it is its own now.
    """
    config = plain_config(read_config(checkpoint.path))
    return untied_config(config) if isinstance(checkpoint.weights, EditedWeights) and checkpoint.weights.untied else config
