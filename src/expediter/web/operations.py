"""What an operation of the HTTP interface is: its route and its description in one place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

import msgspec

from expediter.store.scopes import Scope
from expediter.web.context import Context
from expediter.web.http import Call, Reply

Handler = Callable[[Call, Context], Awaitable[Reply]]
#: Answers what needs no waiting; None: the handler has to. Raises ExpediterError.
AtOnce = Callable[[Call, Context], Reply | None]


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """A query parameter or header; `schema` is JSON Schema."""

    name: str
    schema: Mapping[str, Any]
    description: str
    where: Literal["query", "header"] = "query"


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One method on one or several paths.

    `scope` is what an API key must be for, where callers need one; None: anybody may call.
    `at_once` is asked before the handler, and may spare a task of the event loop.
    `stream` is the media type in which the same comes as a stream, where it is asked for.
    `fault` is what the example of a 422 says: a field, and what is wrong with it.
    `answers` maps each status of success to what its body is (a type that msgspec knows, several of them, a media
    type, or None for none); `problems` are the statuses of refusal beyond those that every operation may answer.
    """

    paths: tuple[str, ...]
    handler: Handler
    summary: str
    answers: Mapping[int, Any]
    scope: Scope | None
    at_once: AtOnce | None = None
    method: str = "GET"
    tag: str = "orders"
    problems: tuple[int, ...] = ()
    body: Any = None
    body_required: bool = True
    parameters: tuple[Parameter, ...] = ()
    stream: str = ""
    fault: tuple[str, str] = ("/items/0/quantity", "expected `int` >= 1")


IDEMPOTENCY_KEY = Parameter(
    name="Idempotency-Key",
    where="header",
    schema={"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
    description="The same key with the same request again gives the stored answer, and does nothing.",
)
IF_MATCH = Parameter(
    name="If-Match",
    where="header",
    schema={"type": "string", "pattern": '^("[0-9]+"|\\*)$'},
    description="Only if the order still has this ETag; otherwise 412.",
)
IF_NONE_MATCH = Parameter(
    name="If-None-Match",
    where="header",
    schema={"type": "string"},  # also lists, and tags of others: what is none of ours is passed over
    description='304 if the order still has this ETag, as in `"3"`.',
)


def both(rest: str = "") -> tuple[str, ...]:
    """Return a path about orders in either family: the canonical one, and the short one."""
    return (f"/api/v1/orders{rest}", f"/orders{rest}")


def service_read(path: str, handler: Handler, summary: str, answers: Mapping[int, Any]) -> Operation:
    """Return a read about the service itself, for everybody."""
    return Operation(paths=(path,), handler=handler, scope=None, summary=summary, tag="service", answers=answers)


def query(name: str, description: str, **schema: Any) -> Parameter:
    """Return a query parameter."""
    return Parameter(name=name, schema=schema, description=description)
