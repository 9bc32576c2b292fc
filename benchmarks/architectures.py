"""Which model types work: every one with routed experts in the installed transformers, tried with a tiny random model.

    make architectures                                              # all of them, into docs/architectures.md
    .venv/bin/python -m benchmarks.architectures mixtral llama4     # these, on the screen

Types are found by scanning transformers' modelling files; tests/support/architectures.py has a small configuration for each,
tests/support/in_full.py says
what "works" means. Types that fail don't stop the others.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from moebit.errors import BadInputError
from tests.support.architectures import TINY, UNTRIED
from tests.support.in_full import Outcome, run
from tests.support.models import quiet

TABLE = Path("docs/architectures.md")
MAPPINGS = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
ON_SEAM = re.compile(r"^@use_experts_implementation", re.MULTILINE)
EXPERTS_CLASS = re.compile(r"^class \w*(?:Experts?|MoE|Moe|Sparse)(?:GLU|MLP|Layer)?\b", re.MULTILINE)


ABOUT = """\
Every modelling module of this transformers that defines routed experts was tried with a tiny random model that has the quirks named below.
*Works* means: saved by transformers, quantized by moebit (GPTQ on a text of tokens, 4 bits, all linears and all experts, layer by layer),
written in the native format, loaded by transformers; every parameter of the routed experts is quantized, every other tensor is what it was,
and the logits are those of the original model in plain transformers with the quantized weights put in as dense values, read from the files
by other code than moebit's. The streaming that calibrates and evaluates gives transformers' logits, too. *Difference* is the largest of
these comparisons in float32, as a share of the largest logit. *Partly*: as exact, but some experts stay in full precision; moebit says so
before it starts, and wants `--accept-unquantized` where it is more than 5% of the expert parameters.""".splitlines()


@dataclass(frozen=True)
class Module:
    """One modelling module of transformers with experts in it.

    Attributes:
        on_seam: whether its experts go through the experts interface.
        types: the model types with a language model, aliases in brackets behind the first of the same configuration.
        causal: whether one of them has a causal language model.
    """

    name: str
    on_seam: bool
    types: dict[str, list[str]]
    causal: bool


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    module: Module
    model_type: str
    verdict: str
    why: str
    outcome: Outcome | None
    seconds: float


def modules() -> Iterator[Module]:
    """Every modelling module that defines experts, in the order of the alphabet."""
    by_module: dict[str, list[str]] = {}
    for model_type in CONFIG_MAPPING_NAMES:
        by_module.setdefault(CONFIG_MAPPING[model_type].__module__.split(".")[2], []).append(model_type)
    for directory in sorted((Path(transformers.__file__).parent / "models").iterdir()):
        source = "".join(file.read_text(encoding="utf-8") for file in sorted(directory.glob("modeling_*.py")))
        on_seam = bool(ON_SEAM.search(source))
        if not on_seam and not EXPERTS_CLASS.search(source):
            continue
        types: dict[str, list[str]] = {}
        for model_type in by_module.get(directory.name, []):
            config = CONFIG_MAPPING[model_type]
            if not any(config in mapping for mapping in MAPPINGS):
                continue
            first = next((known for known in types if CONFIG_MAPPING[known] is config), None)
            types.setdefault(first or model_type, []).extend([model_type] if first else [])
        causal = any(CONFIG_MAPPING[model_type] in MODEL_FOR_CAUSAL_LM_MAPPING for model_type in types)
        yield Module(directory.name, on_seam, types, causal)


def attempt(module: Module, model_type: str) -> Row:
    """Try one type; whatever goes wrong is the result."""
    began = time.perf_counter()
    verdict, why, outcome = "no", "", None
    if model_type not in TINY:
        why = UNTRIED.get(model_type, "tests/support/architectures.py has no configuration for it")
        return Row(module, model_type, "not tried", why, None, 0.0)
    with tempfile.TemporaryDirectory() as directory:
        try:
            tiny = TINY[model_type]
            with quiet():
                try:
                    outcome = run(tiny, Path(directory) / "work")
                except BadInputError as error:
                    if "--accept-unquantized" not in str(error):
                        raise
                    why = str(error)
                    outcome = run(tiny, Path(directory) / "work", accept_unquantized=True)
            verdict = "works" if outcome.works else "partly" if outcome.exact else "no"
            if not outcome.exact:
                why = f"logits or other tensors differ: {', '.join(outcome.changed[:2])}"
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
    return Row(module, model_type, verdict, " ".join(why.split()), outcome, time.perf_counter() - began)


def table(rows: list[Row], found: list[Module]) -> str:
    """The whole page."""
    tried = {module.name: [row for row in rows if row.module is module] for module in found}
    whole = [module for module in found if any(row.verdict == "works" for row in tried[module.name])]
    causal = [module for module in found if module.on_seam and module.causal]
    ids = sum(1 + len(aliases) for module in causal for kind, aliases in module.types.items())
    lines = [
        "# Which model types work",
        "",
        "Written by `make architectures`; do not edit. "
        f"transformers {transformers.__version__}, torch {torch.__version__}, moebit {version('moebit')}.",
        "",
        *ABOUT,
        "",
        f"**{len(whole)} modelling modules work in full**, in at least one of their forms. Of the {len(causal)} whose experts go through",
        f"transformers' experts interface and that have a causal language model ({ids} model types), {sum(m in whole for m in causal)} do.",
        "",
    ]
    for title, chosen in (
        ("Through the experts interface", [m for m in found if m.on_seam]),
        ("Not through the interface", [m for m in found if not m.on_seam]),
    ):
        lines += [
            f"## {title}",
            "",
            "| module | model type | | experts quantized | difference | switched on |",
            "|---|---|---|---|---|---|",
        ]
        for module in chosen:
            if not module.types:
                lines.append(f"| {module.name} | | no | | | has no language model in transformers' auto classes |")
            lines += [_line(row) for row in tried[module.name]]
        lines.append("")
    lines += ["## Why not", ""]
    lines += [f"- **{row.model_type}** ({row.verdict}): {row.why}" for row in rows if row.why]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    aliases = row.module.types[row.model_type]
    name = row.model_type + (f" ({', '.join(aliases)})" if aliases else "")
    share = f"{row.outcome.share:.0%}" if row.outcome else ""
    apart = f"{row.outcome.difference:.0e}" if row.outcome else ""
    quirks = TINY[row.model_type].quirks if row.model_type in TINY else ""
    return f"| {row.module.name} | {name} | {row.verdict} | {share} | {apart} | {quirks} |"


def main() -> None:
    warnings.filterwarnings("ignore")
    wanted = sys.argv[1:]
    found = list(modules())
    rows = []
    for module in found:
        for model_type in module.types:
            if wanted and model_type not in wanted:
                continue
            row = attempt(module, model_type)
            rows.append(row)
            print(f"{row.verdict:10}{model_type:28}{row.seconds:6.1f} s  {row.why[:200]}", flush=True)
    if not wanted:
        TABLE.write_text(table(rows, found), encoding="utf-8")
        print(f"{TABLE}: {sum(row.verdict == 'works' for row in rows)} of {len(rows)} types work in full")


if __name__ == "__main__":
    main()
