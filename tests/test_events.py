"""docs/events.md lists the audit events that the package raises, with as many arguments as they have."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def raised() -> dict[str, set[int]]:
    """Event -> numbers of its arguments, of every sys.audit call in the package."""
    found: dict[str, set[int]] = {}
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "sys.audit":
                name, *arguments = node.args
                assert isinstance(name, ast.Constant), f"{file}: {ast.unparse(node)}"
                found.setdefault(str(name.value), set()).add(len(arguments))
    return found


def test_every_event_is_documented() -> None:
    rows = re.findall(r"^\| `(moebit\.\w+)` \| (.*?) \| before .* \|$", (ROOT / "docs" / "events.md").read_text(), re.M)
    assert rows
    assert raised() == {name: {len(re.sub(r"`[^`]*`", "", arguments).split(","))} for name, arguments in rows}
