"""What waits to be stored: groups of requests, bounded by their number and by the bytes that they came in."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from expediter.errors import Overloaded
from expediter.store.submissions import Asked, Outcome

#: Requests in one transaction, at most, and the bytes of their bodies after which there are no more of them.
BATCH_REQUESTS_MAX = 256
BATCH_BYTES_MAX = 4 * 1024 * 1024
#: How often a batch is halved that the database cannot store: down to one request.
HALVINGS_MAX = 8
#: Requests that may wait for their transaction, and the bytes of their bodies; one more is refused (Overloaded).
QUEUE_REQUESTS_MAX = 10_000
QUEUE_BYTES_MAX = 64 * 1024 * 1024
#: Seconds after which a request is refused that still waits for its transaction, and was not accepted before.
ADMIT_SECONDS_MAX = 5.0
#: Seconds that a newcomer may have to wait behind a queue that does not get shorter.
STANDING_SECONDS_MAX = 0.25
#: Transactions whose worth of requests may always wait: less is no queue, however slow the database is.
STANDING_BATCHES = 2
#: Seconds for which many may come at once, and wait for as long as anybody may (ADMIT_SECONDS_MAX): ten thousand
#: clients with an order each are let in. What goes on coming too fast is not.
BURST_SECONDS_MAX = 10.0
#: Seconds without a refusal after which many may come at once again.
CALM_SECONDS = 5.0
_STANDING_REQUESTS = STANDING_BATCHES * BATCH_REQUESTS_MAX
_STANDING_BYTES = STANDING_BATCHES * BATCH_BYTES_MAX
#: How much of what is known of a batch's speed counts on beside the next one.
_MEMORY = 0.8


@dataclass(slots=True, eq=False)
class Group:
    """Requests that are stored in one transaction, and the future that has their outcomes."""

    asked: Sequence[Asked]
    done: asyncio.Future[list[Outcome]]
    #: When it is refused if it still waits, on the monotonic clock.
    until: float = math.inf
    #: Bytes of the bodies that its requests came in, as far as they are clients'.
    body_bytes: int = 0
    #: Whether it has a transaction to itself: others have failed with it.
    alone: bool = False
    #: When it began to wait, on the monotonic clock.
    since: float = 0.0

    def fail(self, error: Exception) -> None:
        """Tell whoever asked, unless they have been told."""
        if not self.done.done():
            self.done.set_exception(error)


class Gathering:
    """The groups that wait, first come, first served. Use it from one event loop."""

    def __init__(self) -> None:
        """Nothing waits."""
        self.groups: deque[Group] = deque()
        self._requests = 0
        self._bytes = 0
        self._room = asyncio.Event()
        #: The event loop that this is used from; to ask for it costs a system call each time.
        self._loop: asyncio.AbstractEventLoop | None = None
        #: How often a batch is halved now.
        self.halvings = 0
        #: What the last batches took, and had in them; older ones count less.
        self._seconds = self._stored = 0.0
        #: How many requests are in the batch under way, and since when it is; infinity: there is none.
        self._taken = 0
        self._taken_at = math.inf
        #: Since when a newcomer would have to wait for too long, and when that was not so for long enough.
        self._long_since = math.inf
        self._calm_at = -math.inf

    def fewer(self) -> None:
        """Make the next batches half as large: one was too much for the database, or holds what it cannot do."""
        self.halvings = min(self.halvings + 1, HALVINGS_MAX)

    def more(self) -> None:
        """Let the next batches be twice as large again, up to the limits."""
        self.halvings = max(self.halvings - 1, 0)

    @property
    def requests(self) -> int:
        """How many requests wait."""
        return self._requests

    @property
    def bytes(self) -> int:
        """How many bytes their bodies have."""
        return self._bytes

    def stored(self, now: float) -> None:
        """Say that the batch that was taken out last is stored, or has failed."""
        self._seconds = self._seconds * _MEMORY + now - self._taken_at
        self._stored = self._stored * _MEMORY + self._taken
        self._taken_at = math.inf

    def admit(self, now: float) -> None:
        """Raise Overloaded for a newcomer that would wait for too long, as fast as the last batches were.

        What fits into the next transactions is never too much.
        """
        if self._requests <= _STANDING_REQUESTS and self._bytes <= _STANDING_BYTES:
            self._long_since = math.inf
            return
        seconds = self._wait_seconds(now)
        if seconds <= STANDING_SECONDS_MAX:
            self._long_since = math.inf
            return
        self._long_since = min(self._long_since, now)
        burst = now >= self._calm_at and now - self._long_since < BURST_SECONDS_MAX
        if not burst or seconds > ADMIT_SECONDS_MAX:
            self._calm_at = now + CALM_SECONDS
            raise Overloaded(f"{self._requests} requests wait to be stored, for {seconds:.1f} s; try again")

    def _wait_seconds(self, now: float) -> float:
        """Return how long a newcomer will wait; a batch under way that is slower than the last counts, too."""
        if not self._stored:
            return 0.0
        each = self._seconds / self._stored
        slower = (self._seconds + now - self._taken_at) / (self._stored + self._taken)
        return self._requests * max(each, slower)

    def put(
        self, asked: Sequence[Asked], until: float, body_bytes: int, *, alone: bool = False, since: float = 0.0
    ) -> asyncio.Future[list[Outcome]]:
        """Add a group that waits `since` now, `until` then. Raises Overloaded when there is no room for it."""
        if self._requests + len(asked) > QUEUE_REQUESTS_MAX or self._bytes + body_bytes > QUEUE_BYTES_MAX:
            raise Overloaded(f"{self._requests} requests ({self._bytes} bytes) wait to be stored; try again")
        loop = self._loop = self._loop or asyncio.get_running_loop()
        done: asyncio.Future[list[Outcome]] = loop.create_future()
        self.groups.append(Group(asked, done, until, body_bytes, alone, since))
        self._requests += len(asked)
        self._bytes += body_bytes
        return done

    async def room(self, requests: int, body_bytes: int) -> None:
        """Wait until there is room for so much."""
        while self._requests + requests > QUEUE_REQUESTS_MAX or self._bytes + body_bytes > QUEUE_BYTES_MAX:
            self._room.clear()
            await self._room.wait()

    def take(self, now: float) -> tuple[list[Group], list[Group]]:
        """Take out the next batch, at least one group where any waits; and those that have waited too long."""
        batch: list[Group] = []
        late: list[Group] = []
        requests = size = 0
        requests_max, bytes_max = BATCH_REQUESTS_MAX >> self.halvings, BATCH_BYTES_MAX >> self.halvings
        while self.groups:
            group = self.groups[0]
            if group.until < now:
                late.append(group)
            elif batch and (
                requests + len(group.asked) > requests_max
                or size + group.body_bytes > bytes_max
                or group.alone
                or batch[0].alone
            ):
                break
            else:
                batch.append(group)
                requests += len(group.asked)
                size += group.body_bytes
            self.groups.popleft()
            self._requests -= len(group.asked)
            self._bytes -= group.body_bytes
        self._taken, self._taken_at = requests, now
        self._room.set()
        return batch, late
