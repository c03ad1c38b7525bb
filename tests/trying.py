"""The programs to try things on as processes of their own: `expediter gateway` and `expediter receive`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import httpx2

from serving import PATIENCE_SECONDS, Program

#: What webhooks and callbacks are signed with in tests.
SECRET = "whsec_dHJ5IGl0IG9uIGEgbGFwdG9w"


class Trial(Program):
    """A program that listens; `client` asks it."""

    def __init__(self, folder: Path, *words: str, printed: Path | None = None, **settings: str) -> None:
        super().__init__(folder, *words, printed=printed, **({"LOG_LEVEL": "WARNING"} | settings))
        self.url = self.wait_for(r"listens on (http://\S+)")[1]
        self.client = httpx2.Client(base_url=self.url, timeout=PATIENCE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def _end(self) -> int:
        self.client.close()
        return super()._end()

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            assert self.stop() == 0


class TrialGateway(Trial):
    """A gateway to try things on, with its books in `ledger`; `options` say how it misbehaves."""

    def __init__(self, folder: Path, *options: str, port: int = 0, **settings: str) -> None:
        self.ledger = folder / "payments.jsonl"
        super().__init__(
            folder, "gateway", "--port", str(port), "--ledger", str(self.ledger), *options, **settings
        )

    def entries(self) -> list[dict[str, Any]]:
        """Return what is in its books."""
        return [json.loads(line) for line in self.ledger.read_text().splitlines()]

    def pay(self, key: str, token: str | None = None, **more: Any) -> httpx2.Response:
        """Ask for a payment of 12.99 EUR, for an order of the key's name."""
        body = {"key": key, "order_id": key, "amount_minor": 1299, "currency": "EUR", "token": token} | more
        return self.client.post("/payments", json=body, headers={"Idempotency-Key": key})

    def found(self, key: str) -> dict[str, Any]:
        """Return the document of a payment."""
        answer = self.client.get("/payments", params={"key": key})
        assert answer.status_code == 200, answer.text
        document: dict[str, Any] = answer.json()
        return document

    def answer(self, key: str, said: str) -> httpx2.Response:
        """Press a button on the page of a payment."""
        return self.client.post(f"/pay/pay_{key}", data={"answer": said})


class TrialReceiver(Trial):
    """A receiver of webhooks that prints JSON; `options` say how it misbehaves."""

    def __init__(self, folder: Path, *options: str, **settings: str) -> None:
        self._printed = folder / "received"
        super().__init__(folder, "receive", "--port", "0", *options, printed=self._printed, **settings)

    def printed(self) -> list[str]:
        """Return the lines that it has printed by now."""
        return self._printed.read_text().splitlines()
