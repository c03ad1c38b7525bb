"""What was accepted and is not in the database yet, in Redis, for every process to read.

    temp_order:{order_id}     {"state":"pending","version":1,"order":{...},...}; what its readers are shown
    idempotency:{key}         the answer to a queued request with an Idempotency-Key
    idempotency:{key}:busy    such a request is under way
    temp_orders:since         the run of Redis, and since when it has forgotten nothing (milliseconds)

An order is put here before its client is answered, and stays until TEMP_ORDER_CACHE_TTL after it was stored.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal, NamedTuple

import msgspec
import structlog

from expediter.backends.batching import Gatherer
from expediter.backends.redis_client import (
    RedisUnavailable,
    Run,
    connect,
    deadline,
    forget_idle,
    place_of,
    unlink_all,
)
from expediter.orders.order import Job, Line, Order

#: Seconds that one call may take.
CALL_SECONDS_MAX = 0.5
#: Connections to Redis.
CONNECTIONS = 8
#: Seconds for which an order is kept that nobody has stored yet.
PENDING_SECONDS = 7 * 86_400
#: Seconds for which one can see why a command was refused whose order does not exist.
REFUSED_SECONDS = 86_400
#: Seconds after which a Redis that had lost its memory is believed again when it knows nothing of an order.
LOSS_SECONDS = 60.0
#: Orders in one call, at most.
ORDERS_PER_CALL = 200
#: Milliseconds for which a request with an Idempotency-Key keeps others with the same key waiting.
BUSY_MS = 15_000

SINCE = "temp_orders:since"


class Prediction(msgspec.Struct, frozen=True, gc=False):
    """The order as it will be once everything accepted is stored, for the next command to be judged by."""

    order: Order
    job: Job | None
    lines: tuple[Line, ...]


class Temporary(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is kept at `temp_order:{order_id}`.

    `version` is the one that the order will have; `order` is its document (null: it will be deleted, or nothing
    is known of it while the database is away). `token` names the latest command, `key` is what the database will
    know it by (None: its order's id). A `refused` one has `error`.
    """

    state: Literal["pending", "stored", "refused"]
    token: str
    version: int
    key: str | None = None
    order: msgspec.Raw = msgspec.Raw(b"null")
    prediction: Prediction | None = None
    deleted: bool = False
    error: str | None = None

    @property
    def document(self) -> bytes | None:
        """What readers are shown; None: nothing."""
        shown = bytes(self.order)
        return None if shown == b"null" else shown


class Found(NamedTuple):
    """What is known of an order; not `certain`: Redis may have forgotten lately, to find nothing says little.

    `lost`: it has forgotten lately, and this process knows that it knew more before.
    """

    temporary: Temporary | None
    certain: bool
    lost: bool = False


class Settled(NamedTuple):
    """What became of a command: it is stored, or was refused with `error` and there is no order to show it at.

    `wrong_key`: the answer that is kept here under this key is not the one that the database has.
    """

    order_id: str
    token: str
    error: str | None = None
    wrong_key: str | None = None


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept under an Idempotency-Key: the order's id from the start, the answer once there is one."""

    fingerprint: str
    order_id: str
    answer: str | None = None


log = structlog.get_logger(__name__)

_encode = msgspec.json.Encoder().encode
_temporary = msgspec.json.Decoder(Temporary)
_kept = msgspec.json.Decoder(Kept)

# KEYS: temporary orders. ARGV: for each its token, its new value (empty: as it is, but stored), and milliseconds
# to keep it. Only what is still about the same command is changed.
_SETTLE = """
for index, key in ipairs(KEYS) do
  local held = redis.call('GET', key)
  if held and string.find(held, '"token":"' .. ARGV[index * 3 - 2] .. '"', 1, true) then
    local value = ARGV[index * 3 - 1]
    local pending = '{"state":"pending"'
    if value == '' and string.sub(held, 1, #pending) == pending then
      value = '{"state":"stored"' .. string.sub(held, #pending + 1)
    end
    if value ~= '' then redis.call('SET', key, value, 'PX', ARGV[index * 3]) end
  end
end
"""
# KEYS[1]: since when nothing was forgotten. ARGV[1]: this server's run, ARGV[2]: what to set if it has none.
_REMEMBER = """
local since = redis.call('GET', KEYS[1])
if not since or string.sub(since, 1, #ARGV[1]) ~= ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[2])
  since = ARGV[2]
end
return since
"""
# KEYS[1]: the kept answer, KEYS[2]: the mark of a request under way. ARGV[1]: what to keep, ARGV[2]: milliseconds,
# ARGV[3]: milliseconds of the mark. Returns what was kept before, and 1 if nobody else is at it.
_BEGIN = """
local kept = redis.call('GET', KEYS[1])
if not kept then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) end
local free = redis.call('SET', KEYS[2], '1', 'NX', 'PX', ARGV[3])
return {kept, free and 1 or 0}
"""


class TemporaryOrders:
    """Temporary orders in one Redis. Every method raises RedisUnavailable."""

    def __init__(self, url: str, *, keep_seconds: float) -> None:
        """Keep an order for `keep_seconds` after it was stored; nothing is opened yet."""
        self.name = f"Redis at {place_of(url)}"
        self._keep_ms = int(keep_seconds * 1000)
        self._run = Run()
        self._since = b""
        self._lost = False
        self._client = connect(url, "REDIS_URL", connections=CONNECTIONS, run=self._run)
        self._settle = self._client.register_script(_SETTLE)
        self._begin = self._client.register_script(_BEGIN)
        self._remember = self._client.register_script(_REMEMBER)
        self._lookups: Gatherer[str, Found] = Gatherer(self._look_up, items_max=ORDERS_PER_CALL, rounds_max=2)

    async def put(self, orders: Sequence[tuple[str, Temporary, bool]]) -> list[bool]:
        """Keep these orders; one that is `new` only if there is none by its id. Return which were kept."""
        async with self._bounded(), self._client.pipeline(transaction=False) as together:
            for order_id, temporary, new in orders:
                together.set(f"temp_order:{order_id}", _encode(temporary), ex=PENDING_SECONDS, nx=new)
            return [bool(done) for done in await together.execute()]

    async def remove(self, order_ids: Sequence[str]) -> None:
        """Forget these orders."""
        if order_ids:
            async with self._bounded():
                await self._client.unlink(*(f"temp_order:{order_id}" for order_id in order_ids))

    async def settle(self, settled: Sequence[Settled]) -> None:
        """Say what became of commands: stored, or refused."""
        keys: list[str] = []
        arguments: list[str | bytes] = []
        for each in settled:
            keys.append(f"temp_order:{each.order_id}")
            if each.error is None:
                arguments += [each.token, "", str(self._keep_ms)]
            else:
                refused = Temporary(state="refused", token=each.token, version=0, error=each.error)
                arguments += [each.token, _encode(refused), str(REFUSED_SECONDS * 1000)]
        if keys:
            async with self._bounded():
                await self._settle(keys, arguments)
                if wrong := [f"idempotency:{each.wrong_key}" for each in settled if each.wrong_key]:
                    await self._client.unlink(*wrong)

    async def settle_if_possible(self, settled: Sequence[Settled]) -> None:
        """Like `settle`, for what others may see to as well; without Redis nothing happens."""
        with suppress(RedisUnavailable):
            await self.settle(settled)

    async def put_back(self, before: Mapping[str, Temporary | None]) -> None:
        """Keep of these orders what was kept before, if it is still to be shown; the database has the others."""
        pending = [(each, was, False) for each, was in before.items() if was and was.state == "pending"]
        kept = {order_id for order_id, _, _ in pending}
        try:
            await self.remove([order_id for order_id in before if order_id not in kept])
            await self.put(pending)
        except RedisUnavailable:
            log.warning("orders that were not accepted stay visible: Redis cannot be reached")

    async def refused(self, order_id: str, token: str) -> bool:
        """Return whether a command is known to be refused, with no order to show that at."""
        try:
            kept = (await self.find(order_id)).temporary
        except RedisUnavailable:
            return False
        return kept is not None and kept.state == "refused" and kept.token == token

    async def find(self, order_id: str) -> Found:
        """Return what is known of an order."""
        return await self._lookups.ask(order_id)

    async def _look_up(self, order_ids: Sequence[str]) -> list[Found]:
        async with self._bounded():
            keys = [SINCE, *(f"temp_order:{order_id}" for order_id in order_ids)]
            since, *values = await self._client.mget(keys)
            certain = await self._remembers(since)
        lost = self._lost and not certain
        return [Found(_temporary.decode(value) if value else None, certain, lost) for value in values]

    async def _remembers(self, since: Any) -> bool:
        """Return whether Redis has been complete for long enough."""
        now = int(time.time() * 1000)
        if not since or not since.startswith(f"{self._run.id}:".encode()):
            since = await self._remember((SINCE,), (f"{self._run.id}:", f"{self._run.id}:{now}"))
        # Whoever has known an earlier time knows that something was forgotten in between.
        self._lost = self._lost or self._since not in (b"", since)
        self._since = since
        began = since.rpartition(b":")[2]
        return began.isdigit() and not 0 <= now - int(began) < LOSS_SECONDS * 1000

    async def begin(self, key: str, kept: Kept, keep_ms: int) -> tuple[Kept, bool]:
        """Take an Idempotency-Key. Return what is kept under it, and whether this request may go on."""
        async with self._bounded():
            names = [f"idempotency:{key}", f"idempotency:{key}:busy"]
            before, free = await self._begin(names, [_encode(kept), str(keep_ms), str(BUSY_MS)])
        return (_kept.decode(before) if before else kept), bool(free)

    async def finish(self, key: str, kept: Kept, keep_ms: int) -> None:
        """Keep the answer of a request with an Idempotency-Key."""
        async with self._bounded(), self._client.pipeline(transaction=True) as together:
            together.set(f"idempotency:{key}", _encode(kept), px=keep_ms)
            together.unlink(f"idempotency:{key}:busy")
            await together.execute()

    async def give_up(self, key: str, *, forget: bool) -> None:
        """Let the next request with this key go on; `forget` what is kept, too."""
        async with self._bounded():
            names = [f"idempotency:{key}:busy", *([f"idempotency:{key}"] if forget else [])]
            await self._client.unlink(*names)

    async def clear(self) -> None:
        """Forget every order and every answer."""
        await unlink_all(self._client, "temp_order:*", "idempotency:*")

    async def check(self) -> None:
        """See whether Redis answers."""
        async with self._bounded():
            await self._client.ping()

    async def settings(self, *names: str) -> dict[str, str]:
        """Return these settings of the server."""
        async with self._bounded():
            found = await self._client.config_get(*names)
        return {_text(name): _text(value) for name, value in found.items()}

    @asynccontextmanager
    async def _bounded(self) -> AsyncIterator[None]:
        try:
            async with deadline(CALL_SECONDS_MAX):
                yield
        except RedisUnavailable:
            await forget_idle(self._client)
            raise

    async def close(self) -> None:
        """Close every connection."""
        await self._lookups.finish()
        await self._client.aclose()


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
