"""Documents that are changed at random: as bytes, and as data that still is a document."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**5, 0.5, -1e300, float("nan"), float("inf"), "", "x", "../x", "/tmp/x", "a\nb",
    "x[/bold]y", "\x1b[31m", "ü" * 300, [], {}, [[]], [1, "a"], {"a": None}, "float64", "model-00001-of-00003.safetensors",
)  # fmt: skip


def mutate(text: bytes, name: str, chance: random.Random) -> bytes:
    """Another document in the place of this one."""
    if chance.random() < 0.35:
        return _bytes(text, chance)
    try:
        if name.endswith(".jsonl"):
            lines = [json.loads(line) for line in text.decode().splitlines()]
            return "".join(json.dumps(_data(line, chance)) + "\n" for line in lines).encode()
        if name.endswith(".yaml"):
            return yaml.safe_dump(_data(yaml.safe_load(text), chance)).encode()
        return json.dumps(_data(json.loads(text), chance), indent=1).encode()
    except (ValueError, yaml.YAMLError):
        return _bytes(text, chance)


def _bytes(text: bytes, chance: random.Random) -> bytes:
    raw = bytearray(text)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(raw) + 1)
        kind = chance.randrange(7)
        if kind == 0:
            del raw[at:]
        elif kind == 1:
            raw[at : at + chance.randrange(1, 20)] = b""
        elif kind == 2:
            raw[at:at] = chance.choice((b"{", b"[", b'"', b",", b"\\ud800", b"\xff", b"\0", b"NaN", b"1e999", b"- ", b"&a ", b"!!x "))
        elif kind == 3:
            raw[at:at] = b"[" * chance.choice((10, 100, 100_000))
        elif kind == 4 and raw:
            raw[at % len(raw)] = chance.randrange(256)
        elif kind == 5:
            raw[at:at] = raw[chance.randrange(len(raw) + 1) :][:40]
        else:
            raw[:0] = b"\xef\xbb\xbf"
    return bytes(raw)


def _data(data: Any, chance: random.Random) -> Any:
    """Change one value, key or place, chosen evenly over the levels of the document."""
    if not isinstance(data, dict | list) or not data or chance.random() < 0.15:
        return chance.choice(ODD)
    keys = list(data) if isinstance(data, dict) else list(range(len(data)))
    key, kind = chance.choice(keys), chance.randrange(10)
    if isinstance(data, list):
        return [_data(value, chance) if place == key else value for place, value in enumerate(data)] if kind else data[:key]
    if kind == 0:
        return {name: value for name, value in data.items() if name != key}
    if kind == 1:
        return {**data, str(chance.choice(ODD)): data[key]}
    return {**data, key: _data(data[key], chance)}


def damage(file: Path, chance: random.Random) -> str:
    """Harm a file on disk; what was done."""
    raw = bytearray(file.read_bytes())
    kind = chance.choice(("flip", "zeros", "cut", "longer", "gone", "empty", "swap"))
    at, size = chance.randrange(len(raw) or 1), chance.choice((1, 16, 512))
    if kind == "flip" and raw:
        raw[at] ^= 1 << chance.randrange(8)
    elif kind == "zeros":
        raw[at : at + size] = bytes(len(raw[at : at + size]))
    elif kind == "cut":
        del raw[at:]
    elif kind == "longer":
        raw += bytes(chance.randrange(256) for _ in range(size))
    elif kind == "empty":
        raw.clear()
    elif kind == "swap":
        raw[at : at + size], raw[:size] = raw[:size], raw[at : at + size]
    if kind == "gone":
        file.unlink()
    else:
        file.write_bytes(raw)
    return f"{kind} at {at}"
