"""Documents that are kept for pages: never another one's, never more than agreed."""

from __future__ import annotations

import json
from typing import Any

from expediter.backends.cache import NoCache
from expediter.backends.databases import open_database
from expediter.orders.commands import CancelOrder
from expediter.orders.documents import order_document
from expediter.orders.order import Status
from expediter.store.queries import NothingAccepted, Queries
from expediter.store.submissions import PageQuery, Request
from expediter.store.worded import Worded
from storing import Place, applied, ask, open_committer, place


async def test_a_page_shows_orders_as_they_are(at: Place) -> None:
    """Also after a change, and where an id is placed anew once everything was cleared."""
    database = open_database(at.address)
    queries = Queries(database, NoCache(), NothingAccepted())

    async def shown() -> dict[str, Any]:
        page = await queries.page(PageQuery(limit=10))
        documents = [json.loads(bytes(document)) for document in page.documents]
        assert documents == [json.loads((await queries.order(each["order_id"])).body) for each in documents]
        return {each["order_id"]: each for each in documents}

    async with open_committer(at) as committer:
        await ask(committer, place("A1"), place("A2", customer_name="Ann"))
        first = await shown()
        assert await shown() == first
        await applied(committer, Request(CancelOrder(order_id="A1")))
        second = await shown()
        assert second["A2"] == first["A2"]
        assert second["A1"]["status"] == Status.CANCELLED.value
        await committer.clear()
        assert await shown() == {}
        await ask(committer, place("A2", customer_name="Bob"))
        third = await shown()
        assert (third["A2"]["customer_name"], third["A2"]["version"]) == ("Bob", 1)
    await database.close()


async def test_no_more_is_kept_than_agreed(at: Place) -> None:
    """The documents that were kept first go first."""
    async with open_committer(at) as committer:
        orders = [(await applied(committer, place(f"A{number}"))).order for number in range(5)]
    documents = {order.order_id: order_document(order, place("A").command.lines) for order in orders}
    worded = Worded(bytes_max=2 * (len(documents["A0"]) + 500))
    for order in orders:
        worded.keep(order, documents[order.order_id])
        worded.keep(order, documents[order.order_id])
    assert worded.find(orders) == {order_id: documents[order_id] for order_id in ("A3", "A4")}
