"""Orders that somebody else carries out: handed over by HTTP or to a function, taken, and reported later."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from auditing import wait_until
from expediter.errors import ConfigurationError, FulfilmentRefused, FulfilmentUnavailable
from expediter.fulfilment import Handed, open_fulfiller
from expediter.orders.order import Line
from expediter.testing import exercise_fulfiller
from servers import RedisServer, free_port
from serving import Program, Serving
from storing import Place, rows
from strategies import Story

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "fulfilment.md").read_text(encoding="utf-8")
ORDER: dict[str, Any] = {"customer_name": "Ann", "items": [{"name": "Pen", "quantity": 2, "price": "1.20"}]}

#: What a call is answered: status, headers and body.
Said = tuple[int, dict[str, str], bytes]


class Kitchen:
    """Somebody who carries orders out, at `url`; `say` decides what is answered to which call of an order."""

    def __init__(self, say: Callable[[str, int], Said]) -> None:
        kitchen = self
        self.calls: list[tuple[dict[str, str], dict[str, Any]]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                kitchen.calls.append(({name.lower(): value for name, value in self.headers.items()}, body))
                number = sum(each["order_id"] == body["order_id"] for _, each in kitchen.calls)
                status, headers, answer = say(body["order_id"], number)
                if not status:
                    return  # the connection is dropped
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(answer))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/orders"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def asked(self, order_id: str) -> int:
        return sum(body["order_id"] == order_id for _, body in self.calls)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def kitchen(say: Callable[[str, int], Said]) -> Iterator[Kitchen]:
    made = Kitchen(say)
    try:
        yield made
    finally:
        made.close()


def always(status: int, body: bytes = b"") -> Callable[[str, int], Said]:
    return lambda order_id, number: (status, {}, body)


def place(service: Serving, order_id: str, **changes: Any) -> None:
    answer = service.client.post("/orders", json=ORDER | {"order_id": order_id} | changes)
    assert answer.status_code in (201, 202), answer.text


def types(service: Serving, order_id: str) -> list[str]:
    return [event["type"] for event in service.client.get(f"/orders/{order_id}/events").json()["events"]]


def taken(service: Serving, order_id: str) -> bool:
    return types(service, order_id)[-1] == "fulfilment.taken"


def report(service: Serving, order_id: str, outcome: str, **more: str) -> tuple[int, dict[str, Any]]:
    answer = service.client.post(f"/orders/{order_id}/fulfilment", json={"outcome": outcome, **more})
    return answer.status_code, answer.json()


def test_an_order_is_given_whole(folder: Path) -> None:
    """The call has the order document, the key, a request id and the token; 200 completes the order."""
    with (
        kitchen(always(200)) as cooks,
        Serving(folder, FULFILMENT=cooks.url, FULFILMENT_TOKEN="sesame") as service,
    ):
        place(service, "A1")
        assert service.until_rest("A1")["status"] == "completed"
        ((headers, body),) = cooks.calls
        assert (headers["idempotency-key"], headers["authorization"]) == ("A1-1", "Bearer sesame")
        assert len(headers["x-request-id"]) == 32
        shown = service.client.get("/orders/A1").json()
        assert (body["status"], body["payment_status"]) == ("processing", "paid")
        assert body["items"] == shown["items"]
        assert "payment_token" not in body
        assert "sesame" not in "".join(service.log)


ANSWERS = [
    (int(status), meaning)
    for said, meaning in re.findall(r"^\| ((?:\d{3}|any other)[^|]*) \| ([a-z ]+) \|", TEXT, re.M)
    for status in re.findall(r"\d{3}", said)
    if "from 400" not in said
] + [(418, "refused"), (404, "refused")]


@pytest.mark.parametrize(("status", "meaning"), ANSWERS)
async def test_an_answer_means_what_the_page_says(status: int, meaning: str) -> None:
    """Each row of the table in docs/fulfilment.md."""

    async def lines() -> list[Line]:
        return []

    with kitchen(always(status, b"" if status == 204 else b'{"error": "no more dough"}')) as cooks:
        fulfiller = open_fulfiller(cooks.url, latency_ms_min=0, latency_ms_max=0)
        order = Story.of().order
        try:
            if meaning in ("done", "taken"):
                assert await fulfiller.fulfil(order, lines) is Handed(meaning)
            else:
                kind = FulfilmentRefused if meaning == "refused" else FulfilmentUnavailable
                with pytest.raises(kind, match="no more dough"):
                    await fulfiller.fulfil(order, lines)
        finally:
            await fulfiller.close()


def test_the_table_of_answers_is_whole() -> None:
    """Every meaning has rows that were read."""
    assert {meaning for _, meaning in ANSWERS} == {"done", "taken", "try again", "refused"}
    assert len(ANSWERS) >= 11


def test_what_fails_is_tried_again_and_what_is_refused_is_not(folder: Path) -> None:
    """A dropped connection and a 503 are borne with; a refusal is final, until somebody asks for a retry."""
    answers: dict[str, list[Said]] = {
        "A1": [(0, {}, b""), (503, {}, b""), (200, {}, b"")],
        "A2": [(422, {}, b'{"detail": "We have no pens"}'), (200, {}, b"")],
    }
    with (
        kitchen(lambda order_id, number: answers[order_id][number - 1]) as cooks,
        Serving(folder, FULFILMENT=cooks.url) as service,
    ):
        place(service, "A1")
        place(service, "A2")
        assert service.until_rest("A1")["status"] == "completed"
        assert cooks.asked("A1") == 3
        refused = service.until_rest("A2")
        assert (refused["status"], refused["last_error"]) == ("failed", "We have no pens")
        service.client.post("/orders/A2/retry")
        wait_until(lambda: service.client.get("/orders/A2").json()["status"] == "completed")


def test_nobody_there_ends_after_as_many_times_as_are_set(folder: Path) -> None:
    """FULFILMENT_RETRY_ATTEMPTS=2: two calls, then the order is failed and says why."""
    address = f"http://127.0.0.1:{free_port()}/orders"
    with Serving(folder, FULFILMENT=address, FULFILMENT_RETRY_ATTEMPTS="2") as service:
        place(service, "A1")
        ended = service.until_rest("A1")
        assert ended["status"] == "failed"
        assert "cannot be reached" in str(ended["last_error"])
        assert types(service, "A1").count("fulfilment.unavailable") == 1


def test_who_has_taken_an_order_reports_later(folder: Path, at: Place) -> None:
    """202 leaves it in processing without a worker; a report ends it, the same one again changes nothing."""
    with kitchen(always(202)) as cooks, Serving(folder, DATABASE_URL=at.address, FULFILMENT=cooks.url) as service:
        for order_id in ("A1", "A2", "A3", "A4"):
            place(service, order_id)
            wait_until(lambda order_id=order_id: taken(service, order_id))  # type: ignore[misc]
        queue = service.client.get("/orders/status").json()
        assert (queue["ready"], queue["scheduled"], queue["leased"], queue["handed_over"]) == (0, 0, 0, 4)
        explained = service.client.get("/orders/A1/explain").json()
        assert explained["why"] == "It was handed over; whoever carries it out reports by POST to its /fulfilment."
        assert (explained["next_action"]["action"], explained["next_action"]["due_at"]) == ("report", None)

        status, done = report(service, "A1", "done", reference="K-17")
        assert (status, done["status"]) == (200, "completed")
        assert report(service, "A1", "done", reference="K-17") == (200, done)
        history = service.client.get("/orders/A1/events").json()["events"]
        assert history[-1]["data"]["reference"] == "K-17"
        assert report(service, "A1", "failed")[0] == 409

        status, failed = report(service, "A2", "failed", reason="the oven is cold")
        assert (failed["status"], failed["last_error"]) == ("failed", "the oven is cold")
        assert report(service, "A2", "failed")[1]["version"] == failed["version"]

        assert service.client.post("/orders/A3/cancel").status_code == 202
        wait_until(lambda: service.client.get("/orders/A3").json()["payment_status"] == "refunded")
        assert report(service, "A3", "done")[0] == 409

        # It may be handed over again, and a late report of the first time still counts.
        assert service.client.post("/orders/A4/retry").status_code == 202
        wait_until(lambda: cooks.asked("A4") == 2 and taken(service, "A4"))
        assert report(service, "A4", "done")[0] == 200
        queue = service.client.get("/orders/status").json()
        assert (queue["handed_over"], queue["queue_length"]) == (0, 0)
        assert rows(at, "SELECT count(*) FROM jobs") == [(0,)]


def test_a_report_may_come_before_the_answer(folder: Path) -> None:
    """Whoever reports while it is still being asked is believed, and the late answer changes nothing."""
    reported: list[int] = []

    def say(order_id: str, number: int) -> Said:
        reported.append(report(service, order_id, "done")[0])
        return (202, {}, b"")

    with kitchen(say) as cooks, Serving(folder, FULFILMENT=cooks.url) as service:
        place(service, "A1")
        assert service.until_rest("A1")["status"] == "completed"
        service.until_rest("A1")
        assert reported == [200]
        assert types(service, "A1")[-1] == "order.completed"


def test_a_late_report_is_said_to_be_late(folder: Path) -> None:
    """After FULFILMENT_SECONDS_MAX the order says once that it is overdue, and can still be reported."""
    with (
        kitchen(always(202)) as cooks,
        Serving(folder, FULFILMENT=cooks.url, FULFILMENT_SECONDS_MAX="0.5") as service,
    ):
        place(service, "A1")
        wait_until(lambda: types(service, "A1")[-1] == "fulfilment.overdue")
        explained = service.client.get("/orders/A1/explain").json()
        assert explained["why"].endswith("It is overdue.")
        assert "late" in explained["last_error"]
        assert types(service, "A1").count("fulfilment.overdue") == 1
        assert report(service, "A1", "done")[1]["status"] == "completed"


def test_by_hand_a_report_does_as_well(folder: Path) -> None:
    """With FULFILMENT=manual a report takes an order from where it waits to its end."""
    with Serving(folder, FULFILMENT="manual") as service:
        place(service, "A1")
        wait_until(lambda: service.client.get("/orders/A1").json()["status"] == "confirmed")
        assert report(service, "A1", "done")[1]["status"] == "completed"
        place(service, "A2", payment_token="tok_declined")
        service.until_rest("A2")
        status, refused = report(service, "A2", "done")
        assert (status, refused["legal"]) == (409, ["payment_processing", "cancelled"])


def test_a_report_goes_through_the_queue(folder: Path, redis_server: RedisServer) -> None:
    """With INTAKE=queued a report is answered 202 and applied by the workers."""
    url = redis_server.new_database()
    with kitchen(always(202)) as cooks:
        settings = {"INTAKE": "queued", "BROKER_URL": url, "REDIS_URL": url, "FULFILMENT": cooks.url}
        with Serving(folder, **settings) as service:
            place(service, "A1")
            wait_until(lambda: cooks.asked("A1") == 1 and taken(service, "A1"))
            assert report(service, "A1", "done", reference="K-1")[0] == 202
            wait_until(lambda: service.client.get("/orders/A1").json()["status"] == "completed")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"outcome": "maybe"}, "/outcome"),
        ({}, "/outcome"),
        ({"outcome": "done", "reference": "x" * 129}, "/reference"),
        ({"outcome": "failed", "reason": "x" * 501}, "/reason"),
        ({"outcome": "done", "because": "x"}, "/because"),
    ],
)
def test_a_report_that_cannot_be_read_is_refused(service: Serving, body: dict[str, str], field: str) -> None:
    """What is wrong with a report is named."""
    answer = service.client.post("/orders/A1/fulfilment", json=body)
    assert answer.status_code == 422
    assert field in [each["field"] for each in answer.json()["errors"]]


def test_a_function_of_one_s_own_carries_orders_out(folder: Path) -> None:
    """examples/own_fulfilment.py, as the page starts it: done, taken, refused, and closed for a while."""
    shown = re.search(r"^(PYTHONPATH=\S+) (FULFILMENT=\S+) expediter serve$", TEXT, re.M)
    assert shown is not None
    settings = dict(each.split("=", 1) for each in shown.groups())
    settings["PYTHONPATH"] = str(ROOT / settings["PYTHONPATH"])
    book = folder / "kitchen" / "book.txt"
    with Serving(folder, OWN_KITCHEN=str(book), **settings) as service:
        place(service, "A1")
        wait_until(lambda: "fulfilment.unavailable" in types(service, "A1"))  # there is no such folder yet
        book.parent.mkdir()
        assert service.until_rest("A1")["status"] == "completed"
        place(service, "A2", metadata={"table": 7})
        wait_until(lambda: taken(service, "A2"))
        place(service, "A3", items=[{"name": "Blowfish", "quantity": 1}])
        assert service.until_rest("A3")["last_error"] == "The kitchen does not make blowfish"
        assert book.read_text() == "A1-1: 2 x Pen\nA2-1: 2 x Pen\n"
        report(service, "A2", "done")


def test_a_function_with_a_bug_parks_the_order(folder: Path) -> None:
    """What nobody foresaw is tried a few times, then a person must look; other orders go on."""
    (folder / "kitchen.py").write_text(
        "async def fulfil(ticket):\n"
        "    if ticket.order_id == 'A1':\n"
        "        raise ZeroDivisionError('the recipe is wrong')\n"
    )
    settings = {"FULFILMENT": "python:kitchen:fulfil", "PYTHONPATH": str(folder)}
    with Serving(folder, **settings) as service:
        place(service, "A1")
        place(service, "A2")
        assert service.until_rest("A2")["status"] == "completed"
        wait_until(lambda: types(service, "A1")[-1] in ("job.failed", "job.parked"))
        assert "the recipe is wrong" in service.client.get("/orders/A1/explain").json()["last_error"]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("python:kitchen", "write python:package.module:function"),
        ("python:not_there:fulfil", "PYTHONPATH"),
        ("python:json:nobody", "has no attribute"),
        ("python:os:getcwd", "no function of one argument"),
        ("https://user:s3cret@kitchen.example/", "FULFILMENT_TOKEN"),
        ("https:///orders", "has no host"),
        ("https://kitchen.example:99999/", "cannot be read"),
        ("ftp://kitchen.example", "is not known"),
    ],
)
def test_what_cannot_be_opened_is_named(address: str, words: str) -> None:
    """An address or a function that cannot be used is refused by a sentence, never with a secret in it."""
    with pytest.raises(ConfigurationError) as refused:
        open_fulfiller(address, latency_ms_min=0, latency_ms_max=0)
    assert words in str(refused.value)
    assert "s3cret" not in str(refused.value)


def test_a_deadline_for_nobody_is_refused(folder: Path) -> None:
    """FULFILMENT_SECONDS_MAX where nothing is handed over would be a setting that does nothing."""
    program = Program(folder, "serve", FULFILMENT="manual", FULFILMENT_SECONDS_MAX="60")
    program.wait_for("FULFILMENT=manual hands none over: remove it")
    assert program.process.wait(60) == 2
    program.stop()


async def test_the_suite_for_fulfillers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and a user's own pass it; one that fails the second time does not."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setenv("OWN_KITCHEN", str(tmp_path / "kitchen.txt"))
    with kitchen(always(200)) as cooks, kitchen(lambda _, n: (200 if n == 1 else 404, {}, b"")) as once:
        for address in ("simulated", "python:own_fulfilment:fulfil", cooks.url):
            shown = await exercise_fulfiller(
                lambda a=address: open_fulfiller(a, latency_ms_min=0, latency_ms_max=0)
            )  # type: ignore[misc]
            assert len(shown) == 3
        with pytest.raises(AssertionError, match="the same order again"):
            await exercise_fulfiller(lambda: open_fulfiller(once.url, latency_ms_min=0, latency_ms_max=0))
