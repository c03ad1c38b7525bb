"""A server that answers like Stripe, and fails as it is told to: what localstripe cannot do."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

from aiohttp import web

from expediter.payments.stripe import StripeGateway

API_KEY = "sk_test_s3cret"
Form = dict[str, str]


class Fault(NamedTuple):
    """What comes instead of an answer. `after`: the thing was done first. `kept`: saved under the key."""

    status: int = 0
    error: dict[str, Any] | None = None
    headers: Mapping[str, str] = MappingProxyType({})
    body: bytes | None = None
    after: bool = False
    kept: bool = False


DROPPED = Fault()
FAILED = Fault(500, {"type": "api_error", "message": "Something went wrong"}, kept=True)


class Refused(Exception):
    def __init__(self, status: int, **error: Any) -> None:
        self.status = status
        self.error = error


class FakeStripe:
    """PaymentIntents and refunds in memory.

    `faults` has what becomes of the next requests of each kind, `before` what happens before the next one is read.
    """

    def __init__(self) -> None:
        self.intents: dict[str, dict[str, Any]] = {}
        self.refunds: list[dict[str, Any]] = []
        self.faults: defaultdict[str, list[Fault | None]] = defaultdict(list)
        self.asked: list[tuple[str, Form, str | None]] = []
        self.versions: set[str | None] = set()
        self.address = ""
        self.before: dict[str, Callable[[], Awaitable[object]]] = {}
        self.searchable = True
        self.now = int(time.time())
        self._saved: dict[str, tuple[str, int, dict[str, Any]]] = {}

    @property
    def taken(self) -> int:
        """What was taken of all customers together."""
        return sum(intent["amount_received"] for intent in self.intents.values())

    def count(self, what: str) -> int:
        return sum(1 for each, _, _ in self.asked if each == what)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        form: Form = dict(request.query) if request.method == "GET" else dict(await request.post())  # type: ignore[arg-type]
        what, id = _kind(request)
        key = request.headers.get("Idempotency-Key")
        self.asked.append((what, form, key))
        self.versions.add(request.headers.get("Stripe-Version"))
        if what in self.before:
            await self.before.pop(what)()
        if request.headers["Authorization"] != f"Bearer {API_KEY}":
            return _answer(401, {"error": {"message": "Invalid API Key provided: sk_test_****cret"}})
        print_ = json.dumps([request.path, form], sort_keys=True)
        if key in self._saved:
            before, status, document = self._saved[key]
            if before != print_:
                words = "Keys for idempotent requests can only be used with the same parameters"
                return _answer(400, {"error": {"type": "idempotency_error", "message": words}})
            return _answer(status, document, {"Idempotent-Replayed": "true"})
        fault = self.faults[what].pop(0) if self.faults[what] else None
        if fault is not None and not fault.after:
            return await self._fail(request, fault, key, print_)
        status, document = self._do(what, id, form)
        if key is not None and not (fault and fault.kept):
            self._saved[key] = print_, status, document
        if fault is not None:
            return await self._fail(request, fault, key, print_)
        return _answer(status, document)

    async def _fail(self, request: web.Request, fault: Fault, key: str | None, print_: str) -> web.StreamResponse:
        if fault.body is not None:
            return web.Response(status=fault.status, body=fault.body)
        if not fault.status:
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if fault.kept and key is not None:
            self._saved[key] = print_, fault.status, {"error": fault.error}
        return _answer(fault.status, {"error": fault.error}, fault.headers)

    def _do(self, what: str, id: str, form: Form) -> tuple[int, dict[str, Any]]:
        does: Callable[[str, Form], dict[str, Any]] = getattr(self, f"_{what}")
        try:
            # A copy: what is saved under a key must not change with the thing.
            return 200, json.loads(json.dumps(does(id, form)))
        except Refused as refused:
            return refused.status, {"error": refused.error}

    def intent(self, **given: Any) -> dict[str, Any]:
        """Make a PaymentIntent, as the shop's page does."""
        id = f"pi_{len(self.intents) + 1}"
        intent = {
            "id": id,
            "object": "payment_intent",
            "status": "requires_confirmation",
            "amount": 1299,
            "currency": "usd",
            "created": self.now,
            "client_secret": f"{id}_secret",
            "amount_received": 0,
            "metadata": {},
            "capture_method": "automatic",
            "payment_method": "pm_card_visa",
            "next_action": None,
            "last_payment_error": None,
            "latest_charge": None,
        } | given
        self.intents[id] = intent
        return intent

    def _create(self, _: str, form: Form) -> dict[str, Any]:
        return self.intent(
            amount=int(form["amount"]),
            currency=form["currency"],
            payment_method=form["payment_method"],
            capture_method=form["capture_method"],
            metadata=_metadata(form),
        )

    def _retrieve(self, id: str, _: Form) -> dict[str, Any]:
        if id not in self.intents:
            raise Refused(404, type="invalid_request_error", message=f"No such payment_intent: '{id}'")
        return self.intents[id]

    def _update(self, id: str, form: Form) -> dict[str, Any]:
        self.intents[id]["metadata"] |= _metadata(form)
        return self.intents[id]

    def _confirm(self, id: str, form: Form) -> dict[str, Any]:
        intent = self._retrieve(id, form)
        self._must_be(intent, "requires_confirmation")
        if intent["payment_method"] == "pm_card_chargeDeclined":
            intent |= {
                "status": "requires_payment_method",
                "payment_method": None,
                "last_payment_error": {"code": "card_declined", "message": "Your card was declined."},
            }
            raise Refused(402, type="card_error", code="card_declined", message="Your card was declined.")
        if intent["payment_method"] == "pm_card_authenticationRequired":
            url = form.get("return_url")
            action = {"type": "redirect_to_url", "redirect_to_url": {"url": f"https://bank.example/?back={url}"}}
            intent |= {
                "status": "requires_action",
                "next_action": action if url else {"type": "use_stripe_sdk"},
            }
            return intent
        return self.authenticated(intent, form.get("capture_method"))

    def authenticated(self, intent: dict[str, Any], capture_method: str | None = None) -> dict[str, Any]:
        """The customer has done what was asked for."""
        manual = (capture_method or intent["capture_method"]) == "manual"
        charge = {"id": "ch_1", "amount": intent["amount"], "currency": intent["currency"], "amount_refunded": 0}
        intent |= {"status": "requires_capture", "next_action": None, "latest_charge": charge}
        return intent if manual else self._capture(intent["id"], {})

    def _capture(self, id: str, form: Form) -> dict[str, Any]:
        intent = self.intents[id]
        self._must_be(intent, "requires_capture")
        amount = int(form.get("amount_to_capture", intent["amount"]))
        intent |= {"status": "succeeded", "amount_received": amount}
        # What was not taken counts as given back.
        intent["latest_charge"]["amount_refunded"] = intent["amount"] - amount
        return intent

    def _cancel(self, id: str, _: Form) -> dict[str, Any]:
        intent = self.intents[id]
        if intent["status"] in ("succeeded", "canceled"):
            self._must_be(intent, "requires_capture")
        intent["status"] = "canceled"
        return intent

    def _must_be(self, intent: dict[str, Any], status: str) -> None:
        if intent["status"] != status:
            words = f"This PaymentIntent has a status of {intent['status']}"
            raise Refused(400, type="invalid_request_error", code="payment_intent_unexpected_state", message=words)

    def _search(self, _: str, form: Form) -> dict[str, Any]:
        if not self.searchable:
            return {"object": "search_result", "data": [], "has_more": False}
        found = [
            each for each in self.intents.values() if each["metadata"].get("expediter_key", "-") in form["query"]
        ]
        return {"object": "search_result", "data": found, "has_more": False}

    def _list(self, _: str, form: Form) -> dict[str, Any]:
        since, until = int(form.get("created[gte]", 0)), int(form.get("created[lt]", 2**60))
        found = [each for each in reversed(self.intents.values()) if since <= each["created"] < until]
        return _listed(sorted(found, key=lambda each: -each["created"]), form)

    def _refund(self, _: str, form: Form) -> dict[str, Any]:
        intent, amount = self.intents[form["payment_intent"]], int(form["amount"])
        charge = intent["latest_charge"]
        if charge is None or charge["amount_refunded"] + amount > intent["amount"]:
            raise Refused(400, type="invalid_request_error", message="Charge has already been refunded.")
        charge["amount_refunded"] += amount
        refund = {
            "id": f"re_{len(self.refunds) + 1}",
            "object": "refund",
            "status": "succeeded",
            "amount": amount,
            "currency": intent["currency"],
            "payment_intent": intent["id"],
            "metadata": _metadata(form),
        }
        self.refunds.append(refund)
        return refund

    def _refunds(self, _: str, form: Form) -> dict[str, Any]:
        return _listed([each for each in self.refunds if each["payment_intent"] == form["payment_intent"]], form)


def _kind(request: web.Request) -> tuple[str, str]:
    """Return what a request asks for, and of what."""
    thing, *rest = request.path.removeprefix("/v1/").split("/")
    get = request.method == "GET"
    if thing == "refunds":
        return ("refunds" if get else "refund"), ""
    if not rest:
        return ("list" if get else "create"), ""
    if rest[0] == "search":
        return "search", ""
    return (rest[1] if len(rest) > 1 else "retrieve" if get else "update"), rest[0]


def _metadata(form: Form) -> dict[str, str]:
    return {name[9:-1]: text for name, text in form.items() if name.startswith("metadata[")}


def _listed(found: list[dict[str, Any]], form: Form) -> dict[str, Any]:
    after, limit = form.get("starting_after"), int(form["limit"])
    start = next((number + 1 for number, each in enumerate(found) if each["id"] == after), 0)
    return {"object": "list", "data": found[start : start + limit], "has_more": len(found) > start + limit}


def _answer(status: int, document: object, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.json_response(document, status=status, headers={"Request-Id": "req_1", **(headers or {})})


@asynccontextmanager
async def stripe() -> AsyncIterator[tuple[StripeGateway, FakeStripe]]:
    """A gateway, and the server that it asks."""
    fake = FakeStripe()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", fake.serve)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fake.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    gateway = StripeGateway(API_KEY, fake.address)
    try:
        yield gateway, fake
    finally:
        await gateway.close()
        await runner.cleanup()


@asynccontextmanager
async def another(fake: FakeStripe) -> AsyncIterator[StripeGateway]:
    """The gateway of another process: it remembers nothing."""
    gateway = StripeGateway(API_KEY, fake.address)
    try:
        yield gateway
    finally:
        await gateway.close()
