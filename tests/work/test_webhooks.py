"""Webhooks amid processes that die and receivers that fail: every event comes, in order, and nobody else waits."""

from __future__ import annotations

import json
import os
import signal
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from auditing import wait_until
from receiving import Got, Receiver
from serving import Program, Serving
from storing import Place, position, rows

#: Orders of the run; EXPEDITER_WEBHOOKS=2000 makes it a longer one.
ORDERS = int(os.environ.get("EXPEDITER_WEBHOOKS", "200"))
#: Events of each.
EVENTS = 5
#: Orders that are placed at a time.
AT_ONCE = 100


def holder(at: Place, endpoint: str) -> int:
    """Return the id of the process that sends for an endpoint."""
    found = rows(at, f"SELECT holder FROM webhook_endpoints WHERE endpoint_id = '{endpoint}'")[0][0]
    return int(found.split(":")[1])


def test_every_event_comes_in_order_beside_a_receiver_that_never_answers(folder: Path, at: Place) -> None:
    """A receiver that is down for a while and fails every seventh call gets every event, each order's in order.

    Two processes work, and the one that sends is killed. A second receiver never answers.
    """
    settings = {"DATABASE_URL": at.address}
    with ExitStack() as stack:
        receiver = stack.enter_context(Receiver(lambda got: 500 if got.number % 7 == 0 else 204))
        silent = stack.enter_context(Receiver(lambda got: None))
        service = stack.enter_context(Serving(folder, "--no-workers", **settings))
        client = service.client
        slow = silent.subscribe(client)
        endpoint = receiver.subscribe(client, types=["*"])
        workers = {}
        for _ in range(2):
            worker = Program(folder, "work", **settings)
            stack.callback(worker.kill)
            workers[worker.process.pid] = worker
        for start in range(0, ORDERS, AT_ONCE):
            asked = {"total_entries": AT_ONCE, "batch_id": f"b{start}"}
            assert client.post("/orders/populate", json=asked).status_code == 201
            if start == 0:
                wait_until(lambda: len(receiver.taken) > 20)
                receiver.down()
        wait_until(lambda: client.get(f"/api/v1/webhooks/{endpoint}").json()["status"] == "failing")
        killed = holder(at, endpoint)
        os.kill(killed, signal.SIGKILL)
        receiver.up()
        wait_until(lambda: holder(at, endpoint) in workers.keys() - {killed})
        wait_until(lambda: rows(at, "SELECT count(*) FROM jobs") == [(0,)])
        wait_until(lambda: client.get(f"/api/v1/webhooks/{endpoint}").json()["behind"] == 0)

        # The killed process may have left a charge of which nobody knew: such an order has an event more.
        happened = defaultdict(list)
        for order_id, number in rows(at, "SELECT order_id, number FROM events ORDER BY position"):
            happened[order_id].append(number)
        assert len(happened) == ORDERS
        assert receiver.wrong == []
        firsts = defaultdict(list)
        for order_id, number in dict.fromkeys(got.event for got in receiver.taken):
            firsts[order_id].append(number)
        assert firsts == happened
        named: dict[tuple[str, int], set[str]] = defaultdict(set)
        for got in receiver.got:
            named[got.event].add(got.id)
        assert [event for event, names in named.items() if len(names) > 1] == []
        assert len(set.union(*named.values())) == sum(map(len, happened.values())) >= ORDERS * EVENTS
        newest = position(at)
        shown = client.get(f"/api/v1/webhooks/{endpoint}").json()
        assert (shown["status"], shown["position"]) == ("active", newest)
        assert rows(at, "SELECT count(*) FROM webhook_deliveries WHERE status = 'given_up'") == [(0,)]
        behind = client.get(f"/api/v1/webhooks/{slow}").json()["behind"]
        assert behind == newest
        assert silent.taken == []
        print(f"\n{at.address.split(':')[0]}: the silent receiver is {behind} events behind, the other one none")


def test_one_slow_receiver_delays_only_itself(folder: Path) -> None:
    """Beside a receiver that never answers, another one gets each event as soon as it has happened."""
    with Receiver(lambda got: None) as silent, Receiver() as receiver, Serving(folder) as service:
        silent.subscribe(service.client)
        receiver.subscribe(service.client)
        for batch in ("a", "b"):
            asked = {"total_entries": 40, "batch_id": batch}
            service.client.post("/orders/populate", json=asked)
            wait_until(lambda batch=batch: taken(receiver, f"sim_{batch}_") == 40 * EVENTS)  # type: ignore[misc]
        # Every request that the silent one has open is its own.
        assert len(silent.got) == 32
        lag = max(got.at for got in receiver.taken) - min(got.at for got in receiver.got)
        print(
            f"\nall {len(receiver.taken)} events within {lag:.2f} s; none of {len(silent.got)} requests answered"
        )
        # The other one's first requests have not even timed out.
        assert lag < 15


def taken(receiver: Receiver, prefix: str) -> int:
    return sum(got.data["order_id"].startswith(prefix) for got in list(receiver.taken))


def test_what_is_sent_is_the_order_as_it_was_then(folder: Path) -> None:
    """The body has the order after the event, what changed, and the position in the feed; it never has a token."""
    with Receiver() as receiver, Serving(folder) as service:
        client = service.client
        receiver.subscribe(client)
        order = {"customer_name": "Ann", "items": [{"name": "Pen", "quantity": 2, "price": "1.20"}]}
        placed = client.post("/orders", json=order | {"order_id": "A1", "payment_token": "tok_secret"}).json()
        service.until_rest("A1")
        receiver.until(*(("A1", number) for number in range(1, EVENTS + 1)))
        feed = client.get("/api/v1/events").json()["events"]
        bodies = [body_of(got) for got in receiver.taken]
        assert [(body["type"], body["timestamp"]) for body in bodies] == [
            (each["type"], each["at"]) for each in feed
        ]
        assert [body["data"]["change"] for body in bodies] == [each["data"] for each in feed]
        assert [body["data"]["position"] for body in bodies] == [each["position"] for each in feed]
        shown = {name: value for name, value in placed.items() if name != "message"}
        assert bodies[0]["data"]["order"] == shown
        assert bodies[1]["data"]["order"]["status"] == "payment_processing"
        assert bodies[-1]["data"]["order"] == client.get("/api/v1/orders/A1").json()
        assert [body["data"]["order"]["version"] for body in bodies] == [1, 2, 3, 4, 5]
        assert "tok_secret" not in "".join(got.text for got in receiver.got)
        client.delete("/api/v1/orders/A1")
        receiver.until(("A1", 6))
        assert body_of(receiver.taken[-1])["data"]["order"] is None


def body_of(got: Got) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(got.text)
    return found
