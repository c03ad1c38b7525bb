"""Texts are equal where they are the same, code point by code point, on every database."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from serving import Serving
from storing import Place

#: No two of these are the same, whatever a collation may say.
CUSTOMERS = (
    "acme",
    "acme ",
    " acme",
    "acme\u00a0",
    "Acme",
    "ACME",
    "\uff41\uff43\uff4d\uff45",
    "acmé",
    unicodedata.normalize("NFD", "acmé"),
    "acme\u200b",
    "strasse",
    "straße",
    "STRASSE",
    "\u0131s\u0131k",
    "isik",
    "\u0130S\u0130K",
    "œuvre",
    "oeuvre",
    "😀",
    "😁",
    "👍",
    "👍🏽",
    "1",
    "01",
    "\uff11",
)


def test_only_the_same_text_is_equal(at: Place, folder: Path) -> None:
    """The orders of a customer are those with the same customer_id, by case, blanks, accents and width, too."""
    with Serving(folder, "--no-workers", DATABASE_URL=at.address) as service:
        for number, customer in enumerate(CUSTOMERS):
            body = {
                "order_id": f"T{number}",
                "customer_id": customer,
                "items": [{"item_id": customer, "quantity": 1, "price": 1}],
            }
            placed = service.client.post("/orders", json=body)
            assert placed.status_code == 201, placed.text
            assert placed.json()["customer_id"] == customer
        for number, customer in enumerate(CUSTOMERS):
            found = service.client.get("/orders", params={"customer_id": customer}).json()["orders"]
            assert [(each["order_id"], each["customer_id"]) for each in found] == [(f"T{number}", customer)]
            keyed = {"order_id": f"K{number}", "customer_id": "c", "items": [{"name": customer, "quantity": 1}]}
            headers = {"Idempotency-Key": f"key-{number}{'K' if number % 2 else 'k'}"}
            assert service.client.post("/orders", json=keyed, headers=headers).status_code == 201
            assert service.client.get(f"/orders/K{number}").json()["items"][0]["name"] == customer
