"""The service does what its own /openapi.json says: generated requests, good and bad, to every operation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from expediter.orders.order import Status
from expediter.web import operations_document
from serving import ADMIN_PASSWORD, PATIENCE_SECONDS, Serving

METHODS = ("get", "post", "put", "patch", "delete")
DOCUMENT: dict[str, Any] = operations_document()
OPERATIONS = [(method, path) for path, item in DOCUMENT["paths"].items() for method in METHODS if method in item]
#: What to ask of each operation: good requests, and bad ones where it takes anything that could be wrong.
REQUESTS = [
    (method, path, mode)
    for method, path in OPERATIONS
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    if mode is GenerationMode.POSITIVE or {"parameters", "requestBody"} & DOCUMENT["paths"][path][method].keys()
]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]

#: Requests of each kind to each operation.
EXAMPLES_MAX = 15
#: Orders that one request may make up.
MADE_UP_MAX = 20


@pytest.fixture(scope="module")
def schema(service: Serving) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json")


def acceptable(body: Any) -> Any:
    """Return a generated order with a customer and items that no other field contradicts."""
    kept = ("customer_name", "metadata", "order_id", "payment_token")
    return {
        **{name: body[name] for name in kept if body.get(name) is not None},
        "user_id": 1,
        "items": [{"name": "Pen", "quantity": 2, "price": "1.20"}],
    }


def bounded(body: Any) -> Any:
    """Return a body that asks for few orders, if it asks for a number of them at all."""
    if not isinstance(body, dict):
        return body
    counts = ("count", "total_entries")
    return {
        name: min(value, MADE_UP_MAX) if name in counts and type(value) is int else value
        for name, value in body.items()
    }


@pytest.mark.parametrize(
    ("method", "path", "mode"), REQUESTS, ids=[f"{m} {p} {mode.value}" for m, p, mode in REQUESTS]
)
def test_every_answer_is_in_the_document(
    service: Serving, schema: BaseSchema, method: str, path: str, mode: GenerationMode
) -> None:
    """No request to this operation gets a 5xx, or an answer that /openapi.json does not describe."""
    operation = schema[path][method.upper()]
    webhook = subscribe(service) if "{webhook_id}" in path else ""

    @settings(
        max_examples=EXAMPLES_MAX,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), known=st.booleans())
    def ask(case: schemathesis.Case, known: bool) -> None:
        if known and "order_id" in case.path_parameters:
            case.path_parameters["order_id"] = place(service)
        if known and "webhook_id" in case.path_parameters:
            case.path_parameters["webhook_id"] = webhook
        if known and method == "post" and path.endswith("/orders") and mode is GenerationMode.POSITIVE:
            case.body = acceptable(case.body)
        case.body = bounded(case.body)
        case.call_and_validate(
            headers={"X-Admin-Password": ADMIN_PASSWORD} if path.startswith("/admin") else None,
            checks=CHECKS,
            timeout=PATIENCE_SECONDS,
        )

    ask()
    revoke_keys(service)
    for each in service.client.get("/api/v1/webhooks").json()["webhooks"]:
        service.client.delete(f"/api/v1/webhooks/{each['id']}")


def subscribe(service: Serving) -> str:
    """Make a webhook endpoint where nobody listens, and return its id."""
    made = service.client.post("/api/v1/webhooks", json={"url": "http://127.0.0.1:9/"})
    webhook_id: str = made.json()["id"]
    return webhook_id


def revoke_keys(service: Serving) -> None:
    """Let everybody call again without a key."""
    admin = {"X-Admin-Password": ADMIN_PASSWORD}
    for each in service.client.get("/admin/keys", headers=admin).json()["keys"]:
        if each["revoked_at"] is None:
            service.client.delete(f"/admin/keys/{each['id']}", headers=admin)


def place(service: Serving) -> str:
    order_id: str = service.client.post("/orders", json={"user_id": 1, "item_ids": [1]}).json()["order_id"]
    return order_id


def test_the_document_is_openapi_31(service: Serving, schema: BaseSchema) -> None:
    """/openapi.json is an OpenAPI 3.1 document that schemathesis finds valid."""
    answer = service.client.get("/openapi.json")

    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["openapi"].startswith("3.1")
    schema.validate()


def test_every_operation_is_described(service: Serving) -> None:
    """Each operation has a summary, a description, an id of its own, and says how it refuses."""
    paths = service.client.get("/openapi.json").json()["paths"]
    operations = [item[method] for item in paths.values() for method in item if method in METHODS]

    assert all(operation["summary"] and operation["description"] for operation in operations)
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for operation in operations:
        for status, answer in operation["responses"].items():
            if int(status) >= 400 and status != "503":
                assert list(answer["content"]) == ["application/problem+json"]


def test_every_promised_path_is_there(service: Serving) -> None:
    """Both families have every call on orders."""
    paths = service.client.get("/openapi.json").json()["paths"]
    promised = {
        "": {"get", "post"},
        "/{order_id}": {"get", "delete"},
        "/{order_id}/status": {"patch"},
        "/{order_id}/cancel": {"post"},
        "/{order_id}/retry": {"post"},
        "/{order_id}/events": {"get"},
        "/{order_id}/explain": {"get"},
        "/metrics": {"get"},
        "/status": {"get"},
        "/populate": {"post"},
    }

    for family in ("/orders", "/api/v1/orders"):
        for rest, methods in promised.items():
            assert methods <= paths[family + rest].keys()
    assert paths.keys() >= {"/admin/seed", "/admin/reset", "/health", "/healthz", "/readyz", "/docs", "/redoc"}


def test_every_idempotent_change_takes_a_key(service: Serving) -> None:
    """Each POST, PATCH and DELETE describes the Idempotency-Key header."""
    paths = service.client.get("/openapi.json").json()["paths"]
    without = [
        f"{method} {path}"
        for path, item in paths.items()
        for method in item
        if method in ("post", "patch", "delete")
        and "Idempotency-Key" not in [parameter["name"] for parameter in item[method].get("parameters", [])]
    ]

    assert without == []


def test_the_examples_of_the_product_match_the_document(service: Serving) -> None:
    """The amounts of an order are numbers in the document, and its id a text of the promised alphabet."""
    document = service.client.get("/openapi.json").json()
    parameter = document["paths"]["/orders/{order_id}"]["get"]["parameters"][0]["schema"]["pattern"]

    assert re.fullmatch(parameter, "ORD003")
    assert not re.fullmatch(parameter, "metrics")
    assert not re.fullmatch(parameter, "a/b")


def media_types(part: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every body that this part of an operation describes in JSON."""
    for kind, content in part.get("content", {}).items():
        if kind.endswith("json"):
            yield kind, content


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_body_has_an_example_that_fits(method: str, path: str) -> None:
    """What is sent and what is answered have an example each, and its schema holds for it."""
    operation = DOCUMENT["paths"][path][method]
    found = [*media_types(operation.get("requestBody", {}))]
    for answer in operation["responses"].values():
        found += media_types(answer)
    assert found
    for _, content in found:
        schema = {**content["schema"], "components": DOCUMENT["components"]}
        jsonschema_rs.Draft202012Validator(schema).validate(content["example"])


#: What an example comes to where it cannot succeed as it stands: nothing was paid yet, and nobody has signed it.
REFUSED = {"refunds": 409, "callback": 401, "stripe": 401}


@pytest.mark.parametrize(("method", "path"), [each for each in OPERATIONS if each[0] in ("post", "patch")])
def test_an_example_works_as_it_is(idle_service: Serving, method: str, path: str) -> None:
    """Sent as it stands, to an order that was just placed where there is one in the path, it succeeds."""
    operation = DOCUMENT["paths"][path][method]
    order_id = place(idle_service)
    if path.endswith("/retry"):
        for status in ("processing", "failed"):
            idle_service.client.patch(f"/orders/{order_id}/status", json={"status": status})
    webhook = subscribe(idle_service) if "{webhook_id}" in path else ""
    (content,) = [content for _, content in media_types(operation.get("requestBody", {}))] or [{}]
    answer = idle_service.client.request(
        method,
        path.replace("{order_id}", order_id).replace("{webhook_id}", webhook),
        json=content.get("example"),
        headers={"X-Admin-Password": ADMIN_PASSWORD},
    )
    revoke_keys(idle_service)
    refused = REFUSED.get(path.rpartition("/")[2])
    assert answer.is_success if refused is None else answer.status_code == refused, answer.text
    assert str(answer.status_code) in operation["responses"]


def test_generated_clients_get_names_words_and_times() -> None:
    """Short names, each once; statuses and events as words; times as times; amounts as numbers."""
    schemas = DOCUMENT["components"]["schemas"]
    ids = [DOCUMENT["paths"][path][method]["operationId"] for method, path in OPERATIONS]
    assert {"createOrder", "listOrders", "getOrder", "cancelOrder", "createOrderShort"} <= set(ids)
    assert next(iter(DOCUMENT["paths"])) == "/api/v1/orders"
    order = schemas["OrderDocument"]["properties"]
    assert order["status"]["enum"] == [status.value for status in Status]
    assert "voided" in order["payment_status"]["enum"]
    assert order["created_at"] == {"type": "string", "format": "date-time"}
    assert {"type": "string", "format": "date-time"} in order["completed_at"]["anyOf"]
    assert order["total_amount"] == {"type": "number"}
    assert "order.placed" in schemas["EventDocument"]["properties"]["type"]["enum"]
    assert {each["type"] for each in schemas["ItemBody"]["properties"]["price"]["anyOf"]} == {
        "number",
        "string",
        "null",
    }
    tags = [tag["name"] for tag in DOCUMENT["tags"]]
    assert tags[-1] == "short paths"
    assert {
        tag for path, item in DOCUMENT["paths"].items() for each in item.values() for tag in each["tags"]
    } == set(tags)
