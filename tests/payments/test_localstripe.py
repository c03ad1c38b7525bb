"""The gateway on localstripe, a server that others have made after Stripe: a process of its own."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest
from aiohttp import web

from expediter.errors import PaymentDeclined
from expediter.payments import Charge, Payment, PaymentState, Refund, RefundState
from expediter.payments.stripe import StripeGateway
from expediter.payments.stripe_documents import Reported, read_event
from servers import START_SECONDS_MAX, free_port, missing
from serving import PATIENCE_SECONDS, Program, Serving

ROOT = Path(__file__).resolve().parents[2]
API_KEY = "sk_test_local"
SECRET = "whsec_local"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not (ROOT / ".localstripe" / ".lock").exists():
        missing("localstripe", "make localstripe")
    port = free_port()
    start = ROOT / "tests" / "payments" / "localstripe" / "start.py"
    with (tmp_path_factory.mktemp("localstripe") / "log").open("wb") as log:
        process = subprocess.Popen(
            [ROOT / ".localstripe" / "bin" / "python", start, str(port)], stdout=log, stderr=log
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            with suppress(httpx2.HTTPError):
                httpx2.get(address)
                break
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
async def gateway(address: str) -> AsyncIterator[StripeGateway]:
    gateway = StripeGateway(API_KEY, address)
    yield gateway
    await gateway.close()


@pytest.fixture
async def other(address: str) -> AsyncIterator[StripeGateway]:
    """The gateway of another process: it remembers nothing."""
    gateway = StripeGateway(API_KEY, address)
    yield gateway
    await gateway.close()


def posted(address: str, path: str, **form: str) -> dict[str, str]:
    said = httpx2.post(f"{address}/{path}", data=form, headers={"Authorization": f"Bearer {API_KEY}"})
    assert said.status_code == 200, said.text
    document: dict[str, str] = said.json() if said.content else {}
    return document


def card(address: str, number: str = "4242424242424242") -> str:
    form = {"card[number]": number, "card[exp_month]": "12", "card[exp_year]": "2040", "card[cvc]": "123"}
    return posted(address, "v1/payment_methods", type="card", **form)["id"]


async def test_a_payment_is_charged_found_and_refunded(
    address: str, gateway: StripeGateway, other: StripeGateway
) -> None:
    """In two parts, and not once more; another process finds it, and in the list it has its key."""
    charge = Charge(key="paid", order_id="A1", amount_minor=1299, currency="USD", token=card(address))
    assert await other.find("paid") is None
    paid = await gateway.charge(charge)
    assert (paid.state, paid.amount_minor, paid.captured_minor) == (PaymentState.SUCCEEDED, 1299, 1299)
    assert (await gateway.charge(charge)).reference == paid.reference
    found = await other.find("paid")
    assert found is not None and (found.reference, found.order_id) == (paid.reference, "A1")
    for key, amount in (("r1", 300), ("r2", 999), ("r1", 300)):
        refund = Refund(key=key, payment_key="paid", amount_minor=amount, currency="USD", reason="why")
        assert (await other.refund(refund)).state is RefundState.SUCCEEDED
    found = await gateway.find("paid")
    assert found is not None and found.refunded_minor == 1299
    now = int(time.time() * 1_000_000)
    page = await other.payments(now - 600_000_000, now + 60_000_000, None)
    assert "paid" in [each.key for each in page.payments]


async def test_a_declined_card_is_declined(address: str, gateway: StripeGateway, other: StripeGateway) -> None:
    """And found to be so."""
    charge = Charge(
        key="declined", order_id="A2", amount_minor=1299, currency="USD", token=card(address, "4000000000000341")
    )
    for _ in range(2):
        with pytest.raises(PaymentDeclined, match="Your card was declined"):
            await gateway.charge(charge)
    found = await other.find("declined")
    assert found is not None and found.state is PaymentState.DECLINED


async def test_money_is_reserved_then_taken_or_let_go(
    address: str, gateway: StripeGateway, other: StripeGateway
) -> None:
    """Said again, neither changes anything."""
    for key in ("taken", "let go"):
        charge = Charge(
            key=key, order_id=key, amount_minor=500, currency="EUR", token=card(address), capture=False
        )
        assert (await gateway.charge(charge)).state is PaymentState.AUTHORIZED
    for asked in (gateway, other):
        assert (await asked.capture("taken", 500)).state is PaymentState.SUCCEEDED
        assert (await asked.void("let go")).state is PaymentState.VOIDED
        assert (await asked.void("taken")).state is PaymentState.SUCCEEDED


async def test_a_customer_proves_who_he_is(address: str, gateway: StripeGateway) -> None:
    """3-D Secure: the shop's page is given the secret for it, then the payment is made."""
    charge = Charge(
        key="3ds", order_id="A3", amount_minor=1299, currency="USD", token=card(address, "4000002500003155")
    )
    waiting = await gateway.charge(charge)
    assert waiting.state is PaymentState.ACTION_REQUIRED
    assert waiting.action is not None and waiting.action.client_secret
    secret = waiting.action.client_secret
    await asyncio.to_thread(
        posted,
        address,
        f"v1/payment_intents/{waiting.reference}/_authenticate",
        client_secret=secret,
        success="true",
    )
    found = await gateway.find("3ds")
    assert found is not None and found.state is PaymentState.SUCCEEDED


@pytest.mark.parametrize("capture", [True, False])
async def test_what_the_shop_has_made_is_confirmed(
    address: str, gateway: StripeGateway, other: StripeGateway, capture: bool
) -> None:
    """A PaymentIntent of the shop's page, confirmed and captured; its callback has the order's key."""
    made = posted(
        address,
        "v1/payment_intents",
        amount="1299",
        currency="usd",
        payment_method=card(address),
        capture_method="automatic" if capture else "manual",
    )
    key = f"shop-{capture}"
    charge = Charge(key=key, order_id=key, amount_minor=1299, currency="USD", token=made["id"])
    paid = await gateway.charge(charge)
    assert (paid.state, paid.reference) == (PaymentState.SUCCEEDED, made["id"])
    found: Payment | None = await other.find(key)
    assert found is not None and found.reference == made["id"]


async def test_its_callback_is_verified_and_read(address: str, gateway: StripeGateway) -> None:
    """What the server signs, and sends a second later."""
    told: asyncio.Queue[Reported] = asyncio.Queue()

    async def take(request: web.Request) -> web.Response:
        told.put_nowait(read_event(SECRET, request.headers["Stripe-Signature"], await request.read()))
        return web.Response(status=204)

    app = web.Application()
    app.router.add_post("/", take)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        posted(address, "_config/webhooks/orders", url=url, secret=SECRET)
        charge = Charge(key="told", order_id="A4", amount_minor=1299, currency="USD", token=card(address))
        paid = await gateway.charge(charge)
        while True:
            said = await asyncio.wait_for(told.get(), PATIENCE_SECONDS)
            if said.key == "told":
                break
        assert said.payment is not None
        assert (said.payment.state, said.reference) == (PaymentState.SUCCEEDED, paid.reference)
    finally:
        await runner.cleanup()


def test_the_service_is_paid_by_it(address: str, folder: Path) -> None:
    """An order is charged and, cancelled, refunded; neither the key nor the token is shown anywhere."""
    token = card(address)
    settings = {"PAYMENT_GATEWAY": "stripe:", "STRIPE_API_KEY": API_KEY, "STRIPE_API_BASE": address}
    with Serving(folder, **settings, FULFILMENT="manual") as service:
        order = {
            "order_id": "A1",
            "customer_name": "Al",
            "items": [{"name": "Pen", "quantity": 1, "price": "1.20"}],
        }
        service.client.post("/orders", json=order | {"payment_token": token})
        service.until_version("A1", 3)
        assert service.client.get("/orders/A1").json()["payment_status"] == "paid"
        service.client.post("/orders/A1/cancel")
        assert service.until_rest("A1")["payment_status"] == "refunded"
        shown = service.client.get("/orders/A1/events").text + "".join(service.log)
        assert API_KEY not in shown
        assert token not in shown


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "needs STRIPE_API_KEY"),
        ({"STRIPE_API_KEY": API_KEY, "STRIPE_API_BASE": "x"}, "STRIPE_API_BASE begins with https://"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(folder: Path, settings: dict[str, str], words: str) -> None:
    """The program exits with status 2, and says which."""
    program = Program(folder, "serve", PAYMENT_GATEWAY="stripe:", **settings)
    program.wait_for(words)
    assert program.process.wait(PATIENCE_SECONDS) == 2
    program.stop()
