"""Filling and emptying: populate for anyone, seed and reset for the operator."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from functools import wraps
from random import Random
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from expediter.errors import Conflict, DuplicateOrder, ExpediterError, IdempotencyMismatch
from expediter.orders.laws import Breach
from expediter.orders.samples import sample_orders
from expediter.store.scopes import Scope
from expediter.store.submissions import Answer, Applied, IdempotencyKey, Outcome, Replayed, Request
from expediter.web.access import admit, check_admin_calls_are_on
from expediter.web.api.batch import row_key
from expediter.web.api.orders import new_order_id, require_json
from expediter.web.context import Context
from expediter.web.http import Call, Reply, answer_reply, json_reply, to_json
from expediter.web.operations import IDEMPOTENCY_KEY, Handler, Operation, both
from expediter.web.payloads import AdminBody, AdminPassword, PopulateBody, decode
from expediter.web.problems import RequestRefused

#: Made-up orders that are stored in one transaction, at most.
SAMPLES_PER_BATCH = 200

#: Seconds that `/admin/verify` waits for the end of its look.
VERIFY_SECONDS = 10.0

Count = Annotated[int, Meta(ge=0)]

Body = TypeVar("Body", bound=AdminPassword)


class _Passwords(msgspec.Struct):
    admin_password: Any = None
    password: Any = None


_read_password = msgspec.json.Decoder(_Passwords).decode


class Populated(msgspec.Struct, frozen=True):
    """What became of the made-up orders."""

    batch_id: str
    errors: list[str]
    failure_count: Count
    success_count: Count
    total_entries: Count


class Seeded(msgspec.Struct, frozen=True):
    """How many orders were made."""

    message: str
    count: Count


class Emptied(msgspec.Struct, frozen=True):
    """How many orders were removed."""

    message: str
    deleted: Count


class Verification(msgspec.Struct, frozen=True):
    """What `verify` found: how many orders it looked at, how many laws are broken, and up to 1,000 of these."""

    status: Literal["running", "done"]
    orders: Count
    found: Count
    breaches: list[Breach]


async def populate(call: Call, context: Context) -> Reply:
    """Make up orders and store them; they are worked off like any others. 409 for a batch that was made before."""
    call.query()
    call.may_take(math.inf)
    require_json(call)
    wanted = decode(await call.body(), PopulateBody)
    key = call.idempotency_key(wanted, context.keep)
    # With a key the made-up name is made from the key: the repeated answer must be the same.
    made_up = uuid.uuid5(uuid.NAMESPACE_OID, key.key) if key else uuid.uuid4()
    batch_id = wanted.batch_id or made_up.hex[:8]
    errors, replayed = await _fill(context, wanted.total_entries, batch_id, key)
    done = Populated(
        batch_id=batch_id,
        errors=errors[:100],
        failure_count=len(errors),
        success_count=wanted.total_entries - len(errors),
        total_entries=wanted.total_entries,
    )
    return _made(json_reply(201, done), replayed)


def _made(reply: Reply, replayed: bool) -> Reply:
    if replayed:
        reply.headers.append((b"idempotency-replayed", b"true"))
    return reply


async def _fill(
    context: Context, count: int, batch_id: str | None, key: IdempotencyKey | None
) -> tuple[list[str], bool]:
    """Store `count` made-up orders; return a sentence for each that was not, and whether all were there before.

    With a `batch_id` their ids come from it. Raises Conflict where it has orders already.
    """
    random = Random()
    numbers = iter(range(1, count + 1))
    errors: list[str] = []
    replayed = True
    start = 0
    while start < count:
        # The first goes alone: if it is there before, or its key is another request's, nothing has been made.
        size = min(SAMPLES_PER_BATCH, count - start) if start else 1
        orders = sample_orders(
            size,
            random,
            (lambda: f"sim_{batch_id}_{next(numbers)}") if batch_id else new_order_id,
            fresh=not batch_id,
            currency=context.settings.default_currency,
            stages=context.settings.stages,
            metadata=msgspec.json.encode({"batch_id": batch_id}).decode() if batch_id else "{}",
        )
        requests = [
            Request(order, row_key(key, number, key.fingerprint.encode()), _word) if key else Request(order)
            for number, order in enumerate(orders, start)
        ]
        try:
            outcomes: Sequence[Outcome] = await context.committer.submit_patiently(requests)
        except ExpediterError as error:
            outcomes = [error] * size
        if key and isinstance(outcomes[0], IdempotencyMismatch):
            raise outcomes[0]
        if batch_id and not start and isinstance(outcomes[0], DuplicateOrder):
            raise Conflict(f"Batch {batch_id} has been made before: choose another batch_id")
        errors += [str(outcome) for outcome in outcomes if isinstance(outcome, ExpediterError)]
        start += size
        replayed = replayed and all(isinstance(outcome, Replayed) for outcome in outcomes)
    return errors, replayed


def _word(applied: Applied) -> Answer:
    return Answer(201, {}, applied.order.order_id)


async def admin_reset(call: Call, context: Context) -> Reply:
    """Remove every order and everything that belongs to one."""
    _, key = await _asked(call, context)

    def word(deleted: int) -> Answer:
        document = to_json(Emptied(f"Removed {deleted} orders", deleted))
        return Answer(200, {"content-type": "application/json"}, document.decode())

    moved = None if context.temporary is None else context.temporary.tell_incarnation
    outcome = await context.committer.clear(key, word, moved=moved)
    if isinstance(outcome, Replayed):
        return answer_reply(outcome.answer, replayed=True)
    return answer_reply(word(outcome), replayed=False)


async def admin_seed(call: Call, context: Context) -> Reply:
    """Make up `count` orders (100 by default) and store them."""
    body, key = await _asked(call, context)
    errors, replayed = await _fill(context, body.count, None, key)
    if errors:
        raise RequestRefused(503, "Unavailable", errors[0], {"Retry-After": "1"})
    return _made(json_reply(201, Seeded(f"Created {body.count} orders", body.count)), replayed)


async def admin_verify(call: Call, context: Context) -> Reply:
    """Hold everything that is stored against the conservation laws; 202 while it takes longer: ask again."""
    await _asked(call, context)
    found = await context.verify(VERIFY_SECONDS)
    if found is None:
        return json_reply(202, Verification("running", 0, 0, []))
    return json_reply(200, Verification("done", found.orders, found.found, found.breaches))


async def admin_body(call: Call, context: Context, kind: type[Body]) -> Body:
    """Return the body of an admin call that may be made. Raises what `admit` does, and 403 while they are off."""
    call.query()
    call.may_take(math.inf)
    text = await call.body()
    context.secrets.check(call)  # once more: others may have come while the body did
    check_admin_calls_are_on(context)
    admit(call, context, _password_in(text))
    if text.strip():
        require_json(call)
    return decode(text if text.strip() else b"{}", kind)


def _password_in(text: bytes) -> str | None:
    """Return the password in a body, whatever else is in it: a stranger need not know what is wrong with that."""
    try:
        found = _read_password(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return next((each for each in (found.admin_password, found.password) if each and isinstance(each, str)), None)


async def _asked(call: Call, context: Context) -> tuple[AdminBody, IdempotencyKey | None]:
    """Return body and key of an admin call about orders."""
    body = await admin_body(call, context, AdminBody)
    return body, call.idempotency_key({"count": body.count}, context.keep)


def slowed(call: Call, context: Context) -> None:
    """Refuse who has guessed too often, at once: no task is begun and no body is read for it."""
    context.secrets.check(call)


def unkept(handler: Handler) -> Handler:
    """Return the handler of an admin call: nobody on the way keeps its answer."""

    @wraps(handler)
    async def answer(call: Call, context: Context) -> Reply:
        reply = await handler(call, context)
        reply.headers.append((b"cache-control", b"no-store"))
        return reply

    return answer


def _admin(path: str, handler: Handler, summary: str, answers: Mapping[int, Any]) -> Operation:
    return Operation(
        method="POST",
        paths=(path,),
        handler=unkept(handler),
        scope=Scope.ADMIN,
        at_once=slowed,
        summary=summary,
        tag="admin",
        answers=answers,
        problems=(401, 403),
        parameters=(IDEMPOTENCY_KEY,),
        body=AdminBody,
        body_required=False,
    )


OPERATIONS = (
    Operation(
        method="POST",
        paths=both("/populate"),
        handler=populate,
        scope=Scope.ORDERS_WRITE,
        summary="Make up orders",
        answers={201: Populated},
        problems=(409,),
        body=PopulateBody,
        parameters=(IDEMPOTENCY_KEY,),
    ),
    _admin("/admin/reset", admin_reset, "Remove every order", {200: Emptied}),
    _admin("/admin/verify", admin_verify, "Verify the conservation laws", {200: Verification, 202: Verification}),
    _admin("/admin/seed", admin_seed, "Make up orders", {201: Seeded}),
)
