"""Weights as a model's authors stored them, read through transformers' own conversion."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from moebit.errors import BadInputError
from moebit.storage.conversion import Source, match, tied_names
from moebit.storage.files import Entry, TensorSpec
from moebit.storage.weights import Weights


class HubWeights(Weights):
    """Full-precision weights as the model's authors stored them; what they stored quantized is dequantized as it is read.

    Raises:
        BadInputError: stored tensors that do not fit together, or do not fit the model.
    """

    def __init__(self, model: PreTrainedModel, entries: Mapping[str, Entry]) -> None:
        self.model = model
        sources, unused = match(model, entries)
        as_stored = [part for name in unused for part in entries[name].stored]
        self.unused = [part.name for part in as_stored]
        without = set(unused)
        self.entries = {name: entry for name, entry in entries.items() if name not in without}
        self.entries |= {part.name: part for part in as_stored}
        self._of: dict[str, Source] = {}
        self._specs: dict[str, TensorSpec] = {}
        for source in sources:
            try:
                converted = source.on_meta(model)
            except Exception as error:
                names = [entry.name for _, entry in source.parts]
                raise BadInputError(
                    f"the tensors of {source.first_target!r} do not fit together ({error}); stored: {names[0]} … {len(names)} tensors"
                ) from error
            for name, meta in converted.items():
                self._of[name] = source
                self._specs[name] = TensorSpec(meta.dtype, tuple(meta.shape))
        self._check()

    def _check(self) -> None:
        expected = self.model.state_dict()
        tied = {name for name, other in tied_names(self.model).items() if other in self._of}
        missing = sorted(set(expected) - set(self._of) - tied, key=dot_natural_key)
        if missing:
            raise BadInputError(
                f"the checkpoint lacks {len(missing)} tensors of {type(self.model).__name__}, "
                f"first {missing[0]!r}; is a shard or the right config.json missing?"
            )
        for name, spec in self._specs.items():
            if name in expected and spec.shape != tuple(expected[name].shape):
                raise BadInputError(
                    f"tensor {name!r} has shape {list(spec.shape)}, "
                    f"the configuration says {list(expected[name].shape)}; config.json and weights do not belong together"
                )

    def available(self) -> set[str]:
        return set(self._of)

    def spec(self, name: str) -> TensorSpec:
        return self._specs[self._kept(name)]

    def _kept(self, name: str) -> str:
        """The one of a tied parameter's two names under which it is stored."""
        return name if name in self._of else tied_names(self.model)[name]

    def stored_together(self) -> dict[str, list[str]]:
        by_source: dict[int, list[str]] = defaultdict(list)
        for name, source in self._of.items():
            by_source[id(source)].append(name)
        return {name: [other for other in names if other != name] for names in by_source.values() if len(names) > 1 for name in names}

    def stored_names(self, name: str) -> list[str]:
        return [entry.name for _, entry in self._of[name].parts]

    def stored_by_pattern(self, name: str) -> dict[str, list[str]]:
        return {pattern: [entry.name for entry in entries] for pattern, entries in self._of[name].by_pattern().items()}

    def merged(self) -> set[str]:
        return {
            name
            for name, source in self._of.items()
            if source.converter is not None and all(pattern.endswith(".weight") for pattern, _ in source.parts)
        }

    def parameter(self, name: str) -> Tensor:
        kept = self._kept(name)
        source = self._of[kept]
        return source.convert(self.model, ((pattern, entry.read()) for pattern, entry in source.parts))[kept]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        source = self._of[self._kept(name)]
        if source.as_it_is:
            return source.parts[0][1].read(start, stop)
        return self.expert_rows(name, start, stop) if self.divisible(name) else self.parameter(name)[start:stop]

    def divisible(self, name: str) -> bool:
        kept = self._kept(name)
        return self._of[kept].as_it_is or (len(self._specs[kept].shape) == 3 and self._by_expert(kept))

    def _by_expert(self, name: str) -> bool:
        """Whether a stacked parameter is stored so that some experts can be read without the others."""
        try:
            return bool(self._stored_rows(name, 0, 1))
        except BadInputError:
            return False

    def expert_rows(self, name: str, start: int, stop: int) -> Tensor:
        source = self._of[name]
        chosen = [(pattern, entry.read(*rows)) for pattern, entry, rows in self._stored_rows(name, start, stop)]
        rows = source.convert(self.model, chosen)[name]
        if rows.shape[0] != stop - start:
            raise BadInputError(
                f"{name}: reading experts {start} to {stop} gave {tuple(rows.shape)}; moebit does not understand how this layer is stored"
            )
        return rows

    def expect(self, names: Iterable[str], start: int, stop: int) -> None:
        if start < stop:
            for name in names:
                for _, entry, rows in self._stored_rows(name, start, stop):
                    entry.expect(*rows)

    def _stored_rows(self, name: str, start: int, stop: int) -> list[tuple[str, Entry, tuple[int, int | None]]]:
        """(pattern, stored tensor, its rows) that hold experts [start, stop) of a parameter."""
        experts, by_pattern = self._specs[name].shape[0], self._of[name].by_pattern()
        if all(len(entries) % experts == 0 for entries in by_pattern.values()):
            # More tensors than experts: several parameters lie in one numbering, one after the other.
            return [
                (pattern, entry, (0, None))
                for pattern, entries in by_pattern.items()
                for first in range(0, len(entries), experts)
                for entry in entries[first + start : first + stop]
            ]
        if all(len(entries) == 1 and entries[0].shape[0] == experts for entries in by_pattern.values()):
            return [(pattern, entries[0], (start, stop)) for pattern, entries in by_pattern.items()]
        raise BadInputError(
            f"{name}: {len(self._of[name].parts)} stored tensors do not fall apart into {experts} experts; "
            "moebit does not understand how this layer is stored"
        )

    def stored_form(self, name: str, tensor: Tensor, start: int = 0) -> dict[str, Tensor]:
        source = self._of[name]
        if source.as_it_is:
            return {source.parts[0][1].name: tensor}
        assert source.converter is not None
        reverse = source.converter.reverse_transform()
        reverse.add_tensor(name, name, reverse.source_patterns[0], tensor)
        tensors = reverse.convert(name, model=self.model, config=self.model.config)
        return {
            self._stored_name(source, produced, start): value[0] if isinstance(value, list) else value
            for produced, value in tensors.items()
        }

    def _stored_name(self, source: Source, produced: str, start: int) -> str:
        """The stored tensor that a name produced by the reversed converter stands for; expert numbers count from `start`."""
        for pattern, entries in source.by_pattern().items():
            prefix, _, suffix = pattern.replace("\\.", ".").partition("*")
            if prefix in produced and (suffix in produced if "*" in pattern else True):
                if "*" not in pattern:
                    return entries[0].name
                number = produced.split(prefix, 1)[1].split(suffix, 1)[0]
                if number.isdigit() and produced.split(prefix, 1)[1].startswith(number + suffix):
                    return entries[start + int(number)].name
        raise BadInputError(f"{produced}: no stored tensor of this checkpoint goes by this name; write the `native` format instead")
