"""Stripe: what it is asked, what its answers mean, and that no failure of it takes money twice."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import stripe as library
from fake_stripe import API_KEY, DROPPED, FAILED, Fault, another, stripe
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from expediter.errors import (
    CallbackRefused,
    ConfigurationError,
    PaymentConflict,
    PaymentDeclined,
    PaymentError,
    PaymentUnavailable,
    PaymentUnknown,
)
from expediter.payments import (
    Charge,
    Payment,
    PaymentGateway,
    PaymentLister,
    PaymentState,
    Refund,
    RefundState,
    open_gateway,
)
from expediter.payments.stripe import API_VERSION, StripeGateway
from expediter.payments.stripe_documents import SIGNATURE_SECONDS_MAX, read_event
from expediter.testing import exercise_gateway

KEY = "9d7bb5e2-0b9f-5f6e-8d54-4f1c2f1a7b10"
CHARGE = Charge(key=KEY, order_id="A1", amount_minor=1299, currency="USD", token="pm_card_visa")
DECLINED = "pm_card_chargeDeclined"
ACTING = "pm_card_authenticationRequired"


def refund_of(amount: int, key: str = "r1") -> Refund:
    return Refund(key=key, payment_key=KEY, amount_minor=amount, currency="USD", reason="the order was cancelled")


async def test_a_charge_is_one_payment_intent_of_the_order() -> None:
    """Made under the order's key, with the order's name on it, at the version that we know; then confirmed."""
    async with stripe() as (gateway, fake):
        payment = await gateway.charge(CHARGE)
        assert isinstance(gateway, PaymentGateway) and isinstance(gateway, PaymentLister)
    assert (payment.state, payment.amount_minor, payment.currency) == (PaymentState.SUCCEEDED, 1299, "USD")
    assert (payment.captured_minor, payment.key, payment.order_id) == (1299, KEY, "A1")
    (what, form, key), (confirmed, _, _) = fake.asked
    assert (what, key, confirmed) == ("create", KEY, "confirm")
    assert form == {
        "amount": "1299",
        "currency": "usd",
        "payment_method": "pm_card_visa",
        "capture_method": "automatic",
        "automatic_payment_methods[enabled]": "true",
        "automatic_payment_methods[allow_redirects]": "never",
        "metadata[order_id]": "A1",
        "metadata[expediter_key]": KEY,
    }
    assert fake.versions == {API_VERSION}


async def test_the_same_charge_again_takes_nothing() -> None:
    """From the same process, from another one, and from ten at once."""
    async with stripe() as (gateway, fake), another(fake) as other:
        first = await gateway.charge(CHARGE)
        assert (await gateway.charge(CHARGE)).reference == first.reference
        answers = await asyncio.gather(*(other.charge(CHARGE) for _ in range(10)))
        assert {each.reference for each in answers} == {first.reference}
        assert fake.taken == 1299


async def test_a_key_belongs_to_one_amount() -> None:
    """Another amount or currency under it is a conflict, wherever it is asked for."""
    async with stripe() as (gateway, fake), another(fake) as other:
        await gateway.charge(CHARGE)
        for asked in (gateway, other):
            for wrong in (replace(CHARGE, amount_minor=1300), replace(CHARGE, currency="EUR")):
                with pytest.raises(PaymentConflict):
                    await asked.charge(wrong)
        assert fake.taken == 1299


async def test_a_decline_is_final_under_its_key() -> None:
    """With Stripe's words; asked again it is the same, and the card is not tried again."""
    async with stripe() as (gateway, fake), another(fake) as other:
        for asked in (gateway, gateway, other):
            with pytest.raises(PaymentDeclined, match=r"Your card was declined\."):
                await asked.charge(replace(CHARGE, token=DECLINED))
        found = await other.find(KEY)
        assert found is not None and (found.state, found.error) == (
            PaymentState.DECLINED,
            "Your card was declined.",
        )
        assert fake.count("confirm") == 1


@pytest.mark.parametrize("token", [None, "", "tok_visa", "pm_", "pi_1/../customers", "pm_ä"])
async def test_a_token_that_stripe_cannot_have_is_declined(token: str | None) -> None:
    """Nothing is asked with it."""
    async with stripe() as (gateway, fake):
        with pytest.raises(PaymentDeclined, match="payment_token"):
            await gateway.charge(replace(CHARGE, token=token))
        assert fake.asked == []


BUSY = Fault(429, {"message": "Too many"}, {"Retry-After": "7"})
INVALID = Fault(400, {"type": "invalid_request_error", "message": "No such PaymentMethod"})
IN_USE = Fault(409, {"type": "invalid_request_error", "code": "idempotency_key_in_use", "message": "In use"})


@pytest.mark.parametrize(
    ("fault", "meaning", "words"),
    [
        (BUSY, PaymentUnavailable, "busy"),
        (Fault(401, {"message": "Invalid API Key: sk_test_****cret"}), PaymentUnavailable, "STRIPE_API_KEY"),
        (Fault(403, {"message": "This key may not"}), PaymentUnavailable, "STRIPE_API_KEY"),
        (INVALID, PaymentDeclined, "No such PaymentMethod"),
        (Fault(402, {"type": "card_error", "message": "Expired"}), PaymentDeclined, "Expired"),
        (IN_USE, PaymentUnknown, "In use"),
        (FAILED, PaymentUnknown, "500"),
        (Fault(503, {"message": "Away"}), PaymentUnknown, "503"),
        (Fault(502, body=b"<html>"), PaymentUnknown, "502"),
        (Fault(302, body=b""), PaymentUnknown, "Stripe"),
        (Fault(200, body=b"<html>"), PaymentUnknown, "Stripe"),
        (Fault(200, body=b"\xff\xfe"), PaymentUnknown, "Stripe"),
        (Fault(200, body=b"[]"), PaymentUnknown, "Stripe"),
        (Fault(200, body=b'"fine"'), PaymentUnknown, "Stripe"),
        (Fault(200, body=b'{"id": "pi_1", "amount": 12.99}'), PaymentUnknown, "cannot be read"),
        (Fault(400, body=b'{"error": []}'), PaymentUnknown, "Stripe"),
        (DROPPED, PaymentUnknown, "did not answer"),
    ],
)
@pytest.mark.parametrize("what", ["create", "confirm"])
async def test_what_an_answer_means(what: str, fault: Fault, meaning: type[PaymentError], words: str) -> None:
    """Only what surely was not done is said not to be done; no word of ours or of the log repeats the key."""
    async with stripe() as (gateway, fake):
        fake.faults[what].append(fault)
        with pytest.raises(meaning, match=words) as refused:
            await gateway.charge(CHARGE)
        assert "cret" not in str(refused.value)
        assert fake.taken == 0
        if fault is BUSY:
            assert refused.value.retry_after_seconds == 7  # type: ignore[attr-defined]


async def test_a_server_that_is_not_there_has_done_nothing() -> None:
    """Nobody listens, and there is no such name: unavailable, not unknown."""
    for address in ("http://127.0.0.1:1", "http://nobody.invalid"):
        gateway = StripeGateway(API_KEY, address)
        with pytest.raises(PaymentUnavailable, match="cannot be reached"):
            await gateway.charge(CHARGE)
        await gateway.close()


@pytest.mark.parametrize("searchable", [True, False])
@pytest.mark.parametrize("what", ["create", "confirm"])
async def test_a_lost_answer_is_looked_up(what: str, searchable: bool) -> None:
    """The answer is lost after it was done; another process finds the payment or charges it, and once in all."""
    async with stripe() as (gateway, fake), another(fake) as other:
        fake.searchable = searchable
        fake.faults[what].append(DROPPED._replace(after=True))
        with pytest.raises(PaymentUnknown):
            await gateway.charge(CHARGE)
        found = await other.find(KEY)
        assert (found is None) == (what == "create")
        if found is None:  # made and not confirmed: nothing was taken, and the same key leads to it
            found = await other.charge(CHARGE)
        assert found.state is PaymentState.SUCCEEDED
        assert fake.taken == 1299
        assert len(fake.intents) == 1


async def test_whoever_has_no_patience_left_has_not_paid_twice() -> None:
    """Stripe answers after the caller has gone; another process comes meanwhile."""
    async with stripe() as (gateway, fake), another(fake) as other:
        slow = asyncio.Event()
        fake.before["confirm"] = slow.wait
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await gateway.charge(CHARGE)
        slow.set()
        paid = await other.find(KEY) or await other.charge(CHARGE)
        assert paid.state is PaymentState.SUCCEEDED
        assert fake.taken == 1299


class WithCard(StripeGateway):
    """The suite knows of no payment methods."""

    async def charge(self, charge: Charge) -> Payment:
        return await super().charge(charge if charge.token else replace(charge, token="pm_card_visa"))


async def test_stripe_does_what_the_service_relies_on() -> None:
    """The suite that every gateway is held against."""
    async with stripe() as (_, fake):
        shown = await exercise_gateway(lambda: WithCard(API_KEY, fake.address), declined_token=DECLINED)
    assert len(shown) > 10


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("what", ["create", "confirm"])
async def test_a_failure_that_stripe_has_saved_is_got_past(what: str, after: bool) -> None:
    """Stripe answers 500 under the key for a day: two tries later it is paid, whatever it had done, and once."""
    async with stripe() as (gateway, fake), another(fake) as other:
        fake.faults[what].append(FAILED._replace(after=after))
        try:
            paid = await gateway.charge(CHARGE)
        except PaymentUnknown:
            paid = await other.find(KEY) or await other.charge(CHARGE)
        assert paid.state is PaymentState.SUCCEEDED
        assert fake.taken == 1299
        # And whoever comes later comes to the same one.
        async with another(fake) as third:
            assert (await third.charge(CHARGE)).reference == paid.reference
            found = await third.find(KEY)
        assert found is not None and found.reference == paid.reference
        assert fake.taken == 1299


async def test_a_failure_that_may_not_be_saved_is_no_reason_for_another_key() -> None:
    """The next to ask under the key might get a PaymentIntent, and there would be two."""
    async with stripe() as (gateway, fake):
        fake.faults["create"] += [FAILED._replace(kept=False)] * 2
        for _ in range(2):
            with pytest.raises(PaymentUnknown):
                await gateway.charge(CHARGE)
        assert {key for what, _, key in fake.asked if what == "create"} == {KEY}
        await gateway.charge(CHARGE)
        assert fake.taken == 1299


async def test_a_look_that_fails_after_an_unknown_confirmation_leaves_it_unknown() -> None:
    """That Stripe is busy when asked what became of it does not mean that nothing was done."""
    async with stripe() as (gateway, fake):
        fake.faults["confirm"].append(FAILED._replace(after=True))
        fake.faults["retrieve"].append(BUSY)
        with pytest.raises(PaymentUnknown):
            await gateway.charge(CHARGE)


async def test_a_failed_look_is_no_answer() -> None:
    """`find` says None only if Stripe does; what it refuses to say is unknown."""
    async with stripe() as (gateway, fake):
        assert await gateway.find(KEY) is None
        for what, fault, meaning in (
            ("list", FAILED, PaymentUnknown),
            ("list", INVALID, PaymentUnknown),
            ("search", FAILED, PaymentUnknown),
            ("search", BUSY, PaymentUnavailable),
        ):
            fake.faults[what].append(fault)
            with pytest.raises(meaning):
                await gateway.find(KEY)
        # Not every account has the search.
        fake.faults["search"] += [INVALID, Fault(403, {"message": "not in your country"})]
        assert await gateway.find(KEY) is None
        assert await gateway.find(KEY) is None


async def test_what_is_older_than_the_newest_is_found_by_search() -> None:
    """Behind a thousand newer payments the search still leads to it, and it is read as it is now."""
    async with stripe() as (gateway, fake), another(fake) as other:
        await gateway.charge(CHARGE)
        fake.intents["pi_1"]["created"] -= 90 * 86_400
        for number in range(1100):
            fake.intent(metadata={"expediter_key": f"other-{number}"})
        found = await other.find(KEY)
        assert found is not None and found.reference == "pi_1"
        refunded = await other.refund(refund_of(300))
        assert refunded.state is RefundState.SUCCEEDED
        found = await other.find(KEY)
        assert found is not None and found.refunded_minor == 300


async def test_a_customer_who_must_act_is_sent_to_the_bank_and_back() -> None:
    """A redirect where there is an address to come back to, else the client secret; then it is paid."""
    async with stripe() as (gateway, fake):
        payment = await gateway.charge(replace(CHARGE, token=ACTING, return_url="https://shop.example/thanks"))
        assert payment.state is PaymentState.ACTION_REQUIRED
        assert payment.action is not None and payment.action.type == "redirect"
        assert payment.action.url == "https://bank.example/?back=https://shop.example/thanks"
        fake.authenticated(fake.intents["pi_1"])
        found = await gateway.find(KEY)
        assert found is not None and (found.state, found.action) == (PaymentState.SUCCEEDED, None)
        by_script = await gateway.charge(replace(CHARGE, key="k2", token=ACTING))
        assert by_script.action is not None
        assert (by_script.action.type, by_script.action.client_secret) == ("client_secret", "pi_2_secret")
        voided = await gateway.void("k2")
        assert voided.state is PaymentState.VOIDED
        again = await gateway.charge(replace(CHARGE, key="k2", token=ACTING))
        assert again.state is PaymentState.VOIDED


async def test_money_is_reserved_and_taken_or_let_go() -> None:
    """In part, again, after an answer that was lost, and too late."""
    async with stripe() as (gateway, fake), another(fake) as other:
        reserved = await gateway.charge(replace(CHARGE, capture=False))
        assert (reserved.state, reserved.captured_minor) == (PaymentState.AUTHORIZED, 0)
        fake.faults["capture"] += [DROPPED._replace(after=True)]
        with pytest.raises(PaymentUnknown):
            await gateway.capture(KEY, 1000)
        taken = await other.capture(KEY, 1000)
        assert (taken.state, taken.captured_minor, taken.refunded_minor) == (PaymentState.SUCCEEDED, 1000, 0)
        assert (await other.void(KEY)).state is PaymentState.SUCCEEDED
        assert fake.taken == 1000
        await gateway.refund(refund_of(200))
        found = await gateway.find(KEY)
        assert found is not None and found.refunded_minor == 200

        await gateway.charge(replace(CHARGE, key="k2", capture=False))
        for asked in (gateway, other):
            assert (await asked.void("k2")).state is PaymentState.VOIDED
        assert (await other.capture("k2", 1299)).state is PaymentState.VOIDED
        with pytest.raises(PaymentDeclined, match="no payment"):
            await gateway.void("never")
        assert fake.taken == 1000


async def test_two_that_take_and_let_go_at_once_agree() -> None:
    """Whoever comes second learns what the first one did."""
    async with stripe() as (gateway, fake), another(fake) as other:
        await gateway.charge(replace(CHARGE, capture=False))
        await other.find(KEY)
        one, two = await asyncio.gather(gateway.capture(KEY, 1299), other.void(KEY))
        assert one.state is two.state
        assert fake.intents["pi_1"]["status"] in ("succeeded", "canceled")


async def test_a_refund_is_made_once() -> None:
    """Whole or in part; again, by another process, and long after Stripe has forgotten the key."""
    async with stripe() as (gateway, fake), another(fake) as other:
        await gateway.charge(CHARGE)
        fake.faults["refund"].append(DROPPED._replace(after=True))
        with pytest.raises(PaymentUnknown):
            await gateway.refund(refund_of(300))
        first = await other.refund(refund_of(300))
        fake._saved.clear()
        assert (await other.refund(refund_of(300))).reference == first.reference
        assert len(fake.refunds) == 1
        with pytest.raises(PaymentConflict):
            await other.refund(refund_of(301))
        await other.refund(refund_of(999, "r2"))
        with pytest.raises(PaymentDeclined, match="already been refunded"):
            await other.refund(refund_of(1, "r3"))
        found = await other.find(KEY)
        assert found is not None and found.refunded_minor == 1299
        with pytest.raises(PaymentDeclined, match="no payment"):
            await other.refund(replace(refund_of(1), payment_key="never"))


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("pending", RefundState.PENDING),
        ("requires_action", RefundState.PENDING),
        ("failed", RefundState.FAILED),
        ("canceled", RefundState.FAILED),
    ],
)
async def test_a_refund_is_as_it_is_now(status: str, state: RefundState) -> None:
    """Not as it was when it was asked for first."""
    async with stripe() as (gateway, fake):
        await gateway.charge(CHARGE)
        await gateway.refund(refund_of(300))
        fake.refunds[0] |= {"status": status}
        assert (await gateway.refund(refund_of(300))).state is state


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("status", ["requires_confirmation", "requires_capture", "succeeded", "processing"])
async def test_what_the_shop_has_made_is_not_made_again(status: str, capture: bool) -> None:
    """It is confirmed or captured as far as it is not yet, and is found by the order's key afterwards."""
    async with stripe() as (gateway, fake), another(fake) as other:
        charge_ = {"amount": 1299, "currency": "usd", "amount_refunded": 0}
        received = 1299 if status == "succeeded" else 0
        fake.intent(status=status, latest_charge=charge_, amount_received=received)
        asked = replace(CHARGE, token="pi_1", capture=capture)
        for _ in range(2):
            payment = await gateway.charge(asked)
        expected = {
            "processing": PaymentState.PROCESSING,
            "succeeded": PaymentState.SUCCEEDED,
        }.get(status, PaymentState.SUCCEEDED if capture else PaymentState.AUTHORIZED)
        assert (payment.state, payment.reference) == (expected, "pi_1")
        found = await other.find(KEY)
        assert found is not None and (found.reference, found.order_id) == ("pi_1", "A1")
        assert len(fake.intents) == 1
        assert fake.count("create") == 0


async def test_what_the_shop_has_made_must_be_of_this_order() -> None:
    """Another amount or currency, another order's, one that is not there, one without a card."""
    async with stripe() as (gateway, fake):
        fake.intent(amount=1300)
        fake.intent(currency="eur")
        fake.intent(metadata={"expediter_key": "k", "order_id": "A2"})
        fake.intent(status="requires_payment_method", payment_method=None)
        for token in ("pi_1", "pi_2", "pi_3"):
            with pytest.raises(PaymentConflict):
                await gateway.charge(replace(CHARGE, token=token))
        for token, words in (("pi_99", "no such PaymentIntent"), ("pi_4", "no payment method")):
            with pytest.raises(PaymentDeclined, match=words):
                await gateway.charge(replace(CHARGE, token=token))
        assert fake.taken == 0
        assert [fake.intents[id]["metadata"] for id in ("pi_1", "pi_2")] == [{}, {}]


async def test_one_payment_pays_one_order() -> None:
    """Two orders that bring the same PaymentIntent, at once or one after the other: one of them has it."""
    async with stripe() as (gateway, fake), another(fake) as other:
        fake.intent()
        charges = [replace(CHARGE, token="pi_1", key=f"k{n}", order_id=f"A{n}") for n in range(2)]
        answers = await asyncio.gather(
            gateway.charge(charges[0]), other.charge(charges[1]), return_exceptions=True
        )
        assert sorted(type(each).__name__ for each in answers) == ["Payment", "PaymentConflict"]
        loser = charges[0] if isinstance(answers[0], PaymentConflict) else charges[1]
        async with another(fake) as third:
            with pytest.raises(PaymentConflict, match="another order"):
                await third.charge(loser)
        assert fake.taken == 1299


async def test_a_payment_that_another_order_has_meanwhile_is_left_alone() -> None:
    """It had no name on it when it was read; before ours is written, another order is paid by it."""
    async with stripe() as (gateway, fake), another(fake) as other:
        fake.intent()
        theirs = replace(CHARGE, token="pi_1", key="k2", order_id="A2")
        fake.before["update"] = lambda: other.charge(theirs)
        with pytest.raises(PaymentConflict):
            await gateway.charge(replace(CHARGE, token="pi_1"))
        assert fake.intents["pi_1"]["metadata"] == {"order_id": "A2", "expediter_key": "k2"}
        assert fake.taken == 1299


async def test_an_order_may_bring_its_payment_intent_again() -> None:
    """Declined, then given another card by the shop's page, and charged under a new key of the same order."""
    async with stripe() as (gateway, fake):
        fake.intent(payment_method=DECLINED)
        with pytest.raises(PaymentDeclined):
            await gateway.charge(replace(CHARGE, token="pi_1"))
        fake.intents["pi_1"] |= {"status": "requires_confirmation", "payment_method": "pm_card_visa"}
        paid = await gateway.charge(replace(CHARGE, token="pi_1", key="k2"))
        assert (paid.state, paid.key) == (PaymentState.SUCCEEDED, "k2")


async def test_amounts_are_in_stripes_units_where_they_differ() -> None:
    """An Icelandic króna is a hundred at Stripe, a Malagasy ariary has no hundredths there."""
    async with stripe() as (gateway, fake):
        for currency, amount, theirs in (("ISK", 500, 50_000), ("UGX", 3, 300), ("MGA", 500, 5), ("JPY", 7, 7)):
            charge = replace(CHARGE, key=currency, currency=currency, amount_minor=amount)
            payment = await gateway.charge(charge)
            assert (payment.amount_minor, payment.captured_minor) == (amount, amount)
            assert fake.intents[payment.reference]["amount"] == theirs
        with pytest.raises(PaymentDeclined, match="whole units"):
            await gateway.charge(replace(CHARGE, key="k", currency="MGA", amount_minor=550))


async def test_all_payments_of_a_span_are_listed_the_oldest_first() -> None:
    """Some seconds have more than a page, most have none, and what is not of the service is left out."""
    async with stripe() as (gateway, fake):
        begin = fake.now - 50_000
        times = [begin + 7] * 250 + [begin + 40_000 + 3 * number for number in range(120)] + [fake.now]
        for number, at in enumerate(times):
            fake.intent(created=at, status="succeeded", metadata={"expediter_key": f"k{number}", "order_id": "A"})
        fake.intent(created=begin, status="succeeded", metadata={"expediter_key": "before"})
        fake.intent(created=begin + 8, status="succeeded")
        fake.intent(created=begin + 9, metadata={"expediter_key": "unconfirmed"})
        since, until = begin * 1_000_000 + 1, fake.now * 1_000_000
        listed, cursor, pages = [], None, 0
        while True:
            page = await gateway.payments(since, until, cursor)
            listed += page.payments
            pages, cursor = pages + 1, page.next_cursor
            if cursor is None:
                break
        assert sorted(each.key or "" for each in listed) == sorted(f"k{number}" for number in range(370))
        made = [each.created_at or 0 for each in listed]
        assert made == sorted(made)
        assert pages < 20
        assert len(fake.asked) < 60


SECRET = "whsec_test"


def signed(document: object, *, at: float | None = None, secret: str = SECRET) -> tuple[str, bytes]:
    body = json.dumps(document)
    when = int(time.time() if at is None else at)
    return library.WebhookSignature.generate_signature_header(body, secret, when), body.encode()


def event(type: str, **document: Any) -> dict[str, Any]:
    return {"id": "evt_1", "object": "event", "type": type, "data": {"object": document}}


INTENT = {"id": "pi_1", "amount": 1299, "currency": "usd", "metadata": {"order_id": "A1", "expediter_key": KEY}}


@pytest.mark.parametrize(
    ("name", "status", "state"),
    [
        ("succeeded", "succeeded", PaymentState.SUCCEEDED),
        ("amount_capturable_updated", "requires_capture", PaymentState.AUTHORIZED),
        ("requires_action", "requires_action", PaymentState.ACTION_REQUIRED),
        ("payment_failed", "requires_payment_method", PaymentState.DECLINED),
        ("canceled", "canceled", PaymentState.VOIDED),
        ("processing", "processing", PaymentState.PROCESSING),
    ],
)
def test_a_callback_says_what_became_of_a_payment(name: str, status: str, state: PaymentState) -> None:
    """By the state that it carries, with the order's own key."""
    said = read_event(SECRET, *signed(event(f"payment_intent.{name}", **INTENT, status=status)))
    assert said.payment is not None and said.payment.state is state
    assert (said.event, said.key, said.order_id, said.reference) == ("evt_1", KEY, "A1", "pi_1")


def test_a_callback_tells_of_refunds_and_disputes() -> None:
    """A dispute names its order by the PaymentIntent alone; what concerns no order says so."""
    charge = {"amount": 1299, "amount_captured": 1299, "amount_refunded": 300, "currency": "usd"}
    charge |= {"payment_intent": "pi_1", "metadata": INTENT["metadata"]}
    said = read_event(SECRET, *signed(event("charge.refunded", **charge)))
    assert said.payment is not None and (said.payment.refunded_minor, said.key) == (300, KEY)
    dispute = {"id": "dp_1", "payment_intent": "pi_1", "reason": "fraudulent"}
    said = read_event(SECRET, *signed(event("charge.dispute.created", **dispute)))
    assert (said.dispute, said.reason, said.reference, said.payment) == ("dp_1", "fraudulent", "pi_1", None)
    said = read_event(SECRET, *signed(event("customer.created", id="cus_1")))
    assert (said.payment, said.dispute, said.reference) == (None, None, None)


def test_a_callback_must_be_signed_with_the_secret_and_now() -> None:
    """Another secret, another body, an old signature, one of tomorrow, none; a signed body that says nothing."""
    good = event("payment_intent.succeeded", **INTENT, status="succeeded")
    signature, body = signed(good)
    assert read_event(SECRET, signature, body).payment is not None
    late, early = time.time() - SIGNATURE_SECONDS_MAX - 60, time.time() + SIGNATURE_SECONDS_MAX + 60
    for refused in (
        signed(good, secret="whsec_other"),
        (signature, body + b" "),
        signed(good, at=late),
        signed(good, at=early),
        ("", body),
        ("t=1,v1=é", body),
        (signature, b"\xff"),
        signed([]),
        signed(event("payment_intent.succeeded", id="pi_1")),
        signed(event("payment_intent.succeeded", **INTENT | {"amount": 12.5}, status="succeeded")),
        signed(event("payment_intent.succeeded", **INTENT | {"currency": "isk"}, status="succeeded")),
    ):
        with pytest.raises(CallbackRefused):
            read_event(SECRET, *refused)


@settings(max_examples=200, deadline=None)
@given(st.text() | st.from_regex(r"t=\d{1,30},v1=.*"), st.binary())
def test_garbage_in_a_callback_is_refused(signature: str, body: bytes) -> None:
    """Whatever stands in the header and the body, it is refused by the one error."""
    with pytest.raises(CallbackRefused):
        read_event(SECRET, signature, body)


@settings(max_examples=60, deadline=None)
@given(st.none() | st.integers() | st.text() | st.dictionaries(st.text(), st.text() | st.none()))
def test_garbage_that_is_signed_is_refused_too(document: object) -> None:
    """A body by the right hand that is no event."""
    with pytest.raises(CallbackRefused):
        read_event(SECRET, *signed(document))


ROOT = Path(__file__).resolve().parents[2]
MEANINGS = {
    "declined": PaymentDeclined,
    "conflict": PaymentConflict,
    "not done": PaymentUnavailable,
    "unknown": PaymentUnknown,
}
ROWS = [
    (int(status), "idempotency_error" in said, meaning)
    for said, meaning in re.findall(
        r"^\| (`\d{3}`.*) \| (declined|conflict|not done|unknown)\b.* \|$",
        (ROOT / "docs" / "payments.md").read_text(encoding="utf-8"),
        re.M,
    )
    for status in re.findall(r"`(\d{3})`", said)
]


@pytest.mark.parametrize(("status", "conflict", "meaning"), ROWS)
async def test_an_answer_means_what_the_page_says(status: int, conflict: bool, meaning: str) -> None:
    """Each row of the page's table of Stripe's answers."""
    kind = "idempotency_error" if conflict else "invalid_request_error"
    async with stripe() as (gateway, fake):
        fake.faults["create"].append(Fault(status, {"type": kind, "message": "No"}))
        with pytest.raises(MEANINGS[meaning]):
            await gateway.charge(CHARGE)


def test_the_pages_table_is_whole() -> None:
    """Every meaning has a row that was read."""
    assert {meaning for _, _, meaning in ROWS} == set(MEANINGS)
    assert len(ROWS) == 8


def test_without_the_library_it_says_what_to_install() -> None:
    """And nothing else of the program needs it."""
    program = """
import sys
sys.modules["stripe"] = None
from expediter.payments import open_gateway
given = {"success_rate": 1, "latency_ms_min": 0, "latency_ms_max": 0}
open_gateway("simulated", **given)
try:
    open_gateway("stripe:", **given, stripe_api_key="sk_test")
except Exception as error:
    print(type(error).__name__, error)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert ended.stdout.startswith("ConfigurationError")
    assert "pip install 'expediter[stripe]'" in ended.stdout


def opened(address: str, **given: str) -> PaymentGateway:
    return open_gateway(address, success_rate=1.0, latency_ms_min=0, latency_ms_max=0, **given)


async def test_it_is_opened_by_its_name_and_the_key() -> None:
    """Without the key, with something behind the name, with an address that is none: a sentence, and no secret."""
    for address in ("stripe", "stripe:"):
        gateway = opened(address, stripe_api_key=API_KEY)
        assert isinstance(gateway, StripeGateway)
        await gateway.close()
    for address, given_, words in (
        ("stripe:", {}, "needs STRIPE_API_KEY"),
        ("stripe:sk_live_s3cret", {"stripe_api_key": API_KEY}, "has nothing behind it"),
        ("stripe://sk_live_s3cret", {}, "has nothing behind it"),
        ("stripe:", {"stripe_api_key": API_KEY, "stripe_api_base": "ftp://x"}, "STRIPE_API_BASE"),
        ("stripe:", {"stripe_api_key": API_KEY, "stripe_api_base": "http://a:s3cret@x"}, "STRIPE_API_BASE"),
        ("stripe:", {"stripe_api_key": API_KEY, "stripe_api_base": "http://[x"}, "STRIPE_API_BASE"),
    ):
        with pytest.raises(ConfigurationError) as refused:
            opened(address, **given_)
        assert words in str(refused.value)
        assert "s3cret" not in str(refused.value)
