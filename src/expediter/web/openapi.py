"""The OpenAPI 3.1 document, made from the same table that routes requests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any, get_args, get_origin

import msgspec

from expediter import __version__
from expediter.store.scopes import Scope
from expediter.web.http import to_json
from expediter.web.operations import Operation, Parameter
from expediter.web.problems import Problem
from expediter.web.schemas import EXAMPLES, PATH_VALUES, operation_id, problem_example, refine

_SHORT = "short paths"
_REF = "#/components/schemas/{name}"
_DESCRIPTION = """Takes orders, stores each one before it answers, charges and fulfils them in the background.

Amounts are exact: send a number or a string, it is read as decimal text.
A whole number has no point: `2`, not `2.0`.

Every refusal is a problem document (RFC 9457) that also carries `error`, one sentence."""

#: The tags, in the order in which the pages show them.
_TAGS = {
    "orders": "Place orders, read them, and change them.",
    "payments": "An order's money: what goes back, and what the payment gateway tells by itself.",
    "events": "Every change of every order, in the order in which it was stored.",
    "webhooks": "Send events to addresses, signed by the Standard Webhooks specification.",
    "progress": "How things stand: one order explained, counts and averages, the queue.",
    "service": "Whether the service is well, and the pages that describe it.",
    "admin": "For the operator: with the password that ADMIN_PASSWORD sets, or an API key for `admin`.",
    _SHORT: "The same calls under `/orders`, as older clients know them; `POST` answers 201 there.",
}
#: Statuses that any operation may answer.
_ALWAYS = (400, 405, 429, 503)
_HEADERS = {
    "WWW-Authenticate": {"schema": {"type": "string"}, "description": "How to say who calls (RFC 6750, 7617)."},
    "Allow": {"schema": {"type": "string"}, "description": "The methods that this path has."},
    "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."},
    "ETag": {"schema": {"type": "string"}, "description": "The order's version, in quotes."},
    "Location": {"schema": {"type": "string"}, "description": "Where the order is."},
}
_HEADERS_BY_STATUS = {
    201: ("Location", "ETag"),
    401: ("WWW-Authenticate",),
    405: ("Allow",),
    429: ("Retry-After",),
    503: ("Retry-After",),
}


def openapi_document(operations: Sequence[Operation]) -> bytes:
    """Return the document for these operations as JSON."""
    types: list[Any] = [Problem]
    for operation in operations:
        for body in operation.answers.values():
            types += [kind for kind in (body if isinstance(body, tuple) else (body,)) if isinstance(kind, type)]
        types += [operation.body] if operation.body is not None else []
    _, components = msgspec.json.schema_components(types, ref_template=_REF)
    refine(components)
    paths: dict[str, dict[str, Any]] = {}
    for short in (False, True):
        for operation in operations:
            for path in operation.paths:
                if _is_short(path) is short:
                    paths.setdefault(path, {})[operation.method.lower()] = _operation(operation, path)
    return to_json(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "Expediter",
                "version": __version__,
                "description": _DESCRIPTION,
                "contact": {"name": "The developers of Expediter"},
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "servers": [{"url": "/", "description": "This service"}],
            "tags": [{"name": name, "description": description} for name, description in _TAGS.items()],
            "security": [],
            "paths": paths,
            "components": {
                "schemas": components,
                "securitySchemes": {
                    "bearerKey": {"type": "http", "scheme": "bearer", "description": "An API key: `exp_...`"},
                    "headerKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                    "adminPassword": {"type": "apiKey", "in": "header", "name": "X-Admin-Password"},
                    "adminBasic": {"type": "http", "scheme": "basic"},
                },
            },
        }
    )


def _operation(operation: Operation, path: str) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation_id(operation.handler, short=_is_short(path)),
        "summary": operation.summary,
        "description": _description(operation),
        "tags": [_SHORT if _is_short(path) else operation.tag],
        "responses": {
            **{str(status): _answer(status, body, operation.stream) for status, body in operation.answers.items()},
            **{str(status): _problem(status, operation.fault) for status in _problem_statuses(operation, path)},
        },
    }
    parameters = [_path_parameter(name) for name in re.findall(r"{(\w+)}", path)]
    parameters += [_parameter(parameter) for parameter in operation.parameters]
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        described["requestBody"] = {
            "required": operation.body_required,
            "content": {"application/json": _content(operation.body)},
        }
    described["security"] = _security(operation)
    return described


def _description(operation: Operation) -> str:
    """Return what it does, and the scope that it needs: of keys that are no OAuth, `security` cannot say that."""
    text = (operation.handler.__doc__ or "").strip()
    if operation.scope is None:
        return text
    return f"{text}\n\nWhere callers need an API key: one for `{operation.scope}`."


def _security(operation: Operation) -> list[dict[str, list[str]]]:
    """Return the ways to call it. Without any, there is one more: where there is no API key, nobody needs one."""
    if operation.scope is None:
        return []
    ways: list[dict[str, list[str]]] = [{"bearerKey": []}, {"headerKey": []}]
    if operation.scope is Scope.ADMIN:
        ways += [{"adminPassword": []}, {"adminBasic": []}]
    return [*ways, {}]


def _is_short(path: str) -> bool:
    return path == "/orders" or path.startswith("/orders/")


def _problem_statuses(operation: Operation, path: str) -> Iterable[int]:
    statuses = {*_ALWAYS, *operation.problems}
    if operation.scope is not None:
        statuses |= {401, 403}
    if operation.body is not None:
        statuses |= {408, 413, 415, 422}
    if operation.parameters:
        statuses |= {422}
    if "{" in path:
        statuses |= {404, 422}
    if any(parameter.name == "Idempotency-Key" for parameter in operation.parameters):
        statuses |= {408, 413, 422}
    return sorted(statuses)


def _answer(status: int, body: Any, stream: str) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": HTTPStatus(status).phrase}
    if isinstance(body, str):
        answer["content"] = {body: {"schema": {"type": "string"}}}
    elif body is not None:
        answer["content"] = {"application/json": _content(body)}
        if stream:
            answer["content"][stream] = {"schema": {"type": "string"}}
    return _with_headers(answer, status)


def _problem(status: int, fault: tuple[str, str]) -> dict[str, Any]:
    phrase = HTTPStatus(status).phrase
    content = {"schema": _schema(Problem), "example": problem_example(status, phrase, fault)}
    return _with_headers({"description": phrase, "content": {"application/problem+json": content}}, status)


def _content(body: Any) -> dict[str, Any]:
    """Return the schema of a JSON body, and an example of it."""
    kind: Any = body[0] if isinstance(body, tuple) else body
    listed: Any = get_origin(kind)
    if listed is list:
        return {"schema": _schema(body), "example": [EXAMPLES[get_args(kind)[0].__name__]]}
    return {"schema": _schema(body), "example": EXAMPLES[kind.__name__]}


def _with_headers(answer: dict[str, Any], status: int) -> dict[str, Any]:
    names = _HEADERS_BY_STATUS.get(status, ())
    if names:
        answer["headers"] = {name: _HEADERS[name] for name in names}
    return answer


def _schema(kind: Any) -> dict[str, Any]:
    if isinstance(kind, tuple):
        return {"anyOf": [_schema(each) for each in kind]}
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=_REF)
    return schema


def _path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": dict(PATH_VALUES[name])}


def _parameter(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "in": parameter.where,
        "required": False,
        "description": parameter.description,
        "schema": dict(parameter.schema),
    }
