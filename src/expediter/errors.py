"""Every error that Expediter raises on purpose.

ExpediterError
├── BadRequest             the request cannot be read (broken JSON, a malformed key)
├── InvalidInput           it can be read, but breaks a rule; carries one Fault per field, up to a limit
├── OrderNotFound
├── WebhookNotFound
├── KeyNotFound
├── Unauthorized           no API key or password, or a wrong one
├── Forbidden              the API key lacks the scope; names it
├── Conflict               legal in itself, impossible now
│   ├── DuplicateOrder     the order id is taken
│   ├── IllegalTransition  names the legal moves
│   └── MoneyInFlight      a charge or refund has no outcome yet
├── UnknownPayment         the gateway tells of a payment that no order has asked for
├── CursorGone             what follows a reader of the feed cannot be read any more (store/feed.py)
├── PreconditionFailed     `If-Match` names another version
├── IdempotencyMismatch    the key was used with another body
├── NotYetApplied          a queued command whose predecessor is not applied yet
├── ClearedAway            a queued command of before the database was cleared or restored
├── CommandRefused         a queued command was refused after its client had been answered
├── StaleLease             a worker lost its lease; it must stop and commit nothing
├── Unavailable            nothing was stored; try again
│   ├── Overloaded         the intake queue is full
│   ├── DatabaseUnavailable
│   ├── BrokerUnavailable  the broker cannot be used now
│   ├── OrderUnreadable    its row is of a newer version, or damaged
│   ├── RedisUnavailable   a call to Redis failed or took too long (backends/redis_client.py)
│   └── CommitUncertain    the commit was sent, its outcome is not known
├── PaymentError           what a payment gateway may answer besides success
│   ├── PaymentDeclined    definite: no money moved, and none will with this key
│   ├── PaymentUnavailable definite: the charge did not happen; try again with the same key
│   ├── PaymentConflict    the key was used for something else, which is a bug: a person must look
│   └── PaymentUnknown     no answer: the charge may or may not have happened
├── CallbackRefused        a callback whose signature is wrong or old, or that cannot be read
├── FulfilmentError
│   ├── FulfilmentRefused  definite: this order cannot be fulfilled
│   └── FulfilmentUnavailable
├── ConstraintViolated     the database refused a row
├── RequestFailed          a bug kept one request of several from being carried out
├── RequestRefused         a refusal that only HTTP knows, with its status (web/problems.py)
├── AddressTaken           the address to listen on cannot be had now
├── NotUp                  `up`, `down`, `restart`: it is up already, or cannot be stopped (run/background.py)
├── NoLogs                 there is no log to show (run/logfiles.py)
├── NotAnswered            the command line asked a service, and none answered (run/asking.py)
├── Refused                it answered, and refused
└── ConfigurationError     a setting is wrong; the message says which and what to do

The HTTP status of each stands in one table in `web/problems.py`.
"""

from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

#: Faults that one refusal names, at most.
FAULTS_MAX = 100


class Fault(NamedTuple):
    """One broken rule: `field` is a JSON pointer (RFC 6901) into the body, or a parameter's name."""

    field: str
    message: str


class ExpediterError(Exception):
    """The root of the tree; its text is one sentence for the person who reads it."""


class BadRequest(ExpediterError):
    """The request cannot be read."""


class InvalidInput(ExpediterError):
    """The request breaks at least one rule."""

    def __init__(self, faults: Iterable[Fault], *, faults_max: int = FAULTS_MAX, rest: str = "") -> None:
        """Keep up to `faults_max` faults; the message is the first one's, and says when there are more.

        `rest` says why nobody has looked for more.
        """
        found = tuple(islice(faults, faults_max + 1))
        self.faults = found[:faults_max]
        first = self.faults[0]
        text = f"{first.field}: {first.message}" if first.field else first.message
        if len(found) > faults_max:
            rest = (
                f"the first of more than {faults_max} faults" if faults_max > 1 else "the first of several faults"
            )
        super().__init__(f"{text} ({rest})" if rest else text)


class OrderNotFound(ExpediterError):
    """No order has this id."""

    def __init__(self, order_id: str) -> None:
        """Remember which id was asked for."""
        self.order_id = order_id
        super().__init__("Order not found")


class UnknownPayment(ExpediterError):
    """No order has asked for a payment with this key."""


class WebhookNotFound(ExpediterError):
    """No webhook endpoint has this id."""

    def __init__(self) -> None:
        super().__init__("There is no webhook endpoint of this id")


class KeyNotFound(ExpediterError):
    """No API key has this id or name."""


class Unauthorized(ExpediterError):
    """The caller has given no key or password (`guessed` is False), or one that does not count.

    `challenge` says how to give one, as WWW-Authenticate does.
    """

    def __init__(self, message: str, *, guessed: bool, challenge: str) -> None:
        self.guessed = guessed
        self.challenge = challenge
        super().__init__(message)


class Forbidden(ExpediterError):
    """The API key counts, and lacks the scope that this call needs."""

    def __init__(self, scope: str) -> None:
        """Name the scope."""
        self.scope = scope
        super().__init__(f"This API key lacks the scope {scope}")


class AddressTaken(ExpediterError):
    """The address to listen on cannot be had now."""


class Conflict(ExpediterError):
    """The order's state does not allow it."""


class DuplicateOrder(Conflict):
    """The order id belongs to an order that exists or existed."""

    def __init__(self, order_id: str, *, deleted: bool = False) -> None:
        """Say whether the order is still there (`deleted` is False) or was deleted."""
        self.order_id = order_id
        self.deleted = deleted
        super().__init__(
            f"The id {order_id} belonged to an order that was deleted; ids are used once"
            if deleted
            else f"Order {order_id} already exists"
        )


class IllegalTransition(Conflict):
    """The lifecycle has no such move from here."""

    def __init__(self, order_id: str, status: str, wanted: str, legal: Iterable[str]) -> None:
        """Name the move that was asked for and the ones that are legal."""
        self.status = status
        self.legal = tuple(legal)
        moves = ", ".join(self.legal) or "nothing"
        super().__init__(f"Order {order_id} is {status} and cannot become {wanted}; it can become: {moves}")


class MoneyInFlight(Conflict):
    """A charge or a refund of this order has no outcome yet."""


class PreconditionFailed(ExpediterError):
    """The order has another version than the caller asked for."""

    def __init__(self, order_id: str, version: int, wanted: str = "the one that If-Match names") -> None:
        """Name the version that the order has, and the one that was asked for."""
        self.version = version
        super().__init__(f"Order {order_id} is at version {version}, not {wanted}")


class IdempotencyMismatch(ExpediterError):
    """The idempotency key was used before with another request, about `order_id` if that is known."""

    def __init__(self, order_id: str | None = None) -> None:
        """Remember the order."""
        self.order_id = order_id
        about = f", about order {order_id}" if order_id else ""
        super().__init__(f"This Idempotency-Key was used before with another request{about}")


class StaleLease(ExpediterError):
    """The job is no longer held under this fence."""


class NotYetApplied(ExpediterError):
    """What was accepted before this queued command, about the same order, is not stored yet."""


class ClearedAway(ExpediterError):
    """A queued command was accepted before the database was cleared, or restored."""


class CommandRefused(ExpediterError):
    """A queued command was accepted and could not be applied; there is no order to show instead."""


class Unavailable(ExpediterError):
    """It cannot be stored now; unless a subclass says otherwise, nothing was."""

    #: What `Retry-After` says, in seconds; None where sending it again could do it twice.
    retry_after_seconds: int | None = 1


class Overloaded(Unavailable):
    """The intake queue is full."""


class DatabaseUnavailable(Unavailable):
    """The database cannot take the write now (locked, full, gone)."""


class BrokerUnavailable(Unavailable):
    """The broker cannot be used now (gone, full, not answering in time)."""


class OrderUnreadable(Unavailable):
    """This version cannot read the order's row; a newer one that has written it can."""

    retry_after_seconds = 30

    def __init__(self, order_id: str, created_at: object, reason: object) -> None:
        """Remember its place in lists, as far as it can be read."""
        self.order_id = order_id
        self.created_at = created_at if isinstance(created_at, int) else 0
        super().__init__(f"Order {order_id} cannot be read by this version: {reason}; ask a newer one")


class CommitUncertain(Unavailable):
    """The commit was sent but its outcome is not known; only a repeat with an Idempotency-Key is safe.

    `session` names the connection it was sent on, where the database may still be at it.
    """

    retry_after_seconds = None
    session: str | None = None


class PaymentError(ExpediterError):
    """The charge did not succeed, or nobody knows."""


class PaymentDeclined(PaymentError):
    """The gateway said no; no money moved."""


class PaymentUnavailable(PaymentError):
    """The gateway did not take the request; no money moved.

    It may say in how many seconds it is worth to ask again.
    """

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class PaymentConflict(PaymentError):
    """The gateway knows the key from something else: another amount, another order. Nothing was done now."""


class PaymentUnknown(PaymentError):
    """The gateway did not answer; money may have moved."""


class CallbackRefused(ExpediterError):
    """A callback whose signature is wrong or old, or that cannot be read."""


class FulfilmentError(ExpediterError):
    """The order was not fulfilled."""


class FulfilmentRefused(FulfilmentError):
    """The order cannot be fulfilled, now or later."""


class FulfilmentUnavailable(FulfilmentError):
    """The fulfiller did not take the request; try again."""


class Refused(ExpediterError):
    """What the command line asked for was refused: the service's own words, each fault on a line."""


class ConfigurationError(ExpediterError):
    """A setting is wrong."""


class ConstraintViolated(ExpediterError):
    """The database refused a row; the transaction was rolled back."""


class RequestFailed(ExpediterError):
    """A bug kept one request from being carried out: nothing of it is stored, and the log shows why."""


def reason(error: BaseException) -> str:
    """Return what an error says; also where a library has raised one without a word."""
    return str(error) or ("it did not answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
