"""Payments of the trial gateway that are not decided at once: by the customer on a page, or by the clock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from auditing import wait_until
from browsing import a_tab
from expediter.payments.simulated import read_ledger
from serving import Serving
from trying import TrialGateway
from verifying import assert_verified

SHOP = "https://shop.example/thanks?order=1&lang=en"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrialGateway]:
    """A gateway whose customers have time; it asks for a token, which no customer has."""
    with TrialGateway(tmp_path_factory.mktemp("gateway"), PAYMENT_GATEWAY_TOKEN="sesame") as running:
        running.client.headers["Authorization"] = "Bearer sesame"
        yield running


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrialGateway]:
    """A gateway at which nothing waits for longer than a tenth of a second."""
    options = ("--action-seconds", "0.1", "--authorized-seconds", "0.1", "--slow-seconds", "0.1")
    with TrialGateway(tmp_path_factory.mktemp("hasty"), *options) as running:
        yield running


def actions(gateway: TrialGateway, key: str) -> list[str]:
    return [entry["action"] for entry in gateway.entries() if entry["key"] == key]


async def test_a_customer_says_yes_in_a_browser(gateway: TrialGateway, tmp_path: Path) -> None:
    """The page asks, its button pays, and the page that follows leads back to the shop; no script is on it."""
    asked = gateway.pay("yes", "tok_action", return_url=SHOP)
    assert (asked.status_code, asked.json()["status"]) == (201, "action_required")
    action = asked.json()["action"]
    assert action == {"type": "redirect", "url": f"{gateway.url}/pay/pay_yes", "expires_at": action["expires_at"]}
    assert gateway.pay("yes", "tok_action").json()["action"] == action
    async with a_tab(tmp_path, action["url"]) as run:
        shown = await run("document.querySelector('main').innerText")
        assert "12.99 EUR" in shown
        assert "yes" in shown
        assert await run("document.scripts.length") == 0
        assert await run("getComputedStyle(document.querySelector('.yes')).backgroundColor") == "rgb(31, 111, 74)"
        await run("document.querySelector('.yes').click()")
        while (title := await run("document.readyState === 'complete' && document.title")) in (False, "Pay this?"):
            pass
        assert title == "Paid"
        assert await run("document.querySelector('a').href") == SHOP
    paid = gateway.found("yes")
    assert (paid["status"], paid["captured_minor"], paid["action"]) == ("succeeded", 1299, None)
    assert gateway.pay("yes", "tok_action").status_code == 200
    assert gateway.answer("yes", "no").status_code == 303
    assert gateway.found("yes") == paid
    assert actions(gateway, "yes") == ["action", "charge"]


def test_a_customer_says_no(gateway: TrialGateway) -> None:
    """The payment is declined, with the code that says why, for whoever asks and for whoever charges again."""
    gateway.pay("no", "tok_action")
    assert gateway.answer("no", "perhaps").status_code == 400
    assert gateway.found("no")["status"] == "action_required"
    there = gateway.answer("no", "no")
    assert (there.status_code, there.headers["location"]) == (303, "/pay/pay_no")
    assert "You said no" in gateway.client.get("/pay/pay_no").text
    declined = gateway.found("no")
    assert (declined["status"], declined["error"]["code"]) == ("declined", "authentication_failed")
    again = gateway.pay("no", "tok_action")
    assert (again.status_code, again.json()["error"]["code"]) == (402, "authentication_failed")
    assert actions(gateway, "no") == ["action", "decline"]
    assert "no" not in read_ledger(gateway.ledger)


def test_a_yes_reserves_where_nothing_is_to_be_captured_yet(gateway: TrialGateway) -> None:
    """Without `capture` the customer's yes is an authorisation, and the capture takes the money."""
    gateway.pay("later", "tok_action", capture=False)
    gateway.answer("later", "yes")
    assert "reserved" in gateway.client.get("/pay/pay_later").text
    reserved = gateway.found("later")
    assert (reserved["status"], reserved["captured_minor"]) == ("authorized", 0)
    taken = gateway.client.post("/payments/pay_later/capture", json={"amount_minor": 1299})
    assert (taken.status_code, taken.json()["captured_minor"]) == (200, 1299)
    assert actions(gateway, "later") == ["action", "authorize", "capture"]
    assert read_ledger(gateway.ledger)["later"].captured_minor == 1299


def test_the_page_is_for_a_customer_alone(gateway: TrialGateway) -> None:
    """It needs no token, loads nothing, is kept nowhere, and has what it shows as text, never as HTML."""
    gateway.pay("<b>&\"'", "tok_action", order_id="<script>alert(1)</script>", return_url="javascript:alert(1)")
    place = gateway.found("<b>&\"'")["action"]["url"]
    with httpx2.Client() as customer:
        page = customer.get(place)
        assert page.status_code == 200
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.text
        assert "<script" not in page.text
        assert page.headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
        assert page.headers["cache-control"] == "no-store"
        assert customer.post(place, data={"answer": "yes"}).status_code == 303
        after = customer.get(place).text
        assert "<h1>Paid</h1>" in after
        assert "javascript:" not in after
        assert customer.get(f"{gateway.url}/pay/pay_nobody").status_code == 404
        assert customer.get(f"{gateway.url}/payments").status_code == 401


def test_the_shop_calls_off_what_waits_for_its_customer(gateway: TrialGateway) -> None:
    """A payment that is voided cannot be answered any more."""
    gateway.pay("off", "tok_action")
    for _ in range(2):
        voided = gateway.client.post("/payments/pay_off/void")
        assert (voided.status_code, voided.json()["status"]) == (200, "voided")
    assert gateway.answer("off", "yes").status_code == 303
    assert "called off" in gateway.client.get("/pay/pay_off").text
    assert gateway.found("off")["status"] == "voided"
    assert gateway.client.post("/payments/pay_yes_not_there/void").status_code == 404
    assert actions(gateway, "off") == ["action", "void"]


def test_a_customer_is_too_late(hasty: TrialGateway) -> None:
    """After --action-seconds the payment is declined as expired, and a yes changes nothing."""
    hasty.pay("late", "tok_action")
    wait_until(lambda: hasty.found("late")["status"] == "declined")
    assert hasty.found("late")["error"]["code"] == "expired"
    assert hasty.answer("late", "yes").status_code == 303
    assert "too late" in hasty.client.get("/pay/pay_late").text
    assert actions(hasty, "late") == ["action", "decline"]


def test_a_payment_takes_its_time(hasty: TrialGateway) -> None:
    """tok_processing is `processing` first, and succeeds after --slow-seconds."""
    assert hasty.pay("slow", "tok_processing").json()["status"] == "processing"
    wait_until(lambda: hasty.found("slow")["status"] == "succeeded")
    assert hasty.found("slow")["captured_minor"] == 1299
    assert actions(hasty, "slow") == ["process", "charge"]


def test_what_is_reserved_does_not_stay_so(hasty: TrialGateway) -> None:
    """After --authorized-seconds it is voided, and a capture is refused as expired."""
    assert hasty.pay("kept", capture=False).json()["status"] == "authorized"
    wait_until(lambda: hasty.found("kept")["status"] == "voided")
    refused = hasty.client.post("/payments/pay_kept/capture", json={"amount_minor": 1299})
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "expired")
    assert hasty.found("kept")["captured_minor"] == 0


def test_a_refund_fails_or_takes_its_time(hasty: TrialGateway) -> None:
    """By the words of its reason; what is under way counts as given back when another is asked for."""
    hasty.pay("back")

    def refund(key: str, amount_minor: int, reason: str | None = None) -> httpx2.Response:
        body = {"key": key, "amount_minor": amount_minor, "reason": reason}
        return hasty.client.post("/payments/pay_back/refunds", json=body)

    failed = refund("r1", 300, "fail").json()
    assert (failed["status"], failed["error"]["code"]) == ("failed", "refund_failed")
    assert refund("r1", 300, "fail").json() == failed
    assert refund("r2", 1000, "pending").json()["status"] == "pending"
    assert refund("r3", 300).status_code == 422
    wait_until(lambda: refund("r2", 1000, "pending").json()["status"] == "succeeded")
    assert hasty.found("back")["refunded_minor"] == 1000
    assert refund("r4", 299).json()["status"] == "succeeded"
    assert hasty.found("back")["refunded_minor"] == 1299
    assert actions(hasty, "back") == ["charge", "refund_failed", "refund_pending", "refund", "refund"]
    assert read_ledger(hasty.ledger)["back"].refunded_minor == 1299


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"key": "odd"}',
        b'{"key": "odd", "order_id": "A", "currency": "EUR", "amount_minor": 0}',
        b'{"key": "odd", "order_id": "A", "currency": "EUR", "amount_minor": 99999999999999999999999}',
        b'{"key": "odd", "order_id": "\\ud800", "currency": "EUR", "amount_minor": 5}',
        b'{"key": "odd", "odd": ' + b"[" * 50_000,
    ],
)
def test_what_cannot_be_read_is_refused(gateway: TrialGateway, body: bytes) -> None:
    """A charge that is none, and an answer that is none, change nothing."""
    answer = gateway.client.post("/payments", content=body, headers={"Idempotency-Key": "odd"})
    assert answer.status_code == 400, answer.text
    assert gateway.client.get("/payments?key=odd").status_code == 404
    gateway.pay("asked", "tok_action")
    assert gateway.client.post("/pay/pay_asked", content=body).status_code == 400
    assert gateway.found("asked")["status"] == "action_required"


def test_every_answer_outlives_the_gateway(folder: Path) -> None:
    """Customers answer while it is killed: each yes and each no that was taken is known afterwards."""
    said = {f"{'yes' if number % 2 else 'no'}-{number}" for number in range(400)}
    taken: set[str] = set()
    with TrialGateway(folder) as gateway:
        for key in said:
            gateway.pay(key, "tok_action")
        some = threading.Event()

        def answer() -> None:
            for key in said:
                try:
                    assert gateway.answer(key, key.partition("-")[0]).status_code == 303
                except httpx2.TransportError:
                    return
                taken.add(key)
                if len(taken) == 50:
                    some.set()

        customers = threading.Thread(target=answer)
        customers.start()
        assert some.wait(60)
        gateway.process.kill()
        customers.join()
        gateway.kill()
    with TrialGateway(folder) as again:
        outcomes = {"yes": "succeeded", "no": "declined"}
        assert {again.found(key)["status"] for key in said} >= {"succeeded", "declined"}
        assert [key for key in taken if again.found(key)["status"] != outcomes[key.partition("-")[0]]] == []
        for key in said - taken:
            again.answer(key, "yes")
            assert again.found(key)["status"] in ("succeeded", "declined")


def test_time_goes_on_while_the_gateway_is_away(folder: Path) -> None:
    """What was to be decided while it was down is decided when it is back."""
    options = ("--action-seconds", "0.5", "--slow-seconds", "0.5")
    with TrialGateway(folder, *options) as gateway:
        gateway.pay("asked", "tok_action")
        gateway.pay("slow", "tok_processing")
        gateway.kill()
    with TrialGateway(folder) as again:  # with other options: what was said to the shop counts
        wait_until(lambda: again.found("asked")["status"] == "declined")
        wait_until(lambda: again.found("slow")["status"] == "succeeded")


def test_an_order_waits_for_its_customer(folder: Path) -> None:
    """The service waits while the customer is asked, is paid by the yes, and the books agree with the orders."""
    with (
        TrialGateway(folder, "--action-every", "1") as gateway,
        Serving(folder, PAYMENT_GATEWAY=gateway.url, PAYMENT_RETRY_DELAY="0.1") as service,
    ):
        order = {
            "order_id": "A1",
            "customer_name": "Al",
            "items": [{"name": "Pen", "quantity": 1, "price": "1.20"}],
        }
        service.client.post("/orders", json=order)
        wait_until(lambda: gateway.ledger.exists() and gateway.entries() != [])
        (asked,) = gateway.entries()
        assert (asked["action"], asked["order_id"]) == ("action", "A1")
        assert gateway.answer(asked["key"], "yes").status_code == 303
        wait_until(lambda: service.client.get("/orders/A1").json()["status"] == "completed")
        assert service.client.get("/orders/A1").json()["payment_status"] == "paid"
        service.kill()
        assert_verified(f"sqlite:///{folder}/orders.db", gateway.ledger)
