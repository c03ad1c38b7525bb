"""What was accepted and is not in the database yet, in Redis, for every process to read.

    orders:accepted           the set of accepted commands: token -> when to look after it (milliseconds)
    orders:accepted:commands  token -> the command, as the broker has it
    orders:incarnation        the database's incarnation that commands are accepted under
    temp_order:{order_id}     {"state":"pending","order":{...},...}: a placed order, as its readers are shown it
    temp_changes:{order_id}   token -> incarnation, and the key by which the database will know the change
    idempotency:{key}         the answer to a queued request with an Idempotency-Key
    temp_orders:since         the run of Redis, and since when it has forgotten nothing (milliseconds)

Each after REDIS_PREFIX.

A command is put here before its client is answered, and leaves the set when it is settled. Its order stays
readable for TEMP_ORDER_CACHE_TTL after that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import structlog

from expediter.backends.batching import Gatherer
from expediter.backends.redis_client import Memory, Part, RedisUnavailable
from expediter.errors import DuplicateOrder
from expediter.queued.message import QueuedCommand, pack, unpack
from expediter.store.submissions import Answer

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
#: Seconds after its acceptance at which somebody looks whether a command is stored.
OVERDUE_SECONDS = 5.0

log = structlog.get_logger(__name__)


class Temporary(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is kept at `temp_order:{order_id}`: `order` is the document; a `refused` one has `error` instead.

    `token` names the command that placed it, `key` is what the database will know that by (None: the order's id).
    """

    state: Literal["pending", "stored", "refused"]
    token: str
    incarnation: int
    key: str | None = None
    order: msgspec.Raw = msgspec.Raw(b"null")
    error: str | None = None


class Kept(msgspec.Struct, frozen=True):
    """What is kept under an Idempotency-Key: the answer, and which request and command it belongs to."""

    fingerprint: str
    token: str
    incarnation: int
    answer: Answer


class Accepted(NamedTuple):
    """A command on its way to the broker; `order` is the document of one that places an order."""

    command: QueuedCommand
    packed: bytes
    order: bytes | None


class Found(NamedTuple):
    """What is known of an order: `pending` is its document while it is accepted and not known to be stored.

    `changes` are accepted and not applied: what the database will know each by. Not `certain`: Redis may have
    forgotten lately, to find nothing says little; `lost`: this process knows that it knew more before.
    """

    temporary: Temporary | None = None
    changes: tuple[str, ...] = ()
    kept: Kept | None = None
    certain: bool = True
    lost: bool = False

    @property
    def pending(self) -> bytes | None:
        """The document of an order that is accepted and not known to be stored."""
        temporary = self.temporary
        return bytes(temporary.order) if temporary is not None and temporary.state == "pending" else None

    @property
    def waiting(self) -> tuple[str, ...]:
        """What the database will know everything by that waits (an order without a key of its own: by its id)."""
        if self.pending is None or self.temporary is None or self.temporary.key is None:
            return self.changes
        return (self.temporary.key, *self.changes)


class Settled(NamedTuple):
    """What became of a command: it is stored; or was refused with `error`, and there is no order to show that at.

    `order`: what is shown of it now; gone if it was placed by this command and is not to be there, deleted if it
    was stored and is no more. What was kept under a key counts only for a command that was stored.
    """

    command: QueuedCommand
    order: Literal["stored", "gone", "deleted"] = "stored"
    error: str | None = None


# What happens in one step. The scripts find the marks of the documents above in their text.
#
# KEYS: set, commands, incarnation; then for each command its order, changes, and kept answer. ARGV: incarnation,
# when to look after them, seconds to keep them; then for each its token, the command, the order (empty: a change),
# what it is known by, the answer to keep (empty: none), and for how long (milliseconds). Returns the incarnation,
# and for each what was in its way; the incarnation alone if that is a newer one.
_PUT = """
local now = redis.call('GET', KEYS[3]) or '0'
local mine = tonumber(ARGV[1])
if tonumber(now) > mine then return {now} end
if tonumber(now) < mine then redis.call('SET', KEYS[3], ARGV[1]) end
local function counting(key) -- what was refused, or is of an older incarnation, is in nobody's way
  local held = redis.call('GET', key)
  if not held or string.find(held, '{"state":"refused"', 1, true) == 1 then return nil end
  return tonumber(string.match(held, '"incarnation":(%d+)')) >= mine and held or nil
end
local found = {ARGV[1]}
for index = 1, (#KEYS - 3) / 3 do
  local order, changes, kept = unpack(KEYS, index * 3 + 1, index * 3 + 3)
  local token, command, document, known, answer, keep = unpack(ARGV, index * 6 - 2, index * 6 + 3)
  local before = answer ~= '' and counting(kept) or document ~= '' and counting(order) and 'taken' or ''
  if before == '' then
    if document == '' then
      redis.call('HSET', changes, token, known)
      redis.call('EXPIRE', changes, ARGV[3])
    else
      redis.call('SET', order, document, 'EX', ARGV[3])
    end
    redis.call('ZADD', KEYS[1], ARGV[2], token)
    redis.call('HSET', KEYS[2], token, command)
    if answer ~= '' then redis.call('SET', kept, answer, 'PX', keep) end
  end
  found[index + 1] = before
end
return found
"""

# KEYS: set, commands; then for each command its order, changes, and kept answer. ARGV: for each its token, what
# becomes of its order (stored, gone, deleted, or what is shown instead), milliseconds to keep that, and 1 where
# the answer is to be forgotten. A Redis that is full takes nothing new: then nothing is shown.
_SETTLE = """
for index = 1, (#KEYS - 2) / 3 do
  local order, changes, kept = unpack(KEYS, index * 3, index * 3 + 2)
  local token, what, keep, forget = unpack(ARGV, index * 4 - 3, index * 4)
  redis.call('ZREM', KEYS[1], token)
  redis.call('HDEL', KEYS[2], token)
  redis.call('HDEL', changes, token)
  local held = redis.call('GET', order)
  local mine = held and string.find(held, '"token":"' .. token .. '"', 1, true)
  local pending = '{"state":"pending"'
  local shown = nil
  if what == 'stored' and mine and string.find(held, pending, 1, true) == 1 then
    shown = '{"state":"stored"' .. string.sub(held, #pending + 1)
  elseif string.sub(what, 1, 1) == '{' and (mine or not held) then
    shown = what
  end
  local gone = what == 'deleted' or (what == 'gone' and mine)
  if gone or (shown and redis.pcall('SET', order, shown, 'PX', keep).err) then redis.call('UNLINK', order) end
  if forget == '1' then redis.call('UNLINK', kept) end
end
"""

# KEYS: since when nothing was forgotten, set. ARGV: tokens. Returns the first, and when to look after each. No
# transaction: a Redis that is full refuses those, also where they only read.
_WAITING = "return {redis.call('GET', KEYS[1]), redis.call('ZMSCORE', KEYS[2], unpack(ARGV))}"

_encode = msgspec.json.Encoder().encode
_temporary = msgspec.json.Decoder(Temporary)
_kept = msgspec.json.Decoder(Kept)


class TemporaryOrders(Part):
    """Accepted commands in one Redis. Every method raises RedisUnavailable."""

    def __init__(self, url: str, *, prefix: str = "", keep_seconds: float) -> None:
        """Keep an order for `keep_seconds` after it was stored, under names that begin with `prefix`.

        Raises ConfigurationError.
        """
        super().__init__(url, "REDIS_URL", prefix=prefix, connections=CONNECTIONS, call_seconds=CALL_SECONDS_MAX)
        names = "orders:accepted", "orders:accepted:commands", "orders:incarnation", "temp_orders:since"
        self._set, self._commands, self._incarnation_key, self._since = (prefix + name for name in names)
        self._order, self._changes, self._kept = (
            prefix + name for name in ("temp_order:", "temp_changes:", "idempotency:")
        )
        self._keep_ms = int(keep_seconds * 1000)
        self._memory = Memory(self.client, self.run, self._since)
        self._put, self._settle, self._waiting = map(self.client.register_script, (_PUT, _SETTLE, _WAITING))
        self._lookups: Gatherer[tuple[str, str], Found] = Gatherer(
            self._look_up, items_max=ORDERS_PER_CALL, rounds_max=2
        )
        #: The incarnation of the database that commands are accepted under, as far as it is known here.
        self.incarnation = 0

    async def put(self, accepted: Sequence[Accepted]) -> list[DuplicateOrder | Kept | None]:
        """Keep commands; return for each what was in its way: another order, or the answer that its key has."""
        keys = [self._set, self._commands, self._incarnation_key]
        arguments: list[Any] = [self.incarnation, _at(OVERDUE_SECONDS), PENDING_SECONDS]
        for command, packed, document in accepted:
            token, number, key = command.token, command.incarnation, command.key
            order = kept = b""
            if document is not None:
                order = _encode(Temporary("pending", token, number, command.known_by, msgspec.Raw(document)))
            if key is not None and command.answer is not None:
                kept = _encode(Kept(key.fingerprint, token, number, command.answer))
            keys += self._keys(command)
            keep_ms = key.keep // 1000 if key else 0
            arguments += (token, packed, order, f"{number} {command.known_by}", kept, keep_ms)
        async with self.bounded():
            now, *found = await self._put(keys, arguments)
        self.incarnation = int(now)
        if len(found) < len(accepted):
            raise RedisUnavailable("the database was cleared this very moment")
        taken = (DuplicateOrder(each.command.order_id) for each in accepted)
        return [
            (error if before == b"taken" else _kept.decode(before)) if before else None
            for error, before in zip(taken, found, strict=True)
        ]

    async def settle(self, settled: Sequence[Settled]) -> None:
        """Take commands out of the set, and say what became of them."""
        if not settled:
            return
        keys = [self._set, self._commands]
        arguments: list[Any] = []
        for command, shown, error in settled:
            keys += self._keys(command)
            if error is None:
                arguments += (command.token, shown, self._keep_ms, int(shown == "gone"))
            else:
                refused = _encode(Temporary("refused", command.token, self.incarnation, error=error))
                arguments += (command.token, refused, REFUSED_SECONDS * 1000, 1)
        async with self.bounded():
            await self._settle(keys, arguments)

    async def find(self, order_id: str, key: str = "") -> Found:
        """Return what is known of an order, and of an Idempotency-Key."""
        return await self._lookups.ask((order_id, key))

    async def _look_up(self, asked: Sequence[tuple[str, str]]) -> list[Found]:
        names = [name for order_id, key in asked for name in (f"{self._order}{order_id}", f"{self._kept}{key}")]
        async with self.bounded(), self.client.pipeline(transaction=False) as together:
            together.mget([self._since, self._incarnation_key, *names])
            for order_id, _ in asked:
                together.hvals(f"{self._changes}{order_id}")
            (since, incarnation, *values), *changes = await together.execute()
            certain = await self._memory.look(since) >= LOSS_SECONDS
        self.incarnation = max(self.incarnation, int(incarnation or 0))
        lost = self._memory.lost and not certain
        orders = [_temporary.decode(value) if value else None for value in values[::2]]
        kept = [_kept.decode(value) if value else None for value in values[1::2]]
        return [
            Found(self._valid(order), self._keys_of(waiting), self._valid(answer), certain, lost)
            for order, waiting, answer in zip(orders, changes, kept, strict=True)
        ]

    def _valid(self, found: Any) -> Any:
        """Return what was accepted under this incarnation of the database."""
        return found if found is not None and found.incarnation >= self.incarnation else None

    def _keys_of(self, changes: Sequence[bytes]) -> tuple[str, ...]:
        parts = (change.decode().partition(" ") for change in changes)
        return tuple(key for number, _, key in parts if int(number) >= self.incarnation)

    async def waiting(self, tokens: Sequence[str]) -> tuple[list[bool], bytes]:
        """Return which of these commands are in the set (ask for one), and what changes when Redis forgets."""
        async with self.bounded():
            since, scores = await self._waiting((self._since, self._set), tokens)
            await self._memory.look(since)
        return [score is not None for score in scores], self._memory.since

    async def overdue(self, *, limit: int, for_seconds: float) -> list[QueuedCommand]:
        """Return up to `limit` commands that somebody should look after; nobody else does `for_seconds`."""
        async with self.bounded(), self.client.pipeline(transaction=False) as together:
            tokens: Any = await self.client.zrangebyscore(self._set, "-inf", _at(0), start=0, num=limit)
            if not tokens:
                return []
            # Whoever looks in the same moment finds them, too; what is settled meanwhile stays out of the set.
            together.zadd(self._set, dict.fromkeys(tokens, _at(for_seconds)), xx=True)
            together.hmget(self._commands, tokens)
            _, found = await together.execute()
            if lost := [token for token, packed in zip(tokens, found, strict=True) if packed is None]:
                await self.client.zrem(self._set, *lost)
        return [command for packed in found if packed for command in _readable(packed)]

    async def look_again(self, commands: Sequence[QueuedCommand], *, seconds: float) -> None:
        """Have these commands looked after in so many seconds, also where the set has forgotten them."""
        if commands:
            async with self.bounded(), self.client.pipeline(transaction=True) as together:
                together.zadd(self._set, {command.token: _at(seconds) for command in commands})
                left: dict[Any, Any] = {
                    each.token: pack([msgspec.structs.replace(each, left=True)]) for each in commands
                }
                together.hset(self._commands, mapping=left)
                await together.execute()

    async def tell_incarnation(self, number: int) -> None:
        """Accept nothing any more under an incarnation before this one, and show nothing of it."""
        self.incarnation = max(number, self.incarnation)
        await self.put([])

    async def close(self) -> None:
        """See Part."""
        await self._lookups.finish()
        await super().close()

    def _keys(self, command: QueuedCommand) -> tuple[str, str, str]:
        order_id, key = command.order_id, command.known_by or ""
        return f"{self._order}{order_id}", f"{self._changes}{order_id}", f"{self._kept}{key}"


def _at(seconds: float) -> int:
    """Return the time in so many seconds, as the set has it (milliseconds)."""
    return int((time.time() + seconds) * 1000)


def _readable(packed: bytes) -> list[QueuedCommand]:
    try:
        return unpack(packed)
    except ValueError as error:
        log.warning("an accepted command cannot be read: it is left to a newer version", reason=str(error))
        return []
