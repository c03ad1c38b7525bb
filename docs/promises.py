"""Writes the five services' calls into docs/coming-from.md, from the table that the tests run: `make docs`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from promises import PROMISES, Is, Promise  # noqa: E402

DOCUMENT = ROOT / "docs" / "coming-from.md"
END = "<!-- end of calls -->\n"
#: Characters of a body or of a value that a row shows.
SHOWN_CHARACTERS = 110


def begin(name: str) -> str:
    """Return the line before a service's calls."""
    return f"<!-- calls of {name}: written by `make docs` -->\n"


def table(name: str) -> str:
    """Return the calls of one service as a table."""
    rows = ["| call | sent | answer |", "| --- | --- | --- |"]
    rows += [f"| `{promise.call}` | {_sent(promise)} | {_answer(promise)} |" for promise in PROMISES[name]]
    return "\n".join(rows) + "\n"


def _sent(promise: Promise) -> str:
    parts = [f"`{name}: {value}`" for name, value in promise.headers.items()]
    if promise.send is not None:
        parts.insert(0, f"`{_short(promise.send)}`")
    return ", ".join(parts)


def _answer(promise: Promise) -> str:
    parts = [
        f"`{name}`: {value.words}" if isinstance(value, Is) else f"`{name}`: `{_short(value)}`"
        for name, value in promise.members.items()
    ]
    parts += [f"`{name}: {value}`" for name, value in promise.answers.items()]
    said = f"**{promise.status}** {'; '.join(parts)}".strip()
    _, shown = promise.before
    return f"{said}; then the order is `{shown}`" if shown and promise.call.startswith("PATCH") else said


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def written(text: str) -> str:
    """Return the document with its tables as they should be."""
    for name in PROMISES:
        head, start, rest = text.partition(begin(name))
        if start:
            text = head + start + table(name) + END + rest.partition(END)[2]
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
