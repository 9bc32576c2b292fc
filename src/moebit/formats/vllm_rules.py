"""Linears that vLLM's own classes build without a quantization, whatever config.json says: a packed one does not load there.

Rules are data: which modules they are, by their names in the checkpoint, and the source that says so. Mamba's were read in vLLM's files at
commit 00f8d44; those of the indexer in excerpts of its DeepSeek-V3.2 model, so that the name of that file is inferred. Other versions may
differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moebit.formats.native import PackedSpec
from moebit.model.structure import Structure


@dataclass(frozen=True)
class Rule:
    """Linears without a quantization.

    Attributes:
        pattern: of the end of their names. beside: a linear that has to stand beside them, which tells look-alikes apart; "" for none.
        what: what they are. source: the file of vLLM and what it does there.
    """

    pattern: str
    beside: str
    what: str
    source: str


RULES = (
    Rule(
        r"\.(in_proj|x_proj|dt_proj|out_proj)$",
        "x_proj",
        "linears of Mamba layers",
        "vllm/model_executor/layers/mamba/mamba_mixer.py: MambaMixer gives none of its linears a quant_config (MambaMixer2 does)",
    ),
    Rule(
        r"\.indexer\.(wk|weights_proj)$",
        "",
        "linears of the indexer that selects tokens",
        "vllm/model_executor/models/deepseek_v2.py: Indexer joins wk and weights_proj with quant_config=None",
    ),
)


def built_whole(modules: Mapping[str, Mapping[str, PackedSpec]], structure: Structure) -> Iterator[str]:
    """One reason for every rule that quantized linears fall under."""
    linears = {f"{layer.name}.{name}" for layer in structure.layers for group in layer.groups for name in group.names}
    linears |= {f"{layer.name}.{name}" for layer in structure.layers for name in layer.kept}
    for rule in RULES:
        found = [name for name in modules if re.search(rule.pattern, name) and _has(linears, name, rule.beside)]
        if found:
            leaves = sorted({name.rpartition(".")[2] for name in found})
            parent = found[0].rpartition(".")[0].rpartition(".")[2]
            yield (
                f"{rule.what} are quantized ({found[0]} and {len(found) - 1} more), it builds them whole; keep them with weights.ignore: "
                f"[{', '.join(repr(f'*.{parent}.{leaf}') for leaf in leaves)}]"
            )


def _has(linears: set[str], name: str, beside: str) -> bool:
    return not beside or f"{name.rpartition('.')[0]}.{beside}" in linears
