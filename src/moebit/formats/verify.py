"""Is an output what was written? Every byte against the checksums, and every tensor against what the documents say about it.

Checksums find any change and name the file. The other checks know what the files mean: they name the tensor or the module, and they
find what is wrong even where the checksums were made after the damage. Nothing larger than a piece of a tensor is in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moebit.errors import BadInputError
from moebit.formats.consistency import AGAIN, CHECKS, CONFIG, Finding, against_model, finite, format_of, native_specs, place
from moebit.formats.gguf.locate import gguf_file, open_gguf
from moebit.formats.native import FORMAT_VERSION, average_bits
from moebit.formats.output import JOURNAL, partial_of, read_journal
from moebit.formats.seal import SEALED, is_intact, is_report
from moebit.formats.switch import SIDE_FILE
from moebit.recipe.reading import is_there, parse_yaml, read_object, read_text
from moebit.storage.files import INDEX, TensorEntry, read_header, sha256
from moebit.storage.places import is_plain

Progress = Callable[[str, int, int], None]
RECIPE, REPORT, PAGE = "recipe.yaml", "report.json", "report.html"
EXTRA = "move it away: it is no part of this output"
RESTART = "`moebit quantize` with --overwrite starts again"
# What a loader reads when it lies in the directory: a file of this kind that the output does not have may change the model.
LOADED = (
    "*.bin", "*.pt", "*.pth", "*.gguf", "*.py", "*.jinja", "*.model", "*.tiktoken", "*config.json", "*token*", "vocab*", "merges.txt",
    "chat_template*", "additional_chat_templates/*",
)  # fmt: skip


@dataclass
class _Output:
    """One directory while it is looked at."""

    path: Path
    progress: Progress
    manifest: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    gguf_tensors: int = 0

    @property
    def files(self) -> dict[str, str]:
        """name -> sha256 as moebit.json has them."""
        files = self.manifest.get("files")
        return files if isinstance(files, dict) else {}

    def say(self, what: str, where: str, remedy: str = AGAIN) -> None:
        self.findings.append(Finding(what, where, remedy))

    def document(self, name: str) -> dict[str, Any]:
        """A JSON file of the output; an empty one, and a finding, if it is none."""
        if not (self.path / name).exists():
            self.say("is missing", name)
            return {}
        try:
            return read_object(self.path / name)
        except BadInputError as error:
            self.findings.append(Finding.of(error, name))
            return {}


def verify(out: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Check an output of `quantize`, finished or not.

    Args:
        out: the output directory; where there is none yet, its `.partial` is looked at.
        progress: called with (what, done, total).

    Returns:
        `output`, `state` ("fine", "damaged" or "unfinished"), `format`, how many `files`, `tensors` and `bytes` of them there are,
        `findings` (each with `what`, `where` and `remedy`), and for an unfinished one `durable`: what --resume will not do again.

    Raises:
        BadInputError: no output of moebit.
    """
    path = Path(out)
    if not is_there(path) and is_there(partial_of(path)):
        path = partial_of(path)
    if not is_there(path) or not path.is_dir():
        raise BadInputError(f"{out}: no such directory; give the output of `moebit quantize`")
    output = _Output(path, progress or (lambda what, done, total: None))
    try:
        return _unfinished(output) if path.name.endswith(".partial") else _finished(output)
    except OSError as error:
        raise BadInputError(
            f"{error.filename or path}: cannot be read ({error.strerror or error}); mend the disk or the permissions"
        ) from error


def _finished(output: _Output) -> dict[str, Any]:
    path = output.path
    if not any((path / name).exists() for name in (SEALED, RECIPE)):
        raise BadInputError(f"{path}: neither {SEALED} nor {RECIPE} is here, so this is no output of `moebit quantize`; give one")
    _manifest(output)
    _checksums(output)
    if output.manifest.get("format") == "gguf":
        _gguf(output)
        return _described(output, "fine")
    output.config = output.document(CONFIG)
    readable = _shards(output) and bool(output.config)
    if check := CHECKS.get(format_of(output.config)) if output.config else None:
        found = check(output.config, output.entries)
        output.findings += found
        if readable and not found:
            output.findings += against_model(path)
    _values(output)
    _documents(output)
    return _described(output, "fine")


def _gguf(output: _Output) -> None:
    """The GGUF file can be read, and its tensors have the types of the plan."""
    _documents(output)
    plan = output.manifest.get("plan")
    planned = plan.get("gguf", {}).get("types", {}) if isinstance(plan, dict) else {}
    file = gguf_file(output.path)
    if file is None:
        return  # its checksum was looked for
    try:
        tensors = open_gguf(file).tensors
    except BadInputError as error:
        output.say(str(error), file.name)
        return
    for name, kind in planned.items():
        if name not in tensors or tensors[name].type != kind.upper():
            found = tensors[name].type if name in tensors else "missing"
            output.say(f"{name} is {found}, {SEALED} says {kind.upper()}", file.name)
    output.gguf_tensors = len(tensors)


def _described(output: _Output, state: str) -> dict[str, Any]:
    return {
        "output": str(output.path),
        "state": "damaged" if output.findings else state,
        "format": output.manifest.get("format"),
        "files": sum(file.is_file() for file in output.path.iterdir()),
        "tensors": output.gguf_tensors or len(output.entries),
        "bytes": sum(file.stat().st_size for file in output.path.iterdir() if file.is_file()),
        "findings": [asdict(finding) for finding in dict.fromkeys(output.findings)],
    }


def _manifest(output: _Output) -> None:
    """moebit.json is as it was written."""
    output.manifest = output.document(SEALED)
    if not output.manifest:
        return
    try:
        if not is_intact(read_text(output.path / SEALED)):
            output.say("was changed after it was written", SEALED)
    except KeyError:
        output.say("has no checksum of itself: it was changed, or written by a program that makes none", SEALED)


def _checksums(output: _Output) -> None:
    """Every file is as it was written, and none has come that a loader would read."""
    wanted = output.files
    if not wanted:
        if output.manifest:
            output.say("has no checksums of the files, so that their content cannot be compared", SEALED)
        return
    owner = {digest: name for name, digest in wanted.items()}
    for number, (name, digest) in enumerate(sorted(wanted.items())):
        output.progress("checksums", number, len(wanted))
        file = output.path / name
        if not is_plain(name):
            output.say(f"speaks of {name!r}, which is no file of the output", SEALED)
        elif not file.is_file():
            output.say("is missing", name)
        elif (found := sha256(file)) != digest:
            other = f": it holds what {owner[found]} should hold" if found in owner else ", it is empty" if not file.stat().st_size else ""
            output.say(f"is not what was written: its sha256 is another{other}", name)
    output.progress("checksums", len(wanted), len(wanted))
    there = {str(file.relative_to(output.path)) for pattern in LOADED for file in output.path.glob(pattern) if file.is_file()}
    for name in sorted(there - wanted.keys() - {SEALED}):
        if not is_report(name):
            output.say("was not there when the output was written, and loaders may read it", name, EXTRA)


def _shards(output: _Output) -> bool:
    """Headers and index agree; fills `entries`. Whether nothing was wrong."""
    before = len(output.findings)
    weight_map, total = _index(output)
    for file in sorted(output.path.glob("*.safetensors")):
        if file.name == SIDE_FILE and file.name in output.files:
            continue  # no loader reads it; its checksum was looked at
        if weight_map and file.name not in weight_map.values():
            output.say(f"{INDEX} names no tensor of this file", file.name, EXTRA)
            continue
        try:
            header = read_header(file)
        except (BadInputError, TypeError) as error:
            output.findings.append(Finding.of(error, file.name))
            continue
        for name, entry in header.items():
            if weight_map and weight_map.get(name) != file.name:
                elsewhere = weight_map.get(name, "no file")
                output.say(f"{INDEX} says that {elsewhere} has this tensor", place(entry))
            else:
                output.entries[name] = entry
    for name, shard in weight_map.items():
        if name not in output.entries and (output.path / shard).is_file():
            output.say(f"names tensor {name!r}, which is not in {shard}", INDEX)
        elif not (output.path / shard).is_file() and shard not in output.files:
            output.say(f"names tensors of {shard}, which is missing", INDEX)
    stored = sum(entry.spec.nbytes for entry in output.entries.values())
    if weight_map and len(output.entries) == len(weight_map) and total != stored:
        output.say(f"says that all tensors are {total} bytes, they are {stored}", INDEX)
    return len(output.findings) == before and bool(output.entries)


def _index(output: _Output) -> tuple[dict[str, str], Any]:
    """(tensor -> shard, total size) as the index has them."""
    index = output.document(INDEX)
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if index and not (isinstance(weight_map, dict) and isinstance(metadata, dict) and all(isinstance(v, str) for v in weight_map.values())):
        output.say("does not map tensors to files", INDEX)
        return {}, None
    return (dict(weight_map), metadata.get("total_size")) if weight_map and metadata else ({}, None)


def _values(output: _Output) -> None:
    """No floating-point tensor holds NaN or infinity."""
    total = len(output.entries)
    for number, entry in enumerate(output.entries.values()):
        output.progress("values", number, total)
        if found := finite(entry):
            output.findings.append(found)
    output.progress("values", total, total)


def _documents(output: _Output) -> None:
    """recipe.yaml, moebit.json and config.json tell one story."""
    output.document(REPORT)
    page = output.path / PAGE
    if page.is_file() and not page.stat().st_size:
        output.say("is empty", PAGE, "`moebit report OUT` makes it again")
    digest = _recipe(output)
    manifest = output.manifest
    if not manifest:
        return
    if manifest.get("format_version") != FORMAT_VERSION:
        output.say(
            f"format_version is {manifest.get('format_version')!r}, this moebit knows {FORMAT_VERSION}", SEALED, "install a newer moebit"
        )
    if digest and manifest.get("recipe") != digest:
        output.say(f"was made with recipe {manifest.get('recipe')}, {RECIPE} is {digest}", SEALED)
    if output.config and manifest.get("format") != format_of(output.config):
        output.say(f"says that the format is {manifest.get('format')!r}, by {CONFIG} it is {format_of(output.config)!r}", SEALED)
    elif output.config and manifest.get("format") == "native":
        _plan(output)


def _recipe(output: _Output) -> str | None:
    """The digest of recipe.yaml's content, and that its first line agrees."""
    if not (output.path / RECIPE).exists():
        if RECIPE not in output.files:
            output.say("is missing", RECIPE)
        return None
    try:
        text = read_text(output.path / RECIPE)
        data = parse_yaml(text)
        digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    except BadInputError as error:
        output.findings.append(Finding.of(error, RECIPE))
        return None
    except (ValueError, TypeError) as error:
        output.say(f"is not the YAML of a recipe ({str(error).splitlines()[0]})", RECIPE)
        return None
    if digest not in text.partition("\n")[0]:
        output.say("its content is not what the sha256 on its first line stands for: it was edited", RECIPE)
    return digest


def _plan(output: _Output) -> None:
    """The plan of moebit.json is that of config.json's modules."""
    plan, modules = output.manifest.get("plan"), output.config["quantization_config"].get("modules")
    try:
        specs = {name: native_specs(name, entry) for name, entry in dict(modules).items()}
        found: dict[str, float] = {
            "quantized_linears": sum("projections" not in entry for entry in modules.values()),
            "quantized_experts_modules": sum("projections" in entry for entry in modules.values()),
            "average_bits": average_bits(specs) if specs else 0.0,
        }
    except (BadInputError, KeyError, TypeError, ValueError, AttributeError, IndexError):
        return  # said where the modules are checked
    for key, value in found.items():
        said = plan.get(key) if isinstance(plan, dict) else None
        if not isinstance(said, int | float) or abs(said - value) > 1e-6 * max(1.0, value):
            output.say(f"plan.{key} is {said}, by {CONFIG} it is {value}", SEALED)


def _unfinished(output: _Output) -> dict[str, Any]:
    """What the journal of an interrupted run says is there, is there."""
    records = read_journal(output.path / JOURNAL)
    entries = [record for record in records if isinstance(record.get("files"), dict)]
    if not records and any(output.path.glob("model-*.safetensors")):
        output.say(
            "is missing or damaged, so that nobody knows which shards are whole", JOURNAL, "remove this directory and quantize again"
        )
    for number, entry in enumerate(entries):
        output.progress("checksums", number, len(entries))
        for name, digest in entry["files"].items():
            if name.startswith("stream-") and number < len(entries) - 1:
                continue  # a later one has taken its place
            file = output.path / name
            if not file.is_file() or sha256(file) != digest:
                output.say("is not what the journal says" if file.is_file() else "is missing", name, RESTART)
            elif name.startswith("model-"):
                output.entries |= read_header(file)
    _values(output)
    shards = [name for entry in entries for name in entry["files"] if name.startswith("model-")]
    parts = int(shards[0].rpartition("-of-")[2].removesuffix(".safetensors")) if shards else None
    layers = sum(entry.get("kind") == "layer" for entry in entries)
    durable = {"layers": layers, "of": parts - 1 if parts else None, "rest": any(entry.get("kind") == "rest" for entry in entries)}
    return {**_described(output, "unfinished"), "durable": durable}
