"""Draws the lifecycle of an order from its table, into every document that has a place for it: `make docs`."""

from __future__ import annotations

import re
from pathlib import Path

from expediter.orders.order import TRANSITIONS, Status

ROOT = Path(__file__).resolve().parents[1]
#: The documents that show the drawing, between BEGIN and END.
DOCUMENTS = (ROOT / "docs" / "architecture.md",)
BEGIN = "<!-- lifecycle: drawn from TRANSITIONS by `make docs` -->\n"
END = "<!-- end of lifecycle -->\n"

#: What makes a move that is not the next step of the road.
LABELS = {
    (Status.PENDING, Status.PROCESSING): "nothing to pay",
    (Status.PAYMENT_FAILED, Status.PAYMENT_PROCESSING): "retry",
    (Status.FAILED, Status.PROCESSING): "retry",
}


def drawing() -> str:
    """Return the drawing in Mermaid, and a sentence for the moves that it leaves out."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {Status.PENDING.value}"]
    for start, moves in TRANSITIONS.items():
        for end in Status:
            if end in moves and end is not Status.CANCELLED:
                label = LABELS.get((start, end))
                lines.append(f"    {start.value} --> {end.value}{f': {label}' if label else ''}")
    fixed = [f"`{start.value}`" for start, moves in TRANSITIONS.items() if Status.CANCELLED not in moves]
    lines += ["```", "", f"From every status but {' and '.join(fixed)} an order can be cancelled."]
    return "\n".join(lines) + "\n"


def drawn(text: str) -> str:
    """Return a document with its drawing as it should be."""
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: BEGIN + drawing() + END, text, flags=re.S)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(drawn(document.read_text(encoding="utf-8")), encoding="utf-8")
