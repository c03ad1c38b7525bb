"""The events of one order on their way to one receiver: each is sent after the one before it."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import Enum, auto

from msgspec.structs import replace

from expediter.orders.notices import Known, after, notice, notice_id
from expediter.store.deliveries import DELIVERED, GIVEN_UP, WAITING, Delivery
from expediter.store.feed import FeedEvent
from expediter.store.webhooks import Tried

#: Lines of the orders that are remembered after their last event: the next one need not be replayed.
LINES_KNOWN_MAX = 5_000


class State(Enum):
    """Where a lane is: it can go on, it is under way, or it waits for its next try."""

    READY = auto()
    RUNNING = auto()
    RESTING = auto()


@dataclass(slots=True)
class Item:
    """One event to deliver. `event` None: it has to be read again; `stored`: a row says that it waits."""

    delivery: Delivery
    event: FeedEvent | None
    stored: bool = False
    #: What the row does not say yet.
    changed: bool = False

    @property
    def position(self) -> int:
        """Where it is in the feed."""
        return self.delivery.position

    @property
    def size(self) -> int:
        """Bytes that it holds, about."""
        return 0 if self.event is None else len(self.event.data)


@dataclass(slots=True)
class Lane:
    """The events of an order that are to be delivered, in their order. `known`: the order before the first."""

    order_id: str
    items: deque[Item] = field(default_factory=deque)
    known: Known | None = None
    state: State = State.READY
    #: Whether what is under way has failed, and it rests as soon as that has ended.
    failed: bool = False

    @property
    def waits(self) -> bool:
        """Whether its first event has failed: what comes behind it is stored, too."""
        return self.failed or self.state is State.RESTING

    @property
    def due_at(self) -> int:
        """When its first event may be tried (microseconds)."""
        return self.items[0].delivery.next_try_at or 0

    def put(self, item: Item) -> None:
        """Add an event in its place: after the position was set back, what waits may be behind it."""
        self.items.append(item)
        if len(self.items) > 1 and self.items[-2].position > item.position:
            first = [self.items.popleft()] if self.state is State.RUNNING else []
            self.items = deque(first + sorted(self.items, key=lambda each: each.position))

    def forget(self) -> None:
        """Keep nothing that can be read again: it may wait for days."""
        self.known = None
        for item in self.items:
            item.event = None


def fresh(endpoint_id: str, event: FeedEvent) -> Item:
    """Return the item of an event that was just read."""
    delivery = Delivery(
        endpoint_id=endpoint_id,
        position=event.position,
        notice_id=notice_id(event),
        order_id=event.order_id,
        number=event.number,
        at=event.at,
        type=event.type,
        status=WAITING,
    )
    return Item(delivery, event)


def tried(delivery: Delivery, outcome: Tried, now: int, *, again_at: int | None) -> Delivery:
    """Return a delivery after a try; `again_at` None: there is none after it (microseconds)."""
    failed = WAITING if again_at is not None else GIVEN_UP
    return replace(
        delivery,
        status=DELIVERED if outcome.error is None else failed,
        tries=delivery.tries + 1,
        first_tried_at=delivery.first_tried_at or now,
        last_tried_at=now,
        next_try_at=again_at,
        answer_status=outcome.answer_status,
        answer=outcome.answer,
        error=outcome.error,
        took_ms=outcome.took_ms,
    )


def told_of(lane: Lane, item: Item) -> tuple[bytes, Known | None] | None:
    """Return what is sent of an event, and the order after it; None: the order's history has to be read for it."""
    event, known = item.event, lane.known
    if event is None:
        return None
    if event.number != 1 and (known is None or known.order.version != event.number - 1):
        return None
    known = after(known, event)
    return notice(event, item.position, known), known


class KnownOrders:
    """Orders as they were after their last event, the latest ones."""

    def __init__(self) -> None:
        """None yet."""
        self._known: OrderedDict[str, Known] = OrderedDict()
        self._lines = 0

    def take(self, order_id: str) -> Known | None:
        """Return an order, and forget it; None: it is not known."""
        known = self._known.pop(order_id, None)
        if known is not None:
            self._lines -= 1 + len(known.lines)
        return known

    def put(self, known: Known) -> None:
        """Remember an order, which was taken before if it was known."""
        self._known[known.order.order_id] = known
        self._lines += 1 + len(known.lines)
        while self._lines > LINES_KNOWN_MAX:
            _, oldest = self._known.popitem(last=False)
            self._lines -= 1 + len(oldest.lines)
