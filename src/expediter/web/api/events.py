"""The feed of events: pages to read on from, and the same as a stream of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from expediter.backends.tasks import end_tasks
from expediter.errors import ExpediterError, Fault, InvalidInput, Overloaded
from expediter.orders.documents import EventData, event_document
from expediter.orders.events import EVENT_TYPES, types_named
from expediter.store.feed import Cursor, CursorGone, FeedEvent
from expediter.store.scopes import Scope
from expediter.web.context import Context
from expediter.web.http import Call, Header, Reply, Streamed, Writer, json_reply, to_json, whole_number
from expediter.web.operations import Operation, query

#: Events on a page: at most, and where nobody says.
EVENTS_MAX, EVENTS_DEFAULT = 1_000, 100
#: Seconds that a reader may wait for the next event.
WAIT_SECONDS_MAX = 30.0
#: Seconds of silence after which a stream says that it is still there.
PULSE_SECONDS = 15.0
#: Events that a stream reads at once: so much of one reader's is in memory.
EVENTS_PER_TURN = 100
#: Streams that one process has open at once.
STREAMS_MAX = 1_000
#: Milliseconds after which a client whose stream has ended connects again.
RETRY_MILLISECONDS = 1_000
#: The cursor behind everything that is there.
NOW = "now"

_STREAM: list[Header] = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would keep events back
]


class FeedEventDocument(msgspec.Struct, frozen=True, gc=False):
    """One event of the feed; `position` orders the events of all orders as they were committed."""

    position: int
    order_id: str
    number: int
    at: str
    type: str
    data: EventData


class EventPage(msgspec.Struct, frozen=True):
    """A page of the feed; read on with `after=next_cursor`. `has_more`: others are there already."""

    events: list[FeedEventDocument]
    next_cursor: str
    has_more: bool


async def list_events(call: Call, context: Context) -> Reply:
    """Return every change of every order behind a cursor, in the order of commits; also as a stream.

    `Accept: text/event-stream` asks for that: server-sent events, each with the cursor behind it as its id. A
    client that comes back with `Last-Event-ID` goes on behind that one.
    """
    given = call.query("after", "types", "limit", "wait")
    faults: list[Fault] = []
    streaming = "text/event-stream" in (call.header(b"accept") or "")
    asked = given.get("after")
    if streaming and (last := call.header(b"last-event-id")):
        asked = last
    after = None if asked is None or asked == NOW else Cursor.read(asked)
    if asked is not None and asked != NOW and after is None:
        faults.append(Fault("after", f"must be a next_cursor, or {NOW}"))
    types = _types(given.get("types"), faults)
    limit = whole_number(given, "limit", 1, EVENTS_MAX, EVENTS_DEFAULT, faults)
    wait = whole_number(given, "wait", 0, int(WAIT_SECONDS_MAX), 0, faults)
    if faults:
        raise InvalidInput(faults)
    if asked == NOW:
        after = await context.queries.feed.end()
    if streaming:
        return await _stream(call, context, after, types)
    if wait:
        call.may_take(2 * WAIT_SECONDS_MAX)
    deadline = asyncio.get_running_loop().time() + wait
    while True:
        page = await context.queries.feed.read(after, types, limit)
        left = deadline - asyncio.get_running_loop().time()
        if page.events or left <= 0 or context.draining or call.left:
            break  # also where a filter has found nothing in a part: the caller goes on from the cursor
        if not page.more:
            await context.queries.feed.wait(page.cursor, left, call.leaving())
        after = page.cursor
    return json_reply(200, EventPage([_document(event) for event in page.events], str(page.cursor), page.more))


def _types(text: str | None, faults: list[Fault]) -> Sequence[str] | None:
    """Return the event types that `order.*,payment.failed` names; None: all."""
    if text is None or text == "*":
        return None
    found: dict[str, None] = {}
    for word in text.split(","):
        name = word.strip()
        if not (named := types_named(name)):
            faults.append(Fault("types", f"{name!r} is no type of event; there are: {', '.join(EVENT_TYPES)}"))
        found |= dict.fromkeys(named)
    return list(found)


def _document(event: FeedEvent) -> FeedEventDocument:
    shown = event_document(event.number, event.at, event.type, event.data)
    return FeedEventDocument(event.position, event.order_id, shown.number, shown.at, shown.type, shown.data)


async def _stream(call: Call, context: Context, after: Cursor | None, types: Sequence[str] | None) -> Reply:
    if context.streams >= STREAMS_MAX:
        raise Overloaded(f"{STREAMS_MAX} readers are connected to this process already; try again")
    first = await context.queries.feed.read(
        after, types, 1
    )  # what cannot be read is refused before the stream begins
    if call.method == "HEAD":
        return Reply(200, b"", list(_STREAM))
    begin = after if after is not None else Cursor(first.cursor.incarnation, 0)
    return _Stream(call, context, begin, types)


class _Stream(Streamed):
    """Events as they come, for as long as the client reads and the process runs."""

    __slots__ = ("_after", "_context", "_key_id", "_types")

    def __init__(self, call: Call, context: Context, after: Cursor, types: Sequence[str] | None) -> None:
        super().__init__(200, b"", list(_STREAM))
        self._context = context
        self._key_id = call.key_id
        self._after = after
        self._types = types

    async def stream(self, writer: Writer) -> None:
        """Write events until the client goes or may not read them any more, the process stops, or what comes next
        cannot be read.

        Where the client is slow this waits, and reads no further: a client that does not read at all is cut off
        like any other. It begins again behind the last event that it has got.
        """
        await writer.write(f": expediter\nretry: {RETRY_MILLISECONDS}\n\n".encode())
        over = [
            asyncio.create_task(writer.until_gone()),
            asyncio.create_task(self._context.ring.until_refused(self._key_id, Scope.EVENTS_READ)),
        ]
        self._context.streams += 1
        try:
            while not (self._context.draining or any(each.done() for each in over)):
                await self._turn(writer, over)
        except (CursorGone, ExpediterError):
            pass  # the client connects again, and hears why
        finally:
            self._context.streams -= 1
            await end_tasks(over)

    async def _turn(self, writer: Writer, over: Sequence[asyncio.Task[None]]) -> None:
        page = await self._context.queries.feed.read(self._after, self._types, EVENTS_PER_TURN)
        if page.events:
            await writer.write(b"".join([_event(page.cursor.incarnation, event) for event in page.events]))
        self._after = page.cursor
        if page.more:
            return
        waiting = asyncio.create_task(self._context.queries.feed.wait(page.cursor, PULSE_SECONDS))
        await asyncio.wait([waiting, *over], return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
        elif not page.events:
            await writer.write(b":\n\n")


def _event(incarnation: int, event: FeedEvent) -> bytes:
    cursor = str(Cursor(incarnation, event.position)).encode()
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (cursor, event.type.encode(), to_json(_document(event)))


OPERATIONS = (
    Operation(
        paths=("/api/v1/events",),
        handler=list_events,
        scope=Scope.EVENTS_READ,
        summary="Follow every change of every order",
        tag="events",
        answers={200: EventPage},
        stream="text/event-stream",
        problems=(410,),
        parameters=(
            query(
                "after",
                "`next_cursor` of the page before, or `now`: what is to come. Without it from the first event on.",
                type="string",
                pattern="^[A-Za-z0-9_-]+$",
            ),
            query(
                "types",
                "Only events of these types, parted by commas: `order.completed,payment.*`.",
                type="string",
                pattern="^[a-z.*, _]+$",
            ),
            query("limit", "Events on the page.", type="integer", minimum=1, maximum=EVENTS_MAX),
            query(
                "wait",
                "Hold the answer for so many seconds until there is an event.",
                type="integer",
                minimum=0,
                maximum=int(WAIT_SECONDS_MAX),
            ),
        ),
        fault=("types", "'order.done' is no type of event"),
    ),
)
