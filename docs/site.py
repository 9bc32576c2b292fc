"""What the documentation site adds to docs/: the committed results as pages, and links out of docs/ that still lead somewhere.

The Markdown files are written to be read in the repository, where `../benchmarks/results/quality.md` is a file. On the site the results
are pages under results/, and other files of the repository are named without a link (or linked, where mkdocs knows repo_url).
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
# What a page's method was measured to bring; a table that is not committed (yet) is not mentioned.
MEASURED = {
    "methods/gptq.md": ("quality", "solver"),
    "methods/awq.md": ("moequant",),
    "methods/moequant.md": ("moequant", "ebss"),
    "methods/eaquant.md": ("eaquant", "routers"),
    "methods/moqa.md": ("moqa",),
    "methods/rotation.md": ("moequant", "eaquant"),
    "evaluation.md": ("tasks",),
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def results() -> dict[str, str]:
    """Name -> title of every committed table, in the order of the names."""
    found = {}
    for path in sorted((ROOT / RESULTS).glob("*.md")):
        lines = path.read_text(encoding="utf-8").splitlines()
        found[path.stem] = next((line[2:] for line in lines if line.startswith("# ")), path.stem)
    return found


def on_config(config: Any) -> Any:
    """The results in the navigation."""
    for entry in config["nav"]:
        if "Results" in entry:
            entry["Results"] = [{"Overview": "results/index.md"}, *({title: f"results/{name}.md"} for name, title in results().items())]
    return config


def on_files(files: Any, config: Any) -> Any:
    """The results, and a page that lists them."""
    for path in sorted((ROOT / RESULTS).iterdir()):
        if path.suffix in (".md", ".svg", ".png"):
            content = path.read_bytes() if path.suffix == ".png" else path.read_text(encoding="utf-8")
            files.append(File.generated(config, f"results/{path.name}", content=content))
    head = "# Results\n\nMeasured with the programs in `benchmarks/`, and committed with the commit that they were made from.\n\n"
    listed = "".join(f"- [{title}]({name}.md)\n" for name, title in results().items())
    files.append(File.generated(config, "results/index.md", content=head + listed))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links by where they lead in the repository, and under a method those to its tables."""
    here = page.file.src_uri
    origin = f"{RESULTS}/{posixpath.basename(here)}" if here.startswith("results/") else f"docs/{here}"

    def turned(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        file, _, anchor = target.partition("#")
        if not file or re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), file))
        if path.startswith(("docs/", f"{RESULTS}/")):
            there = path.removeprefix("docs/") if path.startswith("docs/") else f"results/{posixpath.basename(path)}"
            relative = posixpath.relpath(there, posixpath.dirname(here) or ".")
            return f"{mark}[{text}]({relative}{'#' + anchor if anchor else ''})"
        if config.get("repo_url"):
            return f"{mark}[{text}]({config['repo_url'].rstrip('/')}/blob/main/{path})"
        return f"{text} (`{path}`)"

    base = posixpath.relpath("results", posixpath.dirname(here) or ".")
    tables = " · ".join(f"[{title}]({base}/{name}.md)" for name, title in results().items() if name in MEASURED.get(here, ()))
    return LINK.sub(turned, markdown) + (f"\n\nMeasured: {tables}\n" if tables else "")
