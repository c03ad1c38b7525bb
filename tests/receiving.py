"""A receiver of webhooks: a real server, which checks each signature and answers as a test wants it to."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import httpx2
from aiohttp import web
from standardwebhooks import Webhook

from auditing import wait_until
from servers import free_port


class Got(NamedTuple):
    """One request: when it came, its number (from 1), its headers and its body."""

    at: float
    number: int
    path: str
    headers: Mapping[str, str]
    text: str

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.text)["data"]
        return found

    @property
    def event(self) -> tuple[str, int]:
        return self.data["order_id"], self.data["number"]


#: A status, headers and a body; a status alone; None: there is never an answer.
Answer = tuple[int, Mapping[str, str], bytes] | int | None


class Receiver:
    """Listens on a port of its own; `answer` says what is answered to a request, by default 204.

    `got` has every request, `taken` those that were answered 2xx, `wrong` what was wrong with a signature.
    """

    def __init__(self, answer: Callable[[Got], Answer] = lambda got: 204) -> None:
        self.answer = answer
        self.secrets: list[str] = []
        self.got: list[Got] = []
        self.taken: list[Got] = []
        self.wrong: list[str] = []
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/hooks"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._runner: web.AppRunner | None = None
        self._never = asyncio.Event()

    def __enter__(self) -> Receiver:
        self._thread.start()
        self.up()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.down()
        self._do(self._end_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def up(self) -> None:
        self._do(self._listen())

    def down(self) -> None:
        """Close the door and every connection."""
        if self._runner is not None:
            self._loop.call_soon_threadsafe(self._never.set)
            self._do(self._runner.cleanup())
            self._runner = None

    async def _end_tasks(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def _listen(self) -> None:
        self._never = asyncio.Event()
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._take)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def _take(self, request: web.Request) -> web.Response:
        text = (await request.read()).decode()
        got = Got(time.monotonic(), len(self.got) + 1, request.path, dict(request.headers), text)
        self.got.append(got)
        for secret in self.secrets:
            try:
                Webhook(secret).verify(text, {name.lower(): value for name, value in got.headers.items()})
            except Exception as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
        answer = self.answer(got)
        if answer is None:
            await self._never.wait()
            return web.Response(status=503)
        status, headers, body = answer if isinstance(answer, tuple) else (answer, {}, b"")
        if 200 <= status < 300:
            self.taken.append(got)
        return web.Response(status=status, headers=headers, body=body)

    def subscribe(self, client: httpx2.Client, **more: Any) -> str:
        """Make an endpoint that sends here; return its id."""
        made = client.post("/api/v1/webhooks", json={"url": self.url, **more})
        assert made.status_code == 201, made.text
        self.secrets = [made.json()["secret"]]
        found: str = made.json()["id"]
        return found

    def until(self, *events: tuple[str, int]) -> None:
        """Wait until each of these events was taken."""
        wait_until(lambda: set(events) <= {got.event for got in list(self.taken)})

    def first_of(self, order_id: str) -> list[int]:
        """Return the numbers of an order's events in the order in which each was first taken."""
        return list(
            dict.fromkeys(got.data["number"] for got in list(self.taken) if got.data["order_id"] == order_id)
        )
