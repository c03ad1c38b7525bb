"""What JSON Schema should say and no type does: amounts, words, times; and an example of each body."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from expediter.orders.documents import order_document
from expediter.orders.events import EVENT_TYPES
from expediter.orders.money import AMOUNT_MINOR_MAX, CURRENCY_DIGITS
from expediter.orders.order import (
    MICROSECONDS,
    RESERVED_IDS,
    JobKind,
    Line,
    Order,
    PaymentOutcome,
    PaymentStatus,
    RefundStatus,
    Stages,
    Status,
)

Schema = dict[str, Any]

#: An order's id as a text.
ORDER_ID: Schema = {
    "type": "string",
    "pattern": f"^(?!(?:{'|'.join(sorted(map(re.escape, RESERVED_IDS)))})$)[A-Za-z0-9._-]{{1,64}}$",
}
#: What stands in a path, by its name.
PATH_VALUES: Mapping[str, Schema] = {
    "order_id": ORDER_ID,
    "webhook_id": {"type": "string", "pattern": "^[A-Za-z0-9_]{1,40}$"},
    "key_id": {"type": "string", "pattern": "^[A-Za-z0-9_]{1,40}$"},
}
#: A whole number that is sent is at most this far from 0. To JSON Schema 1e300 is a whole number, too.
_WHOLE_MAX = 2**53 - 1
#: Texts that are sent have no NUL: not every database can store one.
_WITHOUT_NUL = "^[^\\x00]*$"
#: Of each group of fields at least one must be there, and not null. It is said by `not`, which generated clients
#: pass over: from an `anyOf` that says as much they make several classes of one body.
_AT_LEAST_ONE = {
    "OrderBody": (("customer_id", "user_id", "customer_name"), ("items", "item_ids")),
    "ItemBody": (("item_id", "name", "item_name"),),
}
#: Of these pairs no body has both.
_EITHER = {"OrderBody": (("items", "item_ids"),)}
#: An amount in a request: exact as a text; as a number it may have the noise of a sum of floats.
_AMOUNT: Schema = {
    "anyOf": [
        {"type": "number", "minimum": 0, "maximum": AMOUNT_MINOR_MAX},
        {"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?$"},
        {"type": "null"},
    ]
}
#: What an entry of `metadata` may be. Without it, generated clients take the object for one that has no entries.
_METADATA_VALUE: Schema = {
    "anyOf": [{"type": "string"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"}]
}
#: The schema of a field, where its type says less.
_FIELDS: Mapping[tuple[str, str], Schema] = {
    ("OrderBody", "total_amount"): _AMOUNT,
    ("OrderBody", "currency"): {
        "anyOf": [{"type": "string", "pattern": f"^({'|'.join(sorted(CURRENCY_DIGITS))})$"}, {"type": "null"}]
    },
    ("ItemBody", "price"): _AMOUNT,
    ("ItemBody", "unit_price"): _AMOUNT,
    ("RefundBody", "amount"): _AMOUNT,
    ("LineDocument", "price"): {"anyOf": [{"type": "number"}, {"type": "null"}]},
}
#: The same by the field's name alone, in whatever is answered.
_NAMES: Mapping[str, Schema] = {
    "total_amount": {"type": "number"},
    "amount": {"type": "number"},
    "metadata": {"type": "object", "additionalProperties": _METADATA_VALUE},
}
#: The words that a field may have.
_WORDS: Mapping[tuple[str, str], tuple[str, ...]] = {
    **{
        (document, name): tuple(words)
        for document in ("OrderDocument", "ShownOrder", "Placed", "Explanation")
        for name, words in (("status", Status), ("payment_status", PaymentStatus))
    },
    ("EventDocument", "type"): EVENT_TYPES,
    ("FeedEventDocument", "type"): EVENT_TYPES,
    ("DeliveryDocument", "type"): EVENT_TYPES,
    ("NextAction", "action"): tuple(JobKind),
    ("AttemptDocument", "action"): ("charge", "capture", "void", "refund"),
    ("RefundDocument", "status"): tuple(RefundStatus),
    ("AttemptDocument", "outcome"): tuple(PaymentOutcome),
    ("Dependency", "status"): ("ok", "degraded", "down"),
    ("Health", "status"): ("healthy", "degraded", "unhealthy"),
}


def refine(components: dict[str, Schema]) -> None:
    """Say in these schemas what their types could not say."""
    for name, groups in _AT_LEAST_ONE.items():
        if name in components:
            components[name]["not"] = {"anyOf": [*map(_nothing_of, groups), *map(_both_of, _EITHER.get(name, ()))]}
    for name, schema in components.items():
        for field, found in schema.get("properties", {}).items():
            if "default" in found and found["default"] is None:
                del found["default"]  # generated clients take a field with a default for one that is always there
            if (name, field) in _FIELDS:
                schema["properties"][field] = _FIELDS[name, field]
            elif field in _NAMES and not name.endswith("Body"):
                schema["properties"][field] = _NAMES[field]
            elif (name, field) in _WORDS:
                _each_text(found, "enum", list(_WORDS[name, field]))
            elif field == "at" or field.endswith("_at"):
                _each_text(found, "format", "date-time")
            if field == "order_id" and name.endswith("Body") and "anyOf" in found:
                found["anyOf"] = [ORDER_ID if each["type"] == "string" else each for each in found["anyOf"]]
        if name.endswith("Body"):
            _bound(schema)


def _bound(schema: Schema) -> None:
    """Say of every text and every name in what is sent that it has no NUL, and of numbers how large they are."""
    if schema.get("type") == "string":
        schema.setdefault("pattern", _WITHOUT_NUL)
    elif schema.get("type") == "number":
        schema.setdefault("minimum", -_WHOLE_MAX)
        schema.setdefault("maximum", _WHOLE_MAX)
    if "propertyNames" in schema:
        schema["propertyNames"].setdefault("pattern", _WITHOUT_NUL)
    for part in (*schema.get("properties", {}).values(), *schema.get("anyOf", ())):
        _bound(part)
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            _bound(schema[name])


def _nothing_of(fields: tuple[str, ...]) -> Schema:
    return {"properties": {field: {"type": "null"} for field in fields}}


def _both_of(fields: tuple[str, str]) -> Schema:
    return {"required": list(fields), "properties": {field: {"not": {"type": "null"}} for field in fields}}


def _each_text(schema: Schema, key: str, value: Any) -> None:
    for each in schema.get("anyOf", [schema]):
        if each.get("type") == "string":
            each[key] = value


_NOON = 1_764_244_800 * MICROSECONDS  # 2025-11-27T12:00:00Z
_LINES = (Line(1, "item_001", "Burger", 2, 1299), Line(2, "item_002", "Fries", 1, 349))
_ORDER = Order(
    order_id="ORD-019ac5a4b5c07f2e8d1b2c3d4e5f6071",
    status=Status.PENDING,
    payment_status=PaymentStatus.PENDING,
    stages=Stages.PAYMENT_FULFILMENT,
    customer_id="customer_123",
    customer_name=None,
    currency="USD",
    total_minor=2947,
    priced=True,
    metadata='{"table": 7}',
    payment_token=None,
    version=1,
    created_at=_NOON,
    updated_at=_NOON,
)
_ID = _ORDER.order_id
_DOCUMENT: dict[str, Any] = msgspec.json.decode(order_document(_ORDER, _LINES))
_BODY = {
    "customer_id": "customer_123",
    "items": [
        {"item_id": "item_001", "item_name": "Burger", "quantity": 2, "price": 12.99},
        {"item_id": "item_002", "item_name": "Fries", "quantity": 1, "price": "3.49"},
    ],
    "metadata": {"table": 7},
}
_PLACED_AT = _DOCUMENT["created_at"]
_BUCKET = {"count": 0}
_WEBHOOK = {
    "id": "wh_019ac5a4b5c07f2e8d1b2c3d4e5f6071",
    "url": "http://127.0.0.1:9000/hooks",
    "types": ["order.*"],
    "description": "the kitchen",
    "status": "active",
    "position": 7,
    "behind": 0,
    "last_success_at": _PLACED_AT,
    "last_error": None,
    "created_at": _PLACED_AT,
}
_NOTICE = {
    "type": "order.placed",
    "timestamp": _PLACED_AT,
    "data": {"order_id": _ID, "number": 1, "position": 7, "order": _DOCUMENT, "change": {"order": _DOCUMENT}},
}
_ALIVE = {"status": "ok"}
_KEY = {
    "id": "key_019ac5a4b5c07f2e8d1b2c3d4e5f6071",
    "name": "till 3",
    "scopes": ["orders:read", "orders:write"],
    "created_at": _PLACED_AT,
    "expires_at": "2099-01-01T00:00:00Z",
    "revoked_at": None,
    "last_used_at": None,
}

_REFUND = {
    "number": 1,
    "order_id": _ID,
    "status": "succeeded",
    "amount": 12.99,
    "amount_minor": 1299,
    "currency": "USD",
    "reason": "One burger was missing",
    "by_hand": False,
    "reference": "re_1",
    "error": None,
    "requested_at": _PLACED_AT,
    "settled_at": _PLACED_AT,
}
#: An example of each body, by the name of its type. What is sent can be sent as it is.
EXAMPLES: Mapping[str, Any] = {
    "OrderBody": _BODY,
    "StatusBody": {"status": "cancelled"},
    "RefundBody": {"amount": 12.99, "reason": "One burger was missing"},
    "RefundDocument": _REFUND,
    "Refunds": {
        "refunds": [_REFUND],
        "captured_minor": 5998,
        "refunded_minor": 1299,
        "refunding_minor": 0,
        "left_minor": 4699,
    },
    "CallbackBody": {
        "id": "pay_1",
        "key": "6f1c5c0e-1d1b-5d57-9d0e-7f2c8a1b9e43",
        "order_id": _ID,
        "status": "succeeded",
        "amount_minor": 5998,
        "currency": "USD",
        "captured_minor": 5998,
        "refunded_minor": 0,
        "created_at": _PLACED_AT,
    },
    "StripeEventBody": {
        "id": "evt_1",
        "type": "payment_intent.succeeded",
        "data": {"object": {"id": "pi_1", "object": "payment_intent", "status": "succeeded"}},
    },
    "FulfilmentBody": {"outcome": "done", "reference": "K-17"},
    "PopulateBody": {"total_entries": 4},
    "AdminBody": {"count": 10},
    "KeyBody": {"name": "till 3", "scopes": ["orders:read", "orders:write"], "expires_at": "2099-01-01T00:00:00Z"},
    "KeyDocument": _KEY,
    "KeyList": {"keys": [_KEY]},
    "OrderDocument": _DOCUMENT,
    "ShownOrder": _DOCUMENT,
    "Placed": _DOCUMENT | {"message": "Order created"},
    "Accepted": {"order_id": _ID, "message": "Accepted; it is carried out as soon as it can be"},
    "History": {
        "events": [
            {"number": 2, "at": _PLACED_AT, "type": "payment.started", "data": {"status": "payment_processing"}}
        ],
        "archived": 1,
    },
    "EventPage": {
        "events": [
            {
                "position": 7,
                "order_id": _ID,
                "number": 2,
                "at": _PLACED_AT,
                "type": "payment.started",
                "data": {"status": "payment_processing"},
            }
        ],
        "next_cursor": "MC43",
        "has_more": False,
    },
    "WebhookBody": {"url": "http://127.0.0.1:9000/hooks", "types": ["order.*"], "description": "the kitchen"},
    "WebhookChangeBody": {"types": ["order.completed", "order.cancelled"], "status": "paused"},
    "RedeliverBody": {"since": "2026-11-21T09:30:00Z"},
    "WebhookDocument": _WEBHOOK,
    "WebhookList": {"webhooks": [_WEBHOOK]},
    "DeliveryList": {
        "deliveries": [
            {
                "id": "evt_0f3c1a5b7d9e2f4a6c8b0d1e3f5a7c9b",
                "order_id": _ID,
                "number": 1,
                "position": 7,
                "type": "order.placed",
                "status": "waiting",
                "tries": 1,
                "first_tried_at": _PLACED_AT,
                "last_tried_at": _PLACED_AT,
                "next_try_at": _PLACED_AT,
                "request": _NOTICE,
                "answer": {"status": 500, "body": "out of paper", "seconds": 0.012},
                "error": "answered 500",
            }
        ],
        "next_cursor": None,
    },
    "WebhookTested": {
        "id": "test_019ac5a4b5c07f2e8d1b2c3d4e5f6071",
        "delivered": True,
        "answer": {"status": 204, "body": "", "seconds": 0.012},
        "error": None,
    },
    "OrderList": {
        "orders": [_DOCUMENT],
        "total": 1,
        "limit": 50,
        "offset": 0,
        "page": 1,
        "page_size": 50,
        "next_cursor": None,
        "has_more": False,
    },
    "Batch": {
        "accepted": 1,
        "refused": 1,
        "results": [
            {"row": 1, "status": 202, "order_id": _ID, "version": 1},
            {
                "row": 2,
                "status": 422,
                "error": "/items/0/quantity: expected `int` >= 1",
                "errors": [{"field": "/items/0/quantity", "message": "expected `int` >= 1"}],
            },
        ],
    },
    "Metrics": {
        "total_orders": 1,
        "average_processing_time": 0.25,
        "average_processing_time_from_creation": 0.5,
        "average_processing_time_seconds": 0.25,
        "pending": _BUCKET,
        "processing": _BUCKET,
        "completed": {"count": 1, "order_ids": [_ID]},
        "order_status_counts": {status.value: int(status is Status.COMPLETED) for status in Status},
    },
    "Queue": {
        "ready": 0,
        "scheduled": 0,
        "leased": 1,
        "dead": 0,
        "oldest_age_seconds": None,
        "queue_length": 1,
        "pending_orders": 0,
        "pending_count": 0,
        "processing_count": 1,
        "total_processed": 12,
        "pending": [],
        "processing": [_ID],
    },
    "Explanation": {
        "order_id": _ID,
        "status": "pending",
        "payment_status": "pending",
        "at_rest": False,
        "why": "It waits for a worker (charge).",
        "next_action": {
            "action": "charge",
            "due_at": _PLACED_AT,
            "due_in_seconds": 0.0,
            "held_by": None,
            "claims": 0,
            "failures": 0,
            "parked": False,
        },
        "last_error": None,
        "attempts": [],
    },
    "Populated": {
        "batch_id": "1f0c9a2b",
        "errors": [],
        "failure_count": 0,
        "success_count": 4,
        "total_entries": 4,
    },
    "Emptied": {"message": "Removed 12 orders", "deleted": 12},
    "Seeded": {"message": "Created 10 orders", "count": 10},
    "Verification": {"status": "done", "orders": 12, "found": 0, "breaches": []},
    "Index": {
        "service": "expediter",
        "version": "1.0.0",
        "orders": "/api/v1/orders",
        "docs": "/docs",
        "health": "/health",
    },
    "Health": {
        "status": "healthy",
        "version": "1.0.0",
        "durability": "power-safe",
        "dependencies": {
            "database": {
                "status": "ok",
                "detail": "SQLite 3.40.1, orders.db",
                "since": "2026-11-28T09:30:00.000000Z",
                "latency_ms": 0.2,
            }
        },
    },
    "Alive": _ALIVE,
}


def problem_example(status: int, title: str, fault: tuple[str, str]) -> dict[str, Any]:
    """Return a problem document of this status; a 422 has this fault: a field, and what is wrong with it."""
    error = _SENTENCES.get(status, title)
    if status == 422:
        title, error = "Invalid input", ": ".join(fault)
    example: dict[str, Any] = {
        "type": f"urn:expediter:problem:{title.lower().replace(' ', '-')}",
        "title": title,
        "status": status,
        "detail": error,
        "error": error,
        "request_id": "019ac5a4b5c07f2e8d1b2c3d4e5f6071",
    }
    if status == 422:
        example["errors"] = [{"field": fault[0], "message": fault[1]}]
    return example


_SENTENCES = {
    400: "The body is not valid JSON",
    401: "Give an API key, as Authorization: Bearer, or in X-API-Key",
    403: "This API key lacks the scope orders:write",
    404: "Order not found",
    409: "Order ORD-1 is completed; it can become nothing else",
    412: "Order ORD-1 has version 3",
    415: "Send the body as Content-Type: application/json, without a Content-Encoding",
    503: "The database cannot be used now; try again",
}

Handler = Callable[..., Any]


def operation_id(handler: Handler, *, short: bool) -> str:
    """Return a name for generated clients: createOrder, and createOrderShort on the short path."""
    first, *rest = handler.__name__.split("_")
    return first + "".join(word.capitalize() for word in rest) + ("Short" if short else "")
