"""The trial gateway calls back: signed, on every change, until it is taken, and as badly as it is told to."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from standardwebhooks.webhooks import Webhook

from auditing import wait_until
from servers import free_port
from serving import PATIENCE_SECONDS, environment
from trying import SECRET, TrialGateway


class Call(NamedTuple):
    """A callback as it arrived, verified by the library."""

    id: str
    document: dict[str, Any]
    at: float


class Shop:
    """Takes callbacks: it answers with `answers` in turn, then 204, and each only while `open` is set."""

    def __init__(self, port: int = 0) -> None:
        self.calls: list[Call] = []
        self.wrong: list[str] = []
        self.answers: list[int] = []
        self.open = threading.Event()
        self.open.set()
        shop = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                shop.take(self)

            def log_message(self, *_: Any) -> None:
                """Nobody reads what was asked."""

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/api/v1/payments/callback"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def take(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["content-length"]))
        try:
            document = Webhook(SECRET).verify(body, dict(request.headers))
            self.calls.append(Call(request.headers["webhook-id"], document, time.monotonic()))
        except Exception as error:
            self.wrong.append(repr(error))
        self.open.wait(PATIENCE_SECONDS)
        request.send_response(self.answers.pop(0) if self.answers else 204)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def after(self, count: int) -> list[Call]:
        """Return the calls, once there are so many."""
        wait_until(lambda: len(self.calls) + len(self.wrong) >= count)
        assert self.wrong == []
        return list(self.calls)

    def __enter__(self) -> Shop:
        return self

    def __exit__(self, *_: object) -> None:
        self.open.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@contextmanager
def calling(folder: Path, *options: str, shop: Shop | None = None) -> Iterator[tuple[TrialGateway, Shop]]:
    """A gateway, and a shop that it calls."""
    with (
        shop or Shop() as there,
        TrialGateway(
            folder, "--callback", there.url, *options, PAYMENT_GATEWAY_SECRET=SECRET, LOG_LEVEL="INFO"
        ) as gateway,
    ):
        yield gateway, there


def test_every_change_is_told(folder: Path) -> None:
    """Each with the whole payment as it is then; what the answer said already, or said before, is not told."""
    with calling(folder, "--slow-seconds", "0.1") as (gateway, shop):
        told = 0

        def last() -> tuple[str, str, int, int]:
            nonlocal told
            told += 1
            document = shop.after(told)[-1].document
            return tuple(document[name] for name in ("key", "status", "captured_minor", "refunded_minor"))

        gateway.pay("declined", "tok_declined")
        gateway.pay("paid")
        assert last() == ("paid", "succeeded", 1299, 0)
        gateway.pay("paid")
        gateway.client.post("/payments/pay_paid/refunds", json={"key": "r", "amount_minor": 9})
        assert last() == ("paid", "succeeded", 1299, 9)
        body = {"key": "s", "amount_minor": 10, "reason": "pending"}
        gateway.client.post("/payments/pay_paid/refunds", json=body)
        assert last() == ("paid", "succeeded", 1299, 19)
        gateway.pay("kept", capture=False)
        assert last() == ("kept", "authorized", 0, 0)
        gateway.client.post("/payments/pay_kept/capture", json={"amount_minor": 1000})
        assert last() == ("kept", "succeeded", 1000, 0)
        gateway.pay("off", "tok_action")
        gateway.client.post("/payments/pay_off/void")
        assert last() == ("off", "voided", 0, 0)
        gateway.pay("no", "tok_action")
        gateway.answer("no", "no")
        assert last() == ("no", "declined", 0, 0)
        gateway.pay("lost", "tok_slow")
        assert last() == ("lost", "succeeded", 1299, 0)
        gateway.pay("slow", "tok_processing")
        assert last() == ("slow", "succeeded", 1299, 0)
        assert len(shop.calls) == told
        assert len({call.id for call in shop.calls}) == told
        assert shop.calls[-1].document == gateway.found("slow")


def test_nobody_waits_for_a_callback(folder: Path) -> None:
    """A charge is answered while the shop takes its time over the callback."""
    with calling(folder) as (gateway, shop):
        shop.open.clear()
        assert gateway.pay("a").status_code == 201
        assert gateway.pay("b").status_code == 201
        assert not any("a callback is not taken" in line for line in gateway.log)  # nor has it been given up
        shop.after(2)


def test_a_callback_comes_before_the_answer(folder: Path) -> None:
    """With --callbacks-early the charge is answered after the shop has heard of it."""
    with calling(folder, "--callbacks-early") as (gateway, shop), ThreadPoolExecutor(1) as customer:
        shop.open.clear()
        charge = customer.submit(gateway.pay, "a")
        (call,) = shop.after(1)
        assert gateway.found("a") == call.document
        assert not charge.done()
        shop.open.set()
        assert charge.result().status_code == 201


def test_a_callback_comes_late(folder: Path) -> None:
    """With --callbacks-late it comes that much after the answer."""
    with calling(folder, "--callbacks-late", "0.5") as (gateway, shop):
        began = time.monotonic()
        gateway.pay("a")
        (call,) = shop.after(1)
        assert call.at - began >= 0.5


def test_a_callback_comes_twice(folder: Path) -> None:
    """With --callbacks-twice each is sent again under its id, although it was taken."""
    with calling(folder, "--callbacks-twice") as (gateway, shop):
        gateway.pay("a")
        first, second = shop.after(2)
        assert (first.id, first.document) == (second.id, second.document)


def test_a_callback_is_sent_until_it_is_taken(folder: Path) -> None:
    """Nobody listens, then it is not known, then not trusted: each try is signed anew, under one id."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    with TrialGateway(folder, "--callback", url, "--secret", SECRET, LOG_LEVEL="INFO") as gateway:
        gateway.pay("a")
        gateway.wait_for("a callback is not taken")
        shop = Shop(port)
        shop.answers += [404, 401]
        with shop:
            calls = shop.after(3)
            gateway.wait_for("calls back .* tries=[4-9]")
        assert len({call.id for call in calls}) == 1
        assert calls[1].at - calls[0].at >= 0.5


def test_a_gateway_that_waits_stops_at_once(folder: Path) -> None:
    """SIGTERM ends it while an answer is slow and callbacks wait, and it says how many are lost."""
    with (
        TrialGateway(
            folder, "--slow-seconds", "600", "--callback", "http://127.0.0.1:1/", "--secret", SECRET
        ) as gateway,
        ThreadPoolExecutor(1) as customer,
    ):
        gateway.pay("a")
        slow = customer.submit(gateway.pay, "b", "tok_slow")
        wait_until(lambda: len(gateway.entries()) == 2)
        began = time.monotonic()
        assert gateway.stop() == 0
        assert time.monotonic() - began < 30
        assert slow.exception() is not None
        assert any("callbacks are not sent" in line and "count=2" in line for line in gateway.log)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--secret", SECRET), "--secret is there and --callback is not"),
        (("--callback", "http://127.0.0.1:1/"), "set PAYMENT_GATEWAY_SECRET"),
        (("--callback", "http://127.0.0.1:1/", "--secret", "whsec_!"), "--secret must be whsec_"),
        (("--callback", "127.0.0.1:8000", "--secret", SECRET), "must be an address like http://"),
        (("--callbacks-twice",), "need --callback"),
    ],
)
def test_half_of_what_callbacks_need_is_refused(folder: Path, options: tuple[str, ...], said: str) -> None:
    """Each refusal says what is missing, and shows no secret."""
    ended = subprocess.run(
        [sys.executable, "-m", "expediter", "gateway", "--port", "0", *options],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert said in ended.stderr
    assert SECRET not in ended.stderr
