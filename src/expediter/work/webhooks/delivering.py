"""Delivering: each endpoint has one reader, in one of the processes that work."""

from __future__ import annotations

import asyncio
from functools import partial

import structlog

from expediter.backends.tasks import Background, end_tasks
from expediter.errors import Unavailable
from expediter.store.reading import LEASE_SECONDS, Taken
from expediter.work.webhooks.reader import Reader, Tools

#: Seconds between two looks for endpoints without a reader, where there are endpoints, and where there are none.
LOOK_SECONDS, LOOK_SECONDS_MAX = 1.0, 3.0

#: Seconds that what is under way may take when the process stops, and for saying how far that came.
GIVE_BACK_SECONDS_MAX = 2.0

log = structlog.get_logger(__name__)


class Delivering:
    """Reads for endpoints that nobody else reads for. Use it from one event loop."""

    def __init__(self, tools: Tools, *, holder: str) -> None:
        """`holder` names this process in leases."""
        self._tools = tools
        self._holder = holder
        self._wake = asyncio.Event()
        self._readers: dict[str, Reader] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._any = True
        self._away = False
        self.background = Background("webhooks", self._run)

    def start(self) -> None:
        """Begin to look for endpoints."""
        self.background.start()

    def stop_taking(self) -> None:
        """Take no more endpoints, and send nothing new."""
        self.background.stop_soon()
        self._wake.set()
        for reader in self._readers.values():
            reader.stop_soon(GIVE_BACK_SECONDS_MAX)

    async def stop(self, grace_seconds: float) -> None:
        """Let what is under way end within `grace_seconds`, and give the endpoints to others."""
        self.stop_taking()
        await self.background.stop(grace_seconds)
        for reader in self._readers.values():
            reader.stop_soon(min(grace_seconds, GIVE_BACK_SECONDS_MAX))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_seconds + GIVE_BACK_SECONDS_MAX)
        await end_tasks(self._tasks)  # their endpoints are taken over when the lease ends

    def look_now(self) -> None:
        """See at once which endpoints were made or changed."""
        self._wake.set()
        for reader in self._readers.values():
            reader.look_now()

    async def _run(self) -> None:
        while not self.background.stopping:
            self._wake.clear()
            for taken, held_until in await self._look():
                self._read_for(taken, held_until)
            try:
                async with asyncio.timeout(LOOK_SECONDS if self._any else LOOK_SECONDS_MAX):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _look(self) -> list[tuple[Taken, float]]:
        began = asyncio.get_running_loop().time()
        try:
            free, self._any = await self._tools.readings.any_free()
            taken: list[Taken] = []
            if free:
                taken = await self._tools.readings.take(self._holder)
        except Unavailable as error:
            if not self._away:
                log.warning("webhooks wait for the database", error=str(error))
            self._away = True
            return []
        self._away = False
        return [(each, began + LEASE_SECONDS - 1) for each in taken]

    def _read_for(self, taken: Taken, held_until: float) -> None:
        reader = Reader(taken, self._tools, held_until=held_until)
        endpoint_id = taken.endpoint.endpoint_id
        self._readers[endpoint_id] = reader
        task = asyncio.create_task(reader.run(), name=f"webhook {endpoint_id}")
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, endpoint_id, reader))

    def _ended(self, endpoint_id: str, reader: Reader, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._readers.get(endpoint_id) is reader:
            del self._readers[endpoint_id]
        if not task.cancelled() and (error := task.exception()):
            log.error("a webhook's reader ended with an error; it begins again", exc_info=error)
        else:
            self._wake.set()
