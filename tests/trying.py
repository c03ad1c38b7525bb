"""The trial gateway as a process of its own: `expediter gateway`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serving import Program


class TrialGateway(Program):
    """A gateway to try things on, with its books in `ledger`; `options` say how it misbehaves."""

    def __init__(self, folder: Path, *options: str, port: int = 0, **settings: str) -> None:
        self.ledger = folder / "payments.jsonl"
        words = ("gateway", "--port", str(port), "--ledger", str(self.ledger), *options)
        super().__init__(folder, *words, **({"LOG_LEVEL": "WARNING"} | settings))
        self.url = self.wait_for(r"listens on (http://\S+)")[1]

    def __enter__(self) -> TrialGateway:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            assert self.stop() == 0

    def entries(self) -> list[dict[str, Any]]:
        """Return what is in its books."""
        return [json.loads(line) for line in self.ledger.read_text().splitlines()]
