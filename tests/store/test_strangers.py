"""One request's trouble is its own: who shares its batch, its look-up or its page goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from expediter.backends.cache import NoCache
from expediter.backends.databases import open_database
from expediter.errors import OrderUnreadable, RequestFailed
from expediter.orders.commands import CancelOrder
from expediter.orders.order import Status
from expediter.store.queries import NothingAccepted, Queries
from expediter.store.submissions import Answer, Applied, IdempotencyKey, PageQuery, Request
from storing import Place, applied, ask, claimed, open_committer, place, rows

OF_A_NEWER_VERSION = "UPDATE orders SET status = 'on_the_moon' WHERE order_id = 'X1'"


async def test_a_row_that_cannot_be_read_is_refused_to_whoever_asks_for_it_alone(at: Place) -> None:
    """In one batch the neighbours of an unreadable order are changed; its own request is refused and says why."""
    async with open_committer(at) as committer:
        for order_id in ("A1", "X1", "B1"):
            await applied(committer, place(order_id))
        at.change(OF_A_NEWER_VERSION)
        first, stranger, last = await ask(
            committer, *[Request(CancelOrder(order_id=order_id)) for order_id in ("A1", "X1", "B1")]
        )
    assert isinstance(first, Applied) and first.order.status is Status.CANCELLED
    assert isinstance(last, Applied) and last.order.status is Status.CANCELLED
    assert isinstance(stranger, OrderUnreadable)
    assert "X1" in str(stranger) and "on_the_moon" in str(stranger)


async def test_a_row_that_cannot_be_read_spares_other_readers(at: Place) -> None:
    """Orders that are looked up together with it are found, and the page that it is on shows it as what it is."""
    async with open_committer(at) as committer:
        for order_id in ("A1", "X1", "B1"):
            await applied(committer, place(order_id))
    at.change(OF_A_NEWER_VERSION)
    database = open_database(at.address)
    queries = Queries(database, NoCache(), NothingAccepted())
    try:
        found = await asyncio.gather(
            *(queries.order(order_id) for order_id in ("A1", "X1", "B1")), return_exceptions=True
        )
        assert [type(each).__name__ for each in found] == ["Entry", "OrderUnreadable", "Entry"]
        page = await queries.page(PageQuery(limit=2))
        rest = await queries.page(PageQuery(limit=2, after=page.after))
    finally:
        await database.close()
    shown = [msgspec.json.decode(document) for document in (*page.documents, *rest.documents)]
    assert [document["order_id"] for document in shown] == ["B1", "X1", "A1"]
    assert "cannot be read by this version" in shown[1]["error"]
    assert "status" not in shown[1]


class Bug(Exception):
    """What nobody foresaw."""


def request_with_a_bug(order_id: str) -> Request:
    def word(applied: Applied) -> Answer:
        raise Bug(applied.order.order_id)

    return Request(place(order_id).command, IdempotencyKey(order_id, "f", 1_000_000), word)


async def test_a_bug_in_one_request_spares_the_others_of_its_batch(at: Place) -> None:
    """Of many requests at once, each of another client, one meets a bug: it alone fails, and leaves nothing."""
    async with open_committer(at) as committer:
        asked: list[Any] = [place(f"A{number}") for number in range(20)]
        asked[7] = request_with_a_bug("X1")
        outcomes = await asyncio.gather(*map(committer.submit, asked), return_exceptions=True)
        assert isinstance(outcomes[7], Bug)
        assert all(isinstance(outcome, Applied) for index, outcome in enumerate(outcomes) if index != 7)
        assert committer.failing is None
        await applied(committer, place("A99"))
    assert len(rows(at, "SELECT order_id FROM orders")) == 20
    assert rows(at, "SELECT * FROM orders WHERE order_id = 'X1'") == []


async def test_a_bug_in_one_of_several_requests_of_one_caller_is_its_own_outcome(at: Place) -> None:
    """Rows of a batch file are judged one by one, also where one of them meets a bug."""
    async with open_committer(at) as committer:
        outcomes = await ask(committer, place("A1"), request_with_a_bug("X1"), place("A2"))
    assert [type(outcome) for outcome in outcomes] == [Applied, RequestFailed, Applied]


async def test_a_listener_with_a_bug_makes_nobody_believe_that_nothing_is_stored(at: Place) -> None:
    """What is stored is answered as stored, whatever becomes of telling the other parts of the process."""

    def listener(changes: list[Applied]) -> None:
        raise Bug

    async with open_committer(at) as committer:
        committer.on_commit(listener)
        await applied(committer, place("A1"))
        await applied(committer, place("A2"))
    assert len(rows(at, "SELECT order_id FROM orders")) == 2


@pytest.mark.parametrize("count", [1, 3])
async def test_claims_pass_over_what_cannot_be_read(at: Place, count: int) -> None:
    """A worker that meets unreadable orders parks them, and claims the others."""
    async with open_committer(at) as committer:
        for number in range(count):
            await applied(committer, place(f"A{number}"))
        await applied(committer, place("X1"))
        at.change(OF_A_NEWER_VERSION)
        claims = await claimed(committer)
        assert len(claims.claimed) == count
    assert rows(at, "SELECT order_id FROM jobs WHERE dead_at IS NOT NULL") == [("X1",)]
