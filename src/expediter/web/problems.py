"""Errors as RFC 9457 problem documents; the one table that gives each error its HTTP status."""

from __future__ import annotations

import msgspec
import structlog

from expediter.errors import (
    BadRequest,
    CommandRefused,
    Conflict,
    ConstraintViolated,
    DuplicateOrder,
    ExpediterError,
    Fault,
    Forbidden,
    IdempotencyMismatch,
    IllegalTransition,
    InvalidInput,
    KeyNotFound,
    MoneyInFlight,
    OrderNotFound,
    PreconditionFailed,
    Unauthorized,
    Unavailable,
    UnknownPayment,
    WebhookNotFound,
)
from expediter.store.feed import CursorGone
from expediter.web.http import Call, Header, Reply

log = structlog.get_logger(__name__)


class RequestRefused(ExpediterError):
    """A refusal that only HTTP knows: wrong method, media type, size, credentials."""

    def __init__(self, status: int, title: str, error: str, headers: dict[str, str] | None = None) -> None:
        """Answer with `status`, a short `title`, one sentence, and `headers`."""
        self.status = status
        self.title = title
        self.headers = headers or {}
        super().__init__(error)


class FieldError(msgspec.Struct, frozen=True):
    """One broken rule: a JSON pointer into the body (or a parameter's name), and what is wrong."""

    field: str
    message: str


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An RFC 9457 problem document; `error` says the same in one sentence."""

    type: str
    title: str
    status: int
    detail: str
    error: str
    request_id: str | None = None
    errors: list[FieldError] | None = None
    order_id: str | None = None
    legal: list[str] | None = None
    begin: str | None = None


#: Every error that reaches a client: its status and its title. The first row that fits counts.
STATUSES: tuple[tuple[type[ExpediterError], int, str], ...] = (
    (BadRequest, 400, "Bad request"),
    (Unauthorized, 401, "Unauthorized"),
    (Forbidden, 403, "Forbidden"),
    (OrderNotFound, 404, "Not found"),
    (UnknownPayment, 404, "Unknown payment"),
    (WebhookNotFound, 404, "Not found"),
    (KeyNotFound, 404, "Not found"),
    (DuplicateOrder, 409, "Duplicate order"),
    (IllegalTransition, 409, "Illegal transition"),
    (MoneyInFlight, 409, "Money in flight"),
    (CursorGone, 410, "Gone"),
    (Conflict, 409, "Conflict"),
    (CommandRefused, 409, "Refused"),
    (PreconditionFailed, 412, "Precondition failed"),
    (InvalidInput, 422, "Invalid input"),
    (IdempotencyMismatch, 422, "Idempotency key reused"),
    (Unavailable, 503, "Unavailable"),
    (ConstraintViolated, 500, "Internal error"),
)

_encode = msgspec.json.Encoder().encode
_JSON = (b"content-type", b"application/problem+json")
#: Some refusals say who has asked for what, and none is worth keeping.
_NO_STORE = (b"cache-control", b"no-store")


def problem_reply(error: ExpediterError, request_id: str) -> Reply:
    """Return the answer for a foreseen error."""
    if isinstance(error, RequestRefused):
        status, title = error.status, error.title
    else:
        status, title = _status(error)
    if status == 500:
        return bug_reply(error, request_id)
    headers: list[Header] = [_JSON, _NO_STORE]
    problem = Problem(
        type=f"urn:expediter:problem:{title.lower().replace(' ', '-')}",
        title=title,
        status=status,
        detail=str(error),
        error=str(error),
        request_id=request_id,
        errors=_field_errors(error.faults) if isinstance(error, InvalidInput) else None,
        order_id=error.order_id if isinstance(error, (DuplicateOrder, IdempotencyMismatch)) else None,
        legal=list(error.legal) if isinstance(error, IllegalTransition) else None,
        begin=str(error.begin) if isinstance(error, CursorGone) else None,
    )
    if isinstance(error, Unavailable) and error.retry_after_seconds is not None:
        headers.append((b"retry-after", str(error.retry_after_seconds).encode()))
    if isinstance(error, RequestRefused):
        headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    if isinstance(error, Unauthorized):
        headers.append((b"www-authenticate", error.challenge.encode()))
    if isinstance(error, Forbidden):
        said = f'Bearer realm="expediter", error="insufficient_scope", scope="{error.scope}"'
        headers.append((b"www-authenticate", said.encode()))
    if isinstance(error, PreconditionFailed):
        headers.append((b"etag", f'"{error.version}"'.encode()))
    return Reply(status, _encode(problem), headers)


def bug_reply(error: Exception, request_id: str) -> Reply:
    """Log an error that nobody foresaw, and return a 500 that says its request id and nothing else."""
    log.error("a request failed", often=True, request_id=request_id, exc_info=error)
    text = f"Something went wrong here, not with your request; it is logged as {request_id}"
    problem = Problem(
        type="about:blank",
        title="Internal error",
        status=500,
        detail=text,
        error=text,
        request_id=request_id,
    )
    return Reply(500, _encode(problem), [_JSON, _NO_STORE])


def not_taken(call: Call, *media_types: str) -> RequestRefused:
    """Return why a body is refused that is not of `media_types`, with the header that says what is (RFC 9110)."""
    taken = {"Accept-Encoding": "identity"} if call.packed else {"Accept": ", ".join(media_types)}
    how = f"Send the body as {' or '.join(media_types)}, without a Content-Encoding"
    return RequestRefused(415, "Unsupported media type", how, taken)


def status_of(error: ExpediterError) -> int:
    """Return the HTTP status of an error."""
    return error.status if isinstance(error, RequestRefused) else _status(error)[0]


def _status(error: ExpediterError) -> tuple[int, str]:
    for kind, status, title in STATUSES:
        if isinstance(error, kind):
            return status, title
    return 500, "Internal error"


def _field_errors(faults: tuple[Fault, ...]) -> list[FieldError]:
    return [FieldError(fault.field, fault.message) for fault in faults]
