"""The list of orders, page by page."""

from __future__ import annotations

import base64
import binascii
from functools import partial

import msgspec

from expediter.errors import Fault, InvalidInput
from expediter.orders.documents import OrderDocument, microseconds
from expediter.orders.order import Status, is_order_id
from expediter.store.queries import Page
from expediter.store.scopes import Scope
from expediter.store.submissions import PageQuery
from expediter.web.context import Context
from expediter.web.http import JSON, Call, Reply, to_json, whole_number
from expediter.web.operations import Operation, both, query

#: Orders on one page, by default and at most.
PAGE_SIZE_DEFAULT = 50
PAGE_SIZE_MAX = 200
#: How far a page may be counted from the newest order; further on, a cursor costs nothing.
OFFSET_MAX = 1_000_000

_NOT_TOGETHER = "page and page_size do not go with limit, offset or cursor"

#: The parameters of a list: filters, and the three ways to turn pages.
LIST_PARAMETERS = (
    "customer_id",
    "status",
    "created_after",
    "created_before",
    "cursor",
    "limit",
    "offset",
    "page",
    "page_size",
)


class OrderList(msgspec.Struct, frozen=True):
    """A page of orders, newest first; `has_more`: others follow it.

    `total` is exact for all orders and for one status; by other filters it is counted up to 1,000, null beyond.
    """

    orders: list[OrderDocument]
    total: int | None
    limit: int
    offset: int | None
    page: int | None
    page_size: int
    next_cursor: str | None
    has_more: bool


async def list_orders(call: Call, context: Context) -> Reply:
    """Return a page of orders, newest first: by `cursor`, `limit` and `offset`, or `page` and `page_size`."""
    given = call.query(*LIST_PARAMETERS)
    wanted, cursor = page_query(given)
    by_number = "page" in given or "offset" in given
    word = partial(_word_page, wanted=wanted, cursor=cursor, by_number=by_number)
    if cursor or wanted.filtered or wanted.status:
        return Reply(200, word(await context.queries.page(wanted)), [JSON])
    return Reply(200, await context.queries.cached_page(wanted, word), [JSON])


def _word_page(page: Page, *, wanted: PageQuery, cursor: bool, by_number: bool) -> bytes:
    if by_number and page.after is not None and len(page.documents) < wanted.limit:
        # The page was cut short: whoever counts on would pass over the rest of it.
        error = f"these orders are too large for one page: ask for at most {len(page.documents)}, or use a cursor"
        raise InvalidInput([Fault("limit", error)])
    whole = not cursor and wanted.offset % wanted.limit == 0
    return to_json(
        {
            "orders": page.documents,
            "total": page.total,
            "limit": wanted.limit,
            "offset": None if cursor else wanted.offset,
            "page": wanted.offset // wanted.limit + 1 if whole else None,
            "page_size": wanted.limit,
            "next_cursor": _cursor(page.after) if page.after else None,
            "has_more": page.after is not None,
        }
    )


def page_query(given: dict[str, str]) -> tuple[PageQuery, bool]:
    """Return what the parameters of a list ask for, and whether by cursor. Raises InvalidInput."""
    faults: list[Fault] = []
    styles = [
        style
        for style, names in (
            ("page", ("page", "page_size")),
            ("limit", ("limit", "offset")),
            ("cursor", ("cursor",)),
        )
        if any(name in given for name in names)
    ]
    if "page" in styles and len(styles) > 1:
        faults.append(Fault("page", _NOT_TOGETHER))
    if "cursor" in given and "offset" in given:
        faults.append(Fault("offset", "does not go with cursor"))
    size_name = "page_size" if "page" in styles else "limit"
    limit = whole_number(given, size_name, 1, PAGE_SIZE_MAX, PAGE_SIZE_DEFAULT, faults)
    offset = whole_number(given, "offset", 0, OFFSET_MAX, 0, faults)
    if "page" in styles:
        offset = (whole_number(given, "page", 1, OFFSET_MAX // limit + 1, 1, faults) - 1) * limit
    wanted = PageQuery(
        limit=limit,
        offset=offset,
        after=_after(given, faults),
        customer_id=given.get("customer_id"),
        status=_status(given, faults),
        created_after=_date(given, "created_after", faults),
        created_before=_date(given, "created_before", faults),
    )
    if faults:
        raise InvalidInput(faults)
    return wanted, "cursor" in given


def _status(given: dict[str, str], faults: list[Fault]) -> Status | None:
    if "status" not in given:
        return None
    try:
        return Status(given["status"])
    except ValueError:
        faults.append(Fault("status", f"must be one of {', '.join(Status)}"))
        return None


def _date(given: dict[str, str], name: str, faults: list[Fault]) -> int | None:
    if name not in given:
        return None
    try:
        return microseconds(given[name])
    except ValueError as error:
        faults.append(Fault(name, str(error)))
        return None


def _cursor(after: tuple[int, str]) -> str:
    return base64.urlsafe_b64encode(f"{after[0]}:{after[1]}".encode()).decode().rstrip("=")


def _after(given: dict[str, str], faults: list[Fault]) -> tuple[int, str] | None:
    text = given.get("cursor")
    if text is None:
        return None
    try:
        padded = text.encode("ascii") + b"=" * (-len(text) % 4)
        at, _, order_id = base64.b64decode(padded, altchars=b"-_", validate=True).decode("ascii").partition(":")
        if at.isdecimal() and len(at) < 19 and is_order_id(order_id):
            return int(at), order_id
    except (ValueError, binascii.Error):
        pass  # said below, like every other cursor that this service did not make
    faults.append(Fault("cursor", "is not a cursor of this list: take next_cursor from a page"))
    return None


_PAGING = (
    query("customer_id", "Only orders of this customer.", type="string"),
    query("status", "Only orders in this status.", type="string", enum=[status.value for status in Status]),
    query("created_after", "Only orders placed after this time.", type="string", format="date-time"),
    query("created_before", "Only orders placed before this time.", type="string", format="date-time"),
    query(
        "cursor",
        "`next_cursor` of the page before. Not together with `offset`, `page` or `page_size`.",
        type="string",
        pattern="^[A-Za-z0-9_-]+$",
    ),
    query(
        "limit",
        "Orders on the page. Not together with `page` or `page_size`.",
        type="integer",
        minimum=1,
        maximum=PAGE_SIZE_MAX,
    ),
    query(
        "offset",
        "Orders to pass over. Not together with `cursor`, `page` or `page_size`.",
        type="integer",
        minimum=0,
        maximum=OFFSET_MAX,
    ),
    query(
        "page",
        "The page's number, from 1; it passes over at most 1,000,000 orders."
        " Not together with `limit`, `offset` or `cursor`.",
        type="integer",
        minimum=1,
        maximum=OFFSET_MAX + 1,
    ),
    query(
        "page_size",
        "Orders on the page. Not together with `limit`, `offset` or `cursor`.",
        type="integer",
        minimum=1,
        maximum=PAGE_SIZE_MAX,
    ),
)

OPERATIONS = (
    Operation(
        paths=both(),
        handler=list_orders,
        scope=Scope.ORDERS_READ,
        summary="List orders",
        answers={200: OrderList},
        parameters=_PAGING,
        fault=("page", _NOT_TOGETHER),
    ),
)
