"""What the committer is asked and what it answers, and what a page is asked for."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from expediter.errors import ExpediterError
from expediter.orders.commands import Command
from expediter.orders.order import Job, JobKind, Line, Order, OrderRefund, Status
from expediter.orders.resilience import Breaker


class Answer(msgspec.Struct, frozen=True, gc=False):
    """An answer as it is kept for an idempotency key: status, headers (lower case) and body."""

    status_code: int
    headers: dict[str, str]
    body: str


class IdempotencyKey(msgspec.Struct, frozen=True, gc=False):
    """A caller's key, what identifies the request that it came with, and how long it is kept (microseconds).

    `unowned` is the key as it would be kept for callers without an API key; empty where this one is.
    """

    key: str
    fingerprint: str
    keep: int
    unowned: str = ""


class Applied(msgspec.Struct, frozen=True, gc=False):
    """What became of one command: the order (as it was, if it is deleted), its job, lines, and changed refunds.

    `lines` is empty unless the request asked for them. `answer` is the stored or newly made answer of a request
    with an idempotency key; `replayed` says that nothing was done now.
    """

    order: Order
    job: Job | None = None
    lines: tuple[Line, ...] = ()
    answer: Answer | None = None
    replayed: bool = False
    refunds: tuple[OrderRefund, ...] = ()


class Replayed(msgspec.Struct, frozen=True, gc=False):
    """The stored answer of a request that was carried out before."""

    answer: Answer


class Claimed(msgspec.Struct, frozen=True, gc=False):
    """A job that is now leased to the claimant; `probe` marks the one call an open breaker lets through.

    `refund` is what a job to refund is about.
    """

    order: Order
    job: Job
    probe: bool = False
    refund: OrderRefund | None = None


class Claims(msgspec.Struct, frozen=True, gc=False):
    """What a claim brought: the leased jobs, the breaker, and when the next job is due (None: none is).

    `changed` has every order that the claim changed, also those that it parked or that had nothing left to do.
    """

    claimed: tuple[Claimed, ...]
    changed: tuple[Order, ...]
    breaker: Breaker
    next_due_at: int | None
    now: int


class Request(msgspec.Struct, frozen=True, gc=False):
    """A command, with the caller's idempotency key and how to word the answer that is kept under it.

    Three things are for what was queued. `behind` has the keys of requests that must be carried out before it, and
    `placed` says that the order must be stored before it: NotYetApplied until then. Where the database's
    `incarnation` is higher than this one it is refused as ClearedAway.
    """

    command: Command
    key: IdempotencyKey | None = None
    answer: Callable[[Applied], Answer] | None = None
    with_lines: bool = False
    behind: tuple[str, ...] = ()
    placed: bool = False
    incarnation: int | None = None


class Queued(msgspec.Struct, frozen=True, gc=False):
    """A command that the broker has: what its caller is answered."""

    answer: Answer


class ClaimDue(msgspec.Struct, frozen=True, gc=False):
    """Ask for up to `limit` due jobs of these `kinds`; `key_prefix` goes into the keys of calls to the gateway."""

    holder: str
    limit: int
    lease: int
    claims_max: int
    key_prefix: str = ""
    kinds: frozenset[JobKind] = frozenset(JobKind)


class ReportBreaker(msgspec.Struct, frozen=True, gc=False):
    """Tell the payment breaker how calls went: `failures` in a row; `threshold` of them open it for `recovery`.

    While all is well nobody tells it anything: each process counts by itself (CallWatch).

    `probe` says that it was the one call that the open breaker let through. `order_id` is the order that the call
    was for: if its lease turns out to be lost in the same transaction, the call tells nothing. A worker that slept
    for a minute would otherwise open the breaker for all.
    """

    succeeded: bool
    threshold: int
    recovery: int
    probe: bool = False
    order_id: str | None = None
    failures: int = 1


Asked = Request | ClaimDue | ReportBreaker
Outcome = Applied | Replayed | Claims | Breaker | ExpediterError


class PageQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which orders, newest first; `after` is the (created_at, order_id) of the last order seen."""

    limit: int
    offset: int = 0
    after: tuple[int, str] | None = None
    customer_id: str | None = None
    status: Status | None = None
    created_after: int | None = None
    created_before: int | None = None

    @property
    def filtered(self) -> bool:
        """Whether the exact counters cannot tell how many there are."""
        return any(value is not None for value in (self.customer_id, self.created_after, self.created_before))
