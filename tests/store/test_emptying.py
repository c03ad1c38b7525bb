"""Removing every order beside those who place, claim and report: what stays is counted, and nothing comes back."""

from __future__ import annotations

import asyncio

from auditing import assert_verified
from expediter.errors import DuplicateOrder
from expediter.orders.commands import RecordPayment
from expediter.orders.order import PaymentOutcome, Stages
from expediter.store.committer import Committer
from expediter.store.submissions import Claims, Request
from storing import Place, applied, ask, claim, claimed, open_committer, place, rows


async def test_clearing_beside_commits_leaves_the_counters_right(at: Place) -> None:
    """While two processes place, claim and report, a third removes everything, several times: every law holds."""
    clearing = True
    async with (
        open_committer(at, slot=1) as one,
        open_committer(at, slot=2) as two,
        open_committer(at, slot=3) as broom,
    ):

        async def shop(committer: Committer, name: str) -> None:
            number = 0
            while clearing:
                await ask(committer, *[place(f"{name}-{number + n}") for n in range(20)])
                number += 20

        async def work(committer: Committer, name: str) -> None:
            while clearing:
                (claims,) = await ask(committer, claim(name, limit=10))
                assert isinstance(claims, Claims)
                reports = [
                    Request(
                        RecordPayment(
                            order_id=each.order.order_id,
                            fence=each.job.fence,
                            outcome=PaymentOutcome.SUCCEEDED,
                        )
                    )
                    for each in claims.claimed
                ]
                await ask(committer, *reports)

        doors = {"one": one, "two": two}
        jobs = [job(committer, name) for name, committer in doors.items() for job in (shop, work)]
        busy = [asyncio.create_task(job) for job in jobs]
        removed = 0
        while removed < 500:
            found = await broom.clear()
            assert isinstance(found, int)
            removed += found
        clearing = False
        await asyncio.gather(*busy)
    assert_verified(at.address)


async def test_ids_that_the_gateway_remembers_stay_taken(at: Place) -> None:
    """After a clear the id of an order that was sent to the gateway is refused, another one is free again."""
    async with open_committer(at) as committer:
        await applied(committer, place("CHARGED", stages=Stages.PAYMENT))
        await claimed(committer)
        await applied(committer, place("UNCHARGED"))
        assert await committer.clear() == 2
        charged, uncharged = await ask(committer, place("CHARGED"), place("UNCHARGED"))
        assert isinstance(charged, DuplicateOrder)
        assert charged.deleted
        assert not isinstance(uncharged, Exception)
    for table in ("payment_attempts", "idempotency_keys"):
        assert rows(at, f"SELECT * FROM {table}") == []
    assert_verified(at.address)
