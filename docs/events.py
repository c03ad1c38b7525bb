"""Writes the table of event types into docs/events.md: `make docs`."""

from __future__ import annotations

import re
from pathlib import Path

from expediter.orders.events import EVENTS

DOCUMENT = Path(__file__).resolve().parent / "events.md"
BEGIN = "<!-- events: written from EVENTS by `make docs` -->\n"
END = "<!-- end of events -->\n"


def written() -> str:
    """Return the table."""
    lines = ["| type | what it says | fields of `data` |", "| --- | --- | --- |"]
    for name, word in EVENTS.items():
        fields = ", ".join(f"`{field}`" for field in word.data) or "none"
        lines.append(f"| `{name}` | {word.meaning} | {fields} |")
    return "\n".join(lines) + "\n"


def drawn(text: str) -> str:
    """Return the page with its table as it should be."""
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: BEGIN + written() + END, text, flags=re.S)


if __name__ == "__main__":
    DOCUMENT.write_text(drawn(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
