"""`expediter orders ...`: what a person does with orders at a terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlencode

import msgspec
import typer

from expediter.errors import ConfigurationError, Refused
from expediter.orders.money import format_minor
from expediter.orders.order import Status, is_order_id
from expediter.run.cli.output import (
    command,
    moment,
    print_json,
    print_line,
    run_to_end,
    settings_of,
    to_json,
    what_happened,
)

if TYPE_CHECKING:
    from expediter.run.asking import Client

app = typer.Typer()

#: Seconds that `watch` lets the service wait for the next change.
WATCH_SECONDS = 15
#: Orders on a page when all are listed.
PAGE_ORDERS = 200

#: "2 x Pen @ 1.20": how many (1 without), what, and the price of one (none without).
_ITEM = re.compile(r"(?:(\d+) *[x×] +)?(.+?)(?: *@ *([\d.]+))?")

Url = Annotated[
    str | None,
    typer.Option(
        help="The service's address. Without it the database of the settings is used, and no service need run."
    ),
]
OrderId = Annotated[str, typer.Argument(metavar="ORDER", help="The order's id.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Key = Annotated[
    str | None, typer.Option(help="The Idempotency-Key: the same key with the same change again does nothing.")
]


def _with_client(url: str | None, work: Callable[[Client], Coroutine[Any, Any, None]]) -> None:
    from expediter.run.asking import opened

    settings = settings_of()

    async def run() -> None:
        async with opened(settings, url) as client:
            await work(client)

    run_to_end(run())


def _at(order_id: str, rest: str = "") -> str:
    if not is_order_id(order_id):
        # Such as `metrics`: its address is something else's.
        raise Refused(f"No order can have the id {order_id!r}")
    return f"/api/v1/orders/{order_id}{rest}"


@command(
    app,
    'orders place --customer Alice --item "2 x Pen @ 1.20" --item "Ink @ 3.50"',
    "orders place order.json --url http://127.0.0.1:8000",
)
def place(
    file: Annotated[
        Path | None, typer.Argument(help="A file with the order as JSON, - for stdin.", allow_dash=True)
    ] = None,
    customer: Annotated[str | None, typer.Option(help="The customer's name.")] = None,
    item: Annotated[
        list[str] | None, typer.Option(help='A line, such as "2 x Pen @ 1.20"; may be given again.')
    ] = None,
    currency: Annotated[str | None, typer.Option(help="ISO 4217 code (DEFAULT_CURRENCY without).")] = None,
    order_id: Annotated[str | None, typer.Option("--id", help="The order's id; without, it gets one.")] = None,
    token: Annotated[str | None, typer.Option(help="The payment token.")] = None,
    key: Key = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Place an order: from a file, or from what the options say."""
    options = {"--customer": customer, "--item": item, "--currency": currency, "--id": order_id, "--token": token}
    given = [name for name, value in options.items() if value]
    if file is not None and given:
        raise typer.BadParameter(f"{', '.join(given)} and a file: give one or the other")
    if file is None and not item:
        raise typer.BadParameter('name a file, or at least one --item, such as "2 x Pen @ 1.20"')
    if file is None:
        document = {
            "customer_name": customer,
            "items": [_item(text) for text in item or []],
            "currency": currency,
            "order_id": order_id,
            "payment_token": token,
        }
        body = msgspec.json.encode({name: value for name, value in document.items() if value})
    else:
        body = _read(file)

    async def work(client: Client) -> None:
        order = (await client.change("POST", "/api/v1/orders", body, key)).document
        if as_json:
            print_json(order)
        else:
            print_line(f"Placed {order.get('order_id')}{_total(order)}, {order.get('status')}")

    _with_client(url, work)


def _item(text: str) -> dict[str, Any]:
    found = _ITEM.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter(f'--item {text!r}: write it as "2 x Pen @ 1.20"')
    quantity, name, price = found.groups()
    line: dict[str, Any] = {"quantity": int(quantity or 1), "name": name}
    return line if price is None else line | {"price": price}


def _read(file: Path) -> bytes:
    if str(file) == "-":
        return sys.stdin.buffer.read()
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from error


@command(app, "orders list --status payment_failed", "orders list --all --json | jq .order_id", name="list")
def list_orders(
    status: Annotated[Status | None, typer.Option(help="Only those in this status.")] = None,
    customer_id: Annotated[str | None, typer.Option("--customer-id", help="Only those of this customer.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=PAGE_ORDERS, help="How many, the newest first.")] = 20,
    everything: Annotated[bool, typer.Option("--all", help="All of them, however many.")] = False,
    url: Url = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document a line.")] = False,
) -> None:
    """List orders, the newest first."""
    asked = {"status": status and status.value, "customer_id": customer_id}
    query = {name: value for name, value in asked.items() if value} | {
        "limit": str(PAGE_ORDERS if everything else limit)
    }

    async def work(client: Client) -> None:
        cursor: str | None = None
        first = True
        while True:
            more = {"cursor": cursor} if cursor else {}
            page = await client.read(f"/api/v1/orders?{urlencode(query | more)}")
            if as_json:
                for order in page["orders"]:
                    print_line(to_json(order).decode())
            else:
                for line in _table(page["orders"], headed=first):
                    print_line(line)
            first = False
            cursor = page.get("next_cursor")
            if not everything or not cursor:
                return

    _with_client(url, work)


def _table(orders: Iterable[dict[str, Any]], *, headed: bool) -> Iterable[str]:
    if headed:
        yield f"{'ORDER':<36}  {'STATUS':<18}  {'PAYMENT':<15}  {'TOTAL':>16}  PLACED"
    for order in orders:
        total = _total(order, before="")
        yield (
            f"{order['order_id']:<36}  {order['status']:<18}  {order['payment_status']:<15}  {total:>16}  "
            f"{moment(order['created_at'])}"
        )


@command(app, "orders show DEMO-1", "orders show DEMO-1 --json")
def show(order_id: OrderId, url: Url = None, as_json: AsJson = False) -> None:
    """Show an order."""

    async def work(client: Client) -> None:
        order = await client.read(_at(order_id))
        if as_json:
            print_json(order)
            return
        print_line(_headline(order))
        facts = {
            "customer": order.get("customer_name") or order.get("customer_id"),
            "total": _total(order, before=""),
            "placed": moment(order["created_at"]),
            "changed": moment(order["updated_at"]),
            "error": order.get("last_error"),
        }
        for name, value in facts.items():
            if value:
                print_line(f"  {name:<8}  {value}")
        for line in order["items"]:
            price = "" if line.get("price") is None else f" @ {line['price']}"
            print_line(f"  {'line ' + str(line['line']):<8}  {line['quantity']} x {_name(line)}{price}")
        if order.get("pending_changes"):
            print_line(f"  {'waits':<8}  {order['pending_changes']} changes that are accepted and not applied yet")

    _with_client(url, work)


@command(app, "orders explain DEMO-1")
def explain(order_id: OrderId, url: Url = None, as_json: AsJson = False) -> None:
    """Say why an order is where it is, what happens next, and list every call to the payment gateway."""

    async def work(client: Client) -> None:
        found = await client.read(_at(order_id, "/explain"))
        if as_json:
            print_json(found)
            return
        print_line(_headline(found))
        print_line(f"  {found['why']}")
        if found.get("last_error"):
            print_line(f"  The last error: {found['last_error']}")
        for attempt in found.get("attempts") or []:
            ended = attempt.get("error") or attempt.get("reference") or ""
            print_line(
                f"  {moment(attempt['started_at'])}  {attempt['action']} {attempt['number']}: "
                f"{attempt.get('outcome') or 'under way'}{ended and f' ({ended})'}"
            )

    _with_client(url, work)


@command(app, "orders cancel DEMO-1")
def cancel(order_id: OrderId, key: Key = None, url: Url = None, as_json: AsJson = False) -> None:
    """Cancel an order; what was charged is refunded."""
    _change(order_id, "/cancel", key, url, as_json)


@command(app, "orders retry DEMO-1")
def retry(order_id: OrderId, key: Key = None, url: Url = None, as_json: AsJson = False) -> None:
    """Take up an order again that has failed, or whose job is parked."""
    _change(order_id, "/retry", key, url, as_json)


@command(app, "orders refund DEMO-1 --amount 12.50 --reason 'no fries'", "orders refund DEMO-1 --list")
def refund(
    order_id: OrderId,
    amount: Annotated[
        str | None, typer.Option(help="How much, such as 12.50; without it all that is left.")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Why.")] = None,
    by_hand: Annotated[
        str | None, typer.Option(metavar="REFERENCE", help="Record one that was made outside, under this name.")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Only show the refunds that there are.")] = False,
    key: Key = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Give back a part or all of what was paid for an order."""
    body: dict[str, Any] = {"amount": amount, "reason": reason}
    if by_hand is not None:
        body |= {"by_hand": True, "reference": by_hand}
    asked = {name: value for name, value in body.items() if value is not None}

    async def work(client: Client) -> None:
        path = _at(order_id, "/refunds")
        if show:
            document = await client.read(path)
            refunds = document["refunds"]
        else:
            document = (await client.change("POST", path, msgspec.json.encode(asked), key=key)).document
            refunds = [document]
        if as_json:
            print_json(document)
            return
        for each in refunds:
            given_back = format_minor(each["amount_minor"], each["currency"])
            words = f"refund {each['number']}: {given_back} {each['currency']}, {each['status']}"
            print_line(f"{words} ({each['error']})" if each["error"] else words)

    _with_client(url, work)


def _change(order_id: str, rest: str, key: str | None, url: str | None, as_json: bool) -> None:
    async def work(client: Client) -> None:
        order = (await client.change("POST", _at(order_id, rest), key=key)).document
        if as_json:
            print_json(order)
        else:
            print_line(_headline(order))

    _with_client(url, work)


@command(app, "orders watch DEMO-1")
def watch(order_id: OrderId, url: Url = None, as_json: AsJson = False) -> None:
    """Show what happens to an order until it is at rest; exit status 1 if it has come to rest in a failure."""
    ended: list[str] = []

    async def work(client: Client) -> None:
        shown = 0
        while True:
            events = (await client.read(_at(order_id, "/events")))["events"]
            for event in events:
                if event["number"] > shown:
                    print_line(
                        to_json(event).decode() if as_json else f"{moment(event['at'])}  {what_happened(event)}"
                    )
                    shown = event["number"]
            found = await client.read(_at(order_id, "/explain"))
            if found["at_rest"]:
                order = await client.read(_at(order_id))
                if order["version"] <= shown:  # else something came between the two, and is shown as well
                    ended.append(order["status"])
                    return
            else:
                later = {"wait": WATCH_SECONDS, "min_version": shown + 1}
                await client.look(f"{_at(order_id)}?{urlencode(later)}")

    _with_client(url, work)
    if ended and ended[0] in (Status.PAYMENT_FAILED, Status.FAILED):
        raise typer.Exit(1)


def _headline(order: dict[str, Any]) -> str:
    return f"{order.get('order_id')}  {order.get('status')}, payment {order.get('payment_status')}"


def _total(order: dict[str, Any], before: str = ": ") -> str:
    amount = order.get("total_amount")
    return "" if amount is None else f"{before}{amount} {order.get('currency', '')}".rstrip()


def _name(line: dict[str, Any]) -> str:
    return str(line.get("name") or line.get("item_name") or line.get("item_id"))
