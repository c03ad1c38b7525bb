"""How the programs to try things on are served: on 127.0.0.1, until they are told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp.web as web
from aiohttp.http_exceptions import HttpProcessingError

from expediter.errors import AddressTaken

#: Seconds that what is under way has when a program is told to stop.
STOP_SECONDS = 0.5


_THEIRS = (HttpProcessingError, web.RequestPayloadError)


class _OwnFaults(logging.Filter):
    """Leaves out what was wrong with a request: whoever sent it is told, and a traceback says nothing more."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is about a fault of ours."""
        return not (record.exc_info and isinstance(record.exc_info[1], _THEIRS))


@web.middleware
async def _whole(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except (web.RequestPayloadError, ConnectionResetError):
        return web.Response(status=400, text="The body did not arrive as its headers say\n")


@asynccontextmanager
async def listening(
    app: web.Application, port: int, what: str, *, gives_up: bool = False
) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """Serve `app`; give its address, and what is set by SIGTERM and SIGINT. Raises AddressTaken.

    With `gives_up` an answer that nobody waits for any more is not made.
    """
    app.middlewares.insert(0, _whole)
    logger = logging.getLogger(__name__)
    logger.addFilter(_OwnFaults())
    runner = web.AppRunner(
        app,
        access_log=None,
        logger=logger,
        handle_signals=False,
        shutdown_timeout=STOP_SECONDS,
        handler_cancellation=gives_up,
    )
    await runner.setup()
    stop = asyncio.Event()
    try:
        site = web.TCPSite(runner, "127.0.0.1", port)
        try:
            await site.start()
        except OSError as error:
            raise AddressTaken(f"The {what} cannot listen on port {port}: {error.strerror}") from error
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", stop
    finally:
        await runner.cleanup()
