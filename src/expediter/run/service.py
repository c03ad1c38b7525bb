"""The composition root: opens every part, hands each to those that need it, and closes them in turn."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

from expediter.backends.batching import Gatherer
from expediter.backends.brokers import Broker, Topic, open_broker
from expediter.backends.cache import Cache, open_cache
from expediter.backends.databases import Database, open_database
from expediter.backends.outside import Outside
from expediter.backends.tallies import SharedTally, open_tally
from expediter.backends.tasks import Background
from expediter.errors import BrokerUnavailable
from expediter.fulfilment import Fulfiller, open_fulfiller
from expediter.orders.order import MICROSECONDS, Line
from expediter.payments import PaymentGateway, open_gateway
from expediter.queued.applier import Applier
from expediter.queued.intake import QueuedIntake
from expediter.queued.reader import AcceptedOrders
from expediter.queued.temporary import TemporaryOrders
from expediter.settings import Intake, PaymentCapture, Settings
from expediter.store import lookups
from expediter.store.committer import Committer
from expediter.store.installation import bind_key_prefix, is_bound_to
from expediter.store.keys import KeyRing
from expediter.store.migrations import upgrade
from expediter.store.queries import ORDERS_PER_LOOK, Accepted, NothingAccepted, Queries
from expediter.store.reading import Readings
from expediter.store.standing import read_standing
from expediter.store.webhooks import Webhooks
from expediter.work.hints import Hints
from expediter.work.stages import Tools
from expediter.work.webhooks import reader
from expediter.work.webhooks.delivering import Delivering
from expediter.work.webhooks.sending import Sender
from expediter.work.worker import Worker

#: Slots of each counter; a process adds to one of them.
COUNTER_SLOTS = 64


@dataclass
class Service:
    """One process's parts, open and running.

    `broker` None: the database is the queue. `intake` None: everything is stored before it is answered. `applier`
    None: this process applies no queued commands. `delivering` None: it sends no webhooks but those that are asked
    for. `ring` follows the keys from when it is started: whoever takes no requests need not.
    `tally` None: rates are not counted across processes.
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
    hints: Hints | None
    webhooks: Webhooks
    sender: Sender
    delivering: Delivering | None
    housekeeping: Background
    tally: SharedTally | None
    drain_until: float | None = None

    def __post_init__(self) -> None:
        """Nothing is known of API keys yet."""
        self.ring = KeyRing(self.database)

    def begin_drain(self) -> None:
        """Start the clock of the drain: readers stop waiting and workers stop claiming; what runs may end."""
        if self.drain_until is None:
            self.drain_until = asyncio.get_running_loop().time() + self.settings.drain_seconds
        self.queries.stop_waiting()
        if self.worker is not None:
            self.worker.stop_claiming()
        if self.applier is not None:
            self.applier.stop_taking()
        if self.delivering is not None:
            self.delivering.stop_taking()

    @property
    def drain_seconds_left(self) -> float:
        """Seconds that are left of the drain."""
        self.begin_drain()
        assert self.drain_until is not None
        return max(0.0, self.drain_until - asyncio.get_running_loop().time())

    def ended(self) -> list[str]:
        """Return the names of what should run in the background, and does not any more."""
        parts = (self.committer, self.worker, self.intake, self.hints, self.delivering)
        works = [self.housekeeping, *(part.background for part in parts if part is not None)]
        works += [self.ring.looking, self.ring.noting]
        works += self.applier.works if self.applier is not None else ()
        return [work.name for work in works if work.ended]

    @property
    def moved(self) -> Callable[[int], Awaitable[None]] | None:
        """What must be told when the database's incarnation moves."""
        return None if self.temporary is None else self.temporary.tell_incarnation

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
        service = await open_parts(settings, stack, working=working)
        prefix = settings.gateway_key_prefix
        if not await service.database.read(partial(is_bound_to, prefix=prefix)):
            await service.database.write(partial(bind_key_prefix, prefix=prefix))
        await _reach(service.broker)
        service.committer.start()
        if service.worker is not None:
            service.worker.start()
        if service.applier is not None:
            service.applier.start()
        if service.delivering is not None:
            service.delivering.start()
        if service.intake is not None:
            service.intake.start()
        if service.hints is not None and service.worker is not None:
            service.hints.listen(service.worker.wake)
        service.housekeeping.start()
        try:
            yield service
        finally:
            await service.housekeeping.stop(grace_seconds=0)
            if service.intake is not None:
                await service.intake.stop()
            if service.applier is not None:
                await service.applier.stop(service.drain_seconds_left)
            if service.delivering is not None:
                await service.delivering.stop(service.drain_seconds_left)
            if service.worker is not None:
                await service.worker.stop(service.drain_seconds_left)
            await service.committer.stop()
            if service.hints is not None:
                await service.hints.stop()


async def _reach(broker: Broker | None) -> None:
    """See whether the broker is there, so that the first lines of the log can say so."""
    if broker is not None:
        with suppress(BrokerUnavailable):
            await broker.depth(Topic.COMMANDS)


async def open_parts(settings: Settings, stack: AsyncExitStack, *, working: bool) -> Service:
    """Open every part; `stack` closes them, the last one first. Raises ConfigurationError."""
    database = open_database(settings.database)
    stack.push_async_callback(database.close)
    cache = await open_cache(
        url=settings.redis,
        prefix=settings.redis_prefix,
        disabled=settings.cache_disabled,
        ttl_seconds=settings.orders_cache_ttl,
        position_now=database.position_reader(),
        standing=lambda: database.read(read_standing),
    )
    stack.push_async_callback(cache.close)
    gateway = gateway_of(settings)
    stack.push_async_callback(gateway.close)
    fulfiller = _fulfiller(settings)
    stack.push_async_callback(fulfiller.close)
    broker = open_broker(
        settings.broker, queue_name=settings.rabbitmq_queue_name, redis_prefix=settings.redis_prefix
    )
    temporary = None
    if broker is not None:
        stack.push_async_callback(broker.close)
    if broker is not None and settings.temporary_orders:
        temporary = TemporaryOrders(
            settings.temporary_orders, prefix=settings.redis_prefix, keep_seconds=settings.temp_order_cache_ttl
        )
        stack.push_async_callback(temporary.close)
    committer = Committer(database, cache, slot=random.randrange(COUNTER_SLOTS))
    worker = _worker(settings, database, committer, gateway, fulfiller) if working else None
    intake = applier = None
    accepted: Accepted = NothingAccepted()
    if broker is not None and temporary is not None:
        # Also while INTAKE is direct: what was queued before must not be left behind, nor be unknown.
        accepted = AcceptedOrders(
            temporary,
            broker,
            lambda order_id: database.read(partial(lookups.is_deleted, order_id=order_id)),
            taking=settings.intake is Intake.QUEUED,
        )
        if working:
            applier = Applier(broker, temporary, committer, settings.lease_seconds)
    queries = Queries(database, cache, accepted)
    if settings.intake is Intake.QUEUED and broker is not None and temporary is not None:
        intake = QueuedIntake(database, committer, queries, broker, temporary)
    committer.on_commit(queries.notice)
    hints = None if broker is None else Hints(broker)
    if hints is not None:
        committer.on_commit(hints.notice)
    webhooks, sender = Webhooks(database), _sender(settings, stack)
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
        hints=hints,
        webhooks=webhooks,
        sender=sender,
        delivering=_delivering(database, queries, sender, webhooks) if working else None,
        housekeeping=Background("housekeeping", committer.keep_house),
        tally=_tally(settings, stack),
    )


def _tally(settings: Settings, stack: AsyncExitStack) -> SharedTally | None:
    tally = open_tally(settings.redis if settings.rate else "", prefix=settings.redis_prefix)
    if tally is not None:
        stack.push_async_callback(tally.close)
    return tally


def _sender(settings: Settings, stack: AsyncExitStack) -> Sender:
    outside = Outside()
    stack.push_async_callback(outside.close)
    return Sender(outside, allow_http=settings.webhook_allow_http)


def _delivering(database: Database, queries: Queries, sender: Sender, webhooks: Webhooks) -> Delivering:
    readings = Readings(database)
    tools = reader.Tools(
        readings=readings,
        feed=queries.feed,
        sender=sender,
        histories=Gatherer(readings.histories, items_max=ORDERS_PER_LOOK),
        random=random.random,
    )
    delivering = Delivering(tools, holder=_holder())
    webhooks.on_change(delivering.look_now)
    return delivering


def _holder() -> str:
    """Return a name of this process for leases."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


def _fulfiller(settings: Settings) -> Fulfiller:
    return open_fulfiller(
        settings.fulfilment,
        latency_ms_min=settings.fulfilment_mock_latency_min,
        latency_ms_max=settings.fulfilment_mock_latency_max,
        token=settings.fulfilment_token.get_secret_value() if settings.fulfilment_token else None,
    )


def gateway_of(settings: Settings) -> PaymentGateway:
    """Return the gateway that the settings name. Raises ConfigurationError."""
    return open_gateway(
        settings.payment_gateway,
        success_rate=settings.payment_mock_success_rate,
        latency_ms_min=settings.payment_mock_latency_min,
        latency_ms_max=settings.payment_mock_latency_max,
        token=settings.payment_gateway_token.get_secret_value() if settings.payment_gateway_token else None,
        reserving=settings.payment_capture is PaymentCapture.ON_COMPLETION,
        stripe_api_key=settings.stripe_api_key.get_secret_value() if settings.stripe_api_key else None,
        stripe_api_base=settings.stripe_api_base,
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

    late = settings.fulfilment_seconds_max
    lines: Gatherer[str, Sequence[Line]] = Gatherer(lines_of, items_max=ORDERS_PER_LOOK)
    tools = Tools(
        gateway=gateway,
        fulfiller=fulfiller,
        payment_attempts_max=settings.payment_retry_attempts,
        payment_retry_delay=int(settings.payment_retry_delay * MICROSECONDS),
        lease=int(settings.lease_seconds * MICROSECONDS),
        random=random.random,
        lines=lines.ask,
        key_prefix=settings.gateway_key_prefix,
        fulfilment_attempts_max=settings.fulfilment_retry_attempts,
        report_in=None if late is None else int(late * MICROSECONDS),
        capture_later=settings.payment_capture is PaymentCapture.ON_COMPLETION,
        action_in=int(settings.payment_action_seconds * MICROSECONDS),
    )
    return Worker(
        committer,
        tools,
        holder=_holder(),
        concurrency=settings.worker_count * settings.worker_concurrency,
        breaker_threshold=settings.circuit_breaker_failure_threshold,
        breaker_recovery=int(settings.circuit_breaker_recovery_seconds * MICROSECONDS),
    )
