"""A month of an online shop's invoices, placed as orders and followed until every one is at rest.

    python examples/online_retail.py [FILE.csv.gz] [--url http://127.0.0.1:8000]

What the service answers is held against what the file says. Exit 0 if the figures agree, 1 if not. Where callers
need an API key, EXPEDITER_API_KEY has it. Run it twice: the second time every valid order is refused as the
duplicate it is, and nothing is stored or charged again.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import gzip
import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Order = dict[str, Any]
T = TypeVar("T")
R = TypeVar("R")

DATA = Path(__file__).parent / "data" / "online-retail-2010-12.csv.gz"
#: Requests under way at once.
REQUESTS_MAX = 32
#: Seconds that one answer may take, and that all accepted orders together may take to come to rest.
ANSWER_SECONDS_MAX = 30.0
REST_SECONDS_MAX = 180.0
#: Sendings of one order while the service says that it cannot take it now (503).
SENDINGS_MAX = 10
#: Refused orders that the report describes, at most.
REFUSALS_SHOWN = 5

progress = Progress(
    TextColumn("{task.description:<16}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    console=Console(stderr=True),
)


class Trouble(Exception):
    """What keeps the example from going on, as a sentence for the person who started it."""


def read_orders(path: Path) -> list[Order]:
    """Return one order for each invoice in the file. Prices stay text: no float ever touches money."""
    orders: dict[str, Order] = {}
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            new: Order = {"order_id": row["InvoiceNo"], "currency": "GBP", "items": []}
            order = orders.setdefault(row["InvoiceNo"], new)
            if row["CustomerID"]:
                order["customer_id"] = int(Decimal(row["CustomerID"]))
            else:
                order["customer_name"] = "guest"
            item = {"item_id": row["StockCode"], "quantity": int(row["Quantity"]), "price": row["UnitPrice"]}
            if row["Description"].strip():
                item["name"] = row["Description"]
            order["items"].append(item)
    return list(orders.values())


def is_valid(order: Order) -> bool:
    """Return whether the service should accept the order."""
    return all(item["quantity"] >= 1 and Decimal(item["price"]) >= 0 for item in order["items"])


def value_minor(order: Order) -> int:
    """Return what the order is worth, in pence."""
    return int(sum(item["quantity"] * Decimal(item["price"]) for item in order["items"]) * 100)


async def at_once(work: Callable[[T], Awaitable[R]], inputs: Sequence[T], what: str) -> list[R]:
    """Run `work` on each input, REQUESTS_MAX at a time, under a progress bar called `what`."""
    waiting, results = iter(inputs), []
    task = progress.add_task(what, total=len(inputs))

    async def take() -> None:
        for each in waiting:
            results.append(await work(each))
            progress.advance(task)

    async with asyncio.TaskGroup() as group:
        for _ in range(REQUESTS_MAX):
            group.create_task(take())
    return results


class Shop:
    """The shop's side: what it sends, and what it is told."""

    def __init__(self, client: httpx2.AsyncClient) -> None:
        """Talk to the service through `client`."""
        self._client = client
        self._run = uuid.uuid4().hex
        self.accepted: list[str] = []
        self.accepted_minor = 0
        self.duplicates: list[str] = []
        self.refused: dict[str, list[str]] = {}

    async def get(self, path: str) -> dict[str, Any]:
        """Return the document at `path`."""
        response = await self._client.get(path)
        if response.status_code != 200:
            raise Trouble(f"GET {path} was answered {response.status_code}: {response.text[:200]}")
        document: dict[str, Any] = response.json()
        return document

    async def place(self, order: Order) -> None:
        """Place one order and note the answer. The key makes it safe to send the same order again."""
        headers = {"Idempotency-Key": f"{self._run}-{order['order_id']}"}
        for _ in range(SENDINGS_MAX):
            response = await self._client.post("/orders", json=order, headers=headers)
            if response.status_code != 503:
                break
            await asyncio.sleep(float(response.headers.get("retry-after", "1")))
        answer = response.json()
        if response.status_code in (201, 202):
            self.accepted.append(order["order_id"])
            self.accepted_minor += answer["total_minor"]
        elif response.status_code == 409:
            self.duplicates.append(order["order_id"])
        elif response.status_code == 422:
            self.refused[order["order_id"]] = [describe(fault, order) for fault in answer["errors"]]
        else:
            raise Trouble(f"Order {order['order_id']} was answered {response.status_code}: {answer['error']}")

    async def until_rest(self, expected: int) -> int:
        """Wait until there are `expected` orders and none has anything left to happen.

        Return how many are parked for a person to look at. With queued intake accepted orders are stored later.
        """
        deadline = time.monotonic() + REST_SECONDS_MAX
        task = progress.add_task("Coming to rest", total=expected)
        while True:
            queue = await self.get("/orders/status")
            metrics = await self.get("/orders/metrics")
            coming = max(0, expected - metrics["total_orders"])
            left = coming + queue["ready"] + queue["scheduled"] + queue["leased"]
            progress.update(task, completed=expected - left)
            if not left:
                return int(queue["dead"])
            if time.monotonic() > deadline:
                raise Trouble(f"{left:,} orders are under way after {REST_SECONDS_MAX:g} s: does a worker run?")
            await asyncio.sleep(0.25)


def describe(fault: dict[str, str], order: Order) -> str:
    """Return a fault of a problem document, with the line of the order that its JSON pointer names."""
    parts = fault["field"].split("/")
    if parts[1:2] != ["items"] or len(parts) < 3:
        return f"{fault['field']} {fault['message']}"
    item = order["items"][int(parts[2])]
    name = item.get("name", "no description")
    return f"{fault['field']} {fault['message']} (item {item['item_id']}, {name}: {item.get(parts[-1])})"


def pounds(minor: int) -> str:
    """Return an amount of pence for people."""
    return f"GBP {Decimal(minor) / 100:,.2f}"


async def run(path: Path, url: str) -> bool:
    """Place the orders, wait, read them back, report; return whether the figures agree."""
    orders = read_orders(path)
    key = os.environ.get("EXPEDITER_API_KEY")
    headers = {"X-API-Key": key} if key else {}
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=ANSWER_SECONDS_MAX) as client:
        shop = Shop(client)
        before = await shop.get("/orders/metrics")
        with progress:
            await at_once(shop.place, orders, "Placing")
            parked = await shop.until_rest(before["total_orders"] + len(shop.accepted))
            known = shop.accepted + shop.duplicates
            stored = await at_once(shop.get, [f"/orders/{order_id}" for order_id in known], "Reading back")
        after = await shop.get("/orders/metrics")
    valid = {order["order_id"]: value_minor(order) for order in orders if is_valid(order)}
    print(f"{len(orders):,} invoices, {len(valid):,} of them valid orders worth {pounds(sum(valid.values()))}")
    report(shop, stored, parked, before, after)
    checks = {
        "every valid order is stored, with its value": {each["order_id"]: each["total_minor"] for each in stored}
        == valid,
        "every other order is refused": len(shop.refused) == len(orders) - len(valid),
        "/orders/metrics grew by what was accepted": after["total_orders"] - before["total_orders"]
        == len(shop.accepted),
    }
    for what, agrees in checks.items():
        print(f"{'yes' if agrees else 'NO':<4}{what}")
    return all(checks.values())


def report(shop: Shop, stored: list[Order], parked: int, before: Order, after: Order) -> None:
    """Print what was answered, where the orders are now, and how the service's own counts changed."""
    print(f"accepted   {len(shop.accepted):>6,}  worth {pounds(shop.accepted_minor)}")
    print(f"duplicates {len(shop.duplicates):>6,}  stored before, left as they are")
    print(f"refused    {len(shop.refused):>6,}  among them:")
    for order_id in sorted(shop.refused)[:: len(shop.refused) // REFUSALS_SHOWN + 1]:
        print(f"  {order_id}: {shop.refused[order_id][0]}")
    print(f"at rest    {len(stored):>6,}  worth {pounds(sum(order['total_minor'] for order in stored))}:")
    for status, count in sorted(Counter(order["status"] for order in stored).items()):
        print(f"  {status:<18} {count:>6,}")
    if parked:
        print(f"parked     {parked:>6,}  jobs need a look: see /orders/ORDER_ID/explain")
    print(f"{'/orders/metrics':<20} {'before':>8} {'after':>8} {'change':>8}")
    was, now = ({"total_orders": each["total_orders"], **each["order_status_counts"]} for each in (before, after))
    for name in now:
        print(f"  {name:<18} {was[name]:>8,} {now[name]:>8,} {now[name] - was[name]:>+8,}")


def main() -> int:
    """Read the command line, run, and return the exit status."""
    parser = argparse.ArgumentParser(description="Place a month of an online shop's orders.")
    parser.add_argument("file", nargs="?", type=Path, default=DATA, help="invoices (default: the shipped month)")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the service listens (%(default)s)")
    given = parser.parse_args()
    if not given.file.is_file():
        parser.error(f"there is no file {given.file}")
    try:
        return 0 if asyncio.run(run(given.file, given.url)) else 1
    except* Trouble as troubles:
        print(troubles.exceptions[0], file=sys.stderr)
    except* httpx2.ConnectError:
        print(f"No service answers at {given.url}: start one with `make run`, or give its --url", file=sys.stderr)
    except* httpx2.TransportError as errors:
        print(f"The service at {given.url} stopped answering: {errors.exceptions[0]!r}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
