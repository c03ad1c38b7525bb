"""How this service talks to Redis: nothing is sent twice, and no call takes longer than its deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from expediter.errors import ConfigurationError, Unavailable


class RedisUnavailable(Unavailable):
    """Redis cannot be used now (gone, full, not answering in time)."""


def connect(
    url: str,
    setting: str,
    *,
    connections: int,
    on_connect: Callable[[Any], Coroutine[Any, Any, None]] | None = None,
) -> Redis:
    """Return a client of the Redis at `url`; nothing is opened yet. `on_connect` sets up each new connection.

    It has up to `connections` of them; whoever finds none free waits, within its own deadline.

    Raises ConfigurationError that names `setting`.
    """
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=connections,
            timeout=None,
            # By default a client sends a write again whose answer was lost, up to ten times.
            retry=Retry(NoBackoff(), 0),
            # Deadlines are the caller's: a limit on the socket would end a read that is meant to wait.
            socket_timeout=None,
            redis_connect_func=on_connect,
        )
        return Redis.from_pool(pool)
    except ValueError as error:
        raise ConfigurationError(f"{setting}: {error}") from error


def place_of(url: str) -> str:
    """Return the address for people, without its password: 127.0.0.1:6379/0."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return parts.path
    try:
        port = parts.port or 6379
    except ValueError:
        port = 6379
    return f"{parts.hostname or 'localhost'}:{port}{parts.path or '/0'}"


@asynccontextmanager
async def deadline(seconds: float) -> AsyncIterator[None]:
    """Bound what is inside by `seconds`. Raises RedisUnavailable, also for every error of the client's."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise RedisUnavailable(f"Redis did not answer within {seconds * 1000:g} ms") from error
    except (RedisError, OSError) as error:
        raise RedisUnavailable(f"Redis cannot be used now: {error}") from error
