"""What became of a queued command, told from what the committer said of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import structlog

from expediter.errors import DuplicateOrder, ExpediterError, IdempotencyMismatch
from expediter.orders.commands import PlaceOrder
from expediter.queued.message import QueuedCommand
from expediter.queued.temporary import Settled
from expediter.store.submissions import Outcome, Replayed, Request

log = structlog.get_logger(__name__)


async def settled(
    queued: QueuedCommand, outcome: Outcome, carry_out: Callable[[Sequence[Request]], Awaitable[list[Outcome]]]
) -> Settled:
    """Return what became of a command whose outcome is final.

    `carry_out` notes a refusal in the history of its order; where there is no such order it is shown instead.
    """
    command = queued.command
    if isinstance(outcome, Replayed) and (other := queued.other_order(outcome.answer)):
        return Settled(command.order_id, queued.token, other, queued.key.key if queued.key else None)
    # A fresh id is its own: whatever order has it is the same one, stored before.
    same = isinstance(outcome, DuplicateOrder) and isinstance(command, PlaceOrder) and command.fresh
    if same or not isinstance(outcome, ExpediterError):
        return Settled(command.order_id, queued.token)
    reason = str(outcome)
    log.warning("a queued command was refused", order_id=command.order_id, error=reason)
    recorded: Outcome = outcome
    if not isinstance(outcome, IdempotencyMismatch):  # its key is another request's, and could keep nothing
        (recorded,) = await carry_out([queued.refusal(reason)])
    return Settled(command.order_id, queued.token, reason if isinstance(recorded, ExpediterError) else None)
