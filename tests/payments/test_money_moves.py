"""Money over HTTP, with real processes: parts given back, money reserved and captured, what the gateway tells."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from standardwebhooks import Webhook

from auditing import wait_until
from expediter.orders.order import gateway_key
from servers import free_port
from serving import Serving
from storing import Place
from trying import TrialGateway
from verifying import assert_verified

SECRET = "whsec_" + base64.b64encode(b"a secret of this test's own").decode()


def order(order_id: str, price: str = "60.00", **more: str) -> dict[str, Any]:
    return {
        "order_id": order_id,
        "customer_id": "c",
        "items": [{"item_id": 1, "quantity": 1, "price": price}],
        **more,
    }


@pytest.fixture
def gateway(folder: Path) -> Iterator[TrialGateway]:
    with TrialGateway(folder) as running:
        yield running


def test_a_hundred_refunds_at_once_never_give_back_too_much(
    at: Place, folder: Path, gateway: TrialGateway
) -> None:
    """100 refunds of 1.00 on an order of 60.00, by two processes: 60 are taken, 40 refused, and 60.00 go back."""
    settings = {"DATABASE_URL": at.address, "PAYMENT_GATEWAY": gateway.url}
    with Serving(folder, **settings) as one, Serving(folder, **settings) as two:
        one.client.post("/orders", json=order("A1"))
        assert one.until_rest("A1")["payment_status"] == "paid"

        def ask(number: int) -> int:
            service = two if number % 2 else one
            return service.client.post("/orders/A1/refunds", json={"amount": "1.00", "reason": "late"}).status_code

        with ThreadPoolExecutor(32) as crowd:
            answers = Counter(crowd.map(ask, range(100)))
        assert answers == {202: 60, 409: 40}
        ended = one.until_rest("A1")
        assert (ended["status"], ended["payment_status"]) == ("completed", "refunded")
        assert (ended["captured_minor"], ended["refunded_minor"]) == (6000, 6000)
        given_back = two.client.get("/api/v1/orders/A1/refunds").json()
        assert [refund["number"] for refund in given_back["refunds"]] == list(range(1, 61))
        assert {refund["status"] for refund in given_back["refunds"]} == {"succeeded"}
        assert given_back["left_minor"] == 0
    refunds = [entry for entry in gateway.entries() if entry["action"] == "refund"]
    assert sum(entry["amount_minor"] for entry in refunds) == 6000
    assert_verified(at.address, gateway.ledger)


def test_what_is_reserved_is_captured_or_let_go_of(at: Place, folder: Path, gateway: TrialGateway) -> None:
    """A fifth is cancelled in mid-flight: captured and voided are what was authorized, to the cent."""
    settings = {
        "DATABASE_URL": at.address,
        "PAYMENT_GATEWAY": gateway.url,
        "PAYMENT_CAPTURE": "on_completion",
        "FULFILMENT_MOCK_LATENCY_MIN": "200",
        "FULFILMENT_MOCK_LATENCY_MAX": "400",
    }
    with Serving(folder, **settings) as service:
        bodies = [order(f"R{number}", f"{number + 1}.{number:02}") for number in range(60)]
        assert service.client.post("/orders/batch", json=bodies).status_code == 200

        def cancel(number: int) -> int:
            while (answer := service.client.post(f"/orders/R{number}/cancel")).status_code == 409:
                if "Money in flight" not in answer.text:
                    break
            return answer.status_code

        with ThreadPoolExecutor(4) as crowd:
            cancelled = list(crowd.map(cancel, range(0, 60, 5)))
        ends = Counter()
        for number in range(60):
            ended = service.until_rest(f"R{number}")
            ends[ended["status"], ended["payment_status"]] += 1
        assert 202 in cancelled
        assert set(ends) <= {("completed", "paid"), ("cancelled", "voided")}
        assert ends["cancelled", "voided"] == cancelled.count(202)
    sums = Counter()
    for entry in gateway.entries():
        sums[entry["action"]] += entry["amount_minor"]
    assert sums["authorize"] == sums["capture"] + sums["void"] > 0
    assert set(sums) <= {"authorize", "capture", "void"}
    assert_verified(at.address, gateway.ledger)


def test_a_part_goes_back_while_the_order_waits_for_its_kitchen(folder: Path, gateway: TrialGateway) -> None:
    """The order's road is not disturbed; the rest goes back when it is cancelled."""
    with Serving(folder, PAYMENT_GATEWAY=gateway.url, FULFILMENT="manual") as service:
        service.client.post("/orders", json=order("A1"))
        wait_until(lambda: service.client.get("/orders/A1").json()["status"] == "confirmed")
        answer = service.client.post("/orders/A1/refunds", json={"amount": 12.5, "reason": "no fries"})
        assert answer.status_code == 202
        assert (answer.json()["amount"], answer.json()["number"]) == (12.5, 1)
        wait_until(lambda: service.client.get("/orders/A1").json()["payment_status"] == "partially_refunded")
        explained = service.client.get("/orders/A1/explain").json()
        assert "It waits for whoever carries it out" in explained["why"]
        types = [event["type"] for event in service.client.get("/orders/A1/events").json()["events"]]
        assert types[-3:] == ["refund.requested", "refund.started", "refund.succeeded"]
        for amount, status in (("0", 422), ("12.345", 422), ("-1", 422), ("47.51", 409)):
            refused = service.client.post("/orders/A1/refunds", json={"amount": amount})
            assert refused.status_code == status, refused.text
        assert service.client.post("/orders/A1/cancel").status_code == 202
        ended = service.until_rest("A1")
        assert (ended["status"], ended["payment_status"]) == ("cancelled", "refunded")
        amounts = [refund["amount_minor"] for refund in service.client.get("/orders/A1/refunds").json()["refunds"]]
        assert amounts == [1250, 4750]


def test_a_refund_is_asked_for_once_under_one_key(folder: Path, gateway: TrialGateway) -> None:
    """The same request again gives the stored answer; another one with the key is refused."""
    with Serving(folder, PAYMENT_GATEWAY=gateway.url) as service:
        service.client.post("/orders", json=order("A1"))
        service.until_rest("A1")
        key = {"Idempotency-Key": "refund-1"}
        first = service.client.post("/orders/A1/refunds", json={"amount": 1}, headers=key)
        again = service.client.post("/orders/A1/refunds", json={"amount": 1}, headers=key)
        assert (again.status_code, again.content) == (202, first.content)
        assert again.headers["idempotency-replayed"] == "true"
        assert service.client.post("/orders/A1/refunds", json={"amount": 2}, headers=key).status_code == 422
        service.until_rest("A1")
        assert service.client.get("/orders/A1").json()["refunded_minor"] == 100


def test_a_refund_that_the_gateway_refuses_is_recorded_by_hand(folder: Path, gateway: TrialGateway) -> None:
    """It is parked and shown; a person makes it outside and says so, and then nothing is left to do."""
    with Serving(folder, PAYMENT_GATEWAY=gateway.url) as service:
        service.client.post("/orders", json=order("A1"))
        service.until_rest("A1")
        key = gateway_key("A1", 1)
        # Somebody gives it back at the gateway, so that there is nothing left of it there.
        ask(
            gateway,
            f"/payments/pay_{key}/refunds",
            {"key": "theirs", "amount_minor": 6000, "reason": "x"},
            "theirs",
        )
        service.client.post("/orders/A1/refunds", json={"amount": "20.00"})
        wait_until(lambda: service.client.get("/orders/A1/refunds").json()["refunds"][0]["status"] == "parked")
        assert "A refund is parked" in service.client.get("/orders/A1/explain").json()["why"]
        assert service.client.get("/orders/status").json()["dead"] == 1
        by_hand = {"amount": "20.00", "by_hand": True, "reference": "bank 17"}
        answer = service.client.post("/orders/A1/refunds", json=by_hand)
        assert (answer.status_code, answer.json()["reference"]) == (201, "bank 17")
        ended = service.client.get("/orders/A1").json()
        assert (ended["payment_status"], ended["refunded_minor"]) == ("partially_refunded", 2000)
        statuses = [refund["status"] for refund in service.client.get("/orders/A1/refunds").json()["refunds"]]
        assert statuses == ["failed", "succeeded"]
        assert service.client.get("/orders/status").json()["dead"] == 0


def ask(gateway: TrialGateway, path: str, body: dict[str, Any], key: str) -> None:
    with ExitStack() as stack:
        client = stack.enter_context(httpx2.Client())
        answer = client.post(f"{gateway.url}{path}", json=body, headers={"Idempotency-Key": key})
        assert answer.is_success, answer.text


# What the gateway tells by itself.


def signed(document: dict[str, Any] | str, *, secret: str = SECRET, age: float = 0) -> dict[str, Any]:
    """Return how a document is sent as a callback."""
    body = document if isinstance(document, str) else json.dumps(document)
    at = datetime.now(UTC) - timedelta(seconds=age)
    headers = {
        "content-type": "application/json",
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(secret).sign("msg_1", at, body),
    }
    return {"content": body, "headers": headers}


def payment(order_id: str, status: str = "succeeded", **more: Any) -> dict[str, Any]:
    return {
        "id": "pay_1",
        "key": gateway_key(order_id, 1),
        "order_id": order_id,
        "status": status,
        "amount_minor": 6000,
        "currency": "USD",
        "captured_minor": 6000 if status == "succeeded" else 0,
        "refunded_minor": 0,
    } | more


def test_a_callback_before_the_answer_settles_the_charge_once(
    at: Place, folder: Path, gateway: TrialGateway
) -> None:
    """It tells that it is paid while the worker still waits; told again and again, nothing more happens."""
    settings = {
        "DATABASE_URL": at.address,
        "PAYMENT_GATEWAY": gateway.url,
        "PAYMENT_GATEWAY_SECRET": SECRET,
        "STAGES": "payment",
    }
    with Serving(folder, **settings) as service:
        service.client.post("/orders", json=order("A1", payment_token="tok_slow"))
        wait_until(lambda: len(gateway.entries()) == 1)
        told = service.client.post("/api/v1/payments/callback", **signed(payment("A1")))
        assert told.status_code == 204, told.text
        ended = service.client.get("/orders/A1").json()
        assert (ended["status"], ended["payment_status"]) == ("confirmed", "paid")
        for _ in range(3):
            assert service.client.post("/api/v1/payments/callback", **signed(payment("A1"))).status_code == 204
        late = signed(payment("A1", "declined"))
        assert service.client.post("/api/v1/payments/callback", **late).status_code == 204
        assert service.client.get("/orders/A1").json()["version"] == ended["version"]
        elsewhere = signed(payment("A1", refunded_minor=1500))
        for _ in range(2):
            assert service.client.post("/api/v1/payments/callback", **elsewhere).status_code == 204
        now = service.client.get("/orders/A1").json()
        assert (now["payment_status"], now["refunded_minor"]) == ("partially_refunded", 1500)


def test_a_callback_that_cannot_be_believed_is_refused(folder: Path) -> None:
    """A wrong, an old and no signature, garbage: 401. A key that nobody has used, an order that is gone: 404."""
    with Serving(folder, "--no-workers", PAYMENT_GATEWAY_SECRET=SECRET) as service:
        service.client.post("/orders", json=order("A1"))

        def send(content: str | bytes, headers: dict[str, str]) -> int:
            answer = service.client.post("/api/v1/payments/callback", content=content, headers=headers)
            return int(answer.status_code)

        other = "whsec_" + base64.b64encode(b"somebody else's").decode()
        good = signed(payment("A1"))
        for wrong in (
            signed(payment("A1"), secret=other),
            signed(payment("A1"), age=600),
            signed(payment("A1"), age=-600),
        ):
            assert send(**wrong) == 401
        for name in ("webhook-id", "webhook-timestamp", "webhook-signature"):
            assert (
                send(good["content"], {key: text for key, text in good["headers"].items() if key != name}) == 401
            )
        for signature in ("v1", "v1,", "v1,%%%", "v2,abc", "v1,abc v1", "v1,\xff"):
            headers = good["headers"] | {"webhook-signature": signature}
            assert send(good["content"], {k: v.encode("latin-1") for k, v in headers.items()}) == 401
        assert send(b"\xff\xfe", good["headers"]) == 401
        assert send(**signed(payment("A1", key="6f1c5c0e-0000-5d57-9d0e-7f2c8a1b9e43"))) == 404
        assert send(**signed(payment("A2"))) == 404
        assert send(**signed(payment("A1", amount_minor=1))) == 409
        assert send(**signed({"hello": "world"})) == 400
        assert service.client.get("/orders/A1").json()["version"] == 1


def test_a_callback_that_says_something_twice_is_400(folder: Path) -> None:
    """A signed document with a name twice in one object could mean either: it changes nothing."""
    with Serving(folder, "--no-workers", PAYMENT_GATEWAY_SECRET=SECRET) as service:
        service.client.post("/orders", json=order("A1"))
        twice = json.dumps(payment("A1")).replace('"status": ', '"status": "declined", "status": ')
        answer = service.client.post("/api/v1/payments/callback", **signed(twice))
        assert answer.status_code == 400
        assert '"status" twice' in answer.json()["error"]
        assert service.client.get("/orders/A1").json()["version"] == 1


def test_without_a_secret_every_callback_is_refused(folder: Path) -> None:
    """The refusal says which setting is missing."""
    with Serving(folder, "--no-workers") as service:
        answer = service.client.post("/api/v1/payments/callback", **signed(payment("A1")))
        assert answer.status_code == 401
        assert "PAYMENT_GATEWAY_SECRET" in answer.json()["error"]
        answer = service.client.post("/api/v1/payments/stripe", json={"id": "evt_1", "type": "x", "data": {}})
        assert answer.status_code == 401
        assert "STRIPE_WEBHOOK_SECRET" in answer.json()["error"]


def test_a_charge_that_lands_on_a_cancelled_order_goes_back(folder: Path, gateway: TrialGateway) -> None:
    """The gateway seemed to be away, the order was cancelled, and then the gateway tells that it has the money."""
    settings = {"PAYMENT_GATEWAY": gateway.url, "PAYMENT_GATEWAY_SECRET": SECRET, "PAYMENT_RETRY_ATTEMPTS": "1"}
    with Serving(folder, **settings) as service:
        service.client.post("/orders", json=order("A1", payment_token="tok_unavailable"))
        assert service.until_rest("A1")["status"] == "payment_failed"
        assert service.client.post("/orders/A1/cancel").status_code == 202
        charge = {"key": gateway_key("A1", 1), "order_id": "A1", "amount_minor": 6000, "currency": "USD"}
        ask(gateway, "/payments", charge, gateway_key("A1", 1))
        assert service.client.post("/api/v1/payments/callback", **signed(payment("A1"))).status_code == 204
        ended = service.until_rest("A1")
        assert (ended["status"], ended["payment_status"]) == ("cancelled", "refunded")
        assert ended["refunded_minor"] == 6000
    assert [entry["action"] for entry in gateway.entries()] == ["charge", "refund"]


# A customer who must act, on the page of the trial gateway.


@pytest.fixture
def calling(folder: Path) -> Iterator[tuple[TrialGateway, dict[str, str]]]:
    """A gateway that calls back, early and twice, and the settings of the service that it calls."""
    port = free_port()
    words = ["--callback", f"http://127.0.0.1:{port}/api/v1/payments/callback", "--secret", SECRET]
    with TrialGateway(folder, *words, "--callbacks-twice", "--callbacks-early") as gateway:
        yield gateway, {"PORT": str(port), "PAYMENT_GATEWAY": gateway.url, "PAYMENT_GATEWAY_SECRET": SECRET}


def test_a_customer_says_yes_or_no(calling: tuple[TrialGateway, dict[str, str]], at: Place, folder: Path) -> None:
    """The order has the page's address; yes pays (or reserves) it, no fails it, and a retry asks anew."""
    gateway, settings = calling
    later = at.server is not None
    settings |= {"DATABASE_URL": at.address} | ({"PAYMENT_CAPTURE": "on_completion"} if later else {})
    with Serving(folder, **settings) as service:
        for name in ("yes", "no"):
            service.client.post("/orders", json=order(name, payment_token="tok_action"))
        acts = {}
        for name in ("yes", "no"):
            wait_until(lambda name=name: waits(service, name))  # type: ignore[misc]
            now = service.client.get(f"/orders/{name}").json()
            assert (now["status"], now["payment_action"]["type"]) == ("payment_processing", "redirect")
            assert now["payment_action"]["expires_at"] > now["created_at"]
            assert "must confirm the payment" in service.client.get(f"/orders/{name}/explain").json()["why"]
            for moved in ("confirmed", "payment_failed"):
                refused = service.client.patch(f"/orders/{name}/status", json={"status": moved})
                assert refused.status_code == 409
            acts[name] = now["payment_action"]["url"]
        for name, url in acts.items():
            assert httpx2.post(url, data={"answer": name}).status_code in (200, 303)
        ended = service.until_rest("yes")
        assert (ended["status"], ended["payment_status"]) == ("completed", "paid")
        assert ended["payment_action"] is None
        failed = service.until_rest("no")
        assert (failed["status"], failed["payment_status"]) == ("payment_failed", "declined")
        assert service.client.post("/orders/no/retry").status_code == 202
        wait_until(lambda: waits(service, "no"))
        assert service.client.get("/orders/no").json()["payment_action"]["url"] != acts["no"]
        assert service.client.post("/orders/no/cancel").status_code == 202
        ended = service.until_rest("no")
        assert (ended["status"], ended["payment_status"]) == ("cancelled", "voided")
    taken = [(entry["action"], entry["order_id"]) for entry in gateway.entries() if entry.get("order_id")]
    assert ("charge", "no") not in taken
    assert_verified(at.address, gateway.ledger)


def waits(service: Serving, order_id: str) -> bool:
    return bool(service.client.get(f"/orders/{order_id}").json()["payment_status"] == "action_required")


def test_a_customer_who_does_not_answer_in_time(folder: Path, gateway: TrialGateway) -> None:
    """Nobody calls back: the gateway is asked, the payment is voided there, and the order says why."""
    with Serving(folder, PAYMENT_GATEWAY=gateway.url, PAYMENT_ACTION_SECONDS="1") as service:
        service.client.post("/orders", json=order("A1", payment_token="tok_action"))
        ended = service.until_rest("A1")
        assert (ended["status"], ended["payment_status"]) == ("cancelled", "voided")
        assert ended["last_error"] == "the customer did not confirm the payment in time"
    assert gateway.entries()[-1]["action"] == "void"
    assert_verified(f"sqlite:///{folder}/orders.db", gateway.ledger)
