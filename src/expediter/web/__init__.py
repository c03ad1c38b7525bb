"""The service over HTTP: routes, and what every request passes through."""

from __future__ import annotations

import asyncio
import re
import time
from collections import defaultdict

import msgspec
import uuid_utils
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from expediter.errors import BadRequest, CommitUncertain, ExpediterError, Unavailable
from expediter.settings import Compat
from expediter.web.api import admin, batch, events, ops, orders, pages, payments, progress, webhooks
from expediter.web.compat.tables import DIALECTS
from expediter.web.compat.translation import Translation
from expediter.web.context import Context
from expediter.web.http import (
    ANSWER_SECONDS_MAX,
    BODY_BYTES_MAX,
    BODY_SECONDS_MAX,
    HEADER_BYTES_MAX,
    JSON,
    BodyTooLarge,
    BodyTooSlow,
    Call,
    Header,
    Reply,
)
from expediter.web.openapi import openapi_document
from expediter.web.operations import Handler, Operation
from expediter.web.problems import RequestRefused, bug_reply, problem_reply

#: Every operation, in the order of the documentation.
OPERATIONS: tuple[Operation, ...] = (
    *orders.OPERATIONS,
    *pages.OPERATIONS,
    *batch.OPERATIONS,
    *payments.OPERATIONS,
    *events.OPERATIONS,
    *webhooks.OPERATIONS,
    *progress.OPERATIONS,
    *admin.OPERATIONS,
    *ops.OPERATIONS,
)

#: Seconds between two looks for requests that take too long.
WATCH_SECONDS = 0.25

#: Seconds for which a browser may remember that an origin is let in.
PREFLIGHT_SECONDS = 600
#: What a page on another origin may read of an answer, besides its body.
_EXPOSED = ("ETag", "Location", "Retry-After", "Idempotency-Replayed", "X-Request-ID", "WWW-Authenticate")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def create_app(context: Context) -> ASGIApp:
    """Return the ASGI application over an open service."""
    app: ASGIApp = _Application(context)
    if context.settings.compat is not Compat.NONE:
        app = Translation(app, DIALECTS[context.settings.compat], context.queries)
    origins = context.settings.origins
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST", "PATCH", "DELETE"],
        allow_headers=["*"],
        expose_headers=_EXPOSED,
        max_age=PREFLIGHT_SECONDS,
    )


class _Application:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._under_way: dict[Call, asyncio.Task[object] | None] = {}
        self._watch: asyncio.TimerHandle | None = None
        #: The event loop that serves; to ask for it costs a system call each time.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fixed: dict[str, dict[str, Handler]] = defaultdict(dict)
        self._routes: list[tuple[Route, dict[str, Handler]]] = []
        by_path: dict[str, dict[str, Handler]] = defaultdict(dict)
        for operation in OPERATIONS:
            for path in operation.paths:
                by_path[path][operation.method] = operation.handler
        document = openapi_document(OPERATIONS)

        async def openapi(call: Call, context: Context) -> Reply:
            return Reply(200, document, [JSON])

        by_path["/openapi.json"]["GET"] = openapi
        for path, handlers in by_path.items():
            if "{" in path:
                self._routes.append((Route(path, endpoint=self), handlers))
            else:
                self._fixed[path] = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            raise RuntimeError(f"this service speaks HTTP, not {scope['type']}")
        path: str = scope["path"]
        if len(path) > 1 and path[-1] == "/":
            scope["path"] = path[:-1]
        passed_on, request_id, header_bytes, hosts = _passed_on(scope["headers"])
        call = Call(scope, receive, request_id)
        loop = self._loop = self._loop or asyncio.get_running_loop()
        self._under_way[call] = asyncio.current_task(loop)
        if self._watch is None:
            self._watch = loop.call_later(WATCH_SECONDS, self._end_what_takes_too_long)
        try:
            if header_bytes > HEADER_BYTES_MAX:
                raise RequestRefused(431, "Headers too large", f"Send at most {HEADER_BYTES_MAX} bytes of headers")
            if hosts != 1 and (hosts or scope["http_version"] == "1.1"):
                raise BadRequest(f"The request has {hosts or 'no'} Host headers; HTTP/1.1 asks for one")
            handler = self._handler(call)
            reply = await handler(call, self._context)
        except ExpediterError as error:
            reply = problem_reply(error, request_id)
        except BodyTooLarge:
            reply = problem_reply(_too_large(), request_id)
        except BodyTooSlow:
            reply = problem_reply(_too_slow(), request_id)
        except asyncio.CancelledError:
            if time.monotonic() > call.until:
                reply = problem_reply(_took_too_long(scope["method"]), request_id)
            elif self._context.draining:
                # The drain's time is up before this request was.
                reply = problem_reply(_stopping(), request_id)
            else:
                raise
        except Exception as error:
            # The last resort: a bug must answer this request, not end the connection without a word.
            reply = bug_reply(error, request_id)
        finally:
            del self._under_way[call]
        reply.headers += passed_on
        await reply.send(send)

    def _end_what_takes_too_long(self) -> None:
        now = time.monotonic()
        for call, task in self._under_way.items():
            if task is not None and call.until < now:
                task.cancel()  # what it has asked for is carried out all the same
        self._watch = None
        if self._under_way:
            self._watch = asyncio.get_running_loop().call_later(WATCH_SECONDS, self._end_what_takes_too_long)

    def _handler(self, call: Call) -> Handler:
        handlers = self._fixed.get(call.scope["path"])
        if handlers is None:
            handlers = self._match(call)
        method = call.scope["method"]
        handler = handlers.get("GET" if method == "HEAD" else method)
        if handler is None:
            allowed = sorted(handlers) + (["HEAD"] if "GET" in handlers else [])
            raise RequestRefused(
                405,
                "Method not allowed",
                f"{call.path} has no {method}; it has {', '.join(allowed)}",
                {"Allow": ", ".join(allowed)},
            )
        return handler

    def _match(self, call: Call) -> dict[str, Handler]:
        for route, handlers in self._routes:
            match, found = route.matches(call.scope)
            if match is not Match.NONE:
                call.path_values = found["path_params"]
                return handlers
        raise RequestRefused(404, "Not found", f"There is nothing at {call.path}; see /docs")


def _passed_on(headers: list[Header]) -> tuple[list[Header], str, int, int]:
    """Return the headers that go back (as they came; the request id may be made), the bytes of all, the hosts."""
    passed: list[Header] = []
    request_id = ""
    size = hosts = 0
    for name, value in headers:
        size += len(name) + len(value)
        if name == b"host":
            hosts += 1
        elif name == b"x-request-id" and _REQUEST_ID.fullmatch(value.decode("latin-1")):
            request_id = value.decode("latin-1")
        elif name == b"traceparent" and _TRACEPARENT.fullmatch(value):
            passed.append((name, value))
    request_id = request_id or uuid_utils.uuid7().hex
    passed.append((b"x-request-id", request_id.encode()))
    return passed, request_id, size, hosts


def _took_too_long(method: str) -> Unavailable:
    took = f"It was not done after {ANSWER_SECONDS_MAX:g} seconds"
    if method in ("GET", "HEAD"):
        return Unavailable(f"{took}; try again")
    return CommitUncertain(f"{took}, and may yet be; send it again with the same Idempotency-Key, or look")


def _too_large() -> RequestRefused:
    error = f"The body has more than {BODY_BYTES_MAX} bytes"
    return RequestRefused(413, "Body too large", error, {"Connection": "close"})


def _too_slow() -> RequestRefused:
    error = f"The body took more than {BODY_SECONDS_MAX:g} seconds"
    return RequestRefused(408, "Request timeout", error, {"Connection": "close"})


def _stopping() -> RequestRefused:
    error = "The service stops, and this request was not answered in time; it may have been carried out"
    return RequestRefused(503, "Unavailable", error, {"Connection": "close"})


def operations_document() -> dict[str, object]:
    """Return the OpenAPI document as an object, for tools."""
    decoded: dict[str, object] = msgspec.json.decode(openapi_document(OPERATIONS))
    return decoded
