"""`expediter reconcile`: what the gateway has of a span of time against what the orders say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2

from expediter.orders.order import gateway_key
from serving import PATIENCE_SECONDS, Serving, environment
from storing import Place
from trying import TrialGateway


def reconcile(folder: Path, *options: str, **settings: str) -> tuple[int, dict[str, Any], str]:
    """Return the exit status, what was found, and what was said about what went wrong."""
    ran = subprocess.run(
        [sys.executable, "-m", "expediter", "reconcile", "--json", *options],
        cwd=folder,
        env=environment(folder, **settings),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    return ran.returncode, json.loads(ran.stdout or "{}"), ran.stderr


def order(order_id: str, **more: str) -> dict[str, Any]:
    return {
        "order_id": order_id,
        "customer_id": "c",
        "items": [{"item_id": 1, "quantity": 1, "price": "60"}],
    } | more


def test_every_difference_is_named_and_nothing_else(at: Place, folder: Path) -> None:
    """Charged there and not here, here and not there, another amount, refunded elsewhere: each by its order."""
    with TrialGateway(folder) as gateway:
        settings = {"DATABASE_URL": at.address, "PAYMENT_GATEWAY": gateway.url}
        with Serving(folder, **settings) as service:
            bodies = [order(f"A{number}") for number in range(6)]
            bodies += [order("D1", payment_token="tok_declined")]
            service.client.post("/orders/batch", json=bodies)
            for body in bodies:
                service.until_rest(body["order_id"])
            service.client.post("/orders/A0/refunds", json={"amount": 10})
            service.client.post("/orders/A1/refunds", json={"amount": 5, "by_hand": True, "reference": "cash"})
            service.until_rest("A0")
            assert service.client.delete("/orders/A5").status_code == 204
        status, found, _ = reconcile(folder, **settings)
        assert (status, found["found"], found["open"]) == (0, 0, 0)
        assert (found["payments"], found["orders"]) == (7, 6)

        with httpx2.Client(base_url=gateway.url) as client:
            charge = {"key": "k", "order_id": "B1", "amount_minor": 700, "currency": "USD"}
            client.post("/payments", json=charge, headers={"Idempotency-Key": "k"})
            # Declined, and charged at the gateway under the next key all the same.
            key = gateway_key("D1", 2)
            charge = {"key": key, "order_id": "D1", "amount_minor": 6000, "currency": "USD"}
            client.post("/payments", json=charge, headers={"Idempotency-Key": key})
            key = gateway_key("A2", 1)
            refund = {"key": "r", "amount_minor": 1, "reason": ""}
            client.post(f"/payments/pay_{key}/refunds", json=refund, headers={"Idempotency-Key": "r"})
        at.change("UPDATE orders SET order_id = 'A9' WHERE order_id = 'A3'")
        status, found, _ = reconcile(folder, **settings)
        named = {each["order_id"]: each["what"] for each in found["differences"]}
        assert status == 1
        assert named == {
            "B1": "charged there (700 USD), and no order is here",
            "D1": "captured: 0 here, 6000 there (minor units of USD)",
            "A2": "refunded: 0 here, 1 there (minor units of USD)",
            "A3": "charged there (6000 USD), and no order is here",
        }
        status, found, _ = reconcile(folder, "--until", "2026-01-01", "--since", "2025-01-01", **settings)
        assert (status, found["payments"], found["orders"]) == (0, 0, 0)
        at.change("UPDATE orders SET order_id = 'A3' WHERE order_id = 'A9'")

    # The same orders, and a gateway that has lost its books.
    gateway.ledger.unlink()
    with TrialGateway(folder) as empty:
        status, found, _ = reconcile(folder, **settings | {"PAYMENT_GATEWAY": empty.url})
        named = {each["order_id"]: each["what"] for each in found["differences"]}
        assert status == 1
        assert named == {
            f"A{number}": "charged here, and the gateway knows of no such payment" for number in range(5)
        }


def test_a_gateway_that_cannot_list_its_payments_is_named(folder: Path) -> None:
    """The message says what there is instead."""
    status, _, said = reconcile(folder)
    assert status == 2
    assert "verify --ledger" in said
    status, _, said = reconcile(folder, "--since", "yesterday")
    assert "--since must be a time" in said
