"""`verify`: it is silent about what the service stores, and names each law that is broken behind its back."""

from __future__ import annotations

from pathlib import Path

import pytest

from expediter.backends.databases import open_database
from expediter.orders.commands import CancelOrder, DeleteOrder, RecordPayment, RecordRefund
from expediter.orders.laws import Breach, Verified
from expediter.orders.order import PaymentOutcome, Stages, gateway_key
from expediter.store.committer import Committer
from expediter.store.submissions import Answer, IdempotencyKey, Request
from expediter.upkeep.verify import verify
from storing import Place, applied, claimed, open_committer, place

DAY = 86_400_000_000


async def look(at: Place, ledger: Path | None = None) -> Verified:
    database = open_database(at.address)
    looked: list[int] = []
    try:
        verified = await verify(database, ledger=ledger, advance=looked.append)
    finally:
        await database.close()
    assert sum(looked) == verified.orders
    return verified


async def fill(committer: Committer) -> None:
    """Orders at many places: P waits, H is held, R is refunded, C paid, D deleted; P has a key."""
    for order_id in ("C1", "R1", "D1"):
        await applied(committer, place(order_id, stages=Stages.PAYMENT))
        (claim,) = (await claimed(committer)).claimed
        paid = RecordPayment(order_id=order_id, fence=claim.job.fence, outcome=PaymentOutcome.SUCCEEDED)
        await applied(committer, Request(paid))
    await applied(committer, Request(CancelOrder(order_id="R1")))
    (claim,) = (await claimed(committer)).claimed
    refunded = RecordRefund(order_id="R1", fence=claim.job.fence, refund=1, outcome=PaymentOutcome.SUCCEEDED)
    await applied(committer, Request(refunded))
    await applied(committer, Request(DeleteOrder(order_id="D1")))
    await applied(committer, place("H1"))
    await claimed(committer)
    answer = Answer(202, {"location": "/api/v1/orders/P1"}, "{}")
    key = IdempotencyKey("key-1", "f", DAY)
    await applied(committer, Request(place("P1").command, key, lambda applied: answer))


@pytest.fixture
async def filled(at: Place) -> Place:
    """A database of each kind with orders at many places of their road."""
    async with open_committer(at) as committer:
        await fill(committer)
    return at


async def test_what_the_service_stores_breaks_no_law(filled: Place) -> None:
    """Orders that wait, are held, paid, refunded, deleted, and kept answers: every law holds."""
    assert await look(filled) == Verified(orders=4)


DAMAGES = {
    "UPDATE orders SET status = 'completed' WHERE order_id = 'H1'": ("H1", "its events do not add up to its row"),
    "DELETE FROM jobs WHERE order_id = 'P1'": ("P1", "it is pending and pending, not at rest, and has no job"),
    "UPDATE jobs SET order_id = 'C1' WHERE order_id = 'P1'": (
        "C1",
        "it is at rest (confirmed) and has a job to charge",
    ),
    "UPDATE jobs SET order_id = 'X1' WHERE order_id = 'P1'": ("X1", "jobs has rows of it, and it is not there"),
    "UPDATE counters SET value = value + 1 WHERE name = 'status:pending'": (
        None,
        "the counter status:pending is 2, and the rows say 1",
    ),
    "DELETE FROM counters WHERE name = 'jobs'": (None, "the counter jobs is 0, and the rows say 2"),
    "DELETE FROM events WHERE order_id = 'C1' AND number = 2": ("C1", "its events are not numbered from 1 to 3"),
    "UPDATE payment_attempts SET outcome = 'unavailable' WHERE order_id = 'C1'": (
        "C1",
        "it is paid with 0 successful charges",
    ),
    "DELETE FROM payment_attempts WHERE order_id = 'R1' AND number = 1": (
        "R1",
        "its calls to the gateway are not numbered from 1 to 2",
    ),
    "UPDATE payment_attempts SET amount_minor = 1 WHERE order_id = 'C1'": (
        "C1",
        "a call to the gateway was about another amount",
    ),
    "UPDATE refunds SET amount_minor = 1": ("R1", "its refunds do not add up to the 2997 that are given back"),
    "UPDATE refunds SET status = 'pending'": ("R1", "its open refunds do not add up to the 0 that are set aside"),
    "DELETE FROM refunds": ("R1", "its refunds are not numbered from 1 to 1"),
    "UPDATE orders SET charging = 0 WHERE order_id = 'H1'": (
        "H1",
        "its calls [1] to the gateway have no outcome, and its row says charging=False",
    ),
    "UPDATE feed SET position = position - 1": (None, "the feed is at 15, and an event has position 16"),
    'UPDATE idempotency_keys SET headers = \'{"location":"/orders/NOBODY"}\'': (
        "NOBODY",
        "the answer kept under the key key-1 names it, and it never was",
    ),
    "DELETE FROM deleted_orders": ("D1", "events has rows of it, and it is not there"),
    "UPDATE orders SET status = 'of a newer version' WHERE order_id = 'C1'": (
        "C1",
        "it cannot be read: Order C1 cannot be read by this version: 'of a newer version'; ask a newer one",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=[statement[:40] for statement in DAMAGES])
async def test_each_broken_law_is_named(damage: str, tmp_path: Path) -> None:
    """What is changed behind the program's back is found, and said of which order."""
    at = Place(f"sqlite:///{tmp_path}/orders.db")
    async with open_committer(at) as committer:
        await fill(committer)
    at.change(damage)
    order_id, law = DAMAGES[damage]
    assert Breach(order_id, law) in (await look(at)).breaches


async def test_a_move_that_the_lifecycle_does_not_have_is_named(tmp_path: Path) -> None:
    """Two neighbouring events between which there is no legal move are a breach, also where they add up."""
    at = Place(f"sqlite:///{tmp_path}/orders.db")
    async with open_committer(at) as committer:
        await applied(committer, place("A1"))
        await applied(committer, Request(CancelOrder(order_id="A1")))
    at.change("UPDATE events SET data = replace(data, 'cancelled\"', 'failed\"') WHERE number = 2")
    at.change("UPDATE orders SET status = 'failed' WHERE order_id = 'A1'")
    assert Breach("A1", "event 2 moved it from pending to failed") in (await look(at)).breaches


async def test_the_gateways_books_are_compared(filled: Place, tmp_path: Path) -> None:
    """A charge that no order knows, a paid order without a charge, and one charged twice are each named."""
    ledger = tmp_path / "ledger.jsonl"

    def entry(action: str, order_id: str, generation: int = 1, amount: int = 2997) -> str:
        key = gateway_key(order_id, generation)
        return f'{{"action":"{action}","key":"{key}","amount_minor":{amount},"currency":"USD"}}\n'

    right = entry("charge", "C1") + entry("charge", "R1") + entry("refund", "R1") + entry("charge", "D1")
    ledger.write_text(right + entry("charge", "H1"))  # under way: it may have arrived
    assert await look(filled, ledger) == Verified(orders=4)

    ledger.write_text(
        entry("charge", "R1") + entry("charge", "P1") + entry("charge", "C1", amount=1) + entry("charge", "?")
    )
    found = {
        (breach.order_id, breach.law.partition(" under ")[0]) for breach in (await look(filled, ledger)).breaches
    }
    assert found == {
        ("R1", "it says that it has a refund; the gateway has none"),
        ("P1", "it is pending, and the gateway has charged it"),
        ("C1", "the gateway's charge is about another amount"),
        (None, "the gateway has a charge"),
    }
