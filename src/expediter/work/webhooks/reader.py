"""The reader of one endpoint: follows the feed, sends what its receiver wants, and remembers how far it has come.

Nothing is written for a single event while all goes well: the position moves on once in a while, with what was
delivered. What fails is stored with the time of its next try, and with it whatever comes behind it in the same
order. So the position moves on beside it, and other orders are not held up.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import structlog
from msgspec.structs import replace

from expediter.backends.batching import Gatherer
from expediter.backends.tasks import end_tasks
from expediter.errors import Unavailable
from expediter.orders.events import EVENT_TYPES, types_named
from expediter.orders.notices import Known
from expediter.orders.order import MICROSECONDS
from expediter.store.deliveries import DELIVERED_KEPT, Delivery, History, told_from
from expediter.store.feed import Cursor, Feed, FeedEvent
from expediter.store.reading import LEASE_SECONDS, Progress, Readings, Taken
from expediter.store.webhooks import ACTIVE, PAUSED, Tried
from expediter.work.webhooks.backoff import REQUESTS_MAX, Receiver, again_in, is_over
from expediter.work.webhooks.lanes import Item, KnownOrders, Lane, State, fresh, told_of, tried
from expediter.work.webhooks.sending import Sender

#: Events that wait for their next try, or behind one that does: beyond that nothing more is read.
WAITING_MAX = 1_000
#: Events that were read and are neither delivered nor stored as waiting, and the bytes of their data.
UNDER_WAY_MAX = 1_000
UNDER_WAY_BYTES_MAX = 8 * 1024 * 1024
#: Events that one read brings.
EVENTS_PER_READ = 200
#: Seconds between two writes of what was done, where there is something, and where there is not.
STORE_SECONDS, RENEW_SECONDS = 0.5, 1.5
#: The least pause between two reads that find nothing, and after one that failed, in seconds.
READ_SECONDS_MIN, READ_AGAIN_SECONDS = 0.05, 0.5
#: How long what is under way may take once the endpoint has been changed, in seconds; then it is sent again.
CHANGED_SECONDS_MAX = 2.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Tools:
    """What every reader of a process works with; `random` gives a chance from 0 to 1."""

    readings: Readings
    feed: Feed
    sender: Sender
    histories: Gatherer[str, History | None]
    random: Callable[[], float]


class Reader:
    """Sends for one endpoint for as long as it holds the lease. Use it from one event loop."""

    def __init__(self, taken: Taken, tools: Tools, *, held_until: float) -> None:
        """`held_until` is the end of the lease by the event loop's clock."""
        self._tools = tools
        self._loop = asyncio.get_running_loop()
        self._endpoint = taken.endpoint
        named = {name for word in taken.endpoint.types for name in types_named(word)}
        self._types = None if len(named) == len(EVENT_TYPES) else sorted(named)
        self._held_until = held_until
        self._clock = taken.now - time.monotonic_ns() // 1_000
        #: The position as it is stored, and up to where everything was read.
        self._position = self._reached = taken.endpoint.position
        self._caught_up = False
        self._read_from = 0.0
        self._stored_at = self._loop.time()
        self._soon = self._blocked = False
        self._wake = asyncio.Event()
        self._closing = self._lost = False
        self._grace = CHANGED_SECONDS_MAX
        self._tasks: set[asyncio.Task[None]] = set()

        self._receiver = Receiver(taken.endpoint)
        self._lanes: dict[str, Lane] = {}
        self._ready: deque[Lane] = deque()
        self._resting: list[tuple[int, int, str]] = []
        self._known = KnownOrders()
        #: What was read and no row speaks of yet, by position; the first one holds the stored position back.
        self._unstored: dict[int, Item] = {}
        self._bytes = 0
        #: What waits for its next try, or behind one: it may be read again after the position was set back.
        self._waiting: dict[int, Item] = {}

        #: What the next write says: what must be there, the newest of what was delivered, what has failed.
        self._done: list[Delivery] = []
        self._delivered: deque[Delivery] = deque(maxlen=DELIVERED_KEPT)
        self._vanished: list[int] = []
        self._changed: dict[str, Lane] = {}
        self._untrimmed = DELIVERED_KEPT

        for delivery in taken.waiting:
            self._append(Item(delivery, None, stored=True))
        for lane in self._lanes.values():
            self._rest_lane(lane)

    def stop_soon(self, grace_seconds: float) -> None:
        """Begin nothing more; what is under way may take so long."""
        self._grace = grace_seconds
        self._close()

    def look_now(self) -> None:
        """See at once whether the endpoint was changed."""
        self._stored_at = 0.0
        self._wake.set()

    async def run(self) -> None:
        """Send until the lease is lost, the endpoint is changed, or it is told to stop; give the lease back."""
        try:
            while not self._closing:
                await self._turn()
        finally:
            await self._end()

    async def _turn(self) -> None:
        if self._loop.time() >= self._store_due():
            await self._store()
        if self._closing:
            return
        self._start()
        if self._has_room() and self._loop.time() >= self._read_from and await self._read():
            return  # there is more
        await self._rest()

    def _now(self) -> int:
        """Return the database's time in microseconds."""
        return time.monotonic_ns() // 1_000 + self._clock

    def _close(self) -> None:
        self._closing = True
        self._wake.set()

    # What is read.

    def _has_room(self) -> bool:
        return (
            len(self._unstored) < UNDER_WAY_MAX
            and self._bytes < UNDER_WAY_BYTES_MAX
            and len(self._waiting) < WAITING_MAX
        )

    async def _read(self) -> bool:
        """Read on; return whether there is more."""
        try:
            part = await self._tools.readings.part(self._reached, self._types, EVENTS_PER_READ)
        except Unavailable:
            self._read_from = self._loop.time() + READ_AGAIN_SECONDS
            return False
        if part.gone:
            self._close()  # a backup came back: what is stored now says where to begin
            return False
        if self._reached < part.archived:
            self._receiver.last_error = (
                f"Some events up to position {part.archived} were moved to the archive before they were sent"
            )
        for event in part.events:
            if event.position not in self._waiting:
                self._take(event)
        self._reached = part.reached
        self._tools.feed.note(part.reached)
        self._caught_up = not part.more
        if not part.events:
            self._read_from = self._loop.time() + READ_SECONDS_MIN
        self._start()
        return not self._caught_up

    def _take(self, event: FeedEvent) -> None:
        item = fresh(self._endpoint.endpoint_id, event)
        self._unstored[event.position] = item
        lane = self._append(item)
        if lane.waits:
            item.event = None
            self._changed[lane.order_id] = lane
        self._bytes += item.size

    def _append(self, item: Item) -> Lane:
        lane = self._lanes.get(item.delivery.order_id)
        if lane is None:
            lane = self._lanes[item.delivery.order_id] = Lane(item.delivery.order_id)
            if item.event is not None:
                lane.known = self._known.take(lane.order_id)
                self._ready.append(lane)
        lane.put(item)
        if item.stored or lane.waits:
            self._waiting[item.position] = item
        if lane.state is State.RESTING and lane.items[0] is item:
            self._rest_lane(lane)
        return lane

    # What is sent.

    def _start(self) -> None:
        """Go on with as many lanes as may be under way at once."""
        if self._closing or self._loop.time() >= self._held_until:
            return
        now = self._now()
        if now < self._receiver.left_alone_until:
            return
        while len(self._tasks) < self._receiver.requests_max and (lane := self._next_lane(now)) is not None:
            lane.state = State.RUNNING
            task = asyncio.create_task(self._go_on(lane))
            self._tasks.add(task)
            task.add_done_callback(partial(self._ended, lane))

    def _next_lane(self, now: int) -> Lane | None:
        while self._resting:
            due_at, position, order_id = self._resting[0]
            lane = self._lanes.get(order_id)
            resting = lane is not None and lane.state is State.RESTING
            if lane is not None and resting and (lane.due_at, lane.items[0].position) == (due_at, position):
                if due_at > now:
                    break
                heapq.heappop(self._resting)
                return lane
            heapq.heappop(self._resting)
        return self._ready.popleft() if self._ready else None

    def _rest_lane(self, lane: Lane) -> None:
        lane.state = State.RESTING
        heapq.heappush(self._resting, (lane.due_at, lane.items[0].position, lane.order_id))

    async def _go_on(self, lane: Lane) -> None:
        """Send the events of an order, one after the other, until one fails."""
        while lane.items and not lane.failed and not self._closing:
            item = lane.items[0]
            try:
                made = await self._notice(lane, item)
            except Unavailable:
                await asyncio.sleep(READ_AGAIN_SECONDS)
                continue
            except ValueError as error:
                self._fail(lane, Tried(f"cannot be read by this version: {error}", None, None, 0))
                continue
            if made is None:
                self._drop(lane)
                continue
            body, known = made
            if self._loop.time() >= self._held_until:
                return
            outcome = await self._tools.sender.send(self._endpoint, item.delivery.notice_id, body, self._now())
            if outcome.error is None:
                self._succeed(lane, outcome, known)
            else:
                self._receiver.failed(outcome, self._now(), self._tools.random())
                if self._receiver.gone:
                    self._close()
                else:
                    self._fail(lane, outcome)

    def _ended(self, lane: Lane, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not lane.items:
            del self._lanes[lane.order_id]
            if lane.known is not None:
                self._known.put(lane.known)
        elif lane.failed:
            lane.failed = False
            self._rest_lane(lane)
        else:
            lane.state = State.READY
            self._ready.appendleft(lane)
        if not task.cancelled() and (error := task.exception()):
            log.error("a webhook failed with an error of the reader's own", often=True, exc_info=error)
            self._close()
        self._start()
        reads_on = self._blocked and len(self._unstored) <= UNDER_WAY_MAX - EVENTS_PER_READ and self._has_room()
        if not self._soon or not self._tasks or reads_on:
            # Its loop may rest for longer than what was done should wait to be stored.
            self._soon = True
            self._wake.set()

    async def _notice(self, lane: Lane, item: Item) -> tuple[bytes, Known | None] | None:
        """Return what is sent, and the order after it; None: the event is not there any more."""
        told = told_of(lane, item)
        if told is None and (history := await self._tools.histories.ask(lane.order_id)) is not None:
            told = told_from(history, item.delivery)
        return told

    def _succeed(self, lane: Lane, outcome: Tried, known: Known | None) -> None:
        now = self._now()
        item = self._take_off(lane)
        lane.known = known
        delivery = tried(item.delivery, outcome, now, again_at=None)
        if item.stored:
            self._done.append(delivery)
        else:
            self._delivered.append(delivery)
        self._untrimmed += 1
        if self._receiver.succeeded(now):
            self._try_all(now)

    def _fail(self, lane: Lane, outcome: Tried) -> None:
        now = self._now()
        item = lane.items[0]
        if is_over(item.delivery.first_tried_at or now, now):
            self._take_off(lane)
            lane.known = None
            self._done.append(tried(item.delivery, outcome, now, again_at=None))
            return
        again_at = now + again_in(item.delivery.tries + 1, self._tools.random())
        item.delivery = tried(item.delivery, outcome, now, again_at=max(again_at, self._receiver.wait_until or 0))
        item.changed = True
        for each in lane.items:
            self._bytes -= each.size
            self._waiting[each.position] = each
        lane.forget()
        lane.failed = True
        self._changed[lane.order_id] = lane

    def _drop(self, lane: Lane) -> None:
        """The order was cleared away: there is nothing to tell of it any more."""
        item = self._take_off(lane)
        lane.known = None
        if item.stored:
            self._vanished.append(item.position)

    def _take_off(self, lane: Lane) -> Item:
        item = lane.items.popleft()
        self._bytes -= item.size
        self._unstored.pop(item.position, None)
        self._waiting.pop(item.position, None)
        return item

    def _try_all(self, now: int) -> None:
        """It is well again: whatever waits is tried now."""
        for lane in self._lanes.values():
            if lane.state is State.RESTING:
                lane.items[0].delivery = replace(lane.items[0].delivery, next_try_at=now)
                self._rest_lane(lane)

    # What is stored.

    def _store_due(self) -> float:
        soon = self._soon or self._done or self._changed or self._delivered
        return self._stored_at + (STORE_SECONDS if soon else RENEW_SECONDS)

    async def _store(self, *, release: bool = False) -> None:
        """Store what was done, and prolong the lease."""
        self._stored_at = began = self._loop.time()
        self._soon = False
        done, delivered, vanished, changed = self._done, self._delivered, self._vanished, self._changed
        self._done, self._delivered, self._vanished = [], deque(maxlen=DELIVERED_KEPT), []
        self._changed = {}
        waiting = [
            item
            for lane in changed.values()
            if self._lanes.get(lane.order_id) is lane
            for item in lane.items
            if item.changed or not item.stored
        ]
        for item in waiting:
            # From now on there may be a row: what becomes of it meanwhile has to take its place.
            item.stored, item.changed = True, False
        storing = {item.position for item in waiting}
        first = next((position for position in self._unstored if position not in storing), None)
        progress = Progress(
            endpoint=self._endpoint,
            was=self._position,
            reached=self._reached if first is None else first - 1,
            last_success_at=self._receiver.last_success_at,
            last_error=self._receiver.last_error,
            failing_since=self._receiver.failing_since,
            wait_until=self._receiver.wait_until,
            deliveries=[*done, *delivered, *(item.delivery for item in waiting)],
            gone=vanished,
            status=PAUSED if self._receiver.gone else ACTIVE,
            release=release,
            trim=self._untrimmed >= DELIVERED_KEPT,
        )
        try:
            stored = await self._tools.readings.store(progress)
        except Unavailable:
            self._done = done + self._done
            self._delivered.extendleft(reversed(delivered))
            self._vanished += vanished
            self._changed = changed | self._changed
            for item in waiting:
                item.changed = True
            return
        if stored is None:
            self._lost = True
            self._close()
            return
        endpoint, now = stored
        self._held_until = began + LEASE_SECONDS - 1
        self._clock = now - time.monotonic_ns() // 1_000
        if endpoint.revision != self._endpoint.revision:
            self._close()  # whoever takes it next begins with what was changed
        if endpoint.position == progress.reached or endpoint.revision == self._endpoint.revision:
            self._position = endpoint.position  # else it was set back, and stays there
        self._untrimmed = 0 if progress.trim else self._untrimmed
        for position in storing:
            self._unstored.pop(position, None)

    async def _rest(self) -> None:
        """Wait until there is something to do."""
        now = self._loop.time()
        until = min(self._store_due(), now + RENEW_SECONDS)
        if len(self._tasks) < REQUESTS_MAX:
            held_back = self._receiver.left_alone_until
            due_at = self._resting[0][0] if self._resting else (held_back if self._ready else None)
            if due_at is not None:
                until = min(until, max(now + 0.001, now + (max(due_at, held_back) - self._now()) / MICROSECONDS))
        self._wake.clear()
        waits: list[asyncio.Task[object]] = [asyncio.create_task(self._wake.wait())]
        self._blocked = not self._has_room()
        if not self._blocked:
            reading = self._until_more if self._caught_up else self._until_read
            waits.append(asyncio.create_task(reading()))
        try:
            await asyncio.wait(waits, timeout=max(0.0, until - now), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end_tasks(waits)

    async def _until_read(self) -> None:
        await asyncio.sleep(max(0.0, self._read_from - self._loop.time()))

    async def _until_more(self) -> None:
        """Return when there is something behind what was read."""
        await self._until_read()
        await self._tools.feed.wait(Cursor(0, self._reached), RENEW_SECONDS)

    async def _end(self) -> None:
        self._closing = True
        if self._tasks and not self._lost:
            await asyncio.wait(self._tasks, timeout=self._grace)
        await end_tasks(self._tasks)
        if not self._lost:
            await self._store(release=True)
