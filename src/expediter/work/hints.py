"""Hints: tell workers of other processes that jobs are due. Losing one costs latency and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from expediter.backends.batching import Gatherer
from expediter.backends.brokers import Broker, Topic
from expediter.backends.tasks import Background
from expediter.errors import BrokerUnavailable
from expediter.store.submissions import Applied

#: Orders in one hint, at most.
ORDERS_PER_HINT = 500
#: Orders that may wait for their hint; beyond that the workers look by themselves.
WAITING_MAX = 10_000
#: Hints taken at once, and the seconds that one look for them waits.
HINTS_PER_LOOK = 50
WAIT_SECONDS = 2.0
#: Pause after the broker was not there, in seconds.
PAUSE_SECONDS = 1.0


class Hints:
    """Gives hints, and takes them. Use it from one event loop."""

    def __init__(self, broker: Broker) -> None:
        """By way of `broker`."""
        self._broker = broker
        self.background = Background("hints", self._listen)
        self._wake: Callable[[], None] = lambda: None
        self._sending: Gatherer[str, None] = Gatherer(self._send, items_max=ORDERS_PER_HINT)

    def notice(self, changes: Sequence[Applied]) -> None:
        """Give a hint of the jobs that these changes have made due."""
        for change in changes:
            job = change.job
            if job is not None and job.holder is None and job.due_at <= change.order.updated_at:
                if self._sending.waiting >= WAITING_MAX:
                    return
                self._sending.ask(change.order.order_id)

    async def _send(self, order_ids: Sequence[str]) -> list[None]:
        await self._broker.publish(Topic.HINTS, msgspec.json.encode(order_ids))
        return [None] * len(order_ids)

    def listen(self, wake: Callable[[], None]) -> None:
        """Begin to take hints: `wake` is called after each."""
        self._wake = wake
        self.background.start()

    async def _listen(self) -> None:
        while not self.background.stopping:
            try:
                hints = await self._broker.receive(Topic.HINTS, limit=HINTS_PER_LOOK, wait_seconds=WAIT_SECONDS)
                if hints:
                    self._wake()
                    await self._broker.acknowledge(Topic.HINTS, hints)
            except BrokerUnavailable:
                await self.background.rest(PAUSE_SECONDS)

    async def stop(self) -> None:
        """Take no more, and give those that are due."""
        await self.background.stop(grace_seconds=0)
        await self._sending.finish()
