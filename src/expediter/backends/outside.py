"""Calls to addresses that others have chosen: only to where they may lead, and with a limit on everything."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from expediter.backends.addresses import Destination, may_lead_to
from expediter.errors import reason

# The client is imported where it is used: a service without webhooks starts in less time and memory.
if TYPE_CHECKING:
    import aiohttp

#: Bytes of an answer that are read; what follows is not.
ANSWER_BYTES_MAX = 64 * 1024
#: Seconds in which a connection must stand, and in which all of the answer must be there.
CONNECT_SECONDS_MAX = 5.0
ANSWER_SECONDS_MAX = 15.0
#: Bytes of the headers of an answer.
HEADER_BYTES_MAX = 16 * 1024
#: Seconds for which a connection that nobody uses is kept.
IDLE_SECONDS_MAX = 30.0


class NotAnswered(Exception):
    """There was no answer; what was sent may have arrived all the same."""


class NotAllowed(OSError):
    """The address leads to where nothing may be sent."""


class Answered(NamedTuple):
    """What was answered: `body` is how it begins, `wait_seconds` what `Retry-After` says."""

    status: int
    body: bytes
    wait_seconds: float | None


class Outside:
    """Posts to destinations. Redirects are not followed, cookies not kept, and no proxy is asked."""

    def __init__(self) -> None:
        """Nothing is opened yet."""
        #: To this machine, and to others: no connection that was made for one is ever used for the other.
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    async def post(self, to: Destination, body: bytes, headers: Mapping[str, str]) -> Answered:
        """Send `body`; return what was answered. Raises NotAnswered with the reason."""
        import aiohttp

        try:
            async with self._session(to.local).post(
                to.url, data=body, headers=headers, allow_redirects=False
            ) as response:
                return Answered(response.status, await _beginning(response), _wait_seconds(response.headers))
        except aiohttp.ClientConnectorError as error:
            raise NotAnswered(f"cannot be reached: {reason(error.os_error)}") from error
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise NotAnswered(f"did not answer: {reason(error)}") from error

    async def close(self) -> None:
        """Give back the connections."""
        for session in self._sessions.values():
            await session.close()

    def _session(self, local: bool) -> aiohttp.ClientSession:
        import aiohttp

        if local not in self._sessions:

            def connect(found: Any) -> socket.socket:
                # The last step before each connection, with the very address that it is made to: whatever a name
                # led to when somebody looked, and however an address is written, this is where it goes.
                family, kind, protocol, _, address = found
                if not may_lead_to(str(address[0]), local=local):
                    where = "this machine" if local else "the public internet"
                    raise NotAllowed(f"{address[0]} is not an address of {where}")
                return socket.socket(family, kind, protocol)

            self._sessions[local] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0,  # each reader has its own: a slow one keeps nobody else from connecting
                    socket_factory=connect,
                    ssl=ssl.create_default_context(),
                    keepalive_timeout=IDLE_SECONDS_MAX,
                ),
                timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS_MAX, sock_connect=CONNECT_SECONDS_MAX),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                max_line_size=HEADER_BYTES_MAX,
                max_field_size=HEADER_BYTES_MAX,
                headers={"User-Agent": "expediter", "Accept": "*/*", "Accept-Encoding": "identity"},
            )
        return self._sessions[local]


async def _beginning(response: aiohttp.ClientResponse) -> bytes:
    """Read ANSWER_BYTES_MAX of the body at most; of a longer one the connection is given up."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > ANSWER_BYTES_MAX:
            response.close()
            break
    return bytes(body[:ANSWER_BYTES_MAX])


def _wait_seconds(headers: Mapping[str, str]) -> float | None:
    """Return what `Retry-After` says, in seconds: it is a number of them, or a date; None for anything else."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdecimal() and len(text) < 9:
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
