"""`GET /metrics`: what one scrape tells, whichever process it lands on and whatever hangs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from auditing import wait_until, working
from expediter.run.measuring import KEPT_SECONDS, Measuring
from expediter.run.service import open_service
from expediter.run.serving import context_of
from expediter.settings import load_settings
from expediter.telemetry.meters import LABELS_MAX, OTHER, Bounded
from expediter.web import create_app
from expediter.web.server.state import State
from servers import free_port
from serving import Serving, make_database
from storing import Place, ask, place
from test_costs import overheard_sqlite

ORDER = {"customer_name": "Ann", "items": [{"name": "Pen", "quantity": 2, "price": "1.20"}]}
#: Each request by a connection of its own, which any process may take up.
ALONE = {"Connection": "close"}

Labels = frozenset[tuple[str, str]]


def scraped(client: httpx2.Client) -> Mapping[str, Mapping[Labels, float]]:
    """Scrape once, by a connection of its own; return the numbers by name and labels, each there once."""
    answer = client.get("/metrics", headers=ALONE)
    assert answer.status_code == 200, answer.text
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            by_labels = found.setdefault(sample.name, {})
            labels = frozenset(sample.labels.items())
            assert labels not in by_labels, (sample.name, labels)
            by_labels[labels] = sample.value
    return found


def total(numbers: Mapping[str, Mapping[Labels, float]], name: str, **labels: str) -> float:
    """Return the sum of the numbers that have these labels."""
    return sum(value for found, value in numbers.get(name, {}).items() if labels.items() <= dict(found).items())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Two serving processes on one port."""
    with Serving(tmp_path_factory.mktemp("two"), "--processes", "2") as service:
        yield service


def test_one_scrape_tells_of_all_processes_on_a_port(two: Serving) -> None:
    """Each request is counted once, by route, method and status, whichever process is asked."""
    ask_for = partial(two.client.request, headers=ALONE)
    placed = [ask_for("POST", "/orders", json=ORDER).json()["order_id"] for _ in range(12)]
    for order_id in placed:
        ask_for("GET", f"/orders/{order_id}")
    ask_for("GET", "/orders/nobody")
    ask_for("HEAD", f"/orders/{placed[0]}")
    for _ in range(8):
        numbers = scraped(two.client)
        route = "/api/v1/orders/{order_id}"
        requests = "expediter_http_requests_total"
        assert total(numbers, requests, route="/orders", method="POST", status="201") == 12
        assert total(numbers, requests, route=route, method="GET", status="200") == 12
        assert total(numbers, requests, route=route, method="GET", status="404") == 1
        assert total(numbers, requests, route=route, method="HEAD", status="200") == 1
        seconds = "expediter_http_request_duration_seconds"
        assert total(numbers, f"{seconds}_count", route=route, method="GET") == 13
        assert total(numbers, f"{seconds}_bucket", route=route, method="GET", le="+Inf") == 13
        assert total(numbers, "expediter_process_up") == 2


def test_orders_and_jobs_are_those_of_the_database(two: Serving) -> None:
    """Statuses and the states of jobs are what `/orders/metrics` and `/orders/status` say."""
    order_id = two.client.post("/orders", json=ORDER).json()["order_id"]
    two.until_rest(order_id)
    wait_until(lambda: two.client.get("/orders/status").json()["queue_length"] == 0)
    at_rest = time.monotonic()
    wait_until(lambda: time.monotonic() - at_rest > KEPT_SECONDS)  # what is told may be as old as that
    numbers = scraped(two.client)
    counts = two.client.get("/orders/metrics").json()["order_status_counts"]
    assert {status: total(numbers, "expediter_orders", status=status) for status in counts} == counts
    assert total(numbers, "expediter_orders") == sum(counts.values()) > 0
    assert total(numbers, "expediter_jobs") == 0
    assert total(numbers, "expediter_gateway_breaker_state", state="closed") == 1
    assert total(numbers, "expediter_dependency_up", dependency="database") == 1
    assert total(numbers, "expediter_stage_duration_seconds_count", stage="fulfil") >= 1
    assert total(numbers, "expediter_gateway_call_duration_seconds_count", outcome="succeeded") >= 1


def test_paths_and_methods_of_strangers_are_one_number(two: Serving) -> None:
    """A scanner makes no new series, however many paths and methods it thinks of."""
    for number in range(40):
        two.client.get(f"/wp-admin/{number}.php")
        two.client.request(f"SCAN{number}", f"/{number}")
    requests = scraped(two.client)["expediter_http_requests_total"]
    strange = {
        (dict(labels)["method"], dict(labels)["status"]) for labels in requests if ("route", "none") in labels
    }
    assert {method for method, _ in strange} <= {"GET", "OTHER"}
    bounded = Bounded()
    assert {bounded(f"wh_{number}") for number in range(3 * LABELS_MAX)} == {
        *(f"wh_{number}" for number in range(LABELS_MAX)),
        OTHER,
    }


def test_openmetrics_for_who_asks_for_it(two: Serving) -> None:
    """Prometheus asks for OpenMetrics, and gets it; a browser gets the text format."""
    asked = two.client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert asked.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert asked.text.endswith("# EOF\n")
    plain = two.client.get("/metrics", headers={"Accept": "text/html,*/*"})
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert two.client.get("/metrics?name=expediter_orders").status_code == 422


def test_a_worker_by_itself_has_a_port_for_them(tmp_path: Path) -> None:
    """`expediter work` tells at METRICS_PORT what it has measured, and nothing else is there."""
    port = free_port()
    with Serving(tmp_path, "--no-workers") as service, working(tmp_path, METRICS_PORT=str(port)) as worker:
        worker.wait_for(f"metrics  http://127.0.0.1:{port}/metrics")
        service.until_rest(service.client.post("/orders", json=ORDER).json()["order_id"])
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}") as client:
            numbers = scraped(client)
            assert total(numbers, "expediter_claimed_jobs_total", process="worker-1") == 1
            assert "expediter_orders" not in numbers  # whoever serves tells that, once
            assert client.get("/orders").status_code == 404


async def test_scrapes_in_the_same_second_are_one_bounded_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database is asked as much for 40 orders as for one, and once for two scrapes."""
    asked = []
    make_database(tmp_path, {})
    async with (
        overheard_sqlite(Place(f"sqlite:///{tmp_path}/orders.db"), monkeypatch) as (address, said),
        open_service(load_settings(database_url=address), working=False) as service,
    ):
        context = context_of(service, working=False)
        state = State(create_app(context), connections_max=1, drain_seconds=0)
        for number in range(40):
            await ask(service.committer, place(f"ORD-{number}"))
            if number in (0, 39):
                Measuring(service, "api-1").serve(context, state)  # anew: it remembers nothing
                said.take()
                first, second = await context.metrics(), await context.metrics()
                assert [family.name for family in first] == [family.name for family in second]
                (counted,) = [family.samples for family in first if family.name == "expediter_orders"]
                assert sum(sample.value for sample in counted) == number + 1
                texts = [text for text in said.take().texts if "FROM idempotency_keys" not in text]
                asked.append([text for text in texts if text.startswith("SELECT")])
    few, many = asked
    assert few == many
    assert 4 < len(few) == len(set(few)) < 8
