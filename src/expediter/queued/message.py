"""Queued commands: the form in which the broker carries what was accepted and is not in the database yet."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from expediter.orders.commands import CancelOrder, ChangeStatus, DeleteOrder, PlaceOrder, RecordRefusal, RetryOrder
from expediter.store.submissions import Answer, IdempotencyKey, Request


class QueuedCommand(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One accepted command; exactly one of the five is there.

    `token` names it. `key` is the caller's idempotency key, or one of its own by which a second delivery is known;
    None where the order's id alone tells. `answer` is what is kept under the key. The command was accepted on
    version `base_version` of its order, and is applied to that or a newer one; `after` is the key of the command
    before it on the same order, if that was not stored then. `again` says that it is sent a
    second time.
    """

    token: str
    place: PlaceOrder | None = None
    status: ChangeStatus | None = None
    cancel: CancelOrder | None = None
    retry: RetryOrder | None = None
    delete: DeleteOrder | None = None
    key: IdempotencyKey | None = None
    answer: Answer | None = None
    base_version: int = 0
    after: str | None = None
    again: bool = False

    @property
    def command(self) -> PlaceOrder | ChangeStatus | CancelOrder | RetryOrder | DeleteOrder:
        """The command itself."""
        found = self.place or self.status or self.cancel or self.retry or self.delete
        assert found is not None  # `unpack` lets nothing else in
        return found

    def request(self, *, waits: bool, again: bool = False) -> Request:
        """Return it as the committer takes it; `waits` for its base version, `again`: it may be stored already."""
        command = self.command
        if isinstance(command, PlaceOrder) and (again or self.again):
            command = msgspec.structs.replace(command, fresh=False)
        answer = self.answer
        word = (lambda order, lines: answer) if answer is not None else None
        if not waits:
            return Request(command, self.key, word)
        return Request(command, self.key, word, base_version=self.base_version, after=self.after)

    def other_order(self, kept: Answer) -> str | None:
        """Return why this order is not made, if `kept` says that its key has made another one before.

        So it is where Redis forgot a key between two requests with it, before the first of them was stored.
        """
        location = kept.headers.get("location", "")  # a key of the command's own has none
        if self.place is None or not location or location.rpartition("/")[2] == self.place.order_id:
            return None
        return f"This Idempotency-Key made another order before: {location}"

    def refusal(self, reason: str) -> Request:
        """Return what notes in its order's history that it was refused after all."""
        answer = self.answer
        word = (lambda order, lines: answer) if answer is not None else None
        command = RecordRefusal(order_id=self.command.order_id, error=f"A queued command was refused: {reason}")
        return Request(command, self.key, word)


def queued(command: object, **fields: object) -> QueuedCommand:
    """Return `command` with what travels with it."""
    return msgspec.convert({_FIELDS[type(command)]: command, **fields}, QueuedCommand, from_attributes=True)


_FIELDS: dict[type, str] = {
    PlaceOrder: "place",
    ChangeStatus: "status",
    CancelOrder: "cancel",
    RetryOrder: "retry",
    DeleteOrder: "delete",
}
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(list[QueuedCommand]).decode


def pack(commands: Sequence[QueuedCommand]) -> bytes:
    """Return a batch of commands as one message."""
    return _encode(commands)


def unpack(body: bytes) -> list[QueuedCommand]:
    """Return the commands of a message. Raises ValueError for one that nobody of ours has packed."""
    commands = _decode(body)
    for command in commands:
        if sum(getattr(command, name) is not None for name in _FIELDS.values()) != 1:
            raise ValueError("a queued command must be exactly one command")
    return commands
