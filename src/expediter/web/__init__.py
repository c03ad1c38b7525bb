"""The service over HTTP: routes, and what every request passes through."""

from __future__ import annotations

import asyncio
import re
import time
from collections import defaultdict
from collections.abc import Coroutine, Mapping
from typing import Any

import msgspec

from expediter.errors import CommitUncertain, ExpediterError, Unavailable
from expediter.settings import Compat
from expediter.store.keys import KeyRing
from expediter.web.access import allow, identify
from expediter.web.api import (
    admin,
    batch,
    events,
    health,
    keys,
    metrics,
    ops,
    orders,
    pages,
    payments,
    progress,
    webhooks,
)
from expediter.web.compat.tables import DIALECTS
from expediter.web.compat.translation import Translation
from expediter.web.context import Context
from expediter.web.http import (
    ANSWER_SECONDS_MAX,
    BODY_BYTES_MAX,
    BODY_SECONDS_MAX,
    JSON,
    App,
    BodyTooLarge,
    BodyTooSlow,
    Call,
    Reply,
    passed_on,
)
from expediter.web.limits import RateLimited
from expediter.web.openapi import openapi_document
from expediter.web.operations import Operation
from expediter.web.origins import Origins
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
    *keys.OPERATIONS,
    *health.OPERATIONS,
    *ops.OPERATIONS,
    *metrics.OPERATIONS,
)

#: Seconds between two looks for requests that take too long.
WATCH_SECONDS = 0.25

_NAME = re.compile(r"\{(\w+)\}")

#: The operations at one path, by their method.
Methods = Mapping[str, Operation]


def create_app(context: Context) -> App:
    """Return what answers calls, over an open service."""
    app: App = _Application(context)
    if context.settings.compat is not Compat.NONE:
        app = Translation(app, DIALECTS[context.settings.compat], context.queries, context.ring)
    if context.settings.rate is not None:
        app = _Known(RateLimited(app, context.settings.rate, context.tally), context.ring)
    return Origins(app, context.settings.origins) if context.settings.origins else app


class _Known:
    """An application before which it is known who calls: rates are counted for each key."""

    def __init__(self, app: App, ring: KeyRing) -> None:
        self._app = app
        self._ring = ring

    def __call__(self, call: Call) -> Reply | Coroutine[Any, Any, Reply]:
        if self._ring.asks:
            identify(call, self._ring)
        return self._app(call)


class _Application:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._ring = context.ring
        self._under_way: set[Call] = set()
        self._watch: asyncio.TimerHandle | None = None
        self._fixed: dict[str, Methods] = {}
        #: Paths that end in a name, by what stands before it; and those with a name elsewhere.
        self._ending: dict[str, tuple[str, Methods]] = {}
        self._patterns: list[tuple[re.Pattern[str], Methods]] = []
        by_path: dict[str, dict[str, Operation]] = defaultdict(dict)
        for operation in OPERATIONS:
            for path in operation.paths:
                by_path[path][operation.method] = operation
        document = openapi_document(OPERATIONS)

        async def openapi(call: Call, context: Context) -> Reply:
            return Reply(200, document, [JSON])

        by_path["/openapi.json"]["GET"] = Operation(
            paths=("/openapi.json",), handler=openapi, scope=None, summary="", answers={}
        )
        # It asks the whole service, which says no more than that it is there (RFC 9110).
        by_path["*"]["OPTIONS"] = Operation(
            paths=("*",),
            handler=openapi,
            scope=None,
            at_once=lambda call, context: Reply(204),
            summary="",
            answers={},
        )
        for path, methods in by_path.items():
            before, _, last = path.rpartition("/")
            if "{" in before:
                self._patterns.append((re.compile(_NAME.sub(r"(?P<\1>[^/]+)", path)), methods))
            elif named := _NAME.fullmatch(last):
                self._ending[before] = named[1], methods
            else:
                self._fixed[path] = methods

    def __call__(self, call: Call) -> Reply | Coroutine[Any, Any, Reply]:
        """Answer one request: at once, where nothing has to be waited for."""
        try:
            if self._ring.asks:
                identify(call, self._ring)
            operation = self._operation(call)
            if self._ring.asks:
                allow(call, operation)
            reply = operation.at_once(call, self._context) if operation.at_once is not None else None
            if reply is None:
                return self._answer(call, operation)
        except ExpediterError as error:
            reply = problem_reply(error, call.request_id)
        except Exception as error:
            reply = bug_reply(error, call.request_id)  # as below
        return passed_on(call, reply)

    async def _answer(self, call: Call, operation: Operation) -> Reply:
        self._under_way.add(call)
        if self._watch is None:
            self._watch = asyncio.get_running_loop().call_later(WATCH_SECONDS, self._end_what_takes_too_long)
        try:
            reply = await operation.handler(call, self._context)
        except ExpediterError as error:
            reply = problem_reply(error, call.request_id)
        except BodyTooLarge:
            reply = problem_reply(_too_large(), call.request_id)
        except BodyTooSlow:
            reply = problem_reply(_too_slow(), call.request_id)
        except asyncio.CancelledError:
            if time.monotonic() > call.until:
                reply = problem_reply(_took_too_long(call.method), call.request_id)
            elif self._context.draining:
                # The drain's time is up before this request was.
                reply = problem_reply(_stopping(), call.request_id)
            else:
                raise
        except Exception as error:
            # The last resort: a bug must answer this request, not end the connection without a word.
            reply = bug_reply(error, call.request_id)
        finally:
            self._under_way.remove(call)
        return passed_on(call, reply)

    def _end_what_takes_too_long(self) -> None:
        now = time.monotonic()
        for call in self._under_way:
            if call.task is not None and call.until < now:
                call.task.cancel()  # what it has asked for is carried out all the same
        self._watch = None
        if self._under_way:
            self._watch = asyncio.get_running_loop().call_later(WATCH_SECONDS, self._end_what_takes_too_long)

    def _operation(self, call: Call) -> Operation:
        """Return what a call asks for. Raises what it is refused by."""
        if call.refusal is not None:
            raise call.refusal
        methods = self._fixed.get(call.path) or self._match(call)
        operation = methods.get("GET" if call.method == "HEAD" else call.method)
        if operation is None:
            allowed = sorted(methods) + (["HEAD"] if "GET" in methods else [])
            raise RequestRefused(
                405,
                "Method not allowed",
                f"{call.path} has no {call.method}; it has {', '.join(allowed)}",
                {"Allow": ", ".join(allowed)},
            )
        call.route = operation.paths[0]
        return operation

    def _match(self, call: Call) -> Methods:
        before, _, last = call.path.rpartition("/")
        if last and before in self._ending:
            name, methods = self._ending[before]
            call.path_values = {name: last}
            return methods
        for pattern, methods in self._patterns:
            if found := pattern.fullmatch(call.path):
                call.path_values = found.groupdict()
                return methods
        raise RequestRefused(404, "Not found", f"There is nothing at {call.path}; see /docs")


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
