"""The composition root: opens every part, hands each to those that need it, and closes them in turn."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import msgspec
import structlog
import uuid_utils
import uvicorn

from expediter import lookups
from expediter.cache import Cache, open_cache
from expediter.committer import Committer
from expediter.dialects import Database, open_database
from expediter.errors import ConfigurationError, ExpediterError
from expediter.fulfilment import Fulfiller, open_fulfiller
from expediter.listener import CONNECTIONS_WAITING_MAX, BoundedProtocol, Server, address_of, listen
from expediter.migrations import upgrade
from expediter.orders import MICROSECONDS, Line
from expediter.payments import PaymentGateway, open_gateway
from expediter.queries import Queries
from expediter.requests import Request
from expediter.samples import sample_order
from expediter.settings import Settings
from expediter.stages import Tools
from expediter.web import create_app
from expediter.web.context import Context
from expediter.worker import Worker

#: Slots of each counter; a process adds to one of them.
COUNTER_SLOTS = 64
#: Pause between two rounds of housekeeping, in seconds.
HOUSEKEEPING_SECONDS = 60.0

log = structlog.get_logger(__name__)


@dataclass
class Service:
    """One process's parts, open and running."""

    settings: Settings
    database: Database
    cache: Cache
    committer: Committer
    queries: Queries
    gateway: PaymentGateway
    fulfiller: Fulfiller
    worker: Worker | None
    drain_until: float | None = None

    def begin_drain(self) -> None:
        """Start the clock of the drain: readers stop waiting and workers stop claiming; what runs may end."""
        if self.drain_until is None:
            self.drain_until = asyncio.get_running_loop().time() + self.settings.drain_seconds
        self.queries.stop_waiting()
        if self.worker is not None:
            self.worker.stop_claiming()

    @property
    def drain_seconds_left(self) -> float:
        """Seconds that are left of the drain."""
        self.begin_drain()
        assert self.drain_until is not None
        return max(0.0, self.drain_until - asyncio.get_running_loop().time())

    @property
    def concurrency(self) -> int:
        """How many jobs this process runs at once."""
        return self.settings.worker_count * self.settings.worker_concurrency


@asynccontextmanager
async def open_service(settings: Settings, *, working: bool) -> AsyncIterator[Service]:
    """Open the parts, apply outstanding migrations, and start to commit; `working` also starts the workers.

    On leaving, what runs is given `drain_seconds`, then everything is closed.
    """
    await asyncio.to_thread(upgrade, settings.database)
    database = open_database(settings.database)
    cache = await open_cache(
        url=settings.redis_url,
        disabled=settings.cache_disabled,
        ttl_seconds=settings.orders_cache_ttl,
        position_now=database.position_reader(),
    )
    slot = random.randrange(COUNTER_SLOTS)
    committer = Committer(database, cache, slot=slot)
    queries = Queries(database, cache)
    committer.on_commit(queries.notice)
    gateway = _gateway(settings)
    fulfiller = open_fulfiller(
        settings.fulfilment,
        latency_ms_min=settings.fulfilment_mock_latency_min,
        latency_ms_max=settings.fulfilment_mock_latency_max,
    )
    worker = _worker(settings, database, committer, gateway, fulfiller) if working else None
    service = Service(settings, database, cache, committer, queries, gateway, fulfiller, worker)
    committer.start()
    if worker is not None:
        worker.start()
    housekeeping = asyncio.create_task(_housekeep(committer))
    try:
        yield service
    finally:
        housekeeping.cancel()
        if worker is not None:
            await worker.stop(service.drain_seconds_left)
        await committer.stop()
        await fulfiller.close()
        await gateway.close()
        await cache.close()
        await database.close()


def _gateway(settings: Settings) -> PaymentGateway:
    return open_gateway(
        settings.payment_gateway,
        success_rate=settings.payment_mock_success_rate,
        latency_ms_min=settings.payment_mock_latency_min,
        latency_ms_max=settings.payment_mock_latency_max,
    )


def _worker(
    settings: Settings,
    database: Database,
    committer: Committer,
    gateway: PaymentGateway,
    fulfiller: Fulfiller,
) -> Worker:
    async def lines(order_id: str) -> Sequence[Line]:
        found = await database.read(partial(lookups.order_with_lines, order_id=order_id))
        return found[1] if found else ()

    tools = Tools(
        gateway=gateway,
        fulfiller=fulfiller,
        payment_attempts_max=settings.payment_retry_attempts,
        lease=int(settings.lease_seconds * MICROSECONDS),
        random=random.random,
        lines=lines,
    )
    return Worker(
        committer,
        tools,
        holder=f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}",
        concurrency=settings.worker_count * settings.worker_concurrency,
        breaker_threshold=settings.circuit_breaker_failure_threshold,
        breaker_recovery=int(settings.circuit_breaker_recovery_seconds * MICROSECONDS),
    )


async def _housekeep(committer: Committer) -> None:
    while True:
        try:
            removed = await committer.housekeep()
        except Exception as error:
            # Upkeep that fails once must not end for good.
            log.warning("expired idempotency keys could not be removed", error=str(error))
            removed = 0
        await asyncio.sleep(0 if removed else HOUSEKEEPING_SECONDS)


async def serve(
    settings: Settings, *, working: bool, insecure: bool, announce: Callable[[Service, str], None]
) -> None:
    """Serve HTTP until SIGTERM or SIGINT, then drain. `announce` is told the address once it can be reached.

    Raises ConfigurationError for an address that others could reach, unless `insecure`, and for a port in use.
    """
    if not settings.loopback and not insecure:
        raise ConfigurationError(
            f"HOST={settings.host} can be reached from other machines and this service asks nobody for a key: "
            "bind to 127.0.0.1, or give --insecure if the network itself keeps strangers out"
        )
    listener = listen(settings.host, settings.port)
    async with open_service(settings, working=working) as service:
        context = Context(
            settings=settings,
            committer=service.committer,
            queries=service.queries,
            cache=service.cache,
            durability=service.database.durability,
            database=service.database.describe(),
            working=working,
            worker_alive=lambda: service.worker is None or service.worker.alive,
        )
        config = uvicorn.Config(
            create_app(context),
            loop="none",
            http=BoundedProtocol,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            date_header=True,
            timeout_keep_alive=30,
            backlog=CONNECTIONS_WAITING_MAX,
            # Passed to asyncio as it is, which takes fractions too.
            timeout_graceful_shutdown=settings.drain_seconds,  # type: ignore[arg-type]
        )
        server = Server(config)
        stopping = _on_signals(server, context, service)
        try:
            announce(service, address_of(listener))
            await server.serve(sockets=[listener])
        finally:
            stopping()
            listener.close()


def _on_signals(server: uvicorn.Server, context: Context, service: Service) -> Callable[[], None]:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        context.draining = True
        service.begin_drain()
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)

    def forget() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    return forget


async def work(settings: Settings, *, announce: Callable[[Service], None]) -> None:
    """Work off jobs without serving HTTP, until SIGTERM or SIGINT, then drain."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with open_service(settings, working=True) as service:
        announce(service)
        await stop.wait()


#: Made-up orders that are stored in one transaction.
_SEEDS_PER_BATCH = 200


async def seed(settings: Settings, count: int, advance: Callable[[int], None]) -> None:
    """Store `count` made-up orders; `advance` is told how many more are stored. Raises Unavailable."""
    rng = random.Random()
    async with open_service(settings, working=False) as service:
        for start in range(0, count, _SEEDS_PER_BATCH):
            orders = [
                sample_order(
                    rng,
                    lambda: f"ORD-{uuid_utils.uuid7()}",
                    currency=settings.default_currency,
                    stages=settings.stages,
                )
                for _ in range(min(_SEEDS_PER_BATCH, count - start))
            ]
            outcomes = await service.committer.submit_patiently([Request(order) for order in orders])
            for outcome in outcomes:
                if isinstance(outcome, ExpediterError):
                    raise outcome
            advance(len(orders))


async def clear(settings: Settings, report: Callable[[int], None]) -> None:
    """Remove every order; `report` is told how many there were."""
    async with open_service(settings, working=False) as service:
        removed = await service.committer.clear()
        assert isinstance(removed, int)  # a replay needs a key
        report(removed)


async def reset_cache(settings: Settings) -> None:
    """Make every process on this database drop what it has cached."""
    async with open_service(settings, working=False) as service:
        await service.committer.retire_caches()


def upgrade_database(settings: Settings) -> bool:
    """Apply outstanding migrations; return whether there were any."""
    return upgrade(settings.database)


class Finding(msgspec.Struct, frozen=True):
    """One thing that `doctor` looked at: `ok`, `warning` or `failed`, and what to do."""

    what: str
    verdict: str
    detail: str


async def examine(settings: Settings, findings: list[Finding]) -> None:
    """Look at the settings and at everything they name, without changing an order; add what was found."""
    findings.append(Finding("settings", "ok", f"read; stages {settings.stages.value}"))
    try:
        async with open_service(settings, working=False) as service:
            await _examine_database(service, findings)
            findings.append(Finding("cache", "ok", service.cache.name))
            breaker = await service.queries.breaker()
            verdict = "ok" if breaker.open_until is None else "warning"
            findings.append(
                Finding("gateway", verdict, f"{service.gateway.name}, circuit breaker {breaker.state}")
            )
            findings.append(Finding("fulfilment", "ok", service.fulfiller.name))
    except ExpediterError as error:
        what = "settings" if isinstance(error, ConfigurationError) else "database"
        findings.append(Finding(what, "failed", str(error)))
    if settings.admin_password is None:
        findings.append(Finding("admin", "warning", "admin calls are off: set ADMIN_PASSWORD to allow them"))
    else:
        findings.append(Finding("admin", "ok", "admin calls ask for the password"))


async def _examine_database(service: Service, findings: list[Finding]) -> None:
    database = service.database
    found = await database.durability_settings()
    wrong = [
        f"{name} is {found[name]}, not {want}" for name, want in database.power_safe.items() if found[name] != want
    ]
    said = ", ".join(f"{name}={value}" for name, value in found.items())
    findings.append(Finding("database", "ok", database.describe()))
    if wrong:
        findings.append(Finding("durability", "failed", f"process-safe only: {'; '.join(wrong)}"))
    else:
        findings.append(Finding("durability", "ok", f"{database.durability}: {said}"))
    state, _ = await service.queries.queue()
    verdict = "warning" if state.dead else "ok"
    text = f"{state.ready} ready, {state.scheduled} scheduled, {state.leased} leased, {state.dead} parked"
    findings.append(Finding("queue", verdict, text))
