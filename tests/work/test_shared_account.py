"""Two installations that share an account at the gateway, told apart by GATEWAY_KEY_PREFIX."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from auditing import wait_until
from expediter.payments.simulated import read_ledger
from serving import PATIENCE_SECONDS, Died, Program, Serving, environment
from storing import Place
from verifying import assert_verified

ORDER = {"order_id": "ORD-1", "customer_id": "c", "items": [{"item_id": "i", "quantity": 1, "price": 10}]}


def charged(service: Serving) -> bool:
    order = service.client.get("/orders/ORD-1").json()
    return bool(order["payment_status"] == "paid")


def test_two_orders_of_one_id_are_both_charged(tmp_path: Path) -> None:
    """Each shop names its orders itself, and the gateway sees two keys; a refund is of the own charge."""
    # Named from the shops' own folders, so that no shop is held against books that are not its alone.
    ledger = {"PAYMENT_GATEWAY": "simulated://../ledger.jsonl", "STAGES": "payment"}
    with ExitStack() as stack:
        shops = []
        for number, prefix in enumerate(["", "shop-2"]):
            folder = tmp_path / f"shop-{number}"
            folder.mkdir()
            shop = stack.enter_context(Serving(folder, GATEWAY_KEY_PREFIX=prefix, **ledger))
            shops.append(shop)
            order = {**ORDER, "items": [{"item_id": "i", "quantity": 1, "price": 10 + number}]}
            assert shop.client.post("/orders", json=order).status_code == 201
            wait_until(lambda shop=shop: charged(shop))  # type: ignore[misc]
        accounts = read_ledger(tmp_path / "ledger.jsonl").values()
        assert sorted(account.captured_minor for account in accounts) == [1000, 1100]
        assert shops[1].client.post("/orders/ORD-1/cancel").status_code == 202
        wait_until(lambda: shops[1].client.get("/orders/ORD-1").json()["payment_status"] == "refunded")
        assert charged(shops[0])
        accounts = read_ledger(tmp_path / "ledger.jsonl").values()
        assert sorted(account.refunded_minor for account in accounts) == [0, 1100]


@pytest.mark.parametrize("first", ["", "shop-2"])
def test_a_database_keeps_the_prefix_that_it_was_begun_with(at: Place, tmp_path: Path, first: str) -> None:
    """A start with another one is refused in a sentence: an open charge would get a second key."""
    with Serving(tmp_path, DATABASE_URL=at.address, GATEWAY_KEY_PREFIX=first):
        pass
    other = subprocess.run(
        [sys.executable, "-m", "expediter", "serve"],
        cwd=tmp_path,
        env=environment(tmp_path, DATABASE_URL=at.address, GATEWAY_KEY_PREFIX="other"),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert other.returncode == 2
    assert f"this database was begun with {first!r}" in other.stderr
    with Serving(tmp_path, DATABASE_URL=at.address, GATEWAY_KEY_PREFIX=first) as service:
        assert service.client.post("/orders", json=ORDER).status_code == 201
        wait_until(lambda: service.client.get("/orders/ORD-1").json()["status"] == "completed")
    assert_verified(at.address, None)


def test_of_two_first_starts_at_once_one_is_refused(bare: Place, tmp_path: Path) -> None:
    """With two prefixes at the same moment one of them binds the database, and the other process ends."""
    starts = {
        prefix: Program(tmp_path, "serve", DATABASE_URL=bare.address, GATEWAY_KEY_PREFIX=prefix)
        for prefix in ("", "shop-2")
    }
    served = []
    refused = []
    for prefix, program in starts.items():
        try:
            program.wait_for("listens on http")
            served.append(prefix)
        except Died:
            refused.append(prefix)
    for prefix in served:
        starts[prefix].stop()
    assert (len(served), len(refused)) == (1, 1)
    other = starts[refused[0]]
    assert other.stop() == 2
    assert f"this database was begun with {served[0]!r}" in "\n".join(other.log)
    assert_verified(bare.address, None)
