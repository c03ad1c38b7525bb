"""How this service talks to Redis: nothing is sent twice, and no call takes longer than its deadline."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from expediter.errors import ConfigurationError, Unavailable, reason

# The client is imported where it is used: a service without Redis starts in less time and memory.
if TYPE_CHECKING:
    from redis.asyncio import Redis


class RedisUnavailable(Unavailable):
    """Redis cannot be used now (gone, full, not answering in time)."""


#: Keys that one step of `unlink_all` looks at, about, and the seconds that it may take.
KEYS_PER_UNLINK = 1000
UNLINK_SECONDS_MAX = 2.0
#: What a deadline adds when it has passed, in seconds: one turn of a busy event loop.
LATE_SECONDS = 0.01


class Run:
    """Which run of the Redis server is reached: a restarted one has forgotten, or remembers old things."""

    def __init__(self) -> None:
        """Nothing is connected yet."""
        self.id = ""

    async def on_connect(self, connection: Any) -> None:
        """Set up a connection, and look whom it reached."""
        from redis.exceptions import ResponseError

        await connection.on_connect()
        try:
            await connection.send_command("INFO", "server")
            told = await connection.read_response()
        except ResponseError:
            # Managed servers may forbid it: then an old snapshot that comes back is not told from the present.
            self.id = "run"
            return
        text = told if isinstance(told, bytes) else str(told).encode()
        found = re.search(rb"run_id:([0-9a-f]{12})", text)
        self.id = found[1].decode() if found else "run"


# KEYS[1]: since when nothing was forgotten. ARGV[1]: this server's run, ARGV[2]: what to set if it has none.
_REMEMBER = """
local since = redis.call('GET', KEYS[1])
if not since or string.sub(since, 1, #ARGV[1]) ~= ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[2])
  since = ARGV[2]
end
return since
"""


class Memory:
    """Since when a Redis has forgotten nothing; it stands in a key, as the server's run and milliseconds."""

    def __init__(self, client: Redis, run: Run, key: str) -> None:
        """The key is written when it is found missing, or of an earlier run."""
        self.key = key
        #: What changes whenever Redis forgets.
        self.since = b""
        #: Whether it has forgotten while this process knew it.
        self.lost = False
        self._run = run
        self._remember = client.register_script(_REMEMBER)

    async def look(self, since: bytes | None) -> float:
        """Return for how many seconds it has been complete; `since` is what was found at the key."""
        now = int(time.time() * 1000)
        if not since or not since.startswith(f"{self._run.id}:".encode()):
            since = await self._remember((self.key,), (f"{self._run.id}:", f"{self._run.id}:{now}"))
        self.lost = self.lost or self.since not in (b"", since)
        self.since = since
        began = since.rpartition(b":")[2]
        return (now - int(began)) / 1000 if began.isdigit() else 0.0


class Part:
    """What is kept in one Redis. Every method raises RedisUnavailable."""

    def __init__(self, url: str, setting: str, *, prefix: str = "", connections: int, call_seconds: float) -> None:
        """Connect as `connect` does; no call takes longer than `call_seconds`. Raises ConfigurationError.

        The names of all keys begin with `prefix`.
        """
        self.name = f"Redis at {place_of(url, prefix)}"
        self.run = Run()
        self.client = connect(url, setting, connections=connections, run=self.run)
        self._call_seconds = call_seconds

    async def check(self) -> None:
        """See whether Redis answers."""
        async with self.bounded():
            await self.client.ping()

    async def settings(self, *names: str) -> dict[str, str]:
        """Return these settings of the server."""
        async with self.bounded():
            found = await self.client.config_get(*names)
        return {_text(name): _text(value) for name, value in found.items()}

    @asynccontextmanager
    async def bounded(self) -> AsyncIterator[None]:
        """Bound the calls inside; after a failure no connection is used again."""
        try:
            async with deadline(self._call_seconds):
                yield
        except RedisUnavailable:
            await forget_idle(self.client)
            raise

    async def close(self) -> None:
        """Close every connection."""
        await self.client.aclose()


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def connect(
    url: str,
    setting: str,
    *,
    connections: int,
    run: Run,
) -> Redis:
    """Return a client of the Redis at `url`; nothing is opened yet. `run` is kept up to date.

    It has up to `connections` of them; whoever finds none free waits, within its own deadline.

    Raises ConfigurationError that names `setting`.
    """
    from redis.asyncio import BlockingConnectionPool, Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    try:
        urlsplit(url).port  # noqa: B018
    except ValueError:
        # The error itself would quote the address, with its password.
        raise ConfigurationError(f"{setting} cannot be read: percent-encode user and password") from None
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=connections,
            timeout=None,
            # By default a client sends a write again whose answer was lost, up to ten times.
            retry=Retry(NoBackoff(), 0),
            # Deadlines are the caller's: a limit on the socket would end a read that is meant to wait.
            socket_timeout=None,
            redis_connect_func=run.on_connect,
        )
        # Made once and thrown away: an option that the client does not know shows only here.
        pool.connection_class(**pool.connection_kwargs)
        return Redis.from_pool(pool)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{setting}: {error}") from error


def place_of(url: str, prefix: str = "") -> str:
    """Return the address for people, without its password: 127.0.0.1:6379/0, or 127.0.0.1:6379/0 under shop:."""
    under = f" under {prefix}" if prefix else ""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return parts.path + under
    try:
        port = parts.port or 6379
    except ValueError:
        port = 6379
    return f"{parts.hostname or 'localhost'}:{port}{parts.path or '/0'}{under}"


async def forget_idle(client: Redis) -> None:
    """Close idle connections: the client does not notice that the server has ended one, and would fail on it."""
    await client.connection_pool.disconnect(inuse_connections=False)


async def unlink_all(client: Redis, *patterns: str) -> None:
    """Remove every key that one of these patterns fits, some at a time. Raises RedisUnavailable."""
    for pattern in patterns:
        cursor = -1
        while cursor:
            async with deadline(UNLINK_SECONDS_MAX):
                cursor, keys = await client.scan(max(cursor, 0), pattern, count=KEYS_PER_UNLINK)
                if keys:
                    await client.unlink(*keys)


@asynccontextmanager
async def deadline(seconds: float) -> AsyncIterator[None]:
    """Bound what is inside by `seconds`. Raises RedisUnavailable, also for every error of the client's."""
    from redis.exceptions import RedisError

    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(None) as limit:
            # A loop that is late runs its timers before it reads what has long arrived: that must come first.
            timer = loop.call_later(seconds, lambda: limit.reschedule(loop.time() + LATE_SECONDS))
            try:
                yield
            finally:
                timer.cancel()
    except TimeoutError as error:
        raise RedisUnavailable(f"Redis did not answer within {seconds * 1000:g} ms") from error
    except (RedisError, OSError) as error:
        raise RedisUnavailable(f"Redis cannot be used now: {reason(error)}") from error
