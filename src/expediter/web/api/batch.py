"""Many orders in one request: a JSON array, or NDJSON that is read as it arrives."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from expediter.errors import DuplicateOrder, ExpediterError, Fault, InvalidInput, Overloaded
from expediter.orders.commands import PlaceOrder
from expediter.store.scopes import Scope
from expediter.store.submissions import Answer, Applied, IdempotencyKey, Outcome, Replayed, Request
from expediter.web.api.orders import new_order_id
from expediter.web.context import Context
from expediter.web.fingerprints import fingerprinted
from expediter.web.http import (
    BODY_BYTES_MAX,
    BODY_SECONDS_MAX,
    BodyTooSlow,
    Call,
    Reply,
    json_reply,
    to_json,
)
from expediter.web.operations import IDEMPOTENCY_KEY, Operation, both
from expediter.web.payloads import OrderBody, decode, place_order
from expediter.web.problems import FieldError, not_taken, status_of

#: Rows of one request, at most.
ROWS_MAX = 100_000
#: Rows that are stored in one transaction, at most, and the bytes after which there are no more of them.
ROWS_PER_GROUP = 500
GROUP_BYTES_MAX = 4 * BODY_BYTES_MAX
#: Rows, and bytes of rows, after which other requests have their turn.
ROWS_PER_TURN = 50
BYTES_PER_TURN = 64 * 1024
#: Faults that the verdict of one row names, at most, and those of all rows of a request. After that a verdict has
#: one sentence, about the first fault of its row, and nobody looks for the others.
ROW_FAULTS_MAX = 10
BATCH_FAULTS_MAX = 10_000
#: Requests that are read at one time; one more is refused with Overloaded. Each holds its groups and its verdicts.
BATCHES_MAX = 16
#: Groups that wait for their transaction while the next rows are read.
GROUPS_UNDER_WAY_MAX = 2

Count = Annotated[int, Meta(ge=0)]
_NDJSON = ("application/x-ndjson", "application/ndjson", "application/jsonl")


class Verdict(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one row (counted from 1): the status that the order alone would have been answered with."""

    row: int
    status: int
    order_id: str | UnsetType = UNSET
    version: int | UnsetType = UNSET
    replayed: bool | UnsetType = UNSET
    error: str | UnsetType = UNSET
    errors: list[FieldError] | UnsetType = UNSET


class Batch(msgspec.Struct, frozen=True):
    """A verdict per row, and how many rows were stored and refused."""

    accepted: Count
    refused: Count
    results: list[Verdict]


async def create_batch(call: Call, context: Context) -> Reply:
    """Take many orders: a JSON array of at most 1 MiB, or NDJSON with one order a line, at most 100,000.

    Each row gets its own verdict; good rows are stored whatever the others are. An Idempotency-Key holds for each
    row by its number, so that a batch that broke off can be sent again whole. A verdict names up to 10 faults;
    after 10,000 in one request it names the first alone, in its `error`.
    """
    call.query()
    call.may_take(math.inf)  # each of its groups has its own limits
    streamed = call.has_media_type(*_NDJSON)
    if not streamed and not call.has_media_type("application/json"):
        raise not_taken(call, "application/json", _NDJSON[0])
    if context.batches >= BATCHES_MAX:
        raise Overloaded(f"{context.batches} batches are being read; try again")
    context.batches += 1
    try:
        verdicts = await _verdicts(call, context, streamed)
    finally:
        context.batches -= 1
    if streamed:
        return Reply(200, await _in_lines(verdicts), [(b"content-type", _NDJSON[0].encode())])
    accepted = sum(verdict.status < 300 for verdict in verdicts)
    return json_reply(200, Batch(accepted, len(verdicts) - accepted, verdicts))


async def _verdicts(call: Call, context: Context, streamed: bool) -> list[Verdict]:
    intake = _Intake(call, context)
    try:
        async for row in _lines_of(call) if streamed else _elements_of(await call.body()):
            await intake.add(row)
    except BodyTooSlow:
        intake.end(408, f"nothing came for {BODY_SECONDS_MAX:g} seconds; the rows before this one were read")
    return await intake.finish()


async def _in_lines(verdicts: list[Verdict]) -> bytes:
    lines = bytearray()
    for start in range(0, len(verdicts), ROWS_PER_GROUP):
        await asyncio.sleep(0)  # 100,000 verdicts take a while
        for verdict in verdicts[start : start + ROWS_PER_GROUP]:
            lines += to_json(verdict) + b"\n"
    return bytes(lines)


async def _elements_of(body: bytes) -> AsyncIterator[bytes]:
    for element in decode(body, list[msgspec.Raw]):
        yield bytes(element)


async def _lines_of(call: Call) -> AsyncIterator[bytes]:
    """Yield the lines that are not blank; of one that is too long, its first bytes: enough to see that."""
    rest = b""
    async for chunk in call.chunks():
        *lines, last = chunk.split(b"\n")
        for line in lines:
            whole, rest = rest + line, b""
            if whole.strip():
                yield whole
        rest += last[: BODY_BYTES_MAX + 1 - len(rest)]
    if rest.strip():
        yield rest


class _Intake:
    """Turns rows into groups, and keeps a few groups under way while it reads on."""

    def __init__(self, call: Call, context: Context) -> None:
        self._context = context
        self._key = call.idempotency_key(None, context.keep)
        self._verdicts: list[Verdict] = []
        self._rows: list[int] = []
        self._requests: list[Request] = []
        self._bytes = 0
        self._bytes_of_turn = 0
        self._faults_left = BATCH_FAULTS_MAX
        self._under_way: deque[tuple[list[int], asyncio.Task[list[Outcome]]]] = deque()

    async def add(self, row: bytes) -> None:
        number = len(self._verdicts) + 1
        if number > ROWS_MAX:
            await self.finish()
            raise InvalidInput([Fault("", f"has more than {ROWS_MAX} rows; the first {ROWS_MAX} are stored")])
        self._bytes_of_turn += len(row)
        if number % ROWS_PER_TURN == 0 or self._bytes_of_turn >= BYTES_PER_TURN:
            self._bytes_of_turn = 0
            await asyncio.sleep(0)  # others have their turn, also where every row is refused
        if len(row) > BODY_BYTES_MAX:
            self.end(413, f"has more than {BODY_BYTES_MAX} bytes")
            return
        try:
            self._requests.append(self._read(row, number))
        except InvalidInput as error:
            self._verdicts.append(_refused(number, error, self._faults_max))
            self._faults_left -= min(len(error.faults), self._faults_max)
            return
        except ExpediterError as error:
            self._verdicts.append(_refused(number, error))
            return
        self._verdicts.append(Verdict(number, 0))
        self._rows.append(number)
        self._bytes += len(row)
        if len(self._requests) == ROWS_PER_GROUP or self._bytes >= GROUP_BYTES_MAX:
            await self._send()

    @property
    def _faults_max(self) -> int:
        return min(ROW_FAULTS_MAX, self._faults_left)

    def end(self, status: int, error: str) -> None:
        """Add a verdict for a row that was not read."""
        self._verdicts.append(Verdict(len(self._verdicts) + 1, status, error=error))

    def _read(self, row: bytes, number: int) -> Request:
        command = place_order(
            decode(row, OrderBody, faults_max=self._faults_max or 1),
            row,
            fresh_id=new_order_id(),
            currency=self._context.settings.default_currency,
            stages=self._context.settings.stages,
        )
        if self._key is None:
            return Request(command)
        return Request(command, row_key(self._key, number, fingerprinted(command)), _word)

    async def _send(self) -> None:
        stored = asyncio.create_task(self._store(self._requests, self._bytes))
        self._under_way.append((self._rows, stored))
        self._rows, self._requests, self._bytes = [], [], 0
        if len(self._under_way) >= GROUPS_UNDER_WAY_MAX:
            await self._collect()

    async def _store(self, requests: list[Request], body_bytes: int) -> list[Outcome]:
        """Store a group, except for orders whose id belongs to one that waits in the queue."""
        named = [
            each.command.order_id
            for each in requests
            if isinstance(each.command, PlaceOrder) and not each.command.fresh
        ]
        waiting = await self._context.queries.waiting(named)
        free = [each for each in requests if each.command.order_id not in waiting]
        stored = iter(await self._context.committer.submit_patiently(free, body_bytes))
        return [
            DuplicateOrder(each.command.order_id) if each.command.order_id in waiting else next(stored)
            for each in requests
        ]

    async def _collect(self) -> None:
        rows, stored = self._under_way.popleft()
        try:
            outcomes: Sequence[Outcome] = await stored
        except ExpediterError as error:
            outcomes = [error] * len(rows)
        for number, outcome in zip(rows, outcomes, strict=True):
            self._verdicts[number - 1] = _verdict(number, outcome)

    async def finish(self) -> list[Verdict]:
        if self._requests:
            await self._send()
        while self._under_way:
            await self._collect()
        return self._verdicts


def row_key(key: IdempotencyKey, number: int, row: bytes) -> IdempotencyKey:
    """Return the key of one row of a request with a key; `row` identifies what it asks for."""
    key_of_row, unowned = (
        f"{hashlib.sha256(each.encode()).hexdigest()}/{number}" if each else "" for each in (key.key, key.unowned)
    )
    return IdempotencyKey(key_of_row, hashlib.sha256(row).hexdigest(), key.keep, unowned)


def _word(applied: Applied) -> Answer:
    return Answer(202, {"version": str(applied.order.version)}, applied.order.order_id)


def _verdict(number: int, outcome: Outcome) -> Verdict:
    if isinstance(outcome, Applied):
        return Verdict(number, 202, outcome.order.order_id, outcome.order.version)
    if isinstance(outcome, Replayed):
        answer = outcome.answer
        return Verdict(number, answer.status_code, answer.body, int(answer.headers["version"]), replayed=True)
    assert isinstance(outcome, ExpediterError)
    return _refused(number, outcome)


def _refused(number: int, error: ExpediterError, faults_max: int = ROW_FAULTS_MAX) -> Verdict:
    """Return the verdict on a row that is refused; it names up to `faults_max` of its faults, if it has any."""
    if not isinstance(error, InvalidInput):
        return Verdict(number, status_of(error), error=str(error))
    if len(error.faults) > max(1, faults_max):
        error = InvalidInput(error.faults, faults_max=max(1, faults_max))
    errors = [FieldError(fault.field, fault.message) for fault in error.faults] if faults_max > 0 else UNSET
    return Verdict(number, status_of(error), error=str(error), errors=errors)


OPERATIONS = (
    Operation(
        method="POST",
        paths=both("/batch"),
        handler=create_batch,
        scope=Scope.ORDERS_WRITE,
        summary="Place many orders",
        answers={200: Batch},
        body=list[OrderBody],
        parameters=(IDEMPOTENCY_KEY,),
    ),
)
