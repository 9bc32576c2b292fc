"""How large an output will be on disk, to the byte: what is stored in which file, and the files beside the weights that an engine reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebit.formats.carried import carried_files
from moebit.formats.gguf.size import GgufSize
from moebit.formats.sink import Sink
from moebit.formats.sinks import SINKS
from moebit.model.structure import LayerSites, Structure
from moebit.plan.bitplan import BitPlan
from moebit.plan.plan import Plan
from moebit.storage.checkpoint import Checkpoint
from moebit.storage.config import portable_config, read_config
from moebit.storage.edits import EditedWeights, untied_config
from moebit.storage.files import TensorSpec, index_text, shard_bytes
from moebit.storage.shipped.reading import plain_config


def layer_specs(sink: Sink, sites: LayerSites) -> dict[str, TensorSpec]:
    """What is stored of one decoder layer."""
    return sink.specs(sink.parameters(f"{sites.name}."))


def rest_names(sink: Sink, structure: Structure) -> list[str]:
    """The parameters beside the decoder layers: embeddings, final norm, head."""
    prefixes = tuple(layer.name + "." for layer in structure.layers)
    return [name for name in sink.parameters("") if not name.startswith(prefixes)]


def rest_specs(sink: Sink, structure: Structure) -> dict[str, TensorSpec]:
    """What is stored of them, and stored tensors that the model class does not use."""
    weights = sink.weights
    return sink.specs(rest_names(sink, structure)) | {stored: weights.entries[stored].spec for stored in weights.unused}


def config_text(config: Mapping[str, Any]) -> str:
    """config.json."""
    return json.dumps(config, indent=2) + "\n"


def output_config(checkpoint: Checkpoint, weights: EditedWeights) -> dict[str, Any]:
    """config.json without what it says about how the checkpoint was shipped: the output is no longer stored like that.

    Nor does it name code that the output does not have, or say that the head is tied to the embeddings, where it is its own now.
    """
    config = portable_config(plain_config(read_config(checkpoint.path)))
    return untied_config(config) if weights.untied else config


@dataclass(frozen=True)
class DiskSize:
    """The size of the outputs of one recipe, for any choice of widths and types.

    It counts what an engine reads: weights with their headers, index, configuration, tokenizer and template files, or the GGUF file. The
    documents of moebit beside them (report, recipe, seal, card) are not counted.

    Attributes:
        planned: the plan of a choice. beside: bytes of further files, such as the side file of the native format.
        gguf: sizes of the file, where one is written.
    """

    checkpoint: Checkpoint
    weights: EditedWeights
    planned: Callable[[BitPlan], Plan]
    beside: int = 0
    follow_links: bool = False
    gguf: GgufSize | None = None

    @classmethod
    def find(
        cls, checkpoint: Checkpoint, weights: EditedWeights, planned: Callable[[BitPlan], Plan], *, follow_links: bool = False
    ) -> DiskSize:
        """The sizes of what `planned` plans."""
        gguf = planned(BitPlan()).gguf
        size = GgufSize(gguf.target.converter.gguf, gguf.target.prepare({})) if gguf else None
        return cls(checkpoint, weights, planned, 0, follow_links, size)

    def of(self, bits: BitPlan) -> int:
        """Bytes of the output."""
        plan = self.planned(bits)
        if self.gguf is not None:
            assert plan.gguf is not None
            return self.gguf.of(plan.gguf.types)
        sink = SINKS[plan.recipe.format](self.weights, plan.modules, plan.activations)
        layers = plan.structure.layers
        shards = [*(layer_specs(sink, sites) for sites in layers), rest_specs(sink, plan.structure)]
        named = {f"model-{n:05d}-of-{len(shards):05d}.safetensors": specs for n, specs in enumerate(shards, 1)}
        index = index_text({name: {tensor: spec.nbytes for tensor, spec in specs.items()} for name, specs in named.items()})
        config = config_text(sink.config(output_config(self.checkpoint, self.weights)))
        return sum(map(shard_bytes, shards)) + len(index.encode()) + len(config.encode()) + self._carried() + self.beside

    def _carried(self) -> int:
        files: list[Path] = carried_files(self.checkpoint.path, follow_links=self.follow_links)
        return sum(file.stat().st_size for file in files)
