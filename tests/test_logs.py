"""The log: JSON for machines, one line for repeated trouble, and nothing that opens a door or names a person."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import structlog

from auditing import wait_until
from expediter.telemetry import KINDS_MAX, QUIET_SECONDS, Repeats, configure_logs
from serving import PATIENCE_SECONDS, Program, Serving, environment

ORDERS = 30
#: What belongs to one customer, and is planted in every order.
PLANTED = ("Planted Person", "planted@example.org", "planted street 7", "tok_planted")

KITCHEN = """
async def fulfil(ticket):
    raise KeyError("no such recipe")
"""


def order(order_id: str) -> dict[str, Any]:
    return {
        "order_id": order_id,
        "customer_name": PLANTED[0],
        "metadata": {"email": PLANTED[1], "address": PLANTED[2]},
        "payment_token": PLANTED[3],
        "items": [{"name": "Pen", "quantity": 1, "price": 1}],
    }


def test_trouble_that_many_orders_meet_is_one_line_with_a_count(folder: Path) -> None:
    """Each of thirty orders meets the same bug: the log has it once, with its traceback, and a count."""
    (folder / "kitchen.py").write_text(KITCHEN)
    settings = {
        "FULFILMENT": "python:kitchen:fulfil",
        "PYTHONPATH": str(folder),
        "LOG_FORMAT": "json",
        "LOG_LEVEL": "DEBUG",
        "ACCESS_LOG_FILE": "-",
        "ACCESS_LOG_FORMAT": "json",
        "ADMIN_PASSWORD": "planted-password",
    }
    with Serving(folder, **settings) as service:
        for number in range(ORDERS):
            assert service.client.post("/orders", json=order(f"A{number}")).status_code == 201
        service.client.post("/admin/seed", headers={"X-Admin-Password": "planted-passwort"}, json={"count": 1})
        service.client.post("/orders", content=b'{"payment_token": "tok_planted", "items": 7}')
        for number in range(ORDERS):
            wait_until(lambda number=number: has_failed(service, f"A{number}"))  # type: ignore[misc]
        assert service.stop() == 0
    lines = [json.loads(line) for line in service.log]
    failed = [line for line in lines if line.get("event") == "a stage failed"]
    assert "no such recipe" in failed[0]["exception"]
    assert failed[0]["order_id"]
    assert len(failed) <= 3
    assert sum(line.get("more_of_this", 1) for line in failed) >= ORDERS
    requests = [line for line in lines if "request_id" in line and "target" in line]
    assert len(requests) > ORDERS
    assert {"method", "status", "seconds", "bytes", "client", "timestamp"} <= requests[0].keys()
    text = "\n".join(service.log)
    assert [word for word in (*PLANTED, "planted-passwor") if word in text] == []


def has_failed(service: Serving, order_id: str) -> bool:
    told = service.client.get(f"/orders/{order_id}/explain").json()["last_error"]
    return "no such recipe" in (told or "")


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_service_writes_text_on_a_terminal_and_json_elsewhere(folder: Path, form: str) -> None:
    """Without LOG_FORMAT; what a command of a moment says stays a sentence."""
    if form == "json":
        with Serving(folder, "--no-workers", LOG_FORMAT="auto") as service:
            pass
        assert all("event" in json.loads(line) for line in service.log)
        refused = subprocess.run(
            [sys.executable, "-m", "expediter", "clear"],
            cwd=folder,
            env=environment(folder, LOG_FORMAT="auto"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        assert refused.stderr.startswith("expediter: ")
        return
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "expediter", "serve", "--no-workers"],
        cwd=folder,
        env=environment(folder, LOG_FORMAT="auto"),
        stderr=theirs,
    )
    os.close(theirs)
    said = b""
    try:
        while b"listens on" not in said:
            said += os.read(ours, 4096)
    finally:
        process.terminate()
        with suppress(OSError):  # the other end is closed
            while os.read(ours, 4096):
                pass
        assert process.wait(PATIENCE_SECONDS) == 0
        os.close(ours)
    assert not said.lstrip().startswith(b"{")


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def passed(repeats: Repeats, **line: Any) -> dict[str, Any] | None:
    """Return what comes of a line; None: it was dropped."""
    try:
        return dict(repeats(None, line.pop("method", "warning"), {"level": "warning", **line}))
    except structlog.DropEvent:
        return None


def test_the_same_trouble_is_told_once_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    """Another kind comes through, and so does the first of the next minute; what was counted is said before it."""
    configure_logs("INFO", "json")
    clock = Clock()
    repeats = Repeats(clock)
    error = KeyError("x")
    assert passed(repeats, event="a", often=True, exc_info=error) == {
        "level": "warning",
        "event": "a",
        "exc_info": error,
    }
    assert passed(repeats, event="a", often=True, exc_info=error, order_id="A1") is None
    assert passed(repeats, event="a", often=True, exc_info=error, order_id="A2") is None
    assert passed(repeats, event="a", often=True, exc_info=ValueError()) is not None
    assert passed(repeats, event="a") is not None
    clock.seconds += QUIET_SECONDS
    assert passed(repeats, event="b", method="info") is not None
    (told,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (told["event"], told["order_id"], told["more_of_this"]) == ("a", "A2", 2)
    assert passed(repeats, event="a", often=True, exc_info=error) is not None
    repeats.tell()
    assert capsys.readouterr().err == ""


def test_a_line_about_a_request_always_comes_through() -> None:
    """Its client was told to look for it; only the first has the traceback."""
    repeats = Repeats(Clock())
    first = passed(repeats, event="a request failed", often=True, exc_info=KeyError("x"), request_id="r1")
    again = passed(repeats, event="a request failed", often=True, exc_info=KeyError("x"), request_id="r2")
    assert first is not None and "exc_info" in first
    assert again == {"level": "warning", "event": "a request failed", "request_id": "r2", "error": "KeyError: 'x'"}


def test_what_is_remembered_of_trouble_is_bounded() -> None:
    """A thousand kinds; the one that was told longest ago comes through again."""
    repeats = Repeats(Clock())
    for number in range(KINDS_MAX + 1):
        assert passed(repeats, event=f"kind {number}", often=True) is not None
    assert passed(repeats, event="kind 0", often=True) is not None
    assert passed(repeats, event=f"kind {KINDS_MAX}", often=True) is None


def test_commands_of_a_moment_have_no_secret_in_what_they_say(folder: Path) -> None:
    """A password in an address is not said, neither where the address works nor where it cannot be read."""
    for address in (
        "postgresql://shop:planted-password@127.0.0.1:1/orders",
        "postgresqll://shop:planted-password@h/o",
    ):
        program = Program(folder, "doctor", DATABASE_URL=address)
        program.process.wait(PATIENCE_SECONDS)
        program.kill()
        assert "planted-password" not in "\n".join(program.log)
