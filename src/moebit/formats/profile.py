"""A profile: what data sets say about a model's experts, as a directory with profile.json and one safetensors file per set.

Specified in docs/format.md. Sets are files of their own, so that one more changes nothing about those that are there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.formats.native import PackedSpec
from moebit.recipe.reading import is_there, read_object
from moebit.storage.documents import ProfileFile, checked
from moebit.storage.durable import replace_text
from moebit.storage.files import ShardFile, TensorSpec, read_header

VERSION = 3  # 2: errors are shares of the layer's output, measured through the rest of the layer; 3: of whole experts, too
HEAD = "profile.json"


@dataclass(frozen=True)
class ProfiledModule:
    """An experts module or a linear, as far as its size goes.

    Attributes:
        layer: of the decoder. experts: how many matrices a projection has; 0 for a linear. group: number, in its layer, of the linears
            that share its input.
        parts: projection ("" for a linear) -> (out, in) features. scale_dtype: of its quantized form.
    """

    layer: int
    experts: int
    group: int
    parts: Mapping[str, tuple[int, int]]
    scale_dtype: torch.dtype

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        dtype = str(self.scale_dtype).removeprefix("torch.")
        shapes = {name: list(shape) for name, shape in self.parts.items()}
        if self.experts:
            return {"layer": self.layer, "experts": self.experts, "projections": shapes, "scale_dtype": dtype}
        return {"layer": self.layer, "group": self.group, "shape": shapes[""], "scale_dtype": dtype}

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> ProfiledModule:
        """The inverse of `describe`."""
        dtype = getattr(torch, data["scale_dtype"])
        if "projections" in data:
            parts = {name: (shape[0], shape[1]) for name, shape in data["projections"].items()}
            return cls(data["layer"], data["experts"], 0, parts, dtype)
        return cls(data["layer"], 0, data["group"], {"": (data["shape"][0], data["shape"][1])}, dtype)

    def spec(self, part: str, bits: tuple[int, ...], group_size: int, symmetric: bool) -> PackedSpec:
        """How one part is stored at these widths."""
        return PackedSpec(bits, self.parts[part], group_size, symmetric, self.scale_dtype, stacked=bool(self.experts))


@dataclass
class Profile:
    """A profile on disk.

    Attributes:
        facts: what all sets have in common (model, input, weights' grid, widths, solver): a set measured otherwise does not belong here.
        modules: what was looked at, by full name.
        sets: name -> {"tokens", "sha256", "errors"}.
    """

    path: Path
    facts: dict[str, Any]
    modules: dict[str, ProfiledModule]
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Profile:
        """Open a profile.

        Raises:
            BadInputError: no profile there, damaged, or of a later version.
        """
        directory = Path(path)
        if not is_there(directory / HEAD):
            raise BadInputError(f"{path}: no {HEAD} here; give the directory that `moebit profile MODEL -o PROFILE` wrote")
        try:
            data = read_object(directory / HEAD, remedy="profile again")
            if data["version"] != VERSION:
                raise BadInputError(f"{path}: profile version {data['version']}, this moebit reads {VERSION}; profile again")
            checked(ProfileFile, data, directory / HEAD, "profile again")
            modules = {name: ProfiledModule.read(item) for name, item in data["modules"].items()}
            return cls(directory, dict(data["measured"]), modules, dict(data["sets"]))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise BadInputError(f"{directory / HEAD}: damaged ({type(error).__name__}: {error}); profile again") from error

    def write(self) -> None:
        """Put profile.json in place, all of it or none."""
        self.path.mkdir(parents=True, exist_ok=True)
        document = {
            "version": VERSION,
            "measured": self.facts,
            "sets": self.sets,
            "modules": {name: module.describe() for name, module in self.modules.items()},
        }
        replace_text(self.path / HEAD, json.dumps(document, indent=1) + "\n")

    def add(self, name: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Store one data set: its file first, then its line in profile.json, which is there before the first file."""
        if not (self.path / HEAD).exists():
            self.write()
        with ShardFile(self.path / set_file(name), {n: TensorSpec(t.dtype, tuple(t.shape)) for n, t in tensors.items()}) as shard:
            for key, tensor in tensors.items():
                shard.write(key, tensor)
        self.sets[name] = dict(facts)
        self.write()

    @property
    def widths(self) -> list[int]:
        """Widths that errors were measured at."""
        return list(self.facts["widths"])

    @property
    def experts(self) -> dict[str, ProfiledModule]:
        return {name: module for name, module in self.modules.items() if module.experts}

    @property
    def linears(self) -> dict[str, ProfiledModule]:
        return {name: module for name, module in self.modules.items() if not module.experts}

    @property
    def has_errors(self) -> bool:
        """Whether every set has measured errors."""
        return bool(self.sets) and all(facts["errors"] for facts in self.sets.values())

    @property
    def has_sensitivities(self) -> bool:
        """Whether every matrix that was priced has a sensitivity in every set."""
        names = {f"{name}.{part}" if part else name for name, module in self.modules.items() for part in ("", *module.parts)}
        stored = [read_header(self.path / set_file(key)) for key in self.sets]
        return bool(stored) and all(f"{name}.sensitivity" in entries for entries in stored for name in names)

    def over_sets(self, *names: str) -> Iterator[tuple[Tensor, ...]]:
        """The tensors of these names, set after set.

        Raises:
            BadInputError: a set's file is missing or lacks one.
        """
        for key in self.sets:
            entries = read_header(self.path / set_file(key))
            missing = [name for name in names if name not in entries]
            if missing:
                raise BadInputError(f"{self.path / set_file(key)}: tensor {missing[0]!r} is missing; profile this set again")
            yield tuple(entries[name].read() for name in names)

    def stacked(self, name: str) -> Tensor:
        """[D, ...] one tensor of every set."""
        return torch.stack([tensor for (tensor,) in self.over_sets(name)])


def set_file(name: str) -> str:
    """The file of a data set.

    Raises:
        BadInputError: a name that is no file name.
    """
    if not name or "/" in name or "\\" in name or name.startswith("."):
        raise BadInputError(f"--text: {name!r} cannot name a data set; write NAME=FILE with a plain NAME")
    return f"{name}.safetensors"
