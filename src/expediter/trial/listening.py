"""How the programs to try things on are served: on 127.0.0.1, until they are told to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp.web as web

from expediter.errors import AddressTaken

#: Seconds that what is under way has when a program is told to stop.
STOP_SECONDS = 0.5


@asynccontextmanager
async def listening(app: web.Application, port: int, what: str) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """Serve `app`; give its address, and what is set by SIGTERM and SIGINT. Raises AddressTaken."""
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=STOP_SECONDS)
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
