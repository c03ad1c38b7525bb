"""Calls to the outside over HTTP: one pool of connections, and what is known of a call that went wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import SplitResult

import uuid_utils

from expediter.errors import ConfigurationError, reason

# The client is imported where it is used: a service that calls nobody starts in less time and memory.
if TYPE_CHECKING:
    import aiohttp

#: Bytes of an answer, at most: a longer one is not read on, and nobody knows what it would have said.
ANSWER_BYTES_MAX = 64 * 1024
#: Seconds in which a connection must stand, its TLS included.
CONNECT_SECONDS_MAX = 5.0
#: Seconds that an answer may take; whoever asks may have less patience.
ANSWER_SECONDS_MAX = 60.0
#: Connections to one place that a process has open, at most; further calls wait.
CONNECTIONS_MAX = 100


class NotSent(Exception):
    """The call cannot have arrived: nobody listens, there is no such name, the TLS is not trusted."""


class NoAnswer(Exception):
    """The call may have arrived; what came of it is not known."""


class Called(NamedTuple):
    """What was answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Caller:
    """Calls one address. `token` goes along as a bearer token; redirects are not followed, cookies not kept."""

    def __init__(
        self, setting: str, address: SplitResult, token: str | None, *, answer_bytes_max: int = ANSWER_BYTES_MAX
    ) -> None:
        """Nothing is opened yet. Raises ConfigurationError, by the name of the setting and without any secret."""
        import aiohttp  # noqa: F401 - now, and not in the midst of the first call

        if not address.hostname:
            raise ConfigurationError(f"{setting} has no host: write an address like https://host.example/path")
        if address.username or address.password or address.query or address.fragment:
            raise ConfigurationError(
                f"{setting} is an address without user, password and `?`: its key goes into {setting}_TOKEN"
            )
        self.base = address.geturl().rstrip("/")
        self.host = address.netloc
        self._headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._answer_bytes_max = answer_bytes_max
        self._session: aiohttp.ClientSession | None = None

    async def call(
        self,
        method: str,
        path: str = "",
        body: bytes | None = None,
        *,
        key: str = "",
        query: Mapping[str, str] | None = None,
    ) -> Called:
        """Send one request with an X-Request-ID, and `key` as its Idempotency-Key. Raises NotSent, NoAnswer."""
        headers = {"X-Request-ID": uuid_utils.uuid7().hex}
        if body is not None:
            headers |= {"Content-Type": "application/json", "Idempotency-Key": key}
        return await self.send(method, self.base + path, body, headers, query=query)

    async def send(
        self,
        method: str,
        url: str,
        body: bytes | None,
        headers: Mapping[str, str],
        *,
        query: Mapping[str, str] | None = None,
    ) -> Called:
        """Send a request that somebody else has put together. Raises NotSent, NoAnswer."""
        import aiohttp

        try:
            async with self._open().request(
                method, url, params=query, data=body, headers=headers, allow_redirects=False
            ) as response:
                return Called(response.status, response.headers, await _read(response, self._answer_bytes_max))
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise NotSent(f"cannot be reached: {reason(error)}") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise NoAnswer(f"did not answer: {reason(error)}") from error

    async def close(self) -> None:
        """Give back the connections."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX),
                timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS_MAX, sock_connect=CONNECT_SECONDS_MAX),
                headers=self._headers,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


async def _read(response: aiohttp.ClientResponse, bytes_max: int) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > bytes_max:
            raise NoAnswer(f"gave an answer of more than {bytes_max} bytes")
    return bytes(body)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return a `Retry-After` in seconds; one that is a date counts as a second, None: there is none."""
    text = headers.get("Retry-After")
    if text is None:
        return None
    return float(text) if text.strip().isdecimal() and len(text) < 9 else 1.0
