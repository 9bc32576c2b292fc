"""What an output is made of, small enough to keep, and how two of them differ.

A record has the sha256 of every file, of every tensor and of every value of a JSON file. Left out is what may differ between two revisions
that write the same numbers: `report.*` and the model card, which tell times and words, and in `moebit.json` the versions, the checksums and
the sentences, of which only the place is kept.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LEFT_OUT = ("report.json", "report.html", "README.md")
MANIFEST = "moebit.json"
VERSIONS = ("moebit", "torch", "transformers", "sha256")  # the last: that of moebit.json itself, versions and all
Record = dict[str, Any]


def record(directory: Path) -> Record:
    """{FILE: {"sha256": of the file, "parts": {tensor or JSON path: sha256 or value}}} of everything in a directory that is compared."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    names = {file.relative_to(directory).as_posix(): file for file in files}
    return {name: _file(file, directory) for name, file in names.items() if name not in LEFT_OUT}


def _file(file: Path, directory: Path) -> Record:
    if file.name == MANIFEST:
        manifest = _without_versions(json.loads(file.read_text()), directory)
        return {"sha256": _digest(json.dumps(manifest).encode()), "parts": dict(_values(manifest))}
    content = file.read_bytes()
    parts = _tensors(content) if file.suffix == ".safetensors" else dict(_values(json.loads(content))) if file.suffix == ".json" else {}
    return {"sha256": _digest(content), "parts": parts}


def _without_versions(manifest: Mapping[str, Any], directory: Path) -> Any:
    """The manifest without versions and sentences, and with "right" or "wrong" in the place of the checksums of the files beside it."""
    result = {key: value for key, value in manifest.items() if key not in VERSIONS}
    said = {name: checksum for name, checksum in manifest.get("files", {}).items() if name not in LEFT_OUT}
    result["files"] = {name: _judged(directory / name, checksum) for name, checksum in said.items()}
    return _without_sentences(result)


def _without_sentences(value: Any) -> Any:
    """The same document without the wording of reasons and notes: of its strings, those alone have spaces in them."""
    if isinstance(value, dict):
        return {key: _without_sentences(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_sentences(item) for item in value]
    return "a sentence" if isinstance(value, str) and " " in value else value


def _judged(file: Path, checksum: str) -> str:
    return "right" if file.is_file() and _digest(file.read_bytes()) == checksum else "wrong"


def _tensors(content: bytes) -> dict[str, str]:
    """{tensor: "type shape sha256"} of a safetensors file: 8 bytes with the header's length, the header, the data."""
    (length,) = struct.unpack("<Q", content[:8])
    data = memoryview(content)[8 + length :]
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__", None)
    result = {name: f"{entry['dtype']} {entry['shape']} {_digest(data[slice(*entry['data_offsets'])])}" for name, entry in header.items()}
    return {"metadata": json.dumps(metadata), **result}


def _values(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every leaf of a JSON document."""
    if isinstance(value, dict | list) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            yield from _values(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def differences(base: Record, now: Record) -> list[str]:
    """In words, what differs between the records of one output by two revisions; empty where nothing does."""
    result = [f"{name}: only in {where}" for name, where in _unshared(base, now)]
    for name in sorted(base.keys() & now.keys()):
        if base[name]["sha256"] != now[name]["sha256"]:
            result += [f"{name}: {what}" for what in _parts(base[name]["parts"], now[name]["parts"]) or ["other bytes"]]
    return result


def _parts(base: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    changed = [key for key in base if key in now and (type(base[key]), base[key]) != (type(now[key]), now[key])]
    return [f"{key}: only in {where}" for key, where in _unshared(base, now)] + [f"{key}: {_told(base[key], now[key])}" for key in changed]


def _told(base: Any, now: Any) -> str:
    both = f"{base!r} -> {now!r}"
    return both if len(both) <= 80 else "differs"


def _unshared(base: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, "the base") for key in base if key not in now] + [(key, "this tree") for key in now if key not in base]
