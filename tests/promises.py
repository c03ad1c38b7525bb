"""What the five services promise: their documents, their code, and what their clients rely on, call by call.

`tests/test_promises.py` makes each call on a service that was started with COMPAT, and `docs/coming-from.md` has
them as tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from serving import ADMIN_PASSWORD

PEN = {"customer_name": "Alice", "items": [{"name": "Pen", "quantity": 2}]}
BURGER = {
    "customer_id": "customer_123",
    "items": [{"item_id": "item_001", "item_name": "Burger", "quantity": 2, "price": 12.99}],
}
BOOKS = {"user_id": 1, "item_ids": [101, 102, 103], "total_amount": 59.99}
BROWSER = {"origin": "http://localhost:5173"}


class Is(NamedTuple):
    """A value that is described, not given."""

    words: str
    holds: Callable[[Any], bool]


def of(kind: type, words: str) -> Is:
    return Is(words, lambda value: isinstance(value, kind))


A_LIST = of(list, "a list")
A_NUMBER = Is("a number", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool))
A_TEXT = Is("a text", lambda value: isinstance(value, str) and value != "")
NAIVE = Is("a time without zone", lambda value: re.fullmatch(r"[\d-]{10}T[\d:.]{8,}", str(value)) is not None)
AN_ID = Is("an id", lambda value: isinstance(value, str) and 0 < len(value) <= 36)
EVERY_RECEIVED = Is(
    "orders, new ones `received`", lambda value: {order["status"] for order in value} == {"received"}
)


class Promise(NamedTuple):
    """One call: `{id}` in its path is an order placed before by `body`; `settled`: once it is at rest.

    `members` are those of the answer that are promised. `absent`: it has no others.
    """

    call: str
    status: int
    members: Mapping[str, Any] = {}
    send: Any = None
    headers: Mapping[str, str] = {}
    before: tuple[Any, str | None] = (None, None)
    alone: bool = False
    answers: Mapping[str, str] = {}


def by_hand(changed: int, deleted: int, created: int) -> tuple[Promise, ...]:
    """Return what the cached and the queued orders API have in common."""
    new = (PEN, None)
    moves = {
        "received": "received",
        "preparing": "processing",
        "processing": "processing",
        "shipped": "processing",
        "completed": "completed",
        "delivered": "completed",
        "cancelled": "cancelled",
    }
    return (
        Promise("POST /orders", created, {"order_id": AN_ID, "status": "received", "message": A_TEXT}, PEN),
        Promise("POST /orders", 400, {"error": A_TEXT}, {"customer_name": "Alice", "items": []}, alone=True),
        Promise("POST /orders", 400, {"error": A_TEXT}, {"items": [{"name": "Pen", "quantity": 1}]}, alone=True),
        Promise(
            "POST /orders", created, {"status": "received"}, {**PEN, "items": [{"name": "Pen", "quantity": "2"}]}
        ),
        Promise("GET /orders/{id}", 200, {"status": "received", "customer_name": "Alice"}, before=new),
        Promise("GET /orders/none", 404, {"error": "Order not found"}, alone=True),
        Promise("GET /orders?status=received", 200, {"orders": EVERY_RECEIVED, "count": A_NUMBER}, before=new),
        Promise(
            "GET /orders?limit=1&offset=0", 200, {"count": 1, "total_orders": A_NUMBER, "offset": 0}, before=new
        ),
        Promise("GET /orders?limit=0&offset=-1", 200, {"limit": 1, "offset": 0}, before=new),
        *(
            Promise(
                f"PATCH /orders/{{id}}/status {word}",
                changed,
                {"order_id": AN_ID},
                {"status": word},
                before=(PEN, shown),
            )
            for word, shown in moves.items()
        ),
        Promise(
            "PATCH /orders/{id}/status lost", 400, {"error": A_TEXT}, {"status": "lost"}, before=new, alone=True
        ),
        Promise("DELETE /orders/{id}", deleted, {"message": A_TEXT}, before=new),
        Promise("DELETE /orders/none", 404, {"error": "Order not found"}, alone=True),
        Promise("POST /admin/seed", 201, {"count": 3}, {"count": 3, "password": ADMIN_PASSWORD}),
        Promise("POST /admin/seed", 401, {"error": A_TEXT}, {"count": 3, "password": "wrong"}, alone=True),
        Promise(
            "OPTIONS /orders",
            200,
            headers={**BROWSER, "access-control-request-method": "POST"},
            answers={"access-control-allow-origin": "*"},
        ),
        Promise("GET /orders?limit=1", 200, headers=BROWSER, answers={"access-control-allow-origin": "*"}),
    )


PROMISES: Mapping[str, tuple[Promise, ...]] = {
    "cached": by_hand(changed=200, deleted=200, created=201),
    "queued": by_hand(changed=202, deleted=202, created=202),
    "processor": (
        Promise("POST /orders", 201, {"status": "Pending", "item_ids": "101,102,103", "message": A_TEXT}, BOOKS),
        Promise("POST /orders", 201, {"order_id": "ORD003"}, {**BOOKS, "order_id": "ORD003"}),
        Promise("POST /orders taken", 400, {"error": A_TEXT}, {**BOOKS, "order_id": "ORD003"}, alone=True),
        Promise("POST /orders", 400, {"error": A_TEXT}, {"user_id": 1}, alone=True),
        Promise("GET /orders/none", 404, {"error": "Order not found"}, alone=True),
        Promise(
            "GET /orders/{id}",
            200,
            {
                "status": "Completed",
                "created_at": NAIVE,
                "processing_started_at": NAIVE,
                "completed_at": NAIVE,
                "pending_duration": A_NUMBER,
                "processing_duration": A_NUMBER,
                "total_duration": A_NUMBER,
            },
            before=(BOOKS, "Completed"),
        ),
        Promise(
            "GET /orders/metrics",
            200,
            {
                "total_orders": A_NUMBER,
                "average_processing_time": A_NUMBER,
                "average_processing_time_from_creation": A_NUMBER,
                "completed": Is(
                    "`count`, and `order_ids` empty", lambda value: value["order_ids"] == [] and value["count"] > 0
                ),
            },
            before=(BOOKS, "Completed"),
        ),
        Promise(
            "GET /orders/metrics?getOrderIds=true",
            200,
            {
                "completed": Is(
                    "`count`, and as many `order_ids`", lambda value: len(value["order_ids"]) == value["count"] > 0
                )
            },
            before=(BOOKS, "Completed"),
        ),
        Promise(
            "POST /orders/populate",
            201,
            {"batch_id": "b1", "success_count": 4},
            {"total_entries": 4, "batch_id": "b1"},
        ),
        Promise("GET /orders/sim_b1_4", 200, {"order_id": "sim_b1_4"}),
        Promise(
            "POST /orders/populate again",
            400,
            {"error": A_TEXT},
            {"total_entries": 4, "batch_id": "b1"},
            alone=True,
        ),
        Promise(
            "POST /orders/populate",
            201,
            {
                "batch_id": Is("8 hex digits", lambda value: re.fullmatch("[0-9a-f]{8}", value) is not None),
                "errors": [],
            },
            {"total_entries": 1},
        ),
    ),
    "delivery": (
        Promise(
            "POST /api/v1/orders",
            202,
            {"status": "payment_processing", "id": AN_ID, "total_amount": 25.98},
            BURGER,
        ),
        Promise(
            "GET /api/v1/orders/{id}",
            200,
            {
                "id": AN_ID,
                "status": "confirmed",
                "payment_attempts": Is(
                    "one attempt: number 1, success, its amount",
                    lambda value: (
                        [(each["attempt_number"], each["status"], each["amount"]) for each in value]
                        == [(1, "success", 25.98)]
                    ),
                ),
            },
            before=(BURGER, "confirmed"),
        ),
        Promise(
            "GET /api/v1/orders/{id} declined",
            200,
            {
                "status": "payment_failed",
                "payment_attempts": Is("a failed attempt and its error", lambda value: bool(value[0]["error"])),
            },
            before=({**BURGER, "payment_token": "tok_declined"}, "payment_failed"),
        ),
        Promise("GET /api/v1/orders/none", 404, {"detail": "Order not found"}),
        Promise(
            "POST /api/v1/orders",
            422,
            {"detail": Is("where, what, which kind", lambda value: value[0].keys() == {"loc", "msg", "type"})},
            {"customer_id": "c", "items": []},
        ),
        Promise(
            "GET /api/v1/orders?page=1&page_size=5",
            200,
            {"page": 1, "page_size": 5, "total": A_NUMBER},
            before=(BURGER, None),
        ),
        Promise(
            "GET /api/v1/orders?customer_id=customer_123",
            200,
            {"total": A_NUMBER, "orders": A_LIST},
            before=(BURGER, None),
        ),
        Promise("GET /api/v1/orders?status=CONFIRMED", 200, {"total": A_NUMBER}, before=(BURGER, "confirmed")),
        Promise("GET /api/v1/orders?page_size=1000", 422, {"detail": A_LIST}),
        Promise("GET /health", 200, {"status": A_TEXT}),
        Promise("GET /docs", 200),
        Promise("GET /redoc", 200),
        Promise("GET /api/v1/orders", 200, headers=BROWSER, answers={"access-control-allow-origin": "*"}),
    ),
    "streams": (
        Promise("POST /orders", 200, {"order_id": "S1", "created_at": NAIVE}, {**BOOKS, "order_id": "S1"}),
        Promise("POST /orders", 200, {"order_id": AN_ID}, {**BOOKS, "colour": "red"}),
        Promise("POST /orders?debug=1", 200, {"order_id": AN_ID}, BOOKS),
        Promise(
            "GET /orders/{id}", 200, {"status": "completed", "completed_at": NAIVE}, before=(BOOKS, "completed")
        ),
        Promise("GET /orders/none", 404),
        Promise(
            "GET /orders/status",
            200,
            {"queue_length": A_NUMBER, "pending_orders": A_NUMBER, "total_processed": A_NUMBER},
            before=(BOOKS, "completed"),
        ),
        Promise(
            "GET /orders/metrics",
            200,
            {
                "total_orders": A_NUMBER,
                "average_processing_time_seconds": A_NUMBER,
                "order_status_counts": of(dict, "counts"),
            },
            before=(BOOKS, "completed"),
        ),
        Promise("GET /orders?limit=10&sort=asc", 200, {"orders": A_LIST}, before=(BOOKS, None)),
    ),
}
