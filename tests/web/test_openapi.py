"""The service does what its own /openapi.json says: generated requests, good and bad, to every operation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from schemathesis.schemas import BaseSchema

from expediter.orders.order import Status
from expediter.web import operations_document
from serving import ADMIN_PASSWORD, PATIENCE_SECONDS, Serving

HERE = Path(__file__).resolve().parent
METHODS = ("get", "post", "put", "patch", "delete")
DOCUMENT: dict[str, Any] = operations_document()
OPERATIONS = [(method, path) for path, item in DOCUMENT["paths"].items() for method in METHODS if method in item]
#: Random requests to each operation, and random walks.
EXAMPLES_MAX = 3


@pytest.fixture(scope="module")
def schema(service: Serving) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json")


def test_schemathesis_finds_nothing(service: Serving, tmp_path: Path) -> None:
    """All its checks, in all its phases: examples, every limit of every field, random and stateful requests.

    No request gets a 5xx or an answer that is not in the document, what the document takes is taken, and what it
    refuses is refused; what was deleted is gone, and what was made is there.
    """
    # Keys are made on the way, and from the first one on every call needs one.
    body = {"name": "schemathesis", "scopes": ["admin"]}
    made = service.client.post("/admin/keys", json=body, headers={"X-Admin-Password": ADMIN_PASSWORD})
    program = Path(sys.executable).with_name("schemathesis")
    command = [str(program), "--config-file", str(HERE / "schemathesis.toml")]
    command += ["run", f"{service.url}/openapi.json", "--no-color", "--max-examples", str(EXAMPLES_MAX)]
    command += ["--header", f"X-Admin-Password: {ADMIN_PASSWORD}"]
    command += ["--header", f"X-API-Key: {made.json()['key']}"]
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=10 * PATIENCE_SECONDS,
    )
    revoke_keys(service)
    assert ended.returncode == 0, ended.stdout[-20_000:]
    for phase in ("Examples", "Coverage", "Fuzzing", "Stateful"):
        assert f"\u2705 {phase}" in ended.stdout, ended.stdout[-3_000:]
    assert f"Tested: {len(OPERATIONS)}" in ended.stdout


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
