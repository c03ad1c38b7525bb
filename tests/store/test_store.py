"""The store: claims, leases and fences, the breaker, counters, and the order of events."""

from __future__ import annotations

import random

import msgspec

from expediter.errors import DuplicateOrder, StaleLease
from expediter.orders.commands import (
    CancelOrder,
    ChangeStatus,
    DeleteOrder,
    FulfilmentOutcome,
    RecordFulfilment,
    RecordPayment,
    ReleaseJob,
    RetryOrder,
)
from expediter.orders.order import MICROSECONDS, JobKind, PaymentOutcome, PaymentStatus, Status
from expediter.store.committer import Committer
from expediter.store.submissions import Applied, Claimed, ReportBreaker, Request
from storing import Place, applied, ask, claim, claimed, open_committer, place, rows

FAILURE = ReportBreaker(succeeded=False, threshold=5, recovery=60 * MICROSECONDS)


def paid(job: Claimed, *, lease: int = 0) -> Request:
    return Request(
        RecordPayment(
            order_id=job.order.order_id, fence=job.job.fence, outcome=PaymentOutcome.SUCCEEDED, lease=lease
        )
    )


async def place_many(committer: Committer, count: int) -> None:
    await ask(committer, *(place(f"A{number:04}") for number in range(count)))


async def test_a_claim_takes_due_jobs_and_starts_them(at: Place) -> None:
    """A claim leases at most the jobs it asks for, oldest first, with the intent to charge already stored."""
    async with open_committer(at) as committer:
        await place_many(committer, 5)
        claims = await claimed(committer, claim(limit=3))
    assert [job.order.order_id for job in claims.claimed] == ["A0000", "A0001", "A0002"]
    assert {job.order.status for job in claims.claimed} == {Status.PAYMENT_PROCESSING}
    assert rows(at, "SELECT count(*) FROM payment_attempts WHERE outcome IS NULL") == [(3,)]
    assert rows(at, "SELECT count(*) FROM jobs WHERE holder = 'worker'") == [(3,)]


async def test_two_workers_never_get_the_same_job(at: Place) -> None:
    """Claims of different workers, also in one transaction, have no job in common."""
    async with open_committer(at) as committer:
        await place_many(committer, 60)
        one, two = await ask(committer, claim("one", 40), claim("two", 40))
        three = await claimed(committer, claim("three", 40))
    taken = [job.order.order_id for claims in (one, two, three) for job in claims.claimed]  # type: ignore[union-attr]
    assert len(taken) == len(set(taken)) == 60


async def test_a_lease_that_ran_out_is_taken_over(at: Place) -> None:
    """When a lease ends without a word the next claim gets the job, and the late worker commits nothing."""
    async with open_committer(at) as committer:
        await place_many(committer, 1)
        (late,) = (await claimed(committer, claim("late", lease=0))).claimed
        (second,) = (await claimed(committer, claim("second"))).claimed
        assert second.job.fence > late.job.fence
        assert second.order.payment_status is PaymentStatus.UNKNOWN
        outcome = await committer.submit(paid(late))
        assert isinstance(outcome, StaleLease)
        assert isinstance(await committer.submit(paid(second)), Applied)
    assert rows(at, "SELECT status FROM orders") == [("confirmed",)]


async def test_a_job_claimed_too_often_is_parked_and_the_others_go_on(at: Place) -> None:
    """A job whose claims end without an outcome is parked at the limit; a retry takes it up again."""
    async with open_committer(at) as committer:
        await place_many(committer, 1)
        for _ in range(5):
            assert len((await claimed(committer, claim(lease=0))).claimed) == 1
        assert (await claimed(committer)).claimed == ()
        await ask(committer, place("other"))
        assert [job.order.order_id for job in (await claimed(committer)).claimed] == ["other"]
        assert rows(at, "SELECT count(*) FROM jobs WHERE dead_at IS NOT NULL") == [(1,)]
        await applied(committer, Request(RetryOrder(order_id="A0000")))
        assert [job.order.order_id for job in (await claimed(committer)).claimed] == ["A0000"]


async def test_an_order_that_cannot_be_read_holds_up_nobody(at: Place) -> None:
    """An order whose row makes no sense is parked by the claim that meets it, and the others are claimed."""
    async with open_committer(at) as committer:
        await place_many(committer, 3)
        at.change("UPDATE orders SET status = 'bogus' WHERE order_id = 'A0001'")
        claims = await claimed(committer)
        assert [job.order.order_id for job in claims.claimed] == ["A0000", "A0002"]
        assert (await claimed(committer)).claimed == ()
    assert rows(at, "SELECT order_id FROM jobs WHERE dead_at IS NOT NULL") == [("A0001",)]


async def test_a_released_job_is_due_at_once(at: Place) -> None:
    """A job that is given back is claimed again without waiting, and costs the order no attempt."""
    async with open_committer(at) as committer:
        await place_many(committer, 1)
        (job,) = (await claimed(committer)).claimed
        await applied(committer, Request(ReleaseJob(order_id="A0000", fence=job.job.fence)))
        (again,) = (await claimed(committer)).claimed
    assert again.job.claims == 1
    assert again.order.payment_status is PaymentStatus.PENDING


async def test_the_lease_is_kept_for_the_next_stage(at: Place) -> None:
    """With a lease asked for, a paid order goes on to fulfilment under the same holder in the same commit."""
    async with open_committer(at) as committer:
        await place_many(committer, 1)
        (job,) = (await claimed(committer)).claimed
        commits = committer.commits
        kept = await applied(committer, paid(job, lease=30 * MICROSECONDS))
        assert kept.job is not None and kept.job.kind is JobKind.FULFIL and kept.job.holder == "worker"
        done = RecordFulfilment(order_id="A0000", fence=kept.job.fence, outcome=FulfilmentOutcome.DONE)
        assert (await applied(committer, Request(done))).order.status is Status.COMPLETED
        assert committer.commits == commits + 2
    assert rows(at, "SELECT count(*) FROM jobs") == [(0,)]


async def test_an_open_breaker_holds_charges_back_and_lets_one_probe_through(at: Place) -> None:
    """After five failures in a row no charge is claimed; once the pause is over, exactly one is."""
    async with open_committer(at) as committer:
        await place_many(committer, 20)
        await ask(committer, *[FAILURE] * 5)
        closed_out = await claimed(committer)
        assert closed_out.claimed == ()
        assert closed_out.breaker.state == "open"
        await ask(committer, ReportBreaker(succeeded=True, threshold=5, recovery=0))
        await ask(committer, *[ReportBreaker(succeeded=False, threshold=5, recovery=0)] * 5)
        one, two = await ask(committer, claim("one"), claim("two"))
        probes = [*one.claimed, *two.claimed]  # type: ignore[union-attr]
        assert len(probes) == 1 and probes[0].probe
        await ask(committer, paid(probes[0]), ReportBreaker(succeeded=True, threshold=5, recovery=0))
        assert len((await claimed(committer)).claimed) > 1


async def test_a_call_under_a_lost_lease_tells_the_breaker_nothing(at: Place) -> None:
    """A worker that slept past its leases, and so failed every call, does not open the breaker for all."""
    async with open_committer(at) as committer:
        await place_many(committer, 10)
        slept = (await claimed(committer, claim("sleeper", limit=10))).claimed
        for job in slept:
            order_id, fence = job.order.order_id, job.job.fence
            await applied(committer, Request(ReleaseJob(order_id=order_id, fence=fence)))
        assert len((await claimed(committer, claim("other", limit=10))).claimed) == 10
        for job in slept:
            report = msgspec.structs.replace(FAILURE, order_id=job.order.order_id)
            outcomes = await ask(committer, paid(job), report)
            assert isinstance(outcomes[0], StaleLease)
        assert (await claimed(committer)).breaker.state == "closed"


async def test_an_open_breaker_does_not_hold_fulfilment_back(at: Place) -> None:
    """While the gateway is away, orders that are paid are still fulfilled."""
    async with open_committer(at) as committer:
        await place_many(committer, 1)
        (job,) = (await claimed(committer)).claimed
        await ask(committer, paid(job), place("waiting"), *[FAILURE] * 5)
        assert [each.job.kind for each in (await claimed(committer)).claimed] == [JobKind.FULFIL]


async def test_a_deleted_id_is_not_used_again(at: Place) -> None:
    """An order that is deleted leaves no row behind but its history, and its id is refused from then on."""
    async with open_committer(at) as committer:
        await applied(committer, place("A1"))
        await applied(committer, Request(DeleteOrder(order_id="A1")))
        outcome = await committer.submit(place("A1"))
    assert isinstance(outcome, DuplicateOrder) and outcome.deleted
    for table in ("orders", "order_lines", "jobs"):
        assert rows(at, f"SELECT count(*) FROM {table}") == [(0,)]
    history = rows(at, "SELECT number, type FROM events ORDER BY number")
    assert history == [(1, "order.placed"), (2, "order.deleted")]


async def test_counters_equal_the_rows_after_anything(at: Place) -> None:
    """After a thousand random changes every counter is what counting the rows gives, and no event is missing."""
    chance = random.Random(11)
    async with open_committer(at) as committer:
        for _ in range(60):
            ids = [f"A{chance.randrange(200)}" for _ in range(12)]
            await ask(committer, *(place(order_id) for order_id in dict.fromkeys(ids)))
            jobs = (await claimed(committer, claim(limit=6))).claimed
            await ask(committer, *(paid(job) for job in jobs if job.job.kind is JobKind.CHARGE))
            await ask(
                committer,
                *(
                    Request(chance.choice((CancelOrder, DeleteOrder))(order_id=f"A{chance.randrange(200)}"))
                    for _ in range(4)
                ),
                Request(ChangeStatus(order_id=f"A{chance.randrange(200)}", status=Status.PROCESSING)),
                Request(ChangeStatus(order_id=f"A{chance.randrange(200)}", status=Status.COMPLETED)),
            )
    counted = rows(at, "SELECT status, count(*) FROM orders GROUP BY status ORDER BY 1")
    kept = rows(
        at,
        "SELECT substr(name, 8), sum(value) FROM counters WHERE name LIKE 'status:%'"
        " GROUP BY name HAVING sum(value) <> 0 ORDER BY 1",
    )
    assert kept == counted
    assert rows(at, "SELECT count(*) - max(position), min(position) FROM events") == [(0, 1)]
    gaps = "SELECT order_id FROM events GROUP BY order_id HAVING count(*) <> max(number) OR min(number) <> 1"
    assert rows(at, gaps) == []
    versions = (
        "SELECT o.order_id FROM orders o WHERE o.version <>"
        " (SELECT max(number) FROM events e WHERE e.order_id = o.order_id)"
    )
    assert rows(at, versions) == []
