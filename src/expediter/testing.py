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
    """One call that a ScriptedGateway received; `what` is "charge", "find", "capture", "void" or "refund"."""

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
        self._capture = True

    async def charge(self, charge: Charge) -> Payment:
        """See PaymentGateway."""
        self._total = charge.amount_minor, charge.currency
        self._capture = charge.capture
        return self._payment(self._answer("charge", charge.key) or "reference")

    async def find(self, key: str) -> Payment | None:
        """See PaymentGateway."""
        found = self._answer("find", key)
        return None if found is None else self._payment(found)

    async def capture(self, key: str, amount_minor: int) -> Payment:
        """See PaymentGateway."""
        return self._payment(self._answer("capture", key) or "reference")

    async def void(self, key: str) -> Payment:
        """See PaymentGateway. A step that is no Payment says that it is voided."""
        return self._payment(self._answer("void", key) or "reference", PaymentState.VOIDED)

    async def refund(self, refund: Refund) -> Refunded:
        """See PaymentGateway."""
        return Refunded(reference=str(self._answer("refund", refund.payment_key) or "reference"))

    async def close(self) -> None:
        """Nothing is held."""

    def _payment(self, step: str | Payment, state: PaymentState | None = None) -> Payment:
        if isinstance(step, Payment):
            return step
        amount, currency = self._total
        if state is None:
            state = PaymentState.SUCCEEDED if self._capture else PaymentState.AUTHORIZED
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
        await _exercise_parts(one, two, replace(charge, key=f"{mark}-5"), holds)
        await _exercise_reservation(one, two, replace(charge, key=f"{mark}-6", capture=False), holds)
        if declined_token is not None:
            await _exercise_decline(one, two, replace(charge, key=f"{mark}-4", token=declined_token), holds)
    finally:
        await one.close()
        await two.close()
    return shown


async def _exercise_parts(
    one: PaymentGateway, two: PaymentGateway, charge: Charge, holds: Callable[[bool, str], None]
) -> None:
    await one.charge(charge)
    part = Refund(key=f"{charge.key}-a", payment_key=charge.key, amount_minor=999, currency=charge.currency)
    for gateway in (one, two):
        given_back = await gateway.refund(part)
        holds(
            given_back.state is not RefundState.FAILED,
            "a part can be refunded, and said twice it is refunded once",
        )
    found = await two.find(charge.key)
    holds(found is not None and found.refunded_minor == 999, "a refund of a part is seen at its charge")
    try:
        too_much = (await one.refund(replace(part, key=f"{charge.key}-b", amount_minor=301))).state
    except PaymentDeclined:
        too_much = RefundState.FAILED
    holds(too_much is RefundState.FAILED, "more than what is left is not refunded")
    rest = await two.refund(replace(part, key=f"{charge.key}-c", amount_minor=300))
    holds(rest.state is not RefundState.FAILED, "what is left can be refunded")


async def _exercise_reservation(
    one: PaymentGateway, two: PaymentGateway, charge: Charge, holds: Callable[[bool, str], None]
) -> None:
    reserved = await one.charge(charge)
    holds(
        (reserved.state, reserved.captured_minor) == (PaymentState.AUTHORIZED, 0),
        "a charge without capture is only authorized",
    )
    for gateway in (one, two):
        taken = await gateway.capture(charge.key, charge.amount_minor)
        holds(
            (taken.state, taken.captured_minor) == (PaymentState.SUCCEEDED, charge.amount_minor),
            "what was reserved is captured, said twice once",
        )
    holds((await one.void(charge.key)).state is PaymentState.SUCCEEDED, "what was captured is not voided any more")
    other = replace(charge, key=f"{charge.key}-v")
    await one.charge(other)
    for gateway in (two, one):
        holds((await gateway.void(other.key)).state is PaymentState.VOIDED, "a reservation is let go of")
    try:
        late = (await one.capture(other.key, other.amount_minor)).state
    except PaymentDeclined:
        late = PaymentState.VOIDED
    holds(late is PaymentState.VOIDED, "what was let go of is not captured")
    found = await two.find(other.key)
    gone = (PaymentState.VOIDED, PaymentState.DECLINED)
    holds(found is None or found.state in gone, "what was let go of is found as voided")


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
