"""Whether the service is well: a verdict on each part that it depends on, and on this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable

import msgspec

from expediter import __version__
from expediter.backends.brokers import Broker, Depth, Topic
from expediter.backends.tasks import within
from expediter.errors import BrokerUnavailable, ExpediterError
from expediter.orders.documents import timestamp
from expediter.web.context import Context
from expediter.web.http import Call, Reply, json_reply
from expediter.web.operations import service_read

#: Seconds that a look at one part may take: whoever asks for the health is answered within two, whatever hangs.
LOOK_SECONDS_MAX = 1.5


class Dependency(msgspec.Struct, frozen=True, kw_only=True):
    """A verdict on one part: `ok`, `degraded` or `down`, and why.

    `since` is when this process first saw it so, by this look or an earlier one. `latency_ms` is what the look has
    taken; null where nothing outside of this process was asked.
    """

    status: str
    detail: str
    since: str = ""
    latency_ms: float | None = None


class Health(msgspec.Struct, frozen=True):
    """`healthy`, `degraded` (something waits) or `unhealthy` (orders cannot be taken)."""

    status: str
    version: str
    durability: str
    dependencies: dict[str, Dependency]


class Alive(msgspec.Struct, frozen=True):
    """The process answers."""

    status: str


async def health(call: Call, context: Context) -> Reply:
    """Return a verdict for each dependency; 503 when orders cannot be taken in."""
    call.query()
    (database, gateway), cache, queue = await asyncio.gather(
        _database_and_gateway(context), _timed(_cache(context)), _timed(_queue(context))
    )
    parts = {"database": database, "cache": cache, "queue": queue}
    if gateway is not None:
        parts["payment_gateway"] = gateway
    parts = {name: _dated(context, name, part) for name, part in parts.items()}
    statuses = {part.status for part in parts.values()}
    down = any(part.status == "down" for part in parts.values()) and not _queues(context)
    verdict = "unhealthy" if down else "degraded" if statuses - {"ok"} else "healthy"
    document = Health(verdict, __version__, context.durability, parts)
    reply = json_reply(503 if verdict == "unhealthy" else 200, document)
    if reply.status == 503:
        reply.headers.append((b"retry-after", b"1"))
    return reply


async def _timed(look: Awaitable[Dependency]) -> Dependency:
    started = time.perf_counter()
    found = await look
    return msgspec.structs.replace(found, latency_ms=round((time.perf_counter() - started) * 1000, 1))


def _dated(context: Context, name: str, part: Dependency) -> Dependency:
    """Return a verdict with the time since which it has been so."""
    status, since = context.verdicts.get(name, ("", 0))
    if status != part.status:
        since = time.time_ns() // 1000
        context.verdicts[name] = part.status, since
    return msgspec.structs.replace(part, since=timestamp(since) or "")


def _queues(context: Context) -> bool:
    """Return whether orders are taken in by the broker, so that nobody need wait for the database."""
    intake, broker = context.intake, context.broker
    return intake is not None and broker is not None and intake.failing is None and broker.failing is None


async def _database_and_gateway(context: Context) -> tuple[Dependency, Dependency | None]:
    """Return a verdict on the database within LOOK_SECONDS_MAX, and on the payment gateway if that can be read."""
    if context.committer.under_way_seconds > LOOK_SECONDS_MAX:
        seconds = context.committer.under_way_seconds
        detail = f"{context.database}: a transaction has been under way for {seconds:.1f} s"
        return Dependency(status="down", detail=detail), None

    async def look() -> tuple[Dependency, Dependency | None]:
        database = await _timed(_database(context))
        return database, await _gateway(context) if database.status == "ok" else None

    detail = f"{context.database} did not answer within {LOOK_SECONDS_MAX:g} s"
    slow = Dependency(status="down", detail=detail, latency_ms=LOOK_SECONDS_MAX * 1000), None
    return await within(look(), LOOK_SECONDS_MAX) or slow


async def _database(context: Context) -> Dependency:
    try:
        await context.queries.counters()
    except ExpediterError as error:
        return Dependency(status="down", detail=str(error))
    if (trouble := await context.committer.trouble()) is not None:
        return Dependency(status="down", detail=f"{context.database}: the last write failed: {trouble}")
    return Dependency(status="ok", detail=context.database)


async def _cache(context: Context) -> Dependency:
    await within(context.cache.look(), LOOK_SECONDS_MAX)
    if context.cache.failing is not None:
        return Dependency(status="degraded", detail=f"{context.cache.name}: {context.cache.failing}")
    counts = context.cache.counts
    return Dependency(
        status="ok", detail=f"{context.cache.name}: {counts['hits']} hits, {counts['misses']} misses"
    )


async def _queue(context: Context) -> Dependency:
    broker = context.broker
    name = "the database" if broker is None else broker.name
    if ended := context.ended():
        return Dependency(
            status="down", detail=f"{name}; these have ended in this process: {', '.join(ended)}; restart it"
        )
    workers = "workers run in this process"
    if not context.working:
        workers = "this process has no workers, `expediter work` starts some"
    if broker is None:
        return Dependency(status="ok", detail=f"{name}; {workers}")
    slow = f"it did not answer within {LOOK_SECONDS_MAX:g} s"
    depth, hints = await asyncio.gather(
        within(_depth(broker, Topic.COMMANDS), LOOK_SECONDS_MAX),
        within(_depth(broker, Topic.HINTS), LOOK_SECONDS_MAX),
    )
    depth = depth or slow
    instead = "the workers find what is due in the database by themselves"
    if isinstance(depth, str):
        if context.intake is not None:
            instead += ", and orders are stored there before they are answered"
        return Dependency(status="degraded", detail=f"{name}: {depth}; {instead}")
    said = f"{name}; {workers}; {depth.waiting} messages of queued commands wait, {depth.dead} are put aside"
    if context.intake is not None and context.intake.failing is not None:
        return Dependency(
            status="degraded", detail=f"{said}; orders are stored directly: {context.intake.failing}"
        )
    if no_hints := hints if isinstance(hints, str) else broker.hints_failing if hints else slow:
        return Dependency(status="degraded", detail=f"{said}; there are no hints, {instead}: {no_hints}")
    return Dependency(status="degraded" if depth.dead else "ok", detail=said)


async def _depth(broker: Broker, topic: Topic) -> Depth | str:
    """Return what waits, or why that cannot be said."""
    try:
        return await broker.depth(topic)
    except BrokerUnavailable as error:
        return str(error)


async def _gateway(context: Context) -> Dependency:
    breaker = await context.queries.breaker()
    if breaker.open_until is None:
        return Dependency(
            status="ok", detail=f"{context.settings.payment_gateway.partition(':')[0]}, circuit breaker closed"
        )
    return Dependency(
        status="degraded",
        detail=f"circuit breaker {breaker.state} after {breaker.failures} failures in a row; charges wait",
    )


async def healthz(call: Call, context: Context) -> Reply:
    """Return 200 for as long as the process does its work; 503: it has to be restarted."""
    call.query()
    if ended := context.ended():
        return json_reply(503, Alive(f"ended: {', '.join(ended)}"))
    return json_reply(200, Alive("ok"))


async def readyz(call: Call, context: Context) -> Reply:
    """Return 200 if this process should get requests, 503 while it stops or cannot take orders in."""
    call.query()
    database, _ = await _database_and_gateway(context)
    status = "stopping" if context.draining else _dated(context, "database", database).status
    if status == "down" and _queues(context):
        status = "ok"
    reply = json_reply(200 if status == "ok" else 503, Alive(status))
    if reply.status == 503:
        reply.headers.append((b"retry-after", b"1"))
    return reply


OPERATIONS = (
    service_read("/health", health, "Health", {200: Health, 503: Health}),
    service_read("/healthz", healthz, "Liveness", {200: Alive, 503: Alive}),
    service_read("/readyz", readyz, "Readiness", {200: Alive, 503: Alive}),
)
