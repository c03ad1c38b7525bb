"""Webhooks over HTTP: endpoints are made, changed, paused and removed; what failed is shown, and sent again."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from auditing import wait_until
from receiving import Got, Receiver
from serving import ADMIN_PASSWORD, PATIENCE_SECONDS, Serving, environment
from storing import Place

ORDER = {"customer_name": "Ann", "items": [{"name": "Pen", "quantity": 2, "price": "1.20"}]}
HOOKS = "/api/v1/webhooks"
DAY = 86_400 * 1_000_000


@contextmanager
def subscribed(service: Serving, receiver: Receiver, **more: Any) -> Iterator[str]:
    """An endpoint that sends to the receiver, removed at the end."""
    endpoint = receiver.subscribe(service.client, **more)
    try:
        yield f"{HOOKS}/{endpoint}"
    finally:
        assert service.client.delete(f"{HOOKS}/{endpoint}").status_code == 204


def placed(service: Serving) -> str:
    """Place an order, let it come to rest and return its id."""
    order_id: str = service.client.post("/orders", json=ORDER).json()["order_id"]
    service.until_rest(order_id)
    return order_id


def all_of(order_id: str) -> list[tuple[str, int]]:
    return [(order_id, number) for number in range(1, 6)]


def noticed(service: Serving, endpoint: str, call: Callable[[], object]) -> None:
    """Make a change, and wait until the reader of the endpoint has noticed: it gives its lease back for that."""
    at = Place(f"sqlite:///{database_of(service)}")
    look = f"SELECT fence, lease_until FROM webhook_endpoints WHERE endpoint_id = '{endpoint.rpartition('/')[2]}'"
    wait_until(lambda: at.rows(look)[0][1] > 0)
    before = at.rows(look)[0][0]
    call()
    wait_until(lambda: at.rows(look)[0][0] > before or at.rows(look)[0][1] == 0)


def database_of(service: Serving) -> str:
    """Return the file of a service's database, as it says itself."""
    (line,) = [line for line in service.log if "SQLite" in line]
    return line.split(", ")[1].split(";")[0]


def deliveries(service: Serving, endpoint: str, **query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = service.client.get(f"{endpoint}/deliveries", params=query).json()["deliveries"]
    return found


def status(service: Serving, endpoint: str) -> str:
    found: str = service.client.get(endpoint).json()["status"]
    return found


def test_an_endpoint_is_shown_and_its_secret_only_once(service: Serving) -> None:
    """Made, listed, read, changed and removed; the secret is in the answer that makes it, and in no other one."""
    client = service.client
    body = {
        "url": "http://127.0.0.1:9/hooks",
        "types": ["order.*", "payment.failed"],
        "description": "the kitchen",
    }
    made = client.post(HOOKS, json=body)
    assert made.status_code == 201
    whole = made.json()
    secret = whole.pop("secret")
    assert secret.startswith("whsec_")
    assert whole | body == whole
    assert (whole["status"], whole["behind"], whole["last_error"]) == ("active", 0, None)
    endpoint = f"{HOOKS}/{whole['id']}"
    assert client.get(endpoint).json() == whole
    assert whole in client.get(HOOKS).json()["webhooks"]
    changed = client.patch(endpoint, json={"types": ["*"], "description": "all"}).json()
    assert changed == whole | {"types": ["*"], "description": "all"}
    rotated = client.post(f"{endpoint}/rotate-secret").json()
    assert rotated.pop("secret") != secret
    assert rotated == changed
    assert client.delete(endpoint).status_code == 204
    for answer in (client.get(endpoint), client.delete(endpoint), client.get(f"{endpoint}/deliveries")):
        assert answer.status_code == 404
        assert "no webhook endpoint" in answer.json()["error"]
    assert secret not in "\n".join(service.log)


def test_the_same_request_again_makes_no_second_endpoint(service: Serving) -> None:
    """With an Idempotency-Key the answer is the one of before, whatever was asked."""
    client = service.client
    key = {"Idempotency-Key": "webhook-1"}
    body = {"url": "http://127.0.0.1:9/hooks"}
    first, again = (client.post(HOOKS, json=body, headers=key) for _ in range(2))
    assert first.json() == again.json()
    assert again.headers["idempotency-replayed"] == "true"
    endpoint = f"{HOOKS}/{first.json()['id']}"
    for rest in ("rotate-secret", "test"):
        answers = [client.post(f"{endpoint}/{rest}", headers={"Idempotency-Key": rest}) for _ in range(2)]
        assert answers[0].json() == answers[1].json()
    assert client.post(HOOKS, json={"url": "http://127.0.0.1:8/"}, headers=key).status_code == 422
    assert client.delete(endpoint).status_code == 204


@pytest.mark.parametrize(
    ("body", "field", "word"),
    [
        ({}, "/url", "required"),
        ({"url": "http://shop.example/"}, "/url", "must begin with https://"),
        ({"url": "https://10.0.0.1/"}, "/url", "public internet"),
        ({"url": "https://u:p@shop.example/"}, "/url", "no user"),
        ({"url": "https://x.example/", "types": ["order.done"]}, "/types/0", "there are: *, order.placed"),
        ({"url": "https://x.example/", "types": []}, "/types", "length"),
        ({"url": "https://x.example/", "from": "yesterday!"}, "/from", "now, beginning, or a next_cursor"),
        ({"url": "https://x.example/", "from": "MC45OTk5OTk5"}, "/from", "of before"),
        ({"url": "https://x.example/", "secret": "x"}, "/secret", "not a known field"),
    ],
)
def test_what_is_wrong_is_named(service: Serving, body: dict[str, Any], field: str, word: str) -> None:
    """A refused endpoint says which field, and what is wrong."""
    answer = service.client.post(HOOKS, json=body)
    assert answer.status_code == 422
    (fault,) = answer.json()["errors"]
    assert field in fault["field"] or field[1:] in fault["message"]
    assert word in fault["message"]


def test_there_are_fifty_endpoints_at_most(idle_service: Serving) -> None:
    """The fifty-first is refused with 409; where one is removed there is room again."""
    client = idle_service.client
    made = [client.post(HOOKS, json={"url": "http://127.0.0.1:9/"}) for _ in range(51)]
    assert [each.status_code for each in made] == [201] * 50 + [409]
    assert "50 webhook endpoints" in made[-1].json()["error"]
    assert len(client.get(HOOKS).json()["webhooks"]) == 50
    for each in made[:50]:
        assert client.delete(f"{HOOKS}/{each.json()['id']}").status_code == 204
    again = client.post(HOOKS, json={"url": "http://127.0.0.1:9/"})
    assert again.status_code == 201
    client.delete(f"{HOOKS}/{again.json()['id']}")


def test_only_the_types_that_are_asked_for_come(service: Serving) -> None:
    """Names and `order.*`; the position goes over the others, and the order is as it was all the same."""
    with Receiver() as receiver, subscribed(service, receiver, types=["order.completed", "payment.*"]) as endpoint:
        order_id = placed(service)
        receiver.until((order_id, 2), (order_id, 3), (order_id, 5))
        wait_until(lambda: service.client.get(endpoint).json()["behind"] == 0)
        assert receiver.first_of(order_id) == [2, 3, 5]
        last = receiver.taken[-1].data["order"]
        assert last == service.client.get(f"/api/v1/orders/{order_id}").json()
        assert receiver.wrong == []


def test_it_begins_where_it_is_asked_to(service: Serving) -> None:
    """With the next event, at the beginning, or behind a cursor of the feed."""
    placed(service)
    cursor = service.client.get("/api/v1/events?after=now").json()["next_cursor"]
    old = placed(service)
    with (
        Receiver() as now,
        Receiver() as beginning,
        Receiver() as behind,
        subscribed(service, now),
        subscribed(service, beginning, **{"from": "beginning"}),
        subscribed(service, behind, **{"from": cursor}),
    ):
        new = placed(service)
        for receiver in (now, beginning, behind):
            receiver.until(*all_of(new))
        assert old not in {got.data["order_id"] for got in now.taken}
        assert behind.first_of(old) == behind.first_of(new) == [1, 2, 3, 4, 5]
        first = min(got.data["position"] for got in behind.taken)
        assert first > service.client.get("/api/v1/events").json()["events"][0]["position"]
        assert min(got.data["position"] for got in beginning.taken) < first


def test_a_failed_event_is_shown_and_comes_before_the_next_of_its_order(service: Serving) -> None:
    """Request, answer and next try are listed; what comes behind it in its order waits, and other orders go on."""
    down = {"bad": True}

    def answer(got: Got) -> Any:
        bad = down["bad"] and got.event == (first[0], 2) if first else False
        return (500, {}, b"out of \x00paper" + b"x" * 5000) if bad else 204

    first: list[str] = []
    with Receiver(answer) as receiver, subscribed(service, receiver) as endpoint:
        first.append("F1")
        service.client.post("/orders", json=ORDER | {"order_id": "F1"})
        service.until_rest("F1")
        wait_until(lambda: any(each["tries"] > 1 for each in deliveries(service, endpoint, status="waiting")))
        other = placed(service)
        receiver.until(*all_of(other))
        assert receiver.first_of("F1") == [1]
        wait_until(lambda: len(deliveries(service, endpoint, status="waiting", order_id="F1")) == 4)
        waiting = deliveries(service, endpoint, status="waiting", order_id="F1")
        shown = waiting[-1]
        assert [each["number"] for each in waiting] == [5, 4, 3, 2]
        assert (shown["answer"]["status"], shown["error"]) == (500, "answered 500")
        assert shown["answer"]["body"].startswith("out of \ufffdpaper")
        assert len(shown["answer"]["body"]) == 1024
        assert shown["next_try_at"] >= shown["last_tried_at"]
        assert [each["next_try_at"] for each in waiting[:-1]] == [None] * 3
        (sent,) = {got.text for got in receiver.got if got.event == ("F1", 2)}
        assert shown["request"] == json.loads(sent)
        assert {shown["id"]} == {got.id for got in receiver.got if got.event == ("F1", 2)}
        wait_until(lambda: service.client.get(endpoint).json()["behind"] == 4)
        down["bad"] = False
        receiver.until(*all_of("F1"))
        assert receiver.first_of("F1") == [1, 2, 3, 4, 5]
        wait_until(lambda: deliveries(service, endpoint, status="waiting") == [])
        (delivered,) = [each for each in deliveries(service, endpoint, order_id="F1") if each["number"] == 2]
        assert (delivered["status"], delivered["error"]) == ("delivered", None)
        assert delivered["tries"] > 2


def test_deliveries_come_in_pages(service: Serving) -> None:
    """The newest first, read on with the cursor; what is wrong with a parameter is named."""
    with Receiver() as receiver, subscribed(service, receiver) as endpoint:
        order_id = placed(service)
        receiver.until(*all_of(order_id))
        wait_until(lambda: len(deliveries(service, endpoint)) == 5)
        page = service.client.get(f"{endpoint}/deliveries", params={"limit": "3"}).json()
        rest = deliveries(service, endpoint, cursor=page["next_cursor"])
        assert [each["number"] for each in page["deliveries"] + rest] == [5, 4, 3, 2, 1]
        for query, word in (("status=lost", "must be one of"), ("cursor=x", "next_cursor"), ("limit=0", "from 1")):
            answer = service.client.get(f"{endpoint}/deliveries?{query}")
            assert answer.status_code == 422
            assert word in answer.json()["error"]


def test_paused_it_gets_nothing_and_then_everything(service: Serving) -> None:
    """What happens while it is paused comes once it goes on."""
    with Receiver() as receiver, subscribed(service, receiver) as endpoint:
        noticed(service, endpoint, lambda: service.client.patch(endpoint, json={"status": "paused"}))
        assert status(service, endpoint) == "paused"
        order_id = placed(service)
        # Another one, made later, has everything: the paused one would have had it, too.
        with Receiver() as other, subscribed(service, other, **{"from": "beginning"}):
            other.until(*all_of(order_id))
        assert receiver.got == []
        assert service.client.patch(endpoint, json={"status": "active"}).json()["status"] == "active"
        receiver.until(*all_of(order_id))
        assert receiver.first_of(order_id) == [1, 2, 3, 4, 5]


def test_410_pauses_an_endpoint_and_nothing_is_lost(service: Serving) -> None:
    """It says why; made active it goes on with the very event that was answered 410."""
    with Receiver(lambda got: 410) as receiver, subscribed(service, receiver) as endpoint:
        order_id = placed(service)
        wait_until(lambda: status(service, endpoint) == "paused")
        assert "answered 410" in service.client.get(endpoint).json()["last_error"]
        receiver.answer = lambda got: 204
        service.client.patch(endpoint, json={"status": "active"})
        receiver.until(*all_of(order_id))
        assert receiver.first_of(order_id) == [1, 2, 3, 4, 5]


def test_who_asks_for_time_gets_it(service: Serving) -> None:
    """After a Retry-After nothing comes for so long, whatever happens meanwhile."""
    waits = [(503, {"Retry-After": "1"}, b""), (429, {"Retry-After": "1"}, b"")]
    with (
        Receiver(lambda got: waits.pop() if waits else 204) as receiver,
        subscribed(service, receiver, types=["order.placed"]) as endpoint,
    ):
        first = placed(service)
        wait_until(lambda: status(service, endpoint) == "failing")
        others = [service.client.post("/orders", json=ORDER).json()["order_id"] for _ in range(3)]
        receiver.until(*((order_id, 1) for order_id in [first, *others]))
        assert receiver.got[1].at - receiver.got[0].at >= 0.9
        assert receiver.got[2].at - receiver.got[1].at >= 0.9
        wait_until(lambda: status(service, endpoint) == "active")


def test_redirects_are_not_followed_and_long_answers_not_read(service: Serving) -> None:
    """A redirect is a failure; of an answer without end only the beginning is read, and its status counts."""
    answers: list[Any] = [(302, {"Location": "/elsewhere"}, b""), (200, {}, b"x" * 4_000_000)]
    with (
        Receiver(lambda got: answers.pop(0) if answers else 204) as receiver,
        subscribed(service, receiver, types=["order.placed"]) as endpoint,
    ):
        order_id = placed(service)
        receiver.until((order_id, 1))
        assert {got.path for got in receiver.got} == {"/hooks"}
        wait_until(lambda: [each["status"] for each in deliveries(service, endpoint)] == ["delivered"])
        (shown,) = deliveries(service, endpoint)
        assert (shown["tries"], shown["answer"]["status"], len(shown["answer"]["body"])) == (2, 200, 1024)


def test_during_a_rotation_both_secrets_sign(service: Serving) -> None:
    """For 24 hours a receiver can check with the old one or the new one; then only with the new one."""
    with Receiver() as receiver, subscribed(service, receiver, types=["order.placed"]) as endpoint:
        rotated: list[str] = []

        def rotate() -> None:
            rotated.append(service.client.post(f"{endpoint}/rotate-secret").json()["secret"])

        noticed(service, endpoint, rotate)
        receiver.secrets += rotated
        receiver.until((placed(service), 1))
        assert receiver.wrong == []
        got = receiver.taken[-1]
        assert len(got.headers["webhook-signature"].split()) == 2
        headers = {name.lower(): value for name, value in got.headers.items()}
        with pytest.raises(WebhookVerificationError):
            Webhook(rotated[0]).verify(got.text + " ", headers)
        at = Place(f"sqlite:///{database_of(service)}")
        at.change(f"UPDATE webhook_endpoints SET old_secret_until = old_secret_until - {DAY}")
        noticed(service, endpoint, lambda: service.client.patch(endpoint, json={"description": "read it again"}))
        receiver.secrets = rotated
        receiver.until((placed(service), 1))
        assert receiver.wrong == []
        assert len(receiver.taken[-1].headers["webhook-signature"].split()) == 1


def test_a_test_says_what_the_receiver_answered(service: Serving) -> None:
    """One signed request, also to an endpoint that is paused; the answer, or why there was none."""
    with Receiver(lambda got: (418, {}, b"a teapot")) as receiver, subscribed(service, receiver) as endpoint:
        service.client.patch(endpoint, json={"status": "paused"})
        tried = service.client.post(f"{endpoint}/test").json()
        assert (tried["delivered"], tried["error"]) == (False, "answered 418")
        assert (tried["answer"]["status"], tried["answer"]["body"]) == (418, "a teapot")
        receiver.answer = lambda got: 204
        tried = service.client.post(f"{endpoint}/test").json()
        assert tried["delivered"] is True
        assert receiver.wrong == []
        assert [json.loads(got.text)["type"] for got in receiver.got] == ["webhook.test"] * 2
        assert tried["id"] == receiver.got[-1].id
        receiver.down()
        tried = service.client.post(f"{endpoint}/test").json()
        assert "cannot be reached" in tried["error"]
        receiver.up()


def test_what_was_delivered_is_sent_again(service: Serving) -> None:
    """One delivery by its id, and every event since a moment: the same names, the same bodies, in order."""
    with Receiver() as receiver, subscribed(service, receiver) as endpoint:
        earlier, later = placed(service), placed(service)
        receiver.until(*all_of(earlier), *all_of(later))
        wait_until(lambda: len(deliveries(service, endpoint)) == 10)
        before = list(receiver.taken)
        (wanted,) = [got for got in before if got.event == (later, 3)]
        asked = service.client.post(f"{endpoint}/redeliver", json={"delivery_ids": [wanted.id]})
        assert (asked.status_code, asked.json()["behind"]) == (202, 1)
        wait_until(lambda: len(receiver.taken) == 11)
        assert (receiver.taken[-1].id, receiver.taken[-1].text) == (wanted.id, wanted.text)

        receiver.taken.clear()
        since = json.loads(before[0].text)["timestamp"]
        asked = service.client.post(f"{endpoint}/redeliver", json={"since": since})
        assert asked.status_code == 202
        receiver.until(*all_of(earlier), *all_of(later))
        ids = {got.id for got in before}
        again = [got for got in receiver.taken if got.id in ids]
        assert {got.id: got.text for got in again} == {got.id: got.text for got in before}
        assert receiver.first_of(earlier) == receiver.first_of(later) == [1, 2, 3, 4, 5]
        for body, word in (
            ({}, "one of the two"),
            ({"since": "soon"}, "must be a date"),
            ({"delivery_ids": ["evt_none"]}, "no delivery that is kept"),
        ):
            answer = service.client.post(f"{endpoint}/redeliver", json=body)
            assert answer.status_code == 422
            assert word in answer.json()["error"]


def test_after_three_days_it_is_given_up_kept_and_can_be_sent_again(service: Serving) -> None:
    """The next event of the order goes on then; what was given up is delivered when somebody asks for it."""
    with (
        Receiver(lambda got: 500 if got.data["number"] == 1 else 204) as receiver,
        subscribed(service, receiver) as endpoint,
    ):
        order_id = placed(service)
        wait_until(lambda: len(deliveries(service, endpoint, status="waiting", order_id=order_id)) == 5)
        noticed(service, endpoint, lambda: service.client.patch(endpoint, json={"status": "paused"}))
        at = Place(f"sqlite:///{database_of(service)}")
        at.change(f"UPDATE webhook_deliveries SET first_tried_at = first_tried_at - {3 * DAY}")
        service.client.patch(endpoint, json={"status": "active"})
        receiver.until(*((order_id, number) for number in (2, 3, 4, 5)))
        wait_until(lambda: deliveries(service, endpoint, status="given_up") != [])
        (kept,) = deliveries(service, endpoint, status="given_up")
        assert (kept["number"], kept["next_try_at"], kept["error"]) == (1, None, "answered 500")
        assert service.client.get(endpoint).json()["behind"] == 0
        receiver.answer = lambda got: 204
        service.client.post(f"{endpoint}/redeliver", json={"delivery_ids": [kept["id"]]})
        receiver.until((order_id, 1))


def test_a_name_that_leads_to_this_machine_is_not_called(folder: Path) -> None:
    """Whatever it looked like when it was made: the address that is connected to counts."""
    with Receiver() as receiver, Serving(folder, WEBHOOK_ALLOW_HTTP="true") as service:
        # A name of the machine leads to itself, or into its own network; a number is no name.
        for host, word in ((socket.gethostname(), "public internet"), ("2130706433", "not a canonical")):
            made = service.client.post(HOOKS, json={"url": f"http://{host}:{receiver.port}/"})
            assert made.status_code == 201, made.text
            error = service.client.post(f"{HOOKS}/{made.json()['id']}/test").json()["error"]
            assert word in error
        assert receiver.got == []


def archive(folder: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "expediter", "archive", str(folder / "archive"), "--older-than", "50"],
        cwd=folder,
        env=environment(folder),
        check=True,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
    )


def test_the_archive_leaves_what_waits_and_what_it_took_is_said(folder: Path) -> None:
    """The history of an order whose event is tried again stays; an endpoint that was behind says so."""
    with (
        Receiver(lambda got: 500 if got.data["order_id"] == "W1" else 204) as receiver,
        Receiver() as late,
        Serving(folder) as service,
    ):
        client = service.client
        endpoint = f"{HOOKS}/{receiver.subscribe(client)}"
        behind = f"{HOOKS}/{late.subscribe(client)}"
        noticed(service, behind, lambda: client.patch(behind, json={"status": "paused"}))
        for order_id in ("W1", "W2"):
            client.post("/orders", json=ORDER | {"order_id": order_id})
            service.until_rest(order_id)
        wait_until(lambda: len(deliveries(service, endpoint, status="waiting")) == 5)
        receiver.until(*all_of("W2"))
        noticed(service, endpoint, lambda: client.patch(endpoint, json={"status": "paused"}))
        at = Place(f"sqlite:///{folder}/orders.db")
        at.change(f"UPDATE webhook_deliveries SET at = at - {100 * DAY}")
        at.change(f"UPDATE orders SET updated_at = updated_at - {100 * DAY}")
        at.change(f"UPDATE events SET at = at - {100 * DAY}")
        archive(folder)
        events = client.get("/api/v1/orders/W2/events").json()
        assert (events["events"], events["archived"]) == ([], 5)
        receiver.answer = lambda got: 204
        client.patch(endpoint, json={"status": "active"})
        receiver.until(*all_of("W1"))
        assert receiver.first_of("W1") == [1, 2, 3, 4, 5]
        client.patch(behind, json={"status": "active"})
        late.until(*all_of("W1"))
        wait_until(lambda: "moved to the archive" in (client.get(behind).json()["last_error"] or ""))
        assert {got.data["order_id"] for got in late.got} == {"W1"}


def test_what_is_cleared_is_not_sent_and_what_comes_after_is(folder: Path) -> None:
    """After a reset nothing waits any more, and new orders come as before."""
    with Receiver(lambda got: 500) as receiver, Serving(folder, ADMIN_PASSWORD=ADMIN_PASSWORD) as service:
        endpoint = f"{HOOKS}/{receiver.subscribe(service.client)}"
        placed(service)
        wait_until(lambda: len(deliveries(service, endpoint, status="waiting")) == 5)
        noticed(service, endpoint, lambda: service.client.patch(endpoint, json={"status": "paused"}))
        service.client.post("/admin/reset", headers={"X-Admin-Password": ADMIN_PASSWORD})
        assert deliveries(service, endpoint) == []
        receiver.answer = lambda got: 204
        service.client.patch(endpoint, json={"status": "active"})
        new = placed(service)
        receiver.until(*all_of(new))
        assert {got.data["order_id"] for got in receiver.taken} == {new}
        wait_until(lambda: service.client.get(endpoint).json()["behind"] == 0)
        assert deliveries(service, endpoint, status="waiting") == []
