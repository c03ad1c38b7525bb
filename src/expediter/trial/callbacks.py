"""The trial gateway's callbacks: what became of a payment, signed, sent until it is taken, in the background."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from urllib.parse import urlsplit

import aiohttp
import msgspec
import structlog
import uuid_utils
from standardwebhooks.webhooks import Webhook

from expediter.errors import ConfigurationError, reason

#: How often one callback is sent, at most; then it is given up. With the pauses that is some three minutes.
TRIES_MAX = 10
#: Seconds before the second try; each further pause is twice as long, up to the longest.
PAUSE_SECONDS = 0.5
PAUSE_SECONDS_MAX = 60.0
#: Callbacks that wait at once; one more is not sent at all. They are in memory: the end of the process ends them.
WAITING_MAX = 10_000
#: Callbacks that are under way at once; the others wait for their turn.
CONNECTIONS_MAX = 20
#: Seconds that the answer to a callback may take.
ANSWER_SECONDS_MAX = 10.0

log = structlog.get_logger(__name__)


class Manners(msgspec.Struct, frozen=True, kw_only=True):
    """How callbacks are sent: each twice, before the answer to the charge, or so many seconds late."""

    twice: bool = False
    early: bool = False
    late_seconds: float = 0.0


class Callbacks:
    """Sends callbacks to one address. Make it inside an event loop."""

    def __init__(self, url: str, webhook: Webhook, manners: Manners) -> None:
        """Nothing is sent yet. Raises ConfigurationError for an address that cannot be used."""
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ConfigurationError("--callback must be an address like http://127.0.0.1:8000/path")
        self._url = url
        self._webhook = webhook
        self._manners = manners
        self._waiting: set[asyncio.Task[None]] = set()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX),
            timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS_MAX),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    def send(self, document: bytes, order_id: str) -> asyncio.Event | None:
        """Send a document in the background.

        Where the answer to the charge is to wait for it, return what is set once it was sent for the first time.
        """
        if len(self._waiting) >= WAITING_MAX:
            log.warning("a callback is not sent: too many wait", order_id=order_id, waiting=WAITING_MAX)
            return None
        tried = asyncio.Event()
        task = asyncio.get_running_loop().create_task(self._send(document, order_id, tried))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)
        return tried if self._manners.early else None

    async def close(self) -> None:
        """End; what waits is not sent any more."""
        waiting = list(self._waiting)
        if waiting:
            log.warning("callbacks are not sent: the gateway ends", count=len(waiting))
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await self._session.close()

    async def _send(self, document: bytes, order_id: str, tried: asyncio.Event) -> None:
        await asyncio.sleep(self._manners.late_seconds)
        name = f"msg_{uuid_utils.uuid7().hex}"
        for _ in range(2 if self._manners.twice else 1):
            if not await self._deliver(name, document, order_id, tried):
                return

    async def _deliver(self, name: str, document: bytes, order_id: str, tried: asyncio.Event) -> bool:
        """Try until it is taken; return whether it was."""
        pause = PAUSE_SECONDS
        for number in range(1, TRIES_MAX + 1):
            said = await self._try(name, document)
            tried.set()
            if said is None:
                log.info("calls back", order_id=order_id, id=name, tries=number)
                return True
            if number < TRIES_MAX:
                log.info("a callback is not taken", order_id=order_id, id=name, said=said, again_seconds=pause)
                await asyncio.sleep(pause)
                pause = min(2 * pause, PAUSE_SECONDS_MAX)
        log.warning("a callback is given up", order_id=order_id, id=name, said=said, tries=TRIES_MAX)
        return False

    async def _try(self, name: str, document: bytes) -> str | None:
        """Send it once; return why it was not taken, None if it was."""
        now = datetime.now(UTC)
        headers = {
            "Content-Type": "application/json",
            "webhook-id": name,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": self._webhook.sign(name, now, document.decode()),
        }
        try:
            async with self._session.post(
                self._url, data=document, headers=headers, allow_redirects=False
            ) as response:
                return None if 200 <= response.status < 300 else f"status {response.status}"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return reason(error)
