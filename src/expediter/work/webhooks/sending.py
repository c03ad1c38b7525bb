"""One try to deliver: what is sent, signed by the Standard Webhooks specification, and what the answer means."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import lru_cache

from standardwebhooks import Webhook

from expediter.backends.addresses import Destination, destination
from expediter.backends.outside import NotAnswered, Outside
from expediter.orders.order import MICROSECONDS
from expediter.store.webhooks import Endpoint, Tried
from expediter.telemetry.meters import Family
from expediter.work.measured import Deliveries

#: Characters of an answer that are kept.
ANSWER_KEPT = 1024
#: The receiver wants no more of it; and those that may say when they want it again.
_GONE, _LATER = 410, (429, 503)


@lru_cache(maxsize=128)
def _destination(url: str, allow_http: bool) -> Destination:
    return destination(url, allow_http=allow_http)


@lru_cache(maxsize=128)
def _signer(secret: str) -> Webhook:
    return Webhook(secret)


def signatures(endpoint: Endpoint, notice_id: str, now: int, body: bytes) -> dict[str, str]:
    """Return the three headers of the specification; during a rotation both secrets sign."""
    moment = datetime.fromtimestamp(now // MICROSECONDS, UTC)
    secrets = [endpoint.secret]
    if endpoint.old_secret is not None and now < (endpoint.old_secret_until or 0):
        secrets.append(endpoint.old_secret)
    text = body.decode()
    return {
        "webhook-id": notice_id,
        "webhook-timestamp": str(now // MICROSECONDS),
        "webhook-signature": " ".join([_signer(secret).sign(notice_id, moment, text) for secret in secrets]),
        "content-type": "application/json",
    }


class Sender:
    """Sends to endpoints. Use it from one event loop."""

    def __init__(self, outside: Outside, *, allow_http: bool) -> None:
        """`allow_http`: not only to this machine."""
        self._outside = outside
        self._allow_http = allow_http
        self._measured = Deliveries()

    def families(self) -> list[Family]:
        """Return what this process has measured of its deliveries."""
        return self._measured.families()

    async def send(self, endpoint: Endpoint, notice_id: str, body: bytes, now: int) -> Tried:
        """Try once, `now` by the database's clock (microseconds); return what came of it."""
        tried = await self._send(endpoint, notice_id, body, now)
        self._measured.tried(endpoint.endpoint_id, tried)
        return tried

    async def _send(self, endpoint: Endpoint, notice_id: str, body: bytes, now: int) -> Tried:
        began = time.monotonic()
        try:
            to = _destination(endpoint.url, self._allow_http)
            answered = await self._outside.post(to, body, signatures(endpoint, notice_id, now, body))
        except NotAnswered as error:
            return Tried(str(error), None, None, _since(began))
        except ValueError as error:
            return Tried(f"the address {error}", None, None, _since(began))
        answer = printable(answered.body)
        if 200 <= answered.status < 300:
            return Tried(None, answered.status, answer, _since(began))
        return Tried(
            f"answered {answered.status}",
            answered.status,
            answer,
            _since(began),
            wait_seconds=answered.wait_seconds if answered.status in _LATER else None,
            gone=answered.status == _GONE,
        )


def printable(body: bytes) -> str:
    """Return how an answer begins, without what no screen should be sent and no database can keep."""
    text = body[: 4 * ANSWER_KEPT].decode(errors="replace")[:ANSWER_KEPT]
    return "".join([sign if sign.isprintable() or sign in "\n\t" else "\ufffd" for sign in text])


def _since(began: float) -> int:
    return round((time.monotonic() - began) * 1000)
