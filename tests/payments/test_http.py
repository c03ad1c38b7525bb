"""What each answer of a gateway over HTTP means: it was done, it was not, or nobody knows."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trustme

from expediter.backends.calls import ANSWER_BYTES_MAX
from expediter.errors import (
    PaymentConflict,
    PaymentDeclined,
    PaymentError,
    PaymentUnavailable,
    PaymentUnknown,
)
from expediter.payments import Charge, PaymentGateway, PaymentState, Refund, open_gateway

KEY = "9d7bb5e2-0b9f-5f6e-8d54-4f1c2f1a7b10"
CHARGE = Charge(key=KEY, order_id="A1", amount_minor=1299, currency="USD", token="tok_1", customer_id=7)
PAID: dict[str, Any] = {
    "id": "pay/1",
    "key": KEY,
    "order_id": "A1",
    "status": "succeeded",
    "amount_minor": 1299,
    "currency": "USD",
    "captured_minor": 1299,
    "refunded_minor": 0,
    "action": None,
    "error": None,
    "created_at": "2026-11-28T00:00:00Z",
}


def answer(status: int, document: object = None, *headers: str, body: bytes | None = None) -> bytes:
    """Return an HTTP answer as bytes."""
    data = json.dumps(document).encode() if body is None else body
    lines = [
        f"HTTP/1.1 {status} Whatever",
        f"Content-Length: {len(data)}",
        "Content-Type: application/json",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


class Scripted:
    """A gateway that answers with these bytes in turn, whatever it is asked, and keeps what it was asked."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = list(answers)
        self.asked: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (
                        int(line[15:])
                        for line in head.split(b"\r\n")
                        if line.lower().startswith(b"content-length:")
                    ),
                    0,
                )
                self.asked.append(head + await reader.readexactly(length))
                data = self._answers.pop(0)
                writer.write(data)
                await writer.drain()
                if not data or data.endswith(b"..."):
                    return  # the connection is dropped
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def asking(
    *answers: bytes, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[PaymentGateway, Scripted]]:
    """A gateway's client, and the gateway that it asks."""
    scripted = Scripted(*answers)
    server = await asyncio.start_server(scripted.serve, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    address = f"http{'s' if tls else ''}://127.0.0.1:{port}/base/"
    gateway = open_gateway(address, success_rate=1, latency_ms_min=0, latency_ms_max=0, token="let me in")
    try:
        yield gateway, scripted
    finally:
        await gateway.close()
        server.close()
        await server.wait_closed()


async def test_a_charge_is_asked_for_as_the_protocol_says() -> None:
    """The body, the key in the header as well, the bearer token, and a request id."""
    async with asking(answer(201, PAID)) as (gateway, scripted):
        payment = await gateway.charge(CHARGE)
    assert (payment.reference, payment.state, payment.captured_minor) == ("pay/1", PaymentState.SUCCEEDED, 1299)
    head, _, body = scripted.asked[0].partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert first == "POST /base/payments HTTP/1.1"
    assert headers["authorization"] == "Bearer let me in"
    assert headers["idempotency-key"] == KEY
    assert len(headers["x-request-id"]) == 32
    assert json.loads(body) == {
        "key": KEY,
        "order_id": "A1",
        "amount_minor": 1299,
        "currency": "USD",
        "token": "tok_1",
        "capture": True,
        "customer_id": 7,
        "return_url": None,
    }


async def test_a_refund_is_asked_for_at_the_payment_itself() -> None:
    """The payment is looked up by its key, and its id may have any characters."""
    refunded = {"id": "ref_1", "key": "r", "amount_minor": 1299, "status": "succeeded", "error": None}
    async with asking(answer(200, PAID), answer(201, refunded)) as (gateway, scripted):
        said = await gateway.refund(
            Refund(key="r", payment_key=KEY, amount_minor=1299, currency="USD", reason="x")
        )
    assert said.reference == "ref_1"
    assert scripted.asked[0].startswith(f"GET /base/payments?key={KEY} ".encode())
    assert scripted.asked[1].startswith(b"POST /base/payments/pay%2F1/refunds ")
    assert scripted.asked[1].endswith(b'{"key":"r","amount_minor":1299,"reason":"x"}')


ERROR = {"error": {"code": "no_funds", "message": "Not enough money"}}


@pytest.mark.parametrize(
    ("said", "meaning", "words"),
    [
        (answer(402, ERROR), PaymentDeclined, "Not enough money"),
        (answer(402, body=b"<html>"), PaymentDeclined, "was declined"),
        (answer(409, ERROR), PaymentConflict, "Not enough money"),
        (answer(429), PaymentUnavailable, "busy"),
        (answer(503, ERROR, "Retry-After: 7"), PaymentUnavailable, "busy"),
        # Whoever sends these may have charged before.
        (answer(503, ERROR), PaymentUnknown, "503"),
        (answer(500, ERROR), PaymentUnknown, "500"),
        (answer(502, body=b"<html>bad gateway</html>"), PaymentUnknown, "502"),
        (answer(400, ERROR), PaymentUnknown, "400"),
        (answer(401, ERROR), PaymentUnknown, "401"),
        (answer(404, ERROR), PaymentUnknown, "404"),
        (answer(302, None, "Location: http://127.0.0.1:1/elsewhere"), PaymentUnknown, "302"),
        (answer(204, body=b""), PaymentUnknown, "204"),
        (answer(200, body=b"<html>fine</html>"), PaymentUnknown, "cannot be read"),
        (answer(200, body=b"\xff\xfe"), PaymentUnknown, "cannot be read"),
        (answer(200, {"id": "pay_1"}), PaymentUnknown, "cannot be read"),
        (answer(200, PAID | {"status": "fine"}), PaymentUnknown, "cannot be read"),
        (answer(200, PAID | {"amount_minor": 12.99}), PaymentUnknown, "cannot be read"),
        (answer(200, PAID | {"key": "another"}), PaymentUnknown, "about another"),
        (answer(200, body=b" " * (ANSWER_BYTES_MAX + 1)), PaymentUnknown, "more than 65536 bytes"),
        (b"", PaymentUnknown, "did not answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{...", PaymentUnknown, "did not answer"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n...", PaymentUnknown, "did not answer"),
    ],
)
async def test_what_an_answer_means(said: bytes, meaning: type[PaymentError], words: str) -> None:
    """Only what surely was not done is said not to be done; whatever else is not a clear yes is unknown."""
    async with asking(said) as (gateway, scripted):
        with pytest.raises(meaning, match=words):
            await gateway.charge(CHARGE)
        assert len(scripted.asked) == 1  # nothing is sent twice by itself


async def test_a_busy_gateway_says_when_to_come_back() -> None:
    """Retry-After goes along; a date counts as a second."""
    for header, seconds in (("7", 7.0), ("Fri, 31 Dec 1999 23:59:59 GMT", 1.0)):
        async with asking(answer(503, ERROR, f"Retry-After: {header}")) as (gateway, _):
            with pytest.raises(PaymentUnavailable) as refused:
                await gateway.charge(CHARGE)
            assert refused.value.retry_after_seconds == seconds


async def test_a_payment_that_is_not_known_is_found_to_be_none() -> None:
    """Only 404 says that there is none; every other answer leaves it open."""
    async with asking(answer(404, ERROR), answer(200, PAID), answer(500, ERROR)) as (gateway, _):
        assert await gateway.find(KEY) is None
        found = await gateway.find(KEY)
        assert found is not None
        assert found.reference == "pay/1"
        with pytest.raises(PaymentUnknown):
            await gateway.find(KEY)


async def test_a_certificate_that_nobody_knows_is_not_trusted() -> None:
    """The TLS of somebody else: nothing is sent, least of all the token."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    async with asking(answer(201, PAID), tls=context) as (gateway, scripted):
        with pytest.raises(PaymentUnavailable, match="cannot be reached"):
            await gateway.charge(CHARGE)
        assert scripted.asked == []
