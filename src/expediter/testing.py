"""For tests of code that uses Expediter: a gateway that does as it is told, and what every gateway must do."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from expediter.errors import FulfilmentError, PaymentConflict, PaymentDeclined, PaymentError
from expediter.fulfilment import Fulfiller, Handed
from expediter.orders.order import Line, Order, PaymentStatus, Stages, Status
from expediter.payments.port import (
    Charge,
    Payment,
    PaymentGateway,
    PaymentState,
    Refund,
    Refunded,
    RefundState,
)


class GatewayCall(NamedTuple):
    """One call that a ScriptedGateway received; `what` is "charge", "find" or "refund"."""

    what: str
    idempotency_key: str


class ScriptedGateway:
    """A PaymentGateway that answers from a script and records every call.

    Each step of the script is a reference (success), a Payment, None (for `find`: nothing known), or a
    PaymentError to raise; after the last step every call succeeds. `total` is the amount and the currency of what
    `find` finds if no charge was asked for.
    """

    name = "scripted"

    def __init__(
        self,
        script: Iterable[str | Payment | None | PaymentError] = (),
        *,
        key_window_seconds: float = 86_400,
        total: tuple[int, str] = (0, "USD"),
    ) -> None:
        """Follow `script`, in the order of the calls."""
        self.key_window_seconds = key_window_seconds
        self.calls: list[GatewayCall] = []
        self._script = list(script)
        self._total = total

    async def charge(self, charge: Charge) -> Payment:
        """See PaymentGateway."""
        self._total = charge.amount_minor, charge.currency
        return self._payment(self._answer("charge", charge.key) or "reference")

    async def find(self, key: str) -> Payment | None:
        """See PaymentGateway."""
        found = self._answer("find", key)
        return None if found is None else self._payment(found)

    async def refund(self, refund: Refund) -> Refunded:
        """See PaymentGateway."""
        return Refunded(reference=str(self._answer("refund", refund.payment_key) or "reference"))

    async def close(self) -> None:
        """Nothing is held."""

    def _payment(self, step: str | Payment) -> Payment:
        if isinstance(step, Payment):
            return step
        amount, currency = self._total
        state = PaymentState.SUCCEEDED
        return Payment(reference=step, state=state, amount_minor=amount, currency=currency)

    def _answer(self, what: str, idempotency_key: str) -> str | Payment | None:
        self.calls.append(GatewayCall(what, idempotency_key))
        step = self._script.pop(0) if self._script else "reference"
        if isinstance(step, PaymentError):
            raise step
        return step


async def exercise_gateway(open: Callable[[], PaymentGateway], *, declined_token: str | None = None) -> list[str]:
    """Hold a payment gateway against what the service relies on; return what was shown, a sentence each.

    `open` opens it anew each time, always onto the same place: what one instance was told, the next one must know.
    `declined_token` is a payment token whose charge it declines, if there is one. Some charges are made: use a
    place where no money moves. Raises AssertionError with the sentence that does not hold.
    """
    shown: list[str] = []

    def holds(fact: bool, sentence: str) -> None:
        if not fact:
            raise AssertionError(f"It does not hold: {sentence}")
        shown.append(sentence)

    mark = uuid.uuid4().hex
    charge = Charge(key=f"{mark}-1", order_id=f"T-{mark}", amount_minor=1299, currency="USD")
    one, two = open(), open()
    try:
        holds(await one.find(charge.key) is None, "a key that nobody used is not found")
        paid = await one.charge(charge)
        asked_for = (PaymentState.SUCCEEDED, charge.amount_minor, charge.currency)
        holds((paid.state, paid.amount_minor, paid.currency) == asked_for, "a charge is of what was asked for")
        holds(len(paid.reference) > 0, "a charge has a reference")
        again = await two.charge(charge)
        holds(again.reference == paid.reference, "the same charge again is the same payment")
        found = await two.find(charge.key)
        holds(found is not None and found.reference == paid.reference, "a charge is found by its key")
        for other in (replace(charge, amount_minor=1300), replace(charge, currency="EUR")):
            try:
                await one.charge(other)
                conflict = False
            except (PaymentConflict, PaymentDeclined):
                conflict = True
            holds(conflict, "the same key with another amount or currency is refused")
        crowd = replace(charge, key=f"{mark}-2")
        answers = await asyncio.gather(*((one if number % 2 else two).charge(crowd) for number in range(20)))
        holds(len({each.reference for each in answers}) == 1, "twenty at once under one key are one payment")

        refund = Refund(
            key=f"{mark}-1-refund",
            payment_key=charge.key,
            amount_minor=charge.amount_minor,
            currency=charge.currency,
        )
        given_back = await one.refund(refund)
        holds(given_back.state is not RefundState.FAILED, "a charge can be refunded")
        holds(
            (await two.refund(refund)).reference == given_back.reference,
            "the same refund again is the same refund",
        )
        found = await two.find(charge.key)
        holds(found is not None and found.refunded_minor == refund.amount_minor, "a refund is seen at its charge")
        try:
            await one.refund(replace(refund, key=f"{mark}-3-refund", payment_key=f"{mark}-3"))
            declined = False
        except PaymentDeclined:
            declined = True
        holds(declined, "what was never charged is not refunded")
        if declined_token is not None:
            await _exercise_decline(one, two, replace(charge, key=f"{mark}-4", token=declined_token), holds)
    finally:
        await one.close()
        await two.close()
    return shown


async def _exercise_decline(
    one: PaymentGateway, two: PaymentGateway, charge: Charge, holds: Callable[[bool, str], None]
) -> None:
    for gateway in (one, two):
        try:
            declined = (await gateway.charge(charge)).state is PaymentState.DECLINED
        except PaymentDeclined:
            declined = True
        holds(declined, "what is declined is declined again")
    found = await one.find(charge.key)
    holds(found is None or found.state is PaymentState.DECLINED, "what is declined is not found as a charge")


async def exercise_fulfiller(open: Callable[[], Fulfiller], order: Order | None = None) -> list[str]:
    """Hold a fulfiller against what the service relies on; return what was shown, a sentence each.

    `open` opens it anew each time, onto the same place. `order` is one that it carries out or takes; a made-up one
    without it. Raises AssertionError with the sentence that does not hold.
    """
    line = Line(1, "item_001", "Burger", 2, 1299)
    given = order or Order(
        order_id=f"T-{uuid.uuid4().hex}",
        status=Status.PROCESSING,
        payment_status=PaymentStatus.PAID,
        stages=Stages.PAYMENT_FULFILMENT,
        customer_id="customer_1",
        customer_name="Ann",
        currency="USD",
        total_minor=2598,
        priced=True,
        metadata="{}",
        payment_token=None,
        version=3,
        created_at=1_767_268_800_000_000,
        updated_at=1_767_268_800_000_000,
        processing_started_at=1_767_268_800_000_000,
    )

    async def lines() -> Sequence[Line]:
        return (line,)

    shown: list[str] = []
    one, two = open(), open()
    try:
        for fulfiller, sentence in (
            (one, "an order is carried out or taken"),
            (two, "the same order again is carried out or taken, by another process too"),
        ):
            try:
                handed = await fulfiller.fulfil(given, lines)
            except FulfilmentError as error:
                raise AssertionError(f"It does not hold: {sentence} ({error})") from error
            if not isinstance(handed, Handed):
                raise AssertionError(f"It does not hold: {sentence} (it returned {handed!r})")
            shown.append(sentence)
        answers = await asyncio.gather(*(one.fulfil(given, lines) for _ in range(10)), return_exceptions=True)
        wrong = [
            each for each in answers if isinstance(each, BaseException) and not isinstance(each, FulfilmentError)
        ]
        if wrong:
            raise AssertionError(f"It does not hold: ten at once are answered ({wrong[0]!r})")
        shown.append("ten at once are answered")
    finally:
        await one.close()
        await two.close()
    return shown
