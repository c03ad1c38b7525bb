"""Step 0008: orders whose money moved before there were amounts add up afterwards, and go on."""

from __future__ import annotations

import asyncio

from expediter.orders.commands import CancelOrder, ParkJob, RecordPayment, RecordRefund, RefundOrder, RetryOrder
from expediter.orders.order import PaymentOutcome, Stages, gateway_key, refund_key
from expediter.store.committer import Committer
from expediter.store.migrations import upgrade
from expediter.store.submissions import Claimed, Request
from storing import Place, applied, ask, claimed, open_committer, place, undo_money_and_webhooks
from verifying import assert_verified

PAID = PaymentOutcome.SUCCEEDED


async def next_job(committer: Committer) -> Claimed:
    (job,) = (await claimed(committer)).claimed
    return job


async def fill(committer: Committer) -> None:
    """P is paid, W waits for its refund, R is refunded, K's refund is parked, N waits for its charge."""
    for order_id in ("R", "K", "W", "P"):
        await ask(committer, place(order_id, stages=Stages.PAYMENT))
        job = await next_job(committer)
        await applied(committer, Request(RecordPayment(order_id=order_id, fence=job.job.fence, outcome=PAID)))
    for order_id in ("R", "K"):
        await applied(committer, Request(CancelOrder(order_id=order_id)))
        job = await next_job(committer)
        fence = job.job.fence
        if order_id == "R":
            told: RecordRefund | ParkJob = RecordRefund(order_id="R", fence=fence, refund=1, outcome=PAID)
        else:
            told = ParkJob(order_id="K", fence=fence, error="look it up", refund=1)
        await applied(committer, Request(told))
    await applied(committer, Request(CancelOrder(order_id="W")))
    await ask(committer, place("N"))


def make_old(at: Place) -> None:
    """Take the newer steps back, and what newer versions write into events."""
    undo_money_and_webhooks(at)
    for order_id, number, data in at.rows("SELECT order_id, number, data FROM events ORDER BY position"):
        words = str(data)
        for name in ("refunding_minor", "refunded_minor", "refunds", "refund"):
            before, found, after = words.partition(f'"{name}":')
            if found and '"lines"' not in words:
                rest = after.lstrip("0123456789")
                words = before.rstrip(",") + (rest if before.endswith(",") else rest.lstrip(","))
        at.change(f"UPDATE events SET data = '{words}' WHERE order_id = '{order_id}' AND number = {number}")


async def test_old_orders_add_up_and_go_on(at: Place) -> None:
    """The laws hold after the upgrade; a refund under way keeps its key, one that is parked can be taken up."""
    async with open_committer(at) as committer:
        await fill(committer)
    make_old(at)
    assert await asyncio.to_thread(upgrade, at.address)
    assert_verified(at.address)
    amounts = (
        "SELECT order_id, authorized_minor, captured_minor, refunded_minor, refunding_minor, refunds FROM orders"
    )
    assert sorted(map(tuple, at.rows(amounts))) == [
        ("K", 2997, 2997, 0, 2997, 1),
        ("N", 0, 0, 0, 0, 0),
        ("P", 2997, 2997, 0, 0, 0),
        ("R", 2997, 2997, 2997, 0, 1),
        ("W", 2997, 2997, 0, 2997, 1),
    ]
    async with open_committer(at) as committer:
        await applied(committer, Request(RetryOrder(order_id="K")))
        for job in (await claimed(committer)).claimed:
            if job.refund is not None:
                order_id = job.order.order_id
                key = gateway_key(order_id, 1)
                assert refund_key(key, job.refund) == f"{key}-refund"
                told = RecordRefund(order_id=order_id, fence=job.job.fence, refund=1, outcome=PAID)
                assert (await applied(committer, Request(told))).order.payment_status == "refunded"
        await applied(committer, Request(RefundOrder(order_id="P", amount="9.97")))
    assert_verified(at.address)
