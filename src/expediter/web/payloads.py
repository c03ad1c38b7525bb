"""Reading what clients send: typed decoding; where that fails, `web/faults.py` looks for every fault."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from expediter.backends.addresses import URL_CHARACTERS_MAX
from expediter.errors import FAULTS_MAX, Fault, InvalidInput
from expediter.orders.commands import PlaceOrder, RefundOrder
from expediter.orders.money import (
    AMOUNT_MINOR_MAX,
    CURRENCY_DIGITS,
    MoneyError,
    TooFine,
    format_minor,
    nearest_minor,
    parse_minor,
)
from expediter.orders.order import LINES_MAX, QUANTITY_MAX, Line, Stages, Status, is_order_id
from expediter.store.scopes import NAME_CHARACTERS_MAX, NAME_PATTERN, Scope
from expediter.store.webhooks import REDELIVERED_MAX
from expediter.web.faults import DECIMAL, refusal, refuse_unfit, without_numbers

#: Limits of `metadata`: entries, and characters of a key and of a text.
METADATA_ENTRIES_MAX = 50

_Number = Annotated[int, Meta(ge=-(2**53) + 1, le=2**53 - 1)]
Identifier = _Number | Annotated[str, Meta(min_length=1, max_length=128)]
OrderId = _Number | Annotated[str, Meta(min_length=1, max_length=64)]
Name = Annotated[str, Meta(min_length=1, max_length=512)]
Amount = Decimal
MetadataKey = Annotated[str, Meta(min_length=1, max_length=64)]
MetadataValue = _Number | float | bool | Annotated[str, Meta(max_length=1024)] | None


class ItemBody(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """One line of an order. `item_name` = `name`, `unit_price` = `price`."""

    quantity: Annotated[int, Meta(ge=1, le=QUANTITY_MAX)]
    item_id: Identifier | None = None
    name: Name | None = None
    item_name: Name | None = None
    price: Amount | None = None
    unit_price: Amount | None = None


class OrderBody(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A new order, in any of the accepted shapes. `user_id` = `customer_id`."""

    customer_id: Identifier | None = None
    user_id: Identifier | None = None
    customer_name: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    items: Annotated[list[ItemBody], Meta(min_length=1, max_length=LINES_MAX)] | None = None
    item_ids: Annotated[list[Identifier], Meta(min_length=1, max_length=LINES_MAX)] | None = None
    total_amount: Amount | None = None
    order_id: OrderId | None = None
    currency: Annotated[str, Meta(min_length=3, max_length=3)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Meta(max_length=METADATA_ENTRIES_MAX)] | None = None
    payment_token: Annotated[str, Meta(min_length=1, max_length=256)] | None = None


class StatusBody(msgspec.Struct, forbid_unknown_fields=True):
    """A status to move an order to."""

    status: Status


class FulfilmentBody(msgspec.Struct, forbid_unknown_fields=True):
    """What became of an order that was handed over; `reference` is the reporter's own name for it."""

    outcome: Literal["done", "failed"]
    reason: Annotated[str, Meta(min_length=1, max_length=500)] | None = None
    reference: Annotated[str, Meta(min_length=1, max_length=128)] | None = None


class RefundBody(msgspec.Struct, forbid_unknown_fields=True):
    """Money to give back: `amount` in the order's currency, without it all that is left.

    One `by_hand` was made outside already; `reference` is its name there.
    """

    amount: Amount | None = None
    reason: Annotated[str, Meta(min_length=1, max_length=500)] | None = None
    by_hand: bool = False
    reference: Annotated[str, Meta(min_length=1, max_length=128)] | None = None


class PopulateBody(msgspec.Struct, forbid_unknown_fields=True):
    """How many orders to make up, and what to call them: their ids are `sim_{batch_id}_1`, `_2` and so on."""

    total_entries: Annotated[int, Meta(ge=1, le=10_000)]
    #: With the longest number it makes an order's id.
    batch_id: Annotated[str, Meta(min_length=1, max_length=54, pattern="^[A-Za-z0-9._-]+$")] | None = None


class AdminPassword(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What the body of every admin call may have: the password, by either name; it may also come in a header."""

    admin_password: str | None = None
    password: str | None = None


class AdminBody(AdminPassword, forbid_unknown_fields=True, kw_only=True):
    """The body of an admin call: the password, by either name, may also come in a header."""

    count: Annotated[int, Meta(ge=1, le=100_000)] = 100


KeyName = Annotated[str, Meta(min_length=1, max_length=NAME_CHARACTERS_MAX, pattern=NAME_PATTERN)]
KeyScopes = Annotated[list[Scope], Meta(min_length=1, max_length=len(Scope))]


class KeyBody(AdminPassword, forbid_unknown_fields=True, kw_only=True):
    """A new API key: its name, what it is for, and when it ends (null: never)."""

    name: KeyName
    scopes: KeyScopes
    expires_at: str | None = None


WebhookUrl = Annotated[str, Meta(min_length=1, max_length=URL_CHARACTERS_MAX)]
ShortText = Annotated[str, Meta(min_length=1, max_length=64)]
WebhookTypes = Annotated[list[ShortText], Meta(min_length=1, max_length=50)]
Description = Annotated[str, Meta(max_length=500)]


class WebhookBody(msgspec.Struct, forbid_unknown_fields=True):
    """Whom to tell of what. `types`: `["*"]`, names, or `order.*`. `from`: `now`, `beginning`, or a cursor."""

    url: WebhookUrl
    types: WebhookTypes | None = None
    description: Description | None = None
    begin: ShortText | None = msgspec.field(default=None, name="from")


class WebhookChangeBody(msgspec.Struct, forbid_unknown_fields=True):
    """What to change of a webhook endpoint: only what is given."""

    url: WebhookUrl | None = None
    types: WebhookTypes | None = None
    description: Description | None = None
    status: Literal["active", "paused"] | None = None


class RedeliverBody(msgspec.Struct, forbid_unknown_fields=True):
    """What to send again: every event `since` a moment, or these deliveries. One of the two."""

    since: ShortText | None = None
    delivery_ids: Annotated[list[ShortText], Meta(min_length=1, max_length=REDELIVERED_MAX)] | None = None


T = TypeVar("T")
_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}
_encode = msgspec.json.Encoder().encode


def decode(body: bytes, kind: type[T], *, faults_max: int = FAULTS_MAX) -> T:
    """Return `body` as a `kind`. Raises BadRequest for what is not JSON, InvalidInput with the first faults."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        parsed: T = decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise refusal(body, kind, error, faults_max) from error
    if isinstance(parsed, list):
        return parsed  # a batch, which is looked at row by row
    escaped = b"\\" in body and (b"\\u0000" in body or b"\\ud" in body or b"\\uD" in body)
    if escaped or _QUOTED_AMOUNT.search(body) or not _is_each_member_once(body, parsed):
        refuse_unfit(body, faults_max)
    return parsed


#: An amount as text that may be no plain decimal number: the decoder reads Python's spellings, too (1_0).
_QUOTED_AMOUNT = re.compile(rf'"(?:price|unit_price|total_amount|amount)"\s*:\s*"(?!{DECIMAL}")'.encode())
#: A colon that stands apart from its name.
_PARTED = re.compile(rb'"\s+:')


def _is_each_member_once(body: bytes, parsed: object) -> bool:
    """Return whether it is plain that no name is given twice, of which the decoder would take the last.

    An object has a colon for each member; others are in texts. No more than there are members: none is twice.
    """
    members = _members(parsed) if isinstance(parsed, OrderBody) else -1
    return body.count(b":") == members or (body.count(b'":') == members and not _PARTED.search(body))


def _members(body: OrderBody) -> int:
    members = 0
    for value in (
        body.customer_id,
        body.user_id,
        body.customer_name,
        body.items,
        body.item_ids,
        body.total_amount,
        body.order_id,
        body.currency,
        body.metadata,
        body.payment_token,
    ):
        if value is not None:
            members += 1
    if body.metadata:
        members += len(body.metadata)
    for item in body.items or ():
        members += 1 + (item.item_id is not None) + (item.name is not None) + (item.item_name is not None)
        members += (item.price is not None) + (item.unit_price is not None)
    return members


class _Faults(list[Fault]):
    """What is wrong with an order, found while it is read; `body` is how it came."""

    __slots__ = ("_body", "_plain")

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self._body = body
        self._plain: Any = None

    def is_number(self, pointer: str) -> bool:
        """Return whether an amount came as a JSON number, and not as a text."""
        if self._plain is None:
            self._plain = without_numbers(self._body)
        value = self._plain
        for part in pointer[1:].split("/"):
            value = value[int(part) if isinstance(value, list) else part]
        return not isinstance(value, str)


def refund_order(body: RefundBody, raw: bytes, order_id: str, if_version: int | None) -> RefundOrder:
    """Return the command for a body, decoded and as it came. Raises InvalidInput."""
    if body.reference is not None and not body.by_hand:
        raise InvalidInput([Fault("/reference", "is for a refund that was made by_hand")])
    if body.amount is not None and not body.amount.is_finite():
        raise InvalidInput([Fault("/amount", "must be a finite number")])
    return RefundOrder(
        order_id=order_id,
        amount=None if body.amount is None else str(body.amount),
        number=body.amount is not None and _Faults(raw).is_number("/amount"),
        reason=body.reason,
        by_hand=body.by_hand,
        reference=body.reference,
        if_version=if_version,
    )


def place_order(body: OrderBody, raw: bytes, *, fresh_id: str, currency: str, stages: Stages) -> PlaceOrder:
    """Return the command for a body, decoded and as it came. Raises InvalidInput with every fault."""
    faults = _Faults(raw)
    order_id = fresh_id
    if body.order_id is not None:
        order_id = str(body.order_id)
        if not is_order_id(order_id):
            faults.append(Fault("/order_id", "must be 1 to 64 of A-Z a-z 0-9 . _ - and no word that a path uses"))
    if body.currency is not None:
        currency = body.currency
        if currency not in CURRENCY_DIGITS:
            faults.append(Fault("/currency", "must be an ISO 4217 code such as USD"))
            currency = "USD"
    customer_id = body.customer_id
    if body.user_id is not None:
        if customer_id is not None and customer_id != body.user_id:
            faults.append(Fault("/user_id", "is another name for customer_id, and says something else"))
        customer_id = body.user_id
    if customer_id is None and body.customer_name is None:
        faults.append(Fault("/customer_id", "some customer is required: customer_id, user_id or customer_name"))
    lines = _lines(body, currency, faults)
    priced = bool(lines) and all([line.price_minor is not None for line in lines])
    total = _total(body, lines, currency, priced, faults)
    if faults:
        raise InvalidInput(faults)
    return PlaceOrder(
        order_id=order_id,
        fresh=body.order_id is None,
        customer_id=customer_id,
        customer_name=body.customer_name,
        currency=currency,
        total_minor=total,
        priced=priced,
        lines=lines,
        metadata=_encode(body.metadata).decode() if body.metadata else "{}",
        payment_token=body.payment_token,
        stages=stages,
    )


def _lines(body: OrderBody, currency: str, faults: _Faults) -> tuple[Line, ...]:
    if body.items is not None:
        if body.item_ids is not None:
            faults.append(Fault("/item_ids", "give items or item_ids, not both"))
        return tuple([_line(index, item, currency, faults) for index, item in enumerate(body.items)])
    if body.item_ids is not None:
        return tuple([Line(index, item_id, None, 1, None) for index, item_id in enumerate(body.item_ids, 1)])
    faults.append(Fault("/items", "at least one item is required: items or item_ids"))
    return ()


def _line(index: int, item: ItemBody, currency: str, faults: _Faults) -> Line:
    name, price = item.name, item.price
    if item.item_name is not None:
        if name is not None and name != item.item_name:
            faults.append(Fault(f"/items/{index}/item_name", "is another name for name, and says something else"))
        name = item.item_name
    if item.unit_price is not None:
        if price is not None and item.unit_price.is_finite() and not _equal(price, item.unit_price):
            faults.append(
                Fault(f"/items/{index}/unit_price", "is another name for price, and says something else")
            )
        price = item.unit_price
    if name is None and item.item_id is None:
        faults.append(Fault(f"/items/{index}", "needs an item_id or a name"))
    minor = None
    if price is not None:
        field = "price" if item.unit_price is None else "unit_price"
        minor = _money(price, currency, f"/items/{index}/{field}", faults)
    return Line(index + 1, item.item_id, name, item.quantity, minor)


def _equal(one: Decimal, other: Decimal) -> bool:
    return one.is_finite() and other.is_finite() and one == other


def _money(amount: Decimal, currency: str, field: str, faults: _Faults) -> int:
    try:
        try:
            return parse_minor(amount, currency)
        except TooFine:
            if not faults.is_number(field):
                raise
            # A client's sum of floats. What is a text was written by somebody who knows better.
            return nearest_minor(amount, currency)
    except MoneyError as error:
        faults.append(Fault(field, str(error)))
        return 0


def _total(body: OrderBody, lines: tuple[Line, ...], currency: str, priced: bool, faults: _Faults) -> int:
    declared = None
    if body.total_amount is not None:
        declared = _money(body.total_amount, currency, "/total_amount", faults)
    if not priced:
        unpriced = [line.line for line in lines if line.price_minor is None]
        if declared is None and unpriced and len(unpriced) < len(lines):
            field = f"/items/{unpriced[0] - 1}/price"
            faults.append(Fault(field, "other lines have a price: give every line one, or a total_amount"))
        return declared or 0
    total = sum([line.quantity * (line.price_minor or 0) for line in lines])
    if total > AMOUNT_MINOR_MAX:
        faults.append(Fault("/items", f"add up to more than {format_minor(AMOUNT_MINOR_MAX, currency)}"))
    elif declared is not None and declared != total and not faults:
        faults.append(
            Fault(
                "/total_amount",
                f"is {format_minor(declared, currency)}, but the lines add up to {format_minor(total, currency)}",
            )
        )
    return total
