"""For operators: health, readiness, and the pages that show the interface without an internet connection."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import re
import time
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from expediter import __version__
from expediter.backends.brokers import Broker, Depth, Topic
from expediter.backends.tasks import within
from expediter.errors import BrokerUnavailable, ExpediterError
from expediter.web.context import Context
from expediter.web.http import Call, Reply, json_reply
from expediter.web.operations import Operation

#: Seconds that a look at one part may take: whoever asks for the health is answered within two, whatever hangs.
LOOK_SECONDS_MAX = 1.5


class Dependency(msgspec.Struct, frozen=True):
    """A verdict on one part: `ok`, `degraded` or `down`, and why."""

    status: str
    detail: str


class Health(msgspec.Struct, frozen=True):
    """`healthy`, `degraded` (something waits) or `unhealthy` (orders cannot be taken)."""

    status: str
    version: str
    durability: str
    dependencies: dict[str, Dependency]


class Alive(msgspec.Struct, frozen=True):
    """The process answers."""

    status: str


class Index(msgspec.Struct, frozen=True):
    """Where to look."""

    service: str
    version: str
    orders: str
    docs: str
    health: str


async def health(call: Call, context: Context) -> Reply:
    """Return a verdict for each dependency; 503 when orders cannot be taken in."""
    call.query()
    (database, gateway), queue = await asyncio.gather(_database_and_gateway(context), _queue(context))
    parts = {"database": database, "cache": _cache(context), "queue": queue}
    if gateway is not None:
        parts["payment_gateway"] = gateway
    statuses = {part.status for part in parts.values()}
    down = any(part.status == "down" for part in parts.values()) and not _queues(context)
    verdict = "unhealthy" if down else "degraded" if statuses - {"ok"} else "healthy"
    document = Health(verdict, __version__, context.durability, parts)
    reply = json_reply(503 if verdict == "unhealthy" else 200, document)
    if reply.status == 503:
        reply.headers.append((b"retry-after", b"1"))
    return reply


def _queues(context: Context) -> bool:
    """Return whether orders are taken in by the broker, so that nobody need wait for the database."""
    intake, broker = context.intake, context.broker
    return intake is not None and broker is not None and intake.failing is None and broker.failing is None


async def _database_and_gateway(context: Context) -> tuple[Dependency, Dependency | None]:
    """Return a verdict on the database within LOOK_SECONDS_MAX, and on the payment gateway if that can be read."""
    if context.committer.under_way_seconds > LOOK_SECONDS_MAX:
        seconds = context.committer.under_way_seconds
        return Dependency(
            "down", f"{context.database}: a transaction has been under way for {seconds:.1f} s"
        ), None

    async def look() -> tuple[Dependency, Dependency | None]:
        database = await _database(context)
        return database, await _gateway(context) if database.status == "ok" else None

    slow = Dependency("down", f"{context.database} did not answer within {LOOK_SECONDS_MAX:g} s"), None
    return await within(look(), LOOK_SECONDS_MAX) or slow


async def _database(context: Context) -> Dependency:
    started = time.perf_counter()
    try:
        await context.queries.counters()
    except ExpediterError as error:
        return Dependency("down", str(error))
    if (trouble := await context.committer.trouble()) is not None:
        return Dependency("down", f"{context.database}: the last write failed: {trouble}")
    return Dependency("ok", f"{context.database}, answered in {(time.perf_counter() - started) * 1000:.1f} ms")


def _cache(context: Context) -> Dependency:
    if context.cache.failing is not None:
        return Dependency("degraded", f"{context.cache.name}: {context.cache.failing}")
    counts = context.cache.counts
    return Dependency("ok", f"{context.cache.name}: {counts['hits']} hits, {counts['misses']} misses")


async def _queue(context: Context) -> Dependency:
    broker = context.broker
    name = "the database" if broker is None else broker.name
    if ended := context.ended():
        return Dependency("down", f"{name}; these have ended in this process: {', '.join(ended)}; restart it")
    workers = "workers run in this process"
    if not context.working:
        workers = "this process has no workers, `expediter work` starts some"
    if broker is None:
        return Dependency("ok", f"{name}; {workers}")
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
        return Dependency("degraded", f"{name}: {depth}; {instead}")
    said = f"{name}; {workers}; {depth.waiting} messages of queued commands wait, {depth.dead} are put aside"
    if context.intake is not None and context.intake.failing is not None:
        return Dependency("degraded", f"{said}; orders are stored directly: {context.intake.failing}")
    if no_hints := hints if isinstance(hints, str) else broker.hints_failing if hints else slow:
        return Dependency("degraded", f"{said}; there are no hints, {instead}: {no_hints}")
    return Dependency("degraded" if depth.dead else "ok", said)


async def _depth(broker: Broker, topic: Topic) -> Depth | str:
    """Return what waits, or why that cannot be said."""
    try:
        return await broker.depth(topic)
    except BrokerUnavailable as error:
        return str(error)


async def _gateway(context: Context) -> Dependency:
    breaker = await context.queries.breaker()
    if breaker.open_until is None:
        return Dependency("ok", f"{context.settings.payment_gateway.partition(':')[0]}, circuit breaker closed")
    return Dependency(
        "degraded", f"circuit breaker {breaker.state} after {breaker.failures} failures in a row; charges wait"
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
    status = "stopping" if context.draining else (await _database_and_gateway(context))[0].status
    if status == "down" and _queues(context):
        status = "ok"
    reply = json_reply(200 if status == "ok" else 503, Alive(status))
    if reply.status == 503:
        reply.headers.append((b"retry-after", b"1"))
    return reply


async def index(call: Call, context: Context) -> Reply:
    """Return where to look."""
    call.query()
    return json_reply(200, Index("expediter", __version__, "/api/v1/orders", "/docs", "/health"))


async def swagger(call: Call, context: Context) -> Reply:
    """The interface as a page to try calls on (Swagger UI)."""
    return await _page(call, "SWAGGER")


async def redoc(call: Call, context: Context) -> Reply:
    """The interface as a page to read (ReDoc)."""
    return await _page(call, "REDOC")


class _Page(NamedTuple):
    """A page that does not change while the process runs: as it is, packed by gzip, and its tag."""

    body: bytes
    packed: bytes
    tag: str


#: What the pages are told apart from the template: a title, calls that can be tried at the first click, no logo.
_TOLD = (
    ("<title>SwaggerUI</title>", "<title>Expediter: try the API</title>"),
    ("<title>ReDoc</title>", "<title>Expediter: the API</title>"),
    ('layout: "StandaloneLayout",', 'layout: "StandaloneLayout", tryItOutEnabled: true, deepLinking: true,'),
    ("https://cdn.redoc.ly/redoc/logo-mini-full.svg", "data:,"),
    ("https://cdn.redoc.ly/redoc/logo-mini.svg", "data:,"),
)
#: They fetch nothing from elsewhere, whatever is in their scripts.
_OWN_ORIGIN = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"


@lru_cache
def _template(name: str) -> _Page:
    # Imported on the first visit: it reads several megabytes of scripts, which most processes never need.
    from offapi import OpenAPITemplate

    text: str = OpenAPITemplate[name].value.format(spec_url="/openapi.json")
    for found, told in _TOLD:
        text = text.replace(found, told)
    body = text.encode()
    return _Page(body, gzip.compress(body, mtime=0), f'"{hashlib.sha256(body).hexdigest()[:32]}"')


async def _page(call: Call, name: str) -> Reply:
    page = await asyncio.to_thread(_template, name)
    headers = [
        (b"content-type", b"text/html; charset=utf-8"),
        (b"content-security-policy", _OWN_ORIGIN),
        (b"cache-control", b"no-cache"),  # kept, and asked for again by its tag
        (b"vary", b"accept-encoding"),
        (b"etag", page.tag.encode()),
    ]
    if page.tag in (call.header(b"if-none-match") or ""):
        return Reply(304, b"", headers)
    if re.search(r"\bgzip\b(?!\s*;\s*q=0(?:\.0*)?(?:,|\s|$))", call.header(b"accept-encoding") or ""):
        return Reply(200, page.packed, [*headers, (b"content-encoding", b"gzip")])
    return Reply(200, page.body, headers)


def _read(path: str, handler: Any, summary: str, answers: dict[int, Any]) -> Operation:
    return Operation(paths=(path,), handler=handler, scope=None, summary=summary, tag="service", answers=answers)


OPERATIONS = (
    _read("/", index, "Where to look", {200: Index}),
    _read("/health", health, "Health", {200: Health, 503: Health}),
    _read("/healthz", healthz, "Liveness", {200: Alive, 503: Alive}),
    _read("/readyz", readyz, "Readiness", {200: Alive, 503: Alive}),
    _read("/docs", swagger, "The interface, to try", {200: "text/html; charset=utf-8", 304: None}),
    _read("/redoc", redoc, "The interface, to read", {200: "text/html; charset=utf-8", 304: None}),
)
