"""Writes the limits that no other table has into docs/operations.md, from their comments: `make docs`."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent / "operations.md"
PACKAGE = Path(__file__).resolve().parents[1] / "src" / "expediter"
BEGIN = "<!-- limits: written from the comments in the code by `make docs` -->\n"
END = "<!-- end of limits -->\n"


def limits() -> Iterator[tuple[str, str]]:
    """Give each constant of the package that ends in _MAX, with the comment above it."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Dict):  # such are several limits
                targets = [
                    name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)
                ]
                for name in targets:
                    if name.endswith("_MAX") and not name.startswith("_"):
                        yield f"{module}.{name}", comment_above(lines, node.lineno - 1)


def comment_above(lines: list[str], line: int) -> str:
    """Return the `#:` comment above a line; constants that stand together share the first one's."""
    while line and re.match(r"[A-Z_, ]+ = ", lines[line - 1]):
        line -= 1
    found: list[str] = []
    while line and lines[line - 1].startswith("#:"):
        line -= 1
        found.insert(0, lines[line].removeprefix("#:").strip())
    return " ".join(found).replace("|", "\\|")


def value(place: str) -> str:
    """Return the value of a constant, as the tables show it."""
    module, _, name = place.rpartition(".")
    found = getattr(importlib.import_module(f"expediter.{module}"), name)
    return f"{found:,}"


def written(text: str) -> str:
    """Return the table, for the page `text`: without what it has by hand."""
    by_hand = text.partition(BEGIN)[0]
    rows = [
        f"| `{place}` | {value(place)} | {why} |" for place, why in limits() if f"| `{place}` |" not in by_hand
    ]
    return "\n".join(["| limit | value | what it bounds |", "| --- | --- | --- |", *rows]) + "\n"


def drawn(text: str) -> str:
    """Return the page with its table as it should be."""
    table = BEGIN + written(text) + END
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: table, text, flags=re.S)


if __name__ == "__main__":
    DOCUMENT.write_text(drawn(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
