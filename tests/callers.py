"""Clients that go on, whatever happens to the service, and note what they are told."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2

from serving import PATIENCE_SECONDS

#: Clients that place orders, and the pause of each after an answer, in seconds.
PLACING = 3
PAUSE_SECONDS = 0.04
ITEMS = [{"item_id": "i", "quantity": 1, "price": 1}]


class Clients:
    """Clients that place and read orders, and note what they are told, how long they wait, and for what.

    Each order is sent again, with its key, until it is answered with a 2xx: what is there in the end must be what
    was accepted, no less and no more.
    """

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self.accepted: list[str] = []
        self.versions: dict[str, int] = {}
        #: What a restored backup took away again.
        self.lost: set[str] = set()
        self.slowest: dict[str, float] = {}
        self.statuses: dict[str, set[int]] = {}
        self.refusals = 0
        self.refused: list[str] = []
        self.wrong: list[str] = []
        self.unwell = threading.Event()
        self._token = {"payment_token": token} if token else {}
        self._over = threading.Event()

    def _ask(
        self, client: httpx2.Client, what: str, method: str, path: str, **more: Any
    ) -> httpx2.Response | None:
        began = time.monotonic()
        unwell = self.unwell.is_set()
        try:
            answer = client.request(method, path, **more)
        except httpx2.TransportError:
            return None
        self.slowest[what] = max(self.slowest.get(what, 0.0), time.monotonic() - began)
        if unwell and self.unwell.is_set():
            self.statuses.setdefault(what, set()).add(answer.status_code)
            if answer.status_code >= 300:
                self.refused.append(answer.text)
        if answer.status_code >= 500 and answer.status_code != 503:
            self.wrong.append(f"{method} {path}: {answer.status_code} {answer.text}")
        return answer

    def place(self, number: int) -> None:
        with httpx2.Client(base_url=self.url, timeout=60) as client:
            for count in itertools.count():
                key = f"{number}-{count}"
                # Every other order has an id of the client's own.
                body = {"customer_id": key, "items": ITEMS, **self._token}
                body |= {"order_id": f"mine-{key}"} if count % 2 else {}
                deadline = time.monotonic() + PATIENCE_SECONDS
                while not self._is_placed(client, key, body):
                    assert time.monotonic() < deadline, f"{key} is not taken: {self.refused[-1:]}"
                    time.sleep(PAUSE_SECONDS)
                if self._over.wait(PAUSE_SECONDS):
                    return

    def _is_placed(self, client: httpx2.Client, key: str, body: dict[str, Any]) -> bool:
        answer = self._ask(client, "POST", "POST", "/orders", json=body, headers={"Idempotency-Key": key})
        if answer is None:
            return False
        if answer.status_code in (201, 202):
            self.accepted.append(answer.json()["order_id"])
            return True
        if answer.status_code == 503:
            self.refusals += 1
        elif not (answer.status_code == 409 and "under way" in answer.text):
            self.wrong.append(f"POST {key}: {answer.status_code} {answer.text}")
        return False

    def read(self) -> None:
        with httpx2.Client(base_url=self.url, timeout=60) as client:
            while not self._over.wait(PAUSE_SECONDS):
                if self.accepted:
                    self._read_one(client, self.accepted[-1])

    def _read_one(self, client: httpx2.Client, order_id: str) -> None:
        answer = self._ask(client, "GET", "GET", f"/orders/{order_id}")
        if answer is None or answer.status_code == 503 or order_id in self.lost:
            return
        version = answer.json()["version"] if answer.status_code == 200 else -1
        if version < self.versions.get(order_id, 0):
            self.wrong.append(f"{order_id}, of version {self.versions.get(order_id)} before: {answer.text}")
        self.versions[order_id] = version

    def look(self) -> None:
        with httpx2.Client(base_url=self.url, timeout=60) as client:
            while not self._over.wait(0.1):
                self._ask(client, "health", "GET", "/health")
                self._ask(client, "readyz", "GET", "/readyz")

    @contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(PLACING + 2) as pool:
            running = [pool.submit(self.place, number) for number in range(PLACING)]
            running += [pool.submit(self.read), pool.submit(self.look)]
            try:
                yield
            finally:
                self._over.set()
            for each in running:
                each.result()
