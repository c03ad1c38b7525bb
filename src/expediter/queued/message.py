"""Queued commands: the form in which the broker carries what was accepted and is not in the database yet."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence

import msgspec

from expediter.orders.commands import (
    CancelOrder,
    ChangeStatus,
    Command,
    DeleteOrder,
    PlaceOrder,
    RecordRefusal,
    ReportFulfilment,
    RetryOrder,
)
from expediter.orders.order import MICROSECONDS
from expediter.store.submissions import Answer, IdempotencyKey, Request

#: How long a command of no caller's key is known by its token, in microseconds.
TOKEN_KEEP = 86_400 * MICROSECONDS


class QueuedCommand(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One accepted command. `token` names it.

    `key` is the caller's idempotency key, or one of its own by which a second delivery is known; None where the
    order's id alone tells. `answer` is what is kept under the caller's key. It was accepted at `accepted_at`
    (microseconds since 1970), under this `incarnation` of the database, while the commands `behind` were accepted
    for the same order and not stored (their keys); `placed` says that the order was one of them. It is `left` to
    the sweep by a worker that could not carry it out yet.
    """

    token: str
    command: PlaceOrder | ChangeStatus | CancelOrder | ReportFulfilment | RetryOrder | DeleteOrder
    accepted_at: int = 0
    key: IdempotencyKey | None = None
    answer: Answer | None = None
    behind: tuple[str, ...] = ()
    placed: bool = False
    incarnation: int = 0
    left: bool = False

    @property
    def order_id(self) -> str:
        """The order that it is about."""
        return self.command.order_id

    @property
    def known_by(self) -> str | None:
        """The key by which the database knows that it is carried out; None: the order's id."""
        return None if self.key is None else self.key.key

    def request(self, *, waits: bool, again: bool = False) -> Request:
        """Return it as the committer takes it; `waits` for its predecessors, `again`: it may be stored already."""
        command = self.command
        if isinstance(command, PlaceOrder) and again:
            command = msgspec.structs.replace(command, fresh=False)
        behind, placed = (self.behind, self.placed) if waits else ((), False)
        return Request(command, self.key, self._word, behind=behind, placed=placed, incarnation=self.incarnation)

    def refusal(self, reason: str) -> Request:
        """Return what notes in its order's history that it was refused after all."""
        command = RecordRefusal(order_id=self.order_id, error=f"A queued command was refused: {reason}")
        return Request(command, self.key, self._word, incarnation=self.incarnation)

    def _word(self, applied: object) -> Answer:
        return self.answer or Answer(202, {}, "")


def own_key(token: str) -> IdempotencyKey:
    """Return the key under which the database knows a command that no client's key stands for."""
    return IdempotencyKey(f"queued:{token}", "", TOKEN_KEEP)


def named_by_key(command: Command, key: IdempotencyKey | None, incarnation: int) -> Command:
    """Return a new order without an id of its client's under the id that its key and what it asks for make.

    So it is the same order whoever is asked again, also where nobody can say what was answered before. Once the
    orders were cleared or restored (`incarnation`) it is another.
    """
    if key is None or not isinstance(command, PlaceOrder) or not command.fresh:
        return command
    digest = hashlib.sha256(f"{incarnation}\n{key.key}\n{key.fingerprint}".encode()).digest()
    order_id = f"ORD-{uuid.UUID(bytes=digest[:16], version=4).hex}"
    return msgspec.structs.replace(command, order_id=order_id, fresh=False)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(list[QueuedCommand]).decode


def pack(commands: Sequence[QueuedCommand]) -> bytes:
    """Return a batch of commands as one message."""
    return _encode(commands)


def unpack(body: bytes) -> list[QueuedCommand]:
    """Return the commands of a message. Raises ValueError for one that nobody of ours has packed."""
    return _decode(body)  # msgspec's errors are of this kind


def join(packed: Sequence[bytes]) -> bytes:
    """Return commands that were packed one by one as one message."""
    return b"[" + b",".join(each[1:-1] for each in packed) + b"]"
