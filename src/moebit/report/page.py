"""From documents to one HTML file that loads nothing."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from moebit import words
from moebit.errors import BadInputError
from moebit.report import facts, learning
from moebit.report.facts import Documents, read_documents
from moebit.report.plots import figures
from moebit.report.svg import DARK, LIGHT
from moebit.report.types import type_table
from moebit.storage.documents import understood
from moebit.storage.durable import replace_text


def report(out: str | Path, output: str | Path | None = None, *, evaluation: Sequence[str | Path] | str | Path = ()) -> Path:
    """Write the page of a finished output again.

    Args:
        out: what `quantize` wrote.
        output: where the page goes; default `OUT/report.html`.
        evaluation: files of `moebit evaluate --json` about this output, to be shown on it.

    Returns:
        The file that was written.

    Raises:
        BadInputError: no output of moebit, a document that cannot be read, an evaluation of another model, a file that cannot be written.
    """
    given = [evaluation] if isinstance(evaluation, str | Path) else list(evaluation)
    documents = read_documents(Path(out), [Path(file) for file in given])
    with understood(Path(out) / "report.json", "quantize again, or leave the page as it is"):
        page = report_page(documents)
    return write_page(Path(output) if output is not None else Path(out) / "report.html", page)


def report_page(documents: Documents) -> str:
    """The page as HTML text."""
    recipe = documents.recipe
    return render(
        "report.html",
        title=f"{documents.name}: what happened",
        subtitle=_subtitle(documents),
        warnings=facts.warnings(documents),
        summary=facts.summary(documents),
        engines=facts.engines(documents),
        quality=facts.quality(documents),
        layers=facts.layer_rows(documents),
        types=type_table(documents),
        kept=facts.kept(documents),
        figures=defaultdict(list, figures(documents), learning=learning.figures(documents.layers)),
        command=documents.report.get("command"),
        versions=_versions(documents),
        recipe=recipe,
    )


def _subtitle(documents: Documents) -> str:
    layers = documents.layers
    experts = sum(bool(layer.get("experts")) for layer in layers)
    made = f"Quantized by moebit {documents.manifest.get('moebit', '')}".strip()
    return f"{made} into the {documents.manifest.get('format', 'native')} format: {len(layers)} layers, {experts} of them with experts."


def _versions(documents: Documents) -> str:
    known = [f"{name} {documents.manifest[name]}" for name in ("moebit", "torch", "transformers") if name in documents.manifest]
    told = [f"seed {documents.manifest['seed']}"] if "seed" in documents.manifest else []
    if "memory" in documents.manifest:
        told.append(f"memory {words.size(documents.manifest['memory'])}")
    if documents.manifest.get("input"):
        told.append(f"input {documents.manifest['input'][:16]}…")
    return ", ".join(known + told)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("moebit.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "size": words.size,
        "duration": words.duration,
        "share": words.share,
        "plain": words.plain,
        "short": facts.short,
        "prose": prose,
    }
    environment.globals |= {"light": LIGHT, "dark": DARK}
    return environment


def prose(text: str) -> Markup:
    """A sentence, escaped, with what stands in `backticks` as code."""
    parts = [Markup("<code>{}</code>").format(part) if odd % 2 else escape(part) for odd, part in enumerate(text.split("`"))]
    return Markup("").join(parts)


def render(template: str, **values: Any) -> str:
    """A template of this package as HTML; what is put in is escaped."""
    return _environment().get_template(template).render(version=version("moebit"), **values)


def write_page(file: Path, page: str) -> Path:
    """Write a page.

    Raises:
        BadInputError: the file cannot be written.
    """
    try:
        replace_text(file, page)
    except OSError as error:
        raise BadInputError(f"{file}: cannot be written ({error.strerror}); choose another -o") from error
    return file
