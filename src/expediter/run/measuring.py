"""What `GET /metrics` tells: this process, the processes beside it, and the whole system by its database."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from expediter import __version__
from expediter.backends.brokers import Depth, Topic
from expediter.backends.tasks import within
from expediter.orders.order import MICROSECONDS, Status
from expediter.run.neighbours import ask
from expediter.run.service import Service
from expediter.store.jobs import KINDS
from expediter.store.overview import Lag, Overview
from expediter.store.rows import COMPLETED, COMPLETED_TOTAL, COMPLETED_WORK, count_of
from expediter.telemetry.meters import Family, Sample, counter, gauge, labelled, merged, of_process
from expediter.web.context import Context
from expediter.web.server.state import State

#: Seconds that the database and the broker may take; with what follows, a scrape is answered within two.
LOOK_SECONDS_MAX = 1.5
#: Seconds for which what the database said is said again: scrapes by several are one read.
KEPT_SECONDS = 1.0
#: The states of the gateway's circuit breaker.
BREAKER_STATES = ("closed", "open", "half_open")

_PAGE_BYTES = resource.getpagesize()
_STARTED = "process_start_time_seconds"


class Measuring:
    """Tells what one process has measured, and gathers the rest. Use it from one event loop."""

    def __init__(self, service: Service, name: str, place: Path | None = None) -> None:
        """`place` is where this process answers its neighbours, None where it has none; `name` is its label."""
        self._service = service
        self._name = name
        self._place = place
        self._door: tuple[Context, State] | None = None
        self._system: asyncio.Task[list[Family]] | None = None
        #: When the last look was over, on the monotonic clock.
        self._looked_at = 0.0
        self._started = time.time()

    def serve(self, context: Context, state: State) -> None:
        """Measure what is served, too; and from now on tell how the whole system stands."""
        self._door = context, state
        context.metrics = self.everything

    def own(self) -> list[Family]:
        """Return what this process alone has measured."""
        service = self._service
        families = [*self._process(), *service.committer.families(), *service.sender.families()]
        if service.worker is not None:
            families += service.worker.families()
        if self._door is not None:
            families += _door(*self._door)
        counts, pool = service.cache.counts, service.database.pool()
        families += [
            counter(
                "cache_reads",
                "Reads that the cache answered, or did not.",
                labelled("result", {"hit": counts["hits"], "miss": counts["misses"]}),
            ),
            gauge(
                "database_connections",
                "Connections to the database: in use, and open.",
                labelled("state", {"used": pool.used, "open": pool.open}),
            ),
            gauge("database_connections_max", "Connections that there may be.", pool.most),
        ]
        return of_process(families, self._name)

    async def together(self) -> list[Family]:
        """Return what this process and those beside it have measured."""
        others = await ask(self._place) if self._place is not None else {}
        up = {self._name: 1} | {name: int(answer is not None) for name, answer in others.items()}
        answers = [answer for answer in others.values() if answer is not None]
        return merged(
            [
                gauge("build_info", "The version that runs.", [Sample("", {"version": __version__}, 1)]),
                gauge("process_up", "Whether a process answers.", labelled("process", up)),
                *self.own(),
                *(family for answer in answers for family in answer),
            ]
        )

    async def everything(self) -> list[Family]:
        """Return the same, and how the whole system stands."""
        together, system = await asyncio.gather(self.together(), self._system_lately())
        return [*together, *system]

    async def _system_lately(self) -> list[Family]:
        task = self._system
        if task is None or (task.done() and time.monotonic() - self._looked_at > KEPT_SECONDS):
            task = self._system = asyncio.create_task(self._look())
        return await asyncio.shield(task)

    async def _look(self) -> list[Family]:
        service, began = self._service, time.monotonic()
        overview, depth = await asyncio.gather(within(service.queries.overview(), LOOK_SECONDS_MAX), self._depth())
        self._looked_at = time.monotonic()
        seconds = self._looked_at - began
        up = {"database": int(overview is not None), "cache": int(service.cache.failing is None)}
        if service.broker is not None:
            up["broker"] = int(service.broker.failing is None and depth is not None)
        families = [
            gauge(
                "dependency_up", "Whether a part can be used, as one process sees it.", labelled("dependency", up)
            )
        ]
        if depth is not None:
            messages = {"waiting": depth.waiting, "dead": depth.dead}
            families.append(gauge("queued_messages", "Messages of queued commands.", labelled("state", messages)))
        if overview is not None:
            families.append(gauge("overview_seconds", "Seconds that the database took for these.", seconds))
            families += [*_orders(overview), *_jobs(overview), *_webhooks(overview.lags)]
        return families

    async def _depth(self) -> Depth | None:
        broker = self._service.broker
        return None if broker is None else await within(broker.depth(Topic.COMMANDS), LOOK_SECONDS_MAX)

    def _process(self) -> Iterable[Family]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        yield counter("process_cpu_seconds", "User and system CPU time.", used.ru_utime + used.ru_stime)
        with suppress(OSError):  # Linux alone has it
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            yield gauge("process_resident_memory_bytes", "Resident memory.", pages * _PAGE_BYTES)
        yield gauge(_STARTED, "When it began, in seconds since 1970.", self._started)
        ended = len(self._service.ended())
        yield gauge("background_ended", "Background tasks that have ended and should not have.", ended)


def _door(context: Context, state: State) -> list[Family]:
    return [
        *state.requests.families(),
        gauge("connections", "Connections of clients.", len(state.connections)),
        gauge("connections_max", "Connections that are served at once, at most.", state.connections_max),
        counter("connections_turned_away", "Connections beyond these.", state.turned_away_ever),
        gauge("event_streams", "Readers of events that are connected.", context.streams),
        gauge("batches_reading", "Batches of orders that are being read.", context.batches),
    ]


def _orders(overview: Overview) -> Iterable[Family]:
    counters = overview.counters
    statuses = {status.value: count_of(counters, status) for status in Status}
    yield gauge("orders", "Orders in each status.", labelled("status", statuses))
    # Not counters: an order that is deleted takes its share away.
    yield gauge("orders_completed", "Orders that are completed and not deleted.", counters.get(COMPLETED, 0))
    for name, key, words in (
        ("orders_completed_work_seconds", COMPLETED_WORK, "Seconds from the start of work to the end, summed."),
        ("orders_completed_seconds", COMPLETED_TOTAL, "Seconds from creation to the end, summed."),
    ):
        yield gauge(name, words, counters.get(key, 0) / MICROSECONDS)


def _jobs(overview: Overview) -> Iterable[Family]:
    jobs = overview.backlog
    states = {
        "ready": jobs.ready,
        "scheduled": jobs.scheduled,
        "leased": jobs.leased,
        "parked": jobs.dead,
        "handed_over": jobs.handed_over,
    }
    yield gauge("jobs", "Jobs in each state.", labelled("state", states))
    oldest = {kind.value: max(0, jobs.now - jobs.first_due.get(kind, jobs.now)) / MICROSECONDS for kind in KINDS}
    yield gauge(
        "jobs_oldest_age_seconds",
        "For how long the oldest ready job of each stage has been due.",
        labelled("stage", oldest),
    )
    now = overview.breaker.state
    yield gauge(
        "gateway_breaker_state",
        "1 at the state that the gateway's circuit breaker is in.",
        labelled("state", {state: int(state == now) for state in BREAKER_STATES}),
    )
    yield gauge(
        "gateway_breaker_failures", "Calls to the gateway that failed in a row.", overview.breaker.failures
    )


def _webhooks(lags: list[Lag]) -> Iterable[Family]:
    for name, words, field in (
        ("webhook_active", "Whether an endpoint is sent events.", "active"),
        ("webhook_lag_events", "Events that an endpoint is behind.", "events"),
        ("webhook_lag_seconds", "The age of the oldest event that an endpoint waits for.", "seconds"),
        ("webhook_failing_seconds", "For how long an endpoint has taken nothing.", "failing_seconds"),
    ):
        yield gauge(
            name, words, labelled("endpoint", {lag.endpoint_id: float(getattr(lag, field)) for lag in lags})
        )
