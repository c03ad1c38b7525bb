"""The composition root: opens every part, hands each to those that need it, and closes them in turn."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import uuid_utils

from expediter.backends.batching import Gatherer
from expediter.backends.brokers import Broker, Topic, open_broker
from expediter.backends.cache import Cache, open_cache
from expediter.backends.databases import Database, open_database
from expediter.errors import BrokerUnavailable, ConfigurationError, ExpediterError
from expediter.fulfilment import Fulfiller, open_fulfiller
from expediter.orders.order import MICROSECONDS, Line
from expediter.orders.samples import sample_order
from expediter.payments import PaymentGateway, open_gateway
from expediter.queued.applier import Applier
from expediter.queued.intake import QueuedIntake
from expediter.queued.reader import AcceptedOrders
from expediter.queued.temporary import TemporaryOrders
from expediter.run.processes import Lifeline
from expediter.settings import Intake, Settings
from expediter.store import lookups
from expediter.store.committer import Committer
from expediter.store.migrations import upgrade
from expediter.store.queries import ORDERS_PER_LOOK, Accepted, NothingAccepted, Queries
from expediter.store.submissions import Request
from expediter.upkeep import doctor
from expediter.upkeep.archive import Archived, archive
from expediter.upkeep.doctor import Finding
from expediter.web import create_app
from expediter.web.context import Context
from expediter.web.server.access_log import access_log
from expediter.web.server.listener import Server, address_of, inherit, listen, raise_file_limit, turn_away
from expediter.work.hints import Hints
from expediter.work.stages import Tools
from expediter.work.worker import Worker

#: Slots of each counter; a process adds to one of them.
COUNTER_SLOTS = 64


@dataclass
class Service:
    """One process's parts, open and running.

    `broker` None: the database is the queue. `intake` None: everything is stored before it is answered. `applier`
    None: this process applies no queued commands.
    """

    settings: Settings
    database: Database
    cache: Cache
    committer: Committer
    queries: Queries
    gateway: PaymentGateway
    fulfiller: Fulfiller
    worker: Worker | None
    broker: Broker | None
    temporary: TemporaryOrders | None
    intake: QueuedIntake | None
    applier: Applier | None
    drain_until: float | None = None

    def begin_drain(self) -> None:
        """Start the clock of the drain: readers stop waiting and workers stop claiming; what runs may end."""
        if self.drain_until is None:
            self.drain_until = asyncio.get_running_loop().time() + self.settings.drain_seconds
        self.queries.stop_waiting()
        if self.worker is not None:
            self.worker.stop_claiming()
        if self.applier is not None:
            self.applier.stop_taking()

    @property
    def drain_seconds_left(self) -> float:
        """Seconds that are left of the drain."""
        self.begin_drain()
        assert self.drain_until is not None
        return max(0.0, self.drain_until - asyncio.get_running_loop().time())

    def workers_alive(self) -> bool:
        """Whether what works in this process still does."""
        return all(part is None or part.alive for part in (self.worker, self.applier))

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
    async with AsyncExitStack() as stack:
        service = await _open_parts(settings, stack, working=working)
        await _reach(service.broker)
        service.committer.start()
        if service.worker is not None:
            service.worker.start()
        if service.applier is not None:
            service.applier.start()
        if service.intake is not None:
            service.intake.start()
        hints = _hints(service)
        housekeeping = asyncio.create_task(service.committer.keep_house())
        try:
            yield service
        finally:
            housekeeping.cancel()
            if service.intake is not None:
                await service.intake.stop()
            if service.applier is not None:
                await service.applier.stop(service.drain_seconds_left)
            if service.worker is not None:
                await service.worker.stop(service.drain_seconds_left)
            await service.committer.stop()
            if hints is not None:
                await hints.stop()


async def _reach(broker: Broker | None) -> None:
    """See whether the broker is there, so that the first lines of the log can say so."""
    if broker is not None:
        with suppress(BrokerUnavailable):
            await broker.depth(Topic.COMMANDS)


async def _open_parts(settings: Settings, stack: AsyncExitStack, *, working: bool) -> Service:
    """Open every part; `stack` closes them, the last one first. Raises ConfigurationError."""
    database = open_database(settings.database)
    stack.push_async_callback(database.close)
    cache = await open_cache(
        url=settings.redis_url,
        disabled=settings.cache_disabled,
        ttl_seconds=settings.orders_cache_ttl,
        position_now=database.position_reader(),
    )
    stack.push_async_callback(cache.close)
    gateway = _gateway(settings)
    stack.push_async_callback(gateway.close)
    fulfiller = open_fulfiller(
        settings.fulfilment,
        latency_ms_min=settings.fulfilment_mock_latency_min,
        latency_ms_max=settings.fulfilment_mock_latency_max,
    )
    stack.push_async_callback(fulfiller.close)
    broker = open_broker(settings.broker, queue_name=settings.rabbitmq_queue_name)
    temporary = None
    if broker is not None:
        stack.push_async_callback(broker.close)
    if broker is not None and settings.temporary_orders:
        temporary = TemporaryOrders(settings.temporary_orders, keep_seconds=settings.temp_order_cache_ttl)
        stack.push_async_callback(temporary.close)
    committer = Committer(database, cache, slot=random.randrange(COUNTER_SLOTS))
    worker = _worker(settings, database, committer, gateway, fulfiller) if working else None
    intake = applier = None
    accepted: Accepted = NothingAccepted()
    if broker is not None and temporary is not None:
        # Also while INTAKE is direct: what was queued before must not be left behind, nor be unknown.
        accepted = AcceptedOrders(temporary, broker, taking=settings.intake is Intake.QUEUED)
        if working:
            applier = Applier(committer, broker, temporary)
    queries = Queries(database, cache, accepted)
    if settings.intake is Intake.QUEUED and broker is not None and temporary is not None:
        intake = QueuedIntake(database, committer, queries, broker, temporary)
    committer.on_commit(queries.notice)
    return Service(
        settings=settings,
        database=database,
        cache=cache,
        committer=committer,
        queries=queries,
        gateway=gateway,
        fulfiller=fulfiller,
        worker=worker,
        broker=broker,
        temporary=temporary,
        intake=intake,
        applier=applier,
    )


def _hints(service: Service) -> Hints | None:
    """Give hints by the broker, and take them where there are workers."""
    if service.broker is None:
        return None
    hints = Hints(service.broker)
    service.committer.on_commit(hints.notice)
    if service.worker is not None:
        hints.listen(service.worker.wake)
    return hints


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
    async def lines_of(order_ids: Sequence[str]) -> list[Sequence[Line]]:
        found = await database.read(partial(lookups.lines_of, ids=list(dict.fromkeys(order_ids))))
        return [found[order_id] for order_id in order_ids]

    lines: Gatherer[str, Sequence[Line]] = Gatherer(lines_of, items_max=ORDERS_PER_LOOK)
    tools = Tools(
        gateway=gateway,
        fulfiller=fulfiller,
        payment_attempts_max=settings.payment_retry_attempts,
        lease=int(settings.lease_seconds * MICROSECONDS),
        random=random.random,
        lines=lines.ask,
    )
    return Worker(
        committer,
        tools,
        holder=f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}",
        concurrency=settings.worker_count * settings.worker_concurrency,
        breaker_threshold=settings.circuit_breaker_failure_threshold,
        breaker_recovery=int(settings.circuit_breaker_recovery_seconds * MICROSECONDS),
    )


def bind(settings: Settings, *, insecure: bool) -> socket.socket:
    """Return the socket to serve on.

    Raises ConfigurationError for an address that others could reach, unless `insecure`, and for a port in use.
    """
    if not settings.loopback and not insecure:
        raise ConfigurationError(
            f"HOST={settings.host} can be reached from other machines and this service asks nobody for a key: "
            "bind to 127.0.0.1, or give --insecure if the network itself keeps strangers out"
        )
    return listen(settings.host, settings.port)


async def serve(
    settings: Settings,
    *,
    working: bool,
    insecure: bool,
    announce: Callable[[Service, str], None],
    listen_fd: int | None = None,
    lifeline: Lifeline | None = None,
) -> None:
    """Serve HTTP until SIGTERM or SIGINT, then drain. `announce` is told the address once it can be reached.

    A supervisor's process takes the socket over from it, as `listen_fd`, and drains when its `lifeline` ends, too.
    Raises ConfigurationError as `bind` and `raise_file_limit` do.
    """
    connections_max = raise_file_limit()
    listener = bind(settings, insecure=insecure) if listen_fd is None else inherit(listen_fd)
    async with (
        access_log(settings.access_log_file, settings.access_log_format) as logged,
        open_service(settings, working=working) as service,
    ):
        context = Context(
            settings=settings,
            committer=service.committer,
            queries=service.queries,
            cache=service.cache,
            durability=service.database.durability,
            database=service.database.describe(),
            working=working,
            worker_alive=service.workers_alive,
            broker=service.broker,
            intake=service.intake,
            temporary=service.temporary,
        )
        server = Server(
            logged(create_app(context)),
            turn_away=logged(turn_away),
            connections_max=connections_max,
            drain_seconds=settings.drain_seconds,
        )
        stopping = _on_signals(server, context, service, lifeline)
        try:
            announce(service, address_of(listener))
            await server.serve(sockets=[listener])
        finally:
            stopping()
            listener.close()


def _on_signals(
    server: Server, context: Context, service: Service, lifeline: Lifeline | None
) -> Callable[[], None]:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        context.draining = True
        service.begin_drain()
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    if lifeline is not None:
        lifeline.on_end(stop)

    def forget() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    return forget


async def work(
    settings: Settings, *, announce: Callable[[Service], None], lifeline: Lifeline | None = None
) -> None:
    """Work off jobs without serving HTTP, until SIGTERM or SIGINT or the end of the `lifeline`, then drain."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if lifeline is not None:
        lifeline.on_end(stop.set)
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
        if service.temporary is not None:
            await service.temporary.clear()
        report(removed)


async def move_to_archive(
    settings: Settings, folder: Path, days: float, advance: Callable[[int], None], found: list[Archived]
) -> None:
    """Move the history of orders at rest for `days` into a file in `folder`; add what was moved to `found`."""
    database = open_database(settings.database)
    try:
        await asyncio.to_thread(upgrade, settings.database)
        found.append(await archive(database, folder, days=days, advance=advance))
    finally:
        await database.close()


async def reset_cache(settings: Settings) -> None:
    """Make every process on this database drop what it has cached."""
    async with open_service(settings, working=False) as service:
        await service.committer.retire_caches()


def database_name(settings: Settings) -> str:
    """Return the database for people: never with its password. Raises ConfigurationError."""
    return open_database(settings.database).describe()


def upgrade_database(settings: Settings) -> bool:
    """Apply outstanding migrations; return whether there were any."""
    return upgrade(settings.database)


async def examine(settings: Settings, findings: list[Finding]) -> None:
    """Look at the settings and at everything they name, without changing an order; add what was found."""
    findings.append(
        Finding("settings", "ok", f"read; stages {settings.stages.value}, intake {settings.intake.value}")
    )
    try:
        await asyncio.to_thread(upgrade, settings.database)
    except ExpediterError as error:
        what = "settings" if isinstance(error, ConfigurationError) else "database"
        findings.append(Finding(what, "failed", f"{error}. Nothing is stored until it can be used"))
        await _examine_parts(settings, findings, stored=False)
    else:
        await _examine_parts(settings, findings, stored=True)
    if settings.admin_password is None:
        findings.append(Finding("admin", "warning", "admin calls are off: set ADMIN_PASSWORD to allow them"))
    else:
        findings.append(Finding("admin", "ok", "admin calls ask for the password"))


async def _examine_parts(settings: Settings, findings: list[Finding], *, stored: bool) -> None:
    """Look at every part; not `stored`: the database cannot be looked at."""
    try:
        async with AsyncExitStack() as stack:
            service = await _open_parts(settings, stack, working=False)
            queued = service.intake is not None
            if stored:
                await doctor.examine_database(service.database, service.queries, findings)
            await doctor.examine_cache(service.cache, findings)
            await doctor.examine_broker(service.broker, service.temporary, findings, queued=queued)
            if stored:
                await doctor.examine_gateway(service.gateway, service.queries, findings)
            findings.append(Finding("fulfilment", "ok", service.fulfiller.name))
    except ExpediterError as error:
        what = "settings" if isinstance(error, ConfigurationError) else "database"
        if not any(finding.verdict == "failed" for finding in findings):
            findings.append(Finding(what, "failed", str(error)))
