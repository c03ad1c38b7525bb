"""`expediter receive`: what it says of webhooks that can be trusted, of those that cannot, and of garbage."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from standardwebhooks.webhooks import Webhook

from auditing import wait_until
from serving import PATIENCE_SECONDS, environment
from trying import SECRET, TrialReceiver

EVENT = {
    "type": "order.completed",
    "timestamp": "2026-11-28T00:00:00Z",
    "data": {"order_id": "A1", "number": 5, "position": 12, "order": {"order_id": "A1"}, "change": {}},
}


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrialReceiver]:
    """A receiver that knows the secret, and prints JSON."""
    with TrialReceiver(tmp_path_factory.mktemp("receiver"), "--json", "--secret", SECRET) as running:
        yield running


def signed(body: bytes, *, secret: str = SECRET, age: float = 0) -> dict[str, str]:
    """The headers of a webhook with this body."""
    at = datetime.now(UTC) - timedelta(seconds=age)
    return {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(secret).sign("msg_1", at, body.decode()),
    }


def sent(receiver: TrialReceiver, body: bytes, headers: Any = None) -> tuple[int, dict[str, Any]]:
    """Post a webhook; return the status of the answer, and the line that it made."""
    before = len(receiver.printed())
    answer = receiver.client.post("/hooks/orders", content=body, headers=headers)
    wait_until(lambda: len(receiver.printed()) > before)
    (line,) = receiver.printed()[before:]
    return answer.status_code, json.loads(line)


def test_a_webhook_that_can_be_trusted(receiver: TrialReceiver) -> None:
    """It is answered 204, and the line has what happened to which order, and the whole body."""
    body = json.dumps(EVENT).encode()
    status, line = sent(receiver, body, signed(body))
    assert status == 204
    assert datetime.fromisoformat(line.pop("at")) <= datetime.now(UTC)
    assert line == {
        "verdict": "verified",
        "status": 204,
        "id": "msg_1",
        "type": "order.completed",
        "order_id": "A1",
        "number": 5,
        "position": 12,
        "body": EVENT,
    }


def test_a_signature_beside_others_counts(receiver: TrialReceiver) -> None:
    """While a secret is changed a webhook has two signatures; one of them is enough."""
    body = json.dumps(EVENT).encode()
    headers = signed(body)
    other = signed(body, secret="whsec_c29tZXRoaW5nIGVsc2U=")["webhook-signature"]
    headers["webhook-signature"] = f"{other} {headers['webhook-signature']}"
    assert sent(receiver, body, headers)[0] == 204


@pytest.mark.parametrize(
    ("body", "change", "status", "verdict"),
    [
        (b"{}", {"webhook-signature": None}, 401, "no signature"),
        (b"{}", {"webhook-id": None}, 401, "no signature"),
        (b"{}", {"webhook-id": "msg_2"}, 401, "bad signature"),
        (b"{}", {"webhook-timestamp": "soon"}, 401, "bad timestamp"),
        (b"{}", {"webhook-timestamp": "nan"}, 401, "bad timestamp"),
        (b"{}", {"webhook-timestamp": "1e999"}, 401, "bad timestamp"),
        (b"{}", {"webhook-signature": "v1"}, 401, "bad signature"),
        (b"{}", {"webhook-signature": "v1,a,b"}, 401, "bad signature"),
        (b"{}", {"webhook-signature": "v1,not base64 at all"}, 401, "bad signature"),
        (b"{}", {"webhook-signature": "v1,\xfc\xfe"}, 401, "bad signature"),
        (b"{}", {"webhook-signature": "v9,AAAA"}, 401, "bad signature"),
        (b"{}", {"webhook-id": "\xff\xfe"}, 401, "bad signature"),
        (b"\xff\xfe\x00", {}, 401, "bad signature"),
        (b"", {}, 400, "no JSON"),
        (b"{", {}, 400, "no JSON"),
        (b"[" * 100_000, {}, 400, "no JSON"),
        (b'"\\ud800"', {}, 400, "no JSON"),
    ],
)
def test_what_cannot_be_trusted(
    receiver: TrialReceiver, body: bytes, change: dict[str, str | None], status: int, verdict: str
) -> None:
    """Whatever is wrong with it is named, and the next one is received as if nothing had been."""
    try:
        headers: dict[str, str | None] = {**signed(body), **change}
    except UnicodeDecodeError:
        headers = {**signed(b""), **change}
    given = [(name.encode(), value.encode("latin-1")) for name, value in headers.items() if value is not None]
    said, line = sent(receiver, body, given)
    assert (said, line["status"], line["verdict"]) == (status, status, verdict)
    for odd in (b"null", b"[1]", b'{"data": 7}', b'{"type": [], "data": {"order_id": 7, "number": true}}'):
        assert sent(receiver, odd, signed(odd))[0] == 204


def test_a_webhook_of_another_time(receiver: TrialReceiver) -> None:
    """A signature is good for five minutes, before and after."""
    assert sent(receiver, b"{}", signed(b"{}", age=310))[1]["verdict"] == "too old"
    assert sent(receiver, b"{}", signed(b"{}", age=-3600))[1]["verdict"] == "from the future"
    assert sent(receiver, b"{}", signed(b"{}", age=200))[0] == 204


def test_what_is_too_long(receiver: TrialReceiver) -> None:
    """It is not read to its end, and answered as too long."""
    status, line = sent(receiver, b" " * (4 * 1024 * 1024 + 1), {"webhook-id": "msg_1"})
    assert (status, line["verdict"]) == (413, "too long")


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\xff\x16\x03\x01\r\n\r\n",
        b"POST / HTTP/9.9\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhalf",
        b"GET /%ff%00 HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_what_is_no_request(receiver: TrialReceiver, data: bytes) -> None:
    """It is answered by a refusal or by nothing, and the receiver goes on."""
    address = httpx2.URL(receiver.url)
    with socket.create_connection((address.host, address.port or 0), PATIENCE_SECONDS) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        said = connection.makefile("rb").read()
    assert said == b"" or said.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), said
    body = json.dumps(EVENT).encode()
    assert receiver.client.post("/", content=body, headers=signed(body)).status_code == 204
    assert not any("Traceback" in line for line in receiver.log), "\n".join(receiver.log)


def test_a_person_reads_lines(folder: Path) -> None:
    """Without a secret the line says `unverified`; what a terminal would obey is not printed."""
    with TrialReceiver(folder, "--fail-every", "3") as receiver:
        receiver.wait_for("not verified: give --secret")
        evil = EVENT | {"type": "order.\x1b[31mred\u202e\n" + "x" * 500}
        payment = {"order_id": "A2", "status": "succeeded", "captured_minor": 5}
        answers = [receiver.client.post("/", json=body).status_code for body in (EVENT, evil, payment)]
        assert answers == [204, 204, 500]
        wait_until(lambda: len(receiver.printed()) == 3)
        first, second, third = receiver.printed()
        assert first.split("UTC")[1].split() == (
            ["unverified", "204", "order.completed", "A1", "number", "5", "position", "12"]
        )
        assert "order.\ufffd[31mred\ufffd\ufffdxxx" in second
        assert len(second) < 300
        assert third.split("UTC")[1].split() == ["unverified", "500", "payment", "succeeded", "A2"]


def test_it_says_that_it_is_gone(folder: Path) -> None:
    """With --gone each webhook is printed, and answered 410."""
    with TrialReceiver(folder, "--gone", "--json") as receiver:
        assert sent(receiver, b"{}")[0] == 410


def test_it_never_answers(folder: Path) -> None:
    """With --dead each webhook is printed and none is answered; it can be stopped all the same."""
    with TrialReceiver(folder, "--dead", "--json") as receiver:
        with pytest.raises(httpx2.ReadTimeout):
            receiver.client.post("/", json=EVENT, timeout=0.5)
        wait_until(lambda: len(receiver.printed()) == 1)
        assert json.loads(receiver.printed()[0])["status"] is None


def test_it_takes_its_time(folder: Path) -> None:
    """With --slow an answer comes that much later, and the line at once."""
    with TrialReceiver(folder, "--slow", "0.5", "--json") as receiver:
        answer = receiver.client.post("/", json=EVENT)
        assert answer.elapsed >= timedelta(seconds=0.5)
        assert answer.status_code == 204


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--secret", "hush"), "must be whsec_"), (("--gone", "--dead"), "leave one of them out")],
)
def test_what_makes_no_sense_is_refused(folder: Path, options: tuple[str, ...], said: str) -> None:
    """A secret that is none, and two ways to misbehave at once."""
    ended = subprocess.run(
        [sys.executable, "-m", "expediter", "receive", "--port", "0", *options],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert said in ended.stderr
    assert "hush" not in ended.stderr
