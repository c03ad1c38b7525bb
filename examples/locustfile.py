"""Load for a service: of ten users nine read orders and one places them. `make load` runs it.

The calls are those of the cached orders API, so that it puts the same load on both.
"""

from __future__ import annotations

import os
import random
from collections import deque

from locust import FastHttpUser, between, task

#: Ids of orders that were listed or placed last, for the readers.
KNOWN_MAX = 1_000
#: The first order on a page lies at most this far from the newest.
OFFSET_MAX = 200
PAGE_SIZE = 20

#: The API key, where callers need one.
HEADERS = {"X-API-Key": os.environ["EXPEDITER_API_KEY"]} if os.environ.get("EXPEDITER_API_KEY") else {}

known: deque[str] = deque(maxlen=KNOWN_MAX)


class Reader(FastHttpUser):
    """Looks at single orders and turns the pages of the list; now and then it looks at the figures."""

    weight = 9
    wait_time = between(0.05, 0.25)

    def on_start(self) -> None:
        self.list_orders(0)

    @task(60)
    def read_one(self) -> None:
        if known:
            self.client.get(f"/orders/{random.choice(known)}", name="/orders/{id}", headers=HEADERS)

    @task(35)
    def turn_a_page(self) -> None:
        self.list_orders(random.randrange(0, OFFSET_MAX, PAGE_SIZE))

    @task(5)
    def read_figures(self) -> None:
        self.client.get("/orders/metrics", headers=HEADERS)

    def list_orders(self, offset: int) -> None:
        path = f"/orders?limit={PAGE_SIZE}&offset={offset}"
        with self.client.get(path, name="/orders", headers=HEADERS, catch_response=True) as answer:
            if answer.status_code == 200:
                known.extend(order["order_id"] for order in answer.json()["orders"])


class Writer(FastHttpUser):
    """Places orders."""

    weight = 1
    wait_time = between(0.05, 0.25)

    @task
    def place(self) -> None:
        number = random.randrange(1_000)
        order = {
            "customer_name": f"Customer {number}",
            "items": [{"name": "Pen", "quantity": 1 + number % 5}, {"name": "Paper", "quantity": 2}],
        }
        with self.client.post("/orders", json=order, headers=HEADERS, catch_response=True) as answer:
            if answer.status_code not in (200, 201, 202):
                answer.failure(f"not placed: {answer.status_code}")
            else:
                known.append(answer.json()["order_id"])
