"""The list of orders: three ways to page, filters, totals, and the freshness of a cached page."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from serving import Serving

Document = dict[str, Any]


def place(service: Serving, **fields: Any) -> Document:
    body = {"customer_id": "c", "items": [{"name": "Pen", "quantity": 1}], **fields}
    order: Document = service.client.post("/orders", json=body).json()
    return order


@pytest.fixture(scope="module")
def placed(idle_service: Serving) -> list[str]:
    """The ids of 23 orders of one customer, newest first."""
    return [place(idle_service, customer_id="pager")["order_id"] for _ in range(23)][::-1]


def ids(page: Document) -> list[str]:
    return [order["order_id"] for order in page["orders"]]


def read(service: Serving, path: str = "/orders", **query: Any) -> Document:
    answer = service.client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    page: Document = answer.json()
    assert page.keys() == {"orders", "total", "limit", "offset", "page", "page_size", "next_cursor", "has_more"}
    return page


def by_cursor(service: Serving, size: int, **filters: Any) -> Iterator[Document]:
    page = read(service, limit=size, **filters)
    while True:
        yield page
        if page["next_cursor"] is None:
            return
        page = read(service, limit=size, cursor=page["next_cursor"], **filters)


def by_offset(service: Serving, size: int, **filters: Any) -> Iterator[Document]:
    offset = 0
    while (page := read(service, limit=size, offset=offset, **filters))["orders"]:
        yield page
        offset += size


def by_page(service: Serving, size: int, **filters: Any) -> Iterator[Document]:
    number = 1
    while (page := read(service, page=number, page_size=size, **filters))["orders"]:
        yield page
        number += 1


STYLES = {"cursor": by_cursor, "offset": by_offset, "page": by_page}


@pytest.mark.parametrize("size", [1, 5, 23, 200])
@pytest.mark.parametrize("style", STYLES)
def test_each_style_walks_every_order_once(
    idle_service: Serving, placed: list[str], style: str, size: int
) -> None:
    """Page by page, each style of paging shows every order of a customer exactly once, newest first."""
    pages = list(STYLES[style](idle_service, size, customer_id="pager"))

    assert [order_id for page in pages for order_id in ids(page)] == placed
    assert all(len(page["orders"]) <= size for page in pages)


@pytest.mark.parametrize("style", STYLES)
def test_each_style_walks_the_whole_list(idle_service: Serving, placed: list[str], style: str) -> None:
    """Without a filter each style walks as many orders as `total` says, each once, and `total` is exact."""
    pages = list(STYLES[style](idle_service, 7))
    walked = [order_id for page in pages for order_id in ids(page)]

    assert len(walked) == len(set(walked)) == pages[0]["total"]
    assert set(placed) <= set(walked)
    created = [order["created_at"] for page in pages for order in page["orders"]]
    assert created == sorted(created, reverse=True)


def test_a_cursor_is_not_moved_by_new_orders(idle_service: Serving, placed: list[str]) -> None:
    """Orders placed while a reader follows the cursor neither repeat nor hide an older one."""
    page = read(idle_service, limit=10, customer_id="mover")
    mine = [place(idle_service, customer_id="mover")["order_id"] for _ in range(4)][::-1]
    page = read(idle_service, limit=2, customer_id="mover")
    place(idle_service, customer_id="mover")
    rest = read(idle_service, limit=2, customer_id="mover", cursor=page["next_cursor"])

    assert ids(page) + ids(rest) == mine


def test_pages_say_where_they_are(idle_service: Serving, placed: list[str]) -> None:
    """Limit, offset, page and page_size describe the page in every style; what has no sense in one is null."""
    names = ("limit", "offset", "page", "page_size")

    def where(**query: Any) -> tuple[int | None, ...]:
        page = read(idle_service, **query)
        return tuple(page[name] for name in names)

    assert where() == (50, 0, 1, 50)
    assert where(limit=5, offset=10) == (5, 10, 3, 5)
    assert where(limit=5, offset=3) == (5, 3, None, 5)
    assert where(page=3, page_size=5) == (5, 10, 3, 5)
    assert where(page=2) == (50, 50, 2, 50)
    cursor = read(idle_service, limit=5)["next_cursor"]
    assert where(limit=5, cursor=cursor) == (5, None, None, 5)


@pytest.mark.parametrize("path", ["/orders", "/orders/", "/api/v1/orders", "/api/v1/orders/"])
def test_every_path_lists(idle_service: Serving, placed: list[str], path: str) -> None:
    """The list is the same in both families, with and without a slash."""
    assert read(idle_service, path, limit=7) == read(idle_service, limit=7)


def test_a_listed_order_is_the_whole_order(idle_service: Serving, placed: list[str]) -> None:
    """An order in the list is the document that its own path answers."""
    for order in read(idle_service, limit=3)["orders"]:
        assert order == idle_service.client.get(f"/orders/{order['order_id']}").json()


def test_status_filters_with_an_exact_total(idle_service: Serving, placed: list[str]) -> None:
    """With one status the list has its orders only, and `total` counts exactly them."""
    before = read(idle_service, status="cancelled")["total"]
    gone = [place(idle_service)["order_id"] for _ in range(2)][::-1]
    for order_id in gone:
        idle_service.client.post(f"/orders/{order_id}/cancel")
    page = read(idle_service, status="cancelled")

    assert ids(page)[:2] == gone
    assert {order["status"] for order in page["orders"]} == {"cancelled"}
    assert page["total"] == before + 2


def test_customers_by_number_and_by_text(idle_service: Serving) -> None:
    """A customer whose id was sent as a number is found by it."""
    order_id = place(idle_service, customer_id=424_242)["order_id"]

    assert ids(read(idle_service, customer_id="424242")) == [order_id]
    assert ids(read(idle_service, customer_id="nobody at all")) == []


def test_dates_bound_the_list(idle_service: Serving) -> None:
    """created_after and created_before leave out the very instant they name, in any time zone."""
    first, second, third = (place(idle_service, customer_id="dated") for _ in range(3))

    assert ids(read(idle_service, customer_id="dated", created_after=first["created_at"])) == [
        third["order_id"],
        second["order_id"],
    ]
    assert ids(read(idle_service, customer_id="dated", created_before=third["created_at"])) == [
        second["order_id"],
        first["order_id"],
    ]
    between = {"created_after": first["created_at"], "created_before": third["created_at"]}
    assert ids(read(idle_service, customer_id="dated", **between)) == [second["order_id"]]
    abroad = datetime.fromisoformat(second["created_at"]) + timedelta(0)
    elsewhere = abroad.isoformat().replace("+00:00", "") + "+00:00"
    assert ids(read(idle_service, customer_id="dated", created_after=elsewhere)) == [third["order_id"]]


def test_filters_go_together_with_a_cursor(idle_service: Serving) -> None:
    """Customer and status filter the pages of a cursor alike."""
    mine = [place(idle_service, customer_id="both")["order_id"] for _ in range(6)][::-1]
    for order_id in mine[::2]:
        idle_service.client.post(f"/orders/{order_id}/cancel")
    pages = list(by_cursor(idle_service, 2, customer_id="both", status="cancelled"))

    assert [order_id for page in pages for order_id in ids(page)] == mine[::2]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=201", "limit"),
        ("limit=-1", "limit"),
        ("limit=ten", "limit"),
        ("limit=1.0", "limit"),
        ("limit=", "limit"),
        ("limit=%D9%A3", "limit"),
        ("limit=99999999999999999999", "limit"),
        ("page_size=0", "page_size"),
        ("page_size=201", "page_size"),
        ("page=0", "page"),
        ("page=-1", "page"),
        ("page=99999999999", "page"),
        ("offset=-1", "offset"),
        ("offset=99999999999", "offset"),
        ("page=1&limit=5", "page"),
        ("page_size=5&offset=5", "page"),
        ("cursor=MTox&offset=5", "offset"),
        ("cursor=", "cursor"),
        ("cursor=nonsense", "cursor"),
        ("cursor=%C3%A9", "cursor"),
        ("cursor=MQ==", "cursor"),
        ("status=shipped", "status"),
        ("status=", "status"),
        ("created_after=yesterday", "created_after"),
        ("created_after=", "created_after"),
        ("created_before=2026-13-01", "created_before"),
        ("created_before=2026-02-30T00:00:00Z", "created_before"),
    ],
)
@pytest.mark.parametrize("path", ["/orders", "/api/v1/orders"])
def test_a_bad_page_query_is_422(idle_service: Serving, path: str, query: str, field: str) -> None:
    """A size, place, cursor, status or date without sense is a 422 that names the parameter."""
    refused = idle_service.client.get(f"{path}?{query}")

    assert refused.status_code == 422
    assert refused.headers["content-type"] == "application/problem+json"
    assert field in [error["field"] for error in refused.json()["errors"]]


def test_every_bad_parameter_is_named_at_once(idle_service: Serving) -> None:
    """Several bad parameters are all named in one refusal."""
    refused = idle_service.client.get("/orders?limit=0&offset=-1&status=x&created_after=y&cursor=z")

    assert {error["field"] for error in refused.json()["errors"]} == {
        "limit",
        "offset",
        "status",
        "created_after",
        "cursor",
    }


def test_a_cached_page_is_never_stale(idle_service: Serving) -> None:
    """A page that was read before a write shows the write on the next read: a new order, a move, a deletion."""
    read(idle_service)
    order_id = place(idle_service)["order_id"]
    shown = read(idle_service)
    assert ids(shown)[0] == order_id

    idle_service.client.post(f"/orders/{order_id}/cancel")
    assert read(idle_service)["orders"][0]["status"] == "cancelled"

    idle_service.client.delete(f"/orders/{order_id}")
    after = read(idle_service)
    assert order_id not in ids(after)
    assert after["total"] == shown["total"] - 1


def test_a_cached_page_follows_the_workers(service: Serving) -> None:
    """Once an order is at rest, a page that was read while it was under way shows its end."""
    for _ in range(5):
        order_id = place(service, total_amount="1.00")["order_id"]
        read(service, limit=1)
        order = service.until_rest(order_id)

        assert read(service, limit=1)["orders"][0] == order


def test_a_cached_order_is_never_stale(idle_service: Serving) -> None:
    """An order that was read before a change shows the change on the next read."""
    order_id = place(idle_service)["order_id"]
    for status in ("processing", "failed", "processing", "completed"):
        idle_service.client.get(f"/orders/{order_id}")
        idle_service.client.patch(f"/orders/{order_id}/status", json={"status": status})

        assert idle_service.client.get(f"/orders/{order_id}").json()["status"] == status


def test_another_process_on_the_database_is_seen_at_once(tmp_path: Any) -> None:
    """What one process has answered, every other process on the same database shows on its next read."""
    with Serving(tmp_path, "--no-workers") as writer, Serving(tmp_path, "--no-workers") as reader:
        order_id = place(writer)["order_id"]
        for version, status in enumerate(("processing", "failed", "processing", "completed"), 2):
            reader.client.get(f"/orders/{order_id}")
            read(reader)
            writer.client.patch(f"/orders/{order_id}/status", json={"status": status})

            assert reader.client.get(f"/orders/{order_id}").json()["version"] == version
            assert read(reader)["orders"][0]["version"] == version
