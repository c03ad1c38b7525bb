"""Writes docs/expediter.postman_collection.json from the OpenAPI document: `make docs`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from expediter.web import operations_document

ROOT = Path(__file__).resolve().parents[1]
COLLECTION = ROOT / "docs" / "expediter.postman_collection.json"
_FORMAT = "https://schema.getpostman.com/json/collection/v2.1.0/collection.json"

_DESCRIPTION = """Every call of Expediter, from top to bottom. Set `base_url`, and for the calls of the operator
`admin_password`: one of them removes every order. Where callers need an API key, set `api_key`.

`order_id` is the order that was placed last, `webhook_id` the endpoint and `key_id` the API key that was made
last. Calls that change an order take `declined_id`: a script before each of them places an order whose payment is
declined, and waits until it is."""

#: The calls that clients of the scalable order processing system make: a name, and what is called.
FOUR_CALLS = "The four calls of the scalable order processing system"
_FOUR_CALLS = (
    ("Place an order", "post", "/orders"),
    ("Get the order", "get", "/orders/{order_id}"),
    ("The state of the queue", "get", "/orders/status"),
    ("Counts and averages", "get", "/orders/metrics"),
)
_FOUR_CALLS_BODY = {"user_id": 1, "item_ids": [101, 102, 103], "total_amount": 59.99}
#: That service answers 200, and this one does with COMPAT=streams.
_FOUR_CALLS_STATUSES = (200, 201, 202)

#: What is answered where nobody has signed the body, and to a refund of an order that may not be paid yet.
_OTHERWISE = {"paymentCallback": (401,), "stripeCallback": (401,), "refundPayment": (201, 202, 409)}
#: Calls that want an order that is at rest and can still be cancelled, retried and deleted: a declined one.
_ON_DECLINED = ("changeStatus", "cancelOrder", "retryOrder", "deleteOrder")
_PLACE_DECLINED = """
const base = pm.variables.get("base_url");
const key = pm.variables.get("api_key");
const order = {
  customer_id: "customer_123",
  payment_token: "tok_declined",
  items: [{ item_id: "item_001", quantity: 1, price: 12.99 }],
};
const placing = {
  url: `${base}/api/v1/orders`,
  method: "POST",
  header: { "Content-Type": "application/json", "X-API-Key": key },
  body: { mode: "raw", raw: JSON.stringify(order) },
};
function look(id, version, looks) {
  const header = { "If-None-Match": version, "X-API-Key": key };
  const asked = { url: `${base}/api/v1/orders/${id}?wait=5`, header };
  pm.sendRequest(asked, (error, response) => {
    if (error) throw error;
    const declined = response.code === 200 && response.json().status === "payment_failed";
    if (!declined && looks > 1) look(id, response.headers.get("ETag"), looks - 1);
  });
}
pm.sendRequest(placing, (error, response) => {
  if (error) throw error;
  const id = response.json().order_id;
  pm.collectionVariables.set("declined_id", id);
  look(id, response.headers.get("ETag"), 30);
});
""".strip()

#: Calls whose body could only repeat the password, which comes in a header.
_WITHOUT_BODY = ("adminReset", "adminVerify")

#: What is asked of an answer besides its status, by the operation's name: JavaScript, where `body` is the answer.
_CHECKS: Mapping[str, tuple[str, str]] = {
    "createOrder": (
        "has an id, which becomes order_id",
        'pm.expect(body.order_id).to.be.a("string"); pm.collectionVariables.set("order_id", body.order_id);',
    ),
    "getOrder": ("is the order", 'pm.expect(body.order_id).to.eql(pm.variables.get("order_id"));'),
    "listOrders": (
        "has the order",
        'pm.expect(body.orders.map((each) => each.order_id)).to.include(pm.variables.get("order_id"));',
    ),
    "orderEvents": ("begins with the order", 'pm.expect(body.events[0].type).to.eql("order.placed");'),
    "explainOrder": ("says why", 'pm.expect(body.why).to.be.a("string");'),
    "changeStatus": ("is cancelled", 'pm.expect(body.status).to.eql("cancelled");'),
    "cancelOrder": ("is cancelled", 'pm.expect(body.status).to.eql("cancelled");'),
    "retryOrder": ("is the order", 'pm.expect(body.order_id).to.eql(pm.variables.get("declined_id"));'),
    "createWebhook": (
        "has an id, which becomes webhook_id, and a secret",
        'pm.expect(body.secret).to.match(/^whsec_/); pm.collectionVariables.set("webhook_id", body.id);',
    ),
    "getWebhook": ("is the endpoint", 'pm.expect(body.id).to.eql(pm.variables.get("webhook_id"));'),
    "listWebhooks": (
        "has the endpoint",
        'pm.expect(body.webhooks.map((each) => each.id)).to.include(pm.variables.get("webhook_id"));',
    ),
    "testWebhook": ("says what came of it", 'pm.expect(body.delivered).to.be.a("boolean");'),
    "changeWebhook": ("is paused", 'pm.expect(body.status).to.eql("paused");'),
    "createBatch": ("takes every row", "pm.expect([body.accepted, body.refused]).to.eql([1, 0]);"),
    "populate": ("makes every order", "pm.expect([body.success_count, body.failure_count]).to.eql([4, 0]);"),
    "adminSeed": ("makes every order", "pm.expect(body.count).to.eql(10);"),
    "adminVerify": ("finds no broken law", "pm.expect(body.found).to.eql(0);"),
    "createKey": (
        "has a key, which is shown once, and an id, which becomes key_id",
        'pm.expect(body.key).to.match(/^exp_/); pm.collectionVariables.set("key_id", body.id);',
    ),
    "listKeys": (
        "has the key",
        'pm.expect(body.keys.map((each) => each.id)).to.include(pm.variables.get("key_id"));',
    ),
    "revokeKey": ("is revoked", 'pm.expect(body.revoked_at).to.be.a("string");'),
    "orderMetrics": ("has counts", 'pm.expect(body.total_orders).to.be.a("number");'),
    "queueStatus": ("has the length", 'pm.expect(body.queue_length).to.be.a("number");'),
}


def collection(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the collection: the four calls, then every operation of the document by its tag."""
    paths = document["paths"]
    folders = [{"name": FOUR_CALLS, "item": list(_four_calls(paths))}]
    for tag in document["tags"]:
        items = [
            _item(operation["summary"], method, path, operation)
            for path, methods in paths.items()
            for method, operation in methods.items()
            if tag["name"] in operation["tags"]
        ]
        folders.append({"name": tag["name"], "description": tag["description"], "item": items})
    variables = {"base_url": "http://127.0.0.1:8000", "order_id": "", "declined_id": "", "webhook_id": ""}
    variables |= {"key_id": "", "api_key": "", "admin_password": ""}
    return {
        "info": {"name": document["info"]["title"], "description": _DESCRIPTION, "schema": _FORMAT},
        "item": folders,
        "variable": [{"key": key, "value": value} for key, value in variables.items()],
    }


def _four_calls(paths: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, method, path in _FOUR_CALLS:
        operation = paths[path][method]
        item = _item(name, method, path, operation, _FOUR_CALLS_STATUSES if method == "post" else ())
        if method == "post":
            item["request"]["body"] = _body(_FOUR_CALLS_BODY)
        yield item


def _item(
    name: str, method: str, path: str, operation: Mapping[str, Any], statuses: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Return one request with its scripts; `statuses` are the ones to ask for, if not those of the document."""
    called = operation["operationId"].removesuffix("Short")
    declined = called in _ON_DECLINED
    request: dict[str, Any] = {
        "method": method.upper(),
        "url": _url(
            path.replace("{order_id}", "{{declined_id}}" if declined else "{{order_id}}")
            .replace("{webhook_id}", "{{webhook_id}}")
            .replace("{key_id}", "{{key_id}}"),
            operation,
        ),
        "description": operation["description"],
    }
    if called in _WITHOUT_BODY or "requestBody" not in operation:
        request["header"] = list(_headers(operation))
    else:
        request["header"] = [{"key": "Content-Type", "value": "application/json"}, *_headers(operation)]
        request["body"] = _body(operation["requestBody"]["content"]["application/json"]["example"])
    events = [_script("prerequest", _PLACE_DECLINED)] if declined else []
    good = statuses or _OTHERWISE.get(called.removesuffix("Short"))
    good = good or tuple(int(status) for status in operation["responses"] if status.startswith("2"))
    events.append(_script("test", _tests(good, _CHECKS.get(called))))
    return {"name": name, "event": events, "request": request, "response": []}


def _headers(operation: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if operation["tags"] == ["admin"]:
        yield {"key": "X-Admin-Password", "value": "{{admin_password}}"}
    elif operation["security"]:
        yield {"key": "X-API-Key", "value": "{{api_key}}"}
    yield from _parameters(operation, "header")


def _parameters(operation: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """Yield the parameters of a kind, switched off: whoever wants one gives it a value."""
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == where:
            yield {
                "key": parameter["name"],
                "value": "",
                "description": parameter["description"],
                "disabled": True,
            }


def _url(path: str, operation: Mapping[str, Any]) -> dict[str, Any]:
    url: dict[str, Any] = {
        "raw": "{{base_url}}" + path,
        "host": ["{{base_url}}"],
        "path": path.removeprefix("/").split("/"),
    }
    if query := list(_parameters(operation, "query")):
        url["query"] = query
    return url


def _body(example: Any) -> dict[str, Any]:
    return {
        "mode": "raw",
        "raw": json.dumps(example, indent=2),
        "options": {"raw": {"language": "json"}},
    }


def _script(listen: str, text: str) -> dict[str, Any]:
    return {"listen": listen, "script": {"type": "text/javascript", "exec": text.splitlines()}}


def _tests(statuses: tuple[int, ...], check: tuple[str, str] | None) -> str:
    words = " or ".join(map(str, statuses))
    text = f'pm.test("is answered with {words}", () => pm.expect(pm.response.code).to.be.oneOf({list(statuses)}));'
    if check is None:
        return text
    name, script = check
    return f'{text}\npm.test("{name}", () => {{\n  const body = pm.response.json();\n  {script}\n}});'


def written() -> str:
    """Return the file as it should be."""
    return json.dumps(collection(operations_document()), indent=2) + "\n"


if __name__ == "__main__":
    COLLECTION.write_text(written(), encoding="utf-8")
