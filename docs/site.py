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
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """The results, and a page that lists them."""
    listed = []
    for path in sorted((ROOT / RESULTS).iterdir()):
        if path.suffix in (".md", ".svg", ".png"):
            files.append(
                File.generated(config, f"results/{path.name}", content=path.read_bytes() if path.suffix == ".png" else path.read_text())
            )
        if path.suffix == ".md":
            title = next((line[2:] for line in path.read_text().splitlines() if line.startswith("# ")), path.stem)
            listed.append(f"- [{title}]({path.name})")
    head = "# Results\n\nMeasured with the programs in `benchmarks/`, and committed with the commit that they were made from.\n\n"
    files.append(File.generated(config, "results/index.md", content=head + "\n".join(listed) + "\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links by where they lead in the repository."""
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

    return LINK.sub(turned, markdown)
