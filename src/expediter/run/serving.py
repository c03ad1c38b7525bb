"""Serves HTTP, or works off jobs, until it is told to stop; then it drains."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path

from expediter.backends.databases import open_database
from expediter.backends.tasks import Background
from expediter.errors import ConfigurationError
from expediter.run.hearing import Hearing
from expediter.run.measuring import Measuring
from expediter.run.neighbours import answering
from expediter.run.processes import Lifeline
from expediter.run.service import Service, open_service
from expediter.settings import Settings
from expediter.settings.fields import is_loopback
from expediter.store.keys import KeyRing, Keys, any_key
from expediter.store.migrations import is_begun, upgrade
from expediter.upkeep.verify import Verifying
from expediter.web import create_app
from expediter.web.api.metrics import metrics_app
from expediter.web.context import Context
from expediter.web.server.access_log import access_log
from expediter.web.server.addresses import Proxies
from expediter.web.server.listener import Server, address_of, inherit, listen, raise_file_limit
from expediter.web.server.state import State

#: Connections to the metrics of a working process that are served at once.
METRICS_CONNECTIONS_MAX = 32


async def may_listen_wide(settings: Settings, *, insecure: bool) -> bool:
    """Return whether others than this machine may be let in: `insecure` says so, or there is an API key.

    To know that, it brings the database, if there is one, to the newest step. Raises ConfigurationError and
    Unavailable.
    """
    if insecure or settings.loopback or not is_begun(settings.database):
        return insecure
    await asyncio.to_thread(upgrade, settings.database)
    database = open_database(settings.database)
    try:
        return await database.read(any_key)
    finally:
        await database.close()


def bind(settings: Settings, *, wide: bool) -> socket.socket:
    """Return the socket to serve on.

    Raises ConfigurationError for an address that others could reach, unless `wide`, and for a port in use.
    """
    if not settings.loopback and not wide:
        raise ConfigurationError(
            f"HOST={settings.host} can be reached from other machines and this service asks nobody for a key: "
            "make one with `expediter keys create`, bind to 127.0.0.1, or give --insecure if the network itself "
            "keeps strangers out"
        )
    return listen(settings.host, settings.port)


def context_of(service: Service, *, working: bool) -> Context:
    """Return what the web works with; `working`: workers run in this process."""
    return Context(
        settings=service.settings,
        committer=service.committer,
        queries=service.queries,
        cache=service.cache,
        durability=service.database.durability,
        database=service.database.describe(),
        working=working,
        ended=service.ended,
        verify=Verifying(service.database).result,
        hear=Hearing(service.settings, service.gateway),
        broker=service.broker,
        intake=service.intake,
        temporary=service.temporary,
        webhooks=service.webhooks,
        keys=Keys(service.database),
        ring=service.ring,
        send=service.sender.send,
        tally=service.tally,
    )


async def serve(
    settings: Settings,
    *,
    working: bool,
    insecure: bool,
    announce: Callable[[Service, str], None],
    listen_fd: int | None = None,
    lifeline: Lifeline | None = None,
    place: Path | None = None,
) -> None:
    """Serve HTTP until SIGTERM or SIGINT, then drain. `announce` is told the address once it can be reached.

    A supervisor's process takes the socket over from it, as `listen_fd`, and drains when its `lifeline` ends, too.
    At `place` it answers the processes beside it.
    Raises ConfigurationError as `bind` and `raise_file_limit` do.
    """
    connections_max = raise_file_limit()
    if listen_fd is None:
        listener = bind(settings, wide=await may_listen_wide(settings, insecure=insecure))
    else:
        listener = inherit(listen_fd)
    async with (
        access_log(settings.access_log_file, settings.access_log_format) as note,
        open_service(settings, working=working) as service,
        _following(service.ring),
    ):
        if not insecure and not is_loopback(listener.getsockname()[0]):
            service.ring.always_ask()
        context = context_of(service, working=working)
        state = State(
            create_app(context),
            connections_max=connections_max,
            drain_seconds=settings.drain_seconds,
            note=note,
            requests=context.requests,
            per_address_max=settings.connections_per_address,
            proxies=Proxies(settings.proxies),
        )
        server = Server(state)
        measuring = Measuring(service, place.name if place else "api-1", place)
        measuring.serve(context, state)
        stopping = _on_signals(server, context, service, lifeline)
        try:
            async with answering(place, measuring.own, lifeline):
                announce(service, address_of(listener))
                await server.serve(listener)
        finally:
            stopping()
            listener.close()


@asynccontextmanager
async def _following(ring: KeyRing) -> AsyncIterator[None]:
    await ring.start()
    try:
        yield
    finally:
        await ring.stop()


def _on_signals(
    server: Server, context: Context, service: Service, lifeline: Lifeline | None
) -> Callable[[], None]:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        context.draining = True
        service.begin_drain()
        server.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    if lifeline is not None:
        lifeline.on_end(stop)

    def forget() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    return forget


async def work(
    settings: Settings,
    *,
    announce: Callable[[Service, str | None], None],
    lifeline: Lifeline | None = None,
    place: Path | None = None,
) -> None:
    """Work off jobs without taking orders, until SIGTERM or SIGINT or the end of the `lifeline`, then drain.

    A process of its own tells its metrics at METRICS_PORT, whose address `announce` is given; one of a supervisor
    answers at `place` the processes beside it. Raises ConfigurationError for a port that cannot be used.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if lifeline is not None:
        lifeline.on_end(stop.set)
    port = settings.metrics_port if place is None else None
    with listen(settings.metrics_host, port) if port is not None else nullcontext() as listener:
        async with open_service(settings, working=True) as service:
            measuring = Measuring(service, place.name if place else "worker-1", place)
            app = metrics_app(measuring.together)
            server = Server(State(app, connections_max=METRICS_CONNECTIONS_MAX, drain_seconds=0))
            serving = Background("metrics", partial(server.serve, listener)) if listener is not None else None
            if serving is not None:
                serving.start()
            async with answering(place, measuring.own, lifeline):
                announce(service, None if listener is None else address_of(listener))
                await stop.wait()
            server.stop()
            if serving is not None:
                await serving.stop()
