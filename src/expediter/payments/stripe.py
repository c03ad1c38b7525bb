"""Stripe by its official library: an order's charge is one PaymentIntent (docs/decisions/026-stripe.md).

A PaymentIntent is made first and confirmed after that. Made alone, it moves no money; once its id is known, what
became of it is looked up there. So no money hangs on an answer that was lost, or that was a failure of Stripe's.
"""

from __future__ import annotations

import logging
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import stripe

from expediter.backends.calls import Caller
from expediter.errors import PaymentConflict, PaymentDeclined, PaymentError, PaymentUnknown
from expediter.orders.order import MICROSECONDS
from expediter.payments.port import Charge, Payment, PaymentPage, PaymentState, Refund, Refunded
from expediter.payments.stripe_calls import Said, Transport, ask, base_of, is_saved, read
from expediter.payments.stripe_documents import (
    KEY,
    ORDER_ID,
    REFUND_STATES,
    UNCONFIRMED,
    IntentDocument,
    IntentList,
    RefundDocument,
    RefundList,
    payment_of,
    to_stripe,
)

#: The version of Stripe's interface that every request asks for: a newer library changes nothing by itself.
API_VERSION = "2026-10-28.endive"
API_BASE = "https://api.stripe.com"
#: Stripe keeps what it has answered under a key for 24 hours at least; one of them is for clocks and slow calls.
KEY_WINDOW_SECONDS = 23 * 3600.0
#: Keys that are tried where Stripe has saved a failure of its own under one, at most.
TURNS_MAX = 5
#: Seconds back that are looked through where the search knows nothing yet: it may be an hour behind.
LOOK_BACK_SECONDS = 2 * 3600
#: Pages of the newest payments that one look reads, at most.
LOOK_PAGES_MAX = 10
#: Objects of a page: as many as Stripe gives.
PAGE_SIZE = 100
#: Requests that one page of `payments` may take.
PAGE_REQUESTS_MAX = 20
#: Bytes of an answer, at most: a full page has some 600 KB.
ANSWER_BYTES_MAX = 4 * 1024 * 1024
#: PaymentIntents whose keys a process keeps in mind.
REMEMBERED_MAX = 10_000

_TOKEN = re.compile(r"(pm|pi)_[A-Za-z0-9_]{1,250}")
_CUSTOMER = re.compile("cus_[A-Za-z0-9]{14,}")
_CHARGE_TOO: Any = {"expand": ["latest_charge"]}


class StripeGateway:
    """Payments by one account at Stripe. Its key is sent and never shown."""

    name = "Stripe"
    key_window_seconds = KEY_WINDOW_SECONDS

    def __init__(self, api_key: str, api_base: str | None = None) -> None:
        """Nothing is opened yet. Raises ConfigurationError for an address that cannot be used."""
        base = base_of(api_base or API_BASE)
        self._caller = Caller("STRIPE_API_BASE", base, None, answer_bytes_max=ANSWER_BYTES_MAX)
        # It would write a file into the user's folder, and what it logs names payment methods.
        stripe.enable_telemetry = False
        logging.getLogger("stripe").setLevel(logging.CRITICAL)
        client = stripe.StripeClient(
            api_key,
            stripe_version=API_VERSION,
            base_addresses={"api": self._caller.base},
            http_client=Transport(self._caller),
            max_network_retries=0,
        )
        self._intents, self._refunds = client.v1.payment_intents, client.v1.refunds
        self._ids: OrderedDict[str, str] = OrderedDict()

    async def charge(self, charge: Charge) -> Payment:
        """See PaymentGateway. The token is a payment method, or a PaymentIntent that the shop has made."""
        token = charge.token or ""
        if not _TOKEN.fullmatch(token):
            raise PaymentDeclined("Stripe needs a payment_token: a payment method (pm_) or a PaymentIntent (pi_)")
        amount = to_stripe(charge.amount_minor, charge.currency)
        made = token.startswith("pm_")
        intent = await (self._make(charge, amount) if made else self._adopt(charge))
        self._is_of(intent, amount, charge.currency)
        self._remember(charge.key, intent.id)
        intent = await self._confirm(intent, charge, made=made)
        if intent.metadata.get(KEY, charge.key) != charge.key:
            raise PaymentConflict("The PaymentIntent was taken for another order meanwhile")
        if charge.capture and intent.status == "requires_capture":
            intent = await self._take(intent, amount)
        payment = payment_of(intent)
        if payment.state is PaymentState.DECLINED:
            raise PaymentDeclined(payment.error or "The payment was declined")
        return payment

    async def find(self, key: str) -> Payment | None:
        """See PaymentGateway. None also for a PaymentIntent that nobody has confirmed: it has moved no money."""
        intent = await self._look(key)
        return payment_of(intent) if intent is not None and intent.begun else None

    async def capture(self, key: str, amount_minor: int) -> Payment:
        """See PaymentGateway."""
        intent = await self._known(key)
        if intent.status == "requires_capture":
            intent = await self._take(intent, to_stripe(amount_minor, intent.currency.upper()))
        return payment_of(intent)

    async def void(self, key: str) -> Payment:
        """See PaymentGateway."""
        intent = await self._known(key)
        if intent.status not in ("succeeded", "canceled"):
            intent = await self._moved(
                intent, lambda: self._intents.cancel_async(intent.id, _CHARGE_TOO), "canceled", "succeeded"
            )
        return payment_of(intent)

    async def refund(self, refund: Refund) -> Refunded:
        """See PaymentGateway. Stripe forgets keys, so the refunds of the payment are looked through first."""
        intent = await self._known(refund.payment_key)
        amount = to_stripe(refund.amount_minor, refund.currency)
        document = await self._refund_under(refund.key, intent.id)
        if document is None:
            params: Any = {
                "payment_intent": intent.id,
                "amount": amount,
                "metadata": {KEY: refund.key, **({"reason": refund.reason} if refund.reason else {})},
            }
            options: Any = {"idempotency_key": refund.key}
            document = (await ask(self._refunds.create_async(params, options), RefundDocument)).document
        if document.amount != amount:
            raise PaymentConflict(f"Stripe has a refund of {document.amount} under this key")
        state = REFUND_STATES.get(document.status)
        if state is None:
            raise PaymentUnknown(f"Stripe says that the refund is {document.status}")
        return Refunded(reference=document.id, state=state, error=document.failure_reason)

    async def payments(self, since: int, until: int, cursor: str | None) -> PaymentPage:
        """See PaymentLister. Stripe lists the newest first, so spans are read that fit into one of its pages."""
        start, end = -(-since // MICROSECONDS), -(-until // MICROSECONDS)
        width = max(1, end - start)
        if cursor is not None:
            start, width = (int(part) for part in cursor.split(":"))
        for _ in range(PAGE_REQUESTS_MAX):
            if start >= end:
                return PaymentPage([], None)
            width = min(width, end - start)
            page = await self._page({"gte": start, "lt": start + width})
            if page.has_more and width > 1:
                width //= 2
                continue
            found = page.data + (await self._rest(start, page) if page.has_more else [])
            start += width
            width *= 1 if page.has_more else 2
            ours = [payment_of(intent) for intent in reversed(found) if KEY in intent.metadata and intent.begun]
            if ours:
                return PaymentPage(ours, f"{start}:{width}" if start < end else None)
        return PaymentPage([], f"{start}:{width}" if start < end else None)

    async def payment(self, reference: str) -> Payment:
        """Return the payment of this id: a dispute says no more. Raises what `find` raises."""
        return payment_of(await self._retrieve(reference))

    async def close(self) -> None:
        """See PaymentGateway."""
        await self._caller.close()

    async def _make(self, charge: Charge, amount: int) -> IntentDocument:
        """Make the PaymentIntent of this key, or return the one that was made before."""
        known = self._ids.get(charge.key)
        if known is not None:
            return await self._retrieve(known)
        methods = {"enabled": True} | ({} if charge.return_url else {"allow_redirects": "never"})
        params: Any = {
            "amount": amount,
            "currency": charge.currency.lower(),
            "payment_method": charge.token,
            "capture_method": "automatic" if charge.capture else "manual",
            "automatic_payment_methods": methods,
            "metadata": {ORDER_ID: charge.order_id, KEY: charge.key},
        }
        if _CUSTOMER.fullmatch(str(charge.customer_id)):
            params["customer"] = charge.customer_id  # a saved payment method is of use only with its customer
        said = await self._in_turns(
            charge.key,
            lambda key: self._intents.create_async(params, {"idempotency_key": key}),
            lambda: self._look(charge.key),
        )
        return await self._now(said)

    async def _adopt(self, charge: Charge) -> IntentDocument:
        """Write this order's name on a PaymentIntent that the shop has made; it must not have another's."""
        try:
            intent = await self._retrieve(charge.token or "")
        except PaymentUnknown as error:
            if isinstance(error.__cause__, stripe.InvalidRequestError):
                raise PaymentDeclined("Stripe knows of no such PaymentIntent") from error
            raise
        self._is_of(intent, to_stripe(charge.amount_minor, charge.currency), charge.currency)
        theirs = intent.metadata.get(KEY)
        if theirs is not None and intent.metadata.get(ORDER_ID) != charge.order_id:
            raise PaymentConflict("The PaymentIntent belongs to another order")
        if theirs == charge.key:
            return intent
        params: Any = {"metadata": {ORDER_ID: charge.order_id, KEY: charge.key}} | _CHARGE_TOO
        id = intent.id
        if theirs is not None:  # an earlier charge of the same order, which was declined
            said = await ask(self._intents.update_async(id, params), IntentDocument)
        else:
            # One key for all orders: of two at once Stripe lets the first one write.
            said = await self._in_turns(
                f"expediter-{id}",
                lambda key: self._intents.update_async(id, params, {"idempotency_key": key}),
                lambda: self._retrieve(id),
            )
        return await self._now(said)

    async def _now(self, said: Said) -> IntentDocument:
        """Return a PaymentIntent as it is: a saved answer says how it was."""
        intent: IntentDocument = said.document
        return await self._retrieve(intent.id) if said.saved else intent

    async def _in_turns(
        self,
        key: str,
        call: Callable[[str], Awaitable[stripe.StripeObject]],
        look: Callable[[], Awaitable[IntentDocument | None]],
    ) -> Said:
        """Ask for what moves no money, under the next key where Stripe has saved a failure under this one.

        Everybody who asks meets the same saved failures and so comes to the same key. A failure that is not known
        to be saved is no reason to go on: the next to ask might get an answer where this one got none. If a look
        shows that money is under way all the same, that is the answer.
        """
        refused: PaymentError | None = None
        for turn in range(1, TURNS_MAX + 1):
            try:
                return await ask(call(key if turn == 1 else f"{key}:{turn}"), IntentDocument)
            except PaymentUnknown as error:
                if not is_saved(error.__cause__):
                    raise
                refused = error
            found = await look()
            if found is not None and found.begun and found.metadata.get(KEY):
                return Said(found, saved=False)
        raise refused or PaymentUnknown("Stripe was not asked")

    async def _confirm(self, intent: IntentDocument, charge: Charge, *, made: bool) -> IntentDocument:
        """Let Stripe take the money. Asked twice it does not: a PaymentIntent succeeds once."""
        if intent.status != UNCONFIRMED:
            return intent
        params: Any = dict(_CHARGE_TOO)
        if charge.return_url:
            params["return_url"] = charge.return_url
        if not (made or charge.capture):
            params["capture_method"] = "manual"
        return await self._moved(intent, lambda: self._intents.confirm_async(intent.id, params))

    async def _take(self, intent: IntentDocument, amount: int) -> IntentDocument:
        params: Any = {"amount_to_capture": amount} | _CHARGE_TOO
        return await self._moved(
            intent, lambda: self._intents.capture_async(intent.id, params), "succeeded", "canceled"
        )

    async def _moved(
        self, intent: IntentDocument, call: Callable[[], Awaitable[stripe.StripeObject]], *ends: str
    ) -> IntentDocument:
        """Move a PaymentIntent on; where Stripe answers that it cannot or has failed, look at what became of it.

        `ends` are the states in which the refusal means nothing; without them, any other than before.
        """
        try:
            said = await ask(call(), IntentDocument)
        except (PaymentDeclined, PaymentUnknown) as refused:
            if not isinstance(refused.__cause__, stripe.InvalidRequestError | stripe.APIError):
                raise
            try:
                now = await self._retrieve(intent.id)
            except PaymentError:
                raise refused from refused.__cause__
            if now.status in ends or (not ends and now.status != intent.status):
                return now
            raise
        document: IntentDocument = said.document
        return document

    async def _known(self, key: str) -> IntentDocument:
        intent = await self._look(key)
        if intent is None:
            raise PaymentDeclined("Stripe knows of no payment under this key")
        return intent

    async def _look(self, key: str) -> IntentDocument | None:
        """Return the PaymentIntent of a key: by its id, by the search, or among the newest."""
        known = self._ids.get(key)
        intent = await self._retrieve(known) if known is not None else None
        if intent is None or not intent.begun:
            intent = _first(await self._search(key), key) or await self._newest(key) or intent
            if intent is not None:
                # What a search shows may be old.
                intent = await self._retrieve(intent.id)
                self._remember(key, intent.id)
        return intent

    async def _search(self, key: str) -> list[IntentDocument]:
        """Ask Stripe's search, which is quick, a minute behind, and not there for every account."""
        params: Any = {"query": f"metadata['{KEY}']:'{key}'", "limit": PAGE_SIZE}
        try:
            said = await ask(self._intents.search_async(params), IntentList)
        except PaymentError as error:
            if isinstance(error.__cause__, stripe.InvalidRequestError | stripe.PermissionError):
                return []
            raise
        found: list[IntentDocument] = said.document.data
        return found

    async def _newest(self, key: str) -> IntentDocument | None:
        since, after, found = int(time.time()) - LOOK_BACK_SECONDS, None, None
        for _ in range(LOOK_PAGES_MAX):
            page = await self._page({"gte": since}, after)
            found = _first(page.data, key) or found
            if not page.has_more or (found is not None and found.begun):
                return found
            after = page.data[-1].id
        return found

    async def _page(self, created: dict[str, int], after: str | None = None) -> IntentList:
        params: Any = {"created": created, "limit": PAGE_SIZE, "expand": ["data.latest_charge"]}
        if after is not None:
            params["starting_after"] = after
        page: IntentList = await read(self._intents.list_async(params), IntentList)
        if page.has_more and not page.data:
            raise PaymentUnknown("Stripe says that there is more after an empty page")
        return page

    async def _rest(self, second: int, page: IntentList) -> list[IntentDocument]:
        """Return what one second has beyond a page. Raises PaymentUnknown where it is too much to be listed."""
        found: list[IntentDocument] = []
        for _ in range(LOOK_PAGES_MAX):
            page = await self._page({"gte": second, "lt": second + 1}, page.data[-1].id)
            found += page.data
            if not page.has_more:
                return found
        raise PaymentUnknown(f"Stripe has more payments in one second than {(LOOK_PAGES_MAX + 1) * PAGE_SIZE}")

    async def _refund_under(self, key: str, intent_id: str) -> RefundDocument | None:
        params: Any = {"payment_intent": intent_id, "limit": PAGE_SIZE}
        for _ in range(LOOK_PAGES_MAX):
            page: RefundList = await read(self._refunds.list_async(params), RefundList)
            found = next((each for each in page.data if each.metadata.get(KEY) == key), None)
            if found is not None or not page.has_more or not page.data:
                return found
            params = params | {"starting_after": page.data[-1].id}
        raise PaymentUnknown("The payment has more refunds than can be looked through")

    async def _retrieve(self, id: str) -> IntentDocument:
        call = self._intents.retrieve_async(id, _CHARGE_TOO)
        intent: IntentDocument = await read(call, IntentDocument)
        if intent.id != id:
            raise PaymentUnknown("Stripe was asked about one PaymentIntent and answered about another")
        return intent

    def _is_of(self, intent: IntentDocument, amount: int, currency: str) -> None:
        if (intent.amount, intent.currency.upper()) != (amount, currency):
            raise PaymentConflict(f"Stripe has {intent.amount} {intent.currency} for this order, not {amount}")

    def _remember(self, key: str, id: str) -> None:
        self._ids[key] = id
        self._ids.move_to_end(key)
        if len(self._ids) > REMEMBERED_MAX:
            self._ids.popitem(last=False)


def _first(intents: Iterable[IntentDocument], key: str) -> IntentDocument | None:
    """Return the PaymentIntent of a key. There may be another one, that nobody has confirmed."""
    ours = [intent for intent in intents if intent.metadata.get(KEY) == key]
    return next((intent for intent in ours if intent.begun), ours[0] if ours else None)
