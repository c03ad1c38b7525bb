"""Reading what clients send: typed decoding first, and a patient look for every fault where that fails."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from decimal import Decimal
from itertools import islice
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from expediter.errors import BadRequest, Fault, InvalidInput
from expediter.orders.commands import PlaceOrder
from expediter.orders.money import AMOUNT_MINOR_MAX, CURRENCY_DIGITS, MoneyError, format_minor, parse_minor
from expediter.orders.order import LINES_MAX, QUANTITY_MAX, Line, Stages, Status, is_order_id

#: How deep a body may be nested.
DEPTH_MAX = 32
#: Faults that one refusal names, at most.
FAULTS_MAX = 100
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


class PopulateBody(msgspec.Struct, forbid_unknown_fields=True):
    """How many orders to make up, and what to call them."""

    total_entries: Annotated[int, Meta(ge=1, le=10_000)]
    batch_id: Annotated[str, Meta(min_length=1, max_length=128)] | None = None


class AdminBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of an admin call: the password may also come in a header."""

    admin_password: str | None = None
    count: Annotated[int, Meta(ge=1, le=100_000)] = 100


T = TypeVar("T")
_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}
_encode = msgspec.json.Encoder().encode


def decode(body: bytes, kind: type[T]) -> T:
    """Return `body` as a `kind`. Raises BadRequest for what is not JSON, InvalidInput with every fault."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        parsed: T = decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _diagnose(body, kind, error) from error
    escaped = b"\\" in body and (b"\\u0000" in body or b"\\ud" in body or b"\\uD" in body)
    if escaped or _QUOTED_AMOUNT.search(body) or not _is_each_member_once(body, parsed):
        plain = _plain(body)
        if faults := _unclean(plain, "") or _misspelt(plain, ""):
            raise InvalidInput(faults)
    return parsed


def _is_each_member_once(body: bytes, parsed: object) -> bool:
    """Return whether it is plain that no name is given twice, of which the decoder would take the last.

    An object has a colon for each member; others are in texts. No more than there are members: none is twice.
    """
    if isinstance(parsed, list):
        return True  # of a batch, which is looked at row by row
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


def place_order(body: OrderBody, *, fresh_id: str, currency: str, stages: Stages) -> PlaceOrder:
    """Return the command for a decoded body. Raises InvalidInput with every fault."""
    faults: list[Fault] = []
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


def _lines(body: OrderBody, currency: str, faults: list[Fault]) -> tuple[Line, ...]:
    if body.items is not None:
        if body.item_ids is not None:
            faults.append(Fault("/item_ids", "give items or item_ids, not both"))
        return tuple([_line(index, item, currency, faults) for index, item in enumerate(body.items)])
    if body.item_ids is not None:
        return tuple([Line(index, item_id, None, 1, None) for index, item_id in enumerate(body.item_ids, 1)])
    faults.append(Fault("/items", "at least one item is required: items or item_ids"))
    return ()


def _line(index: int, item: ItemBody, currency: str, faults: list[Fault]) -> Line:
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


def _money(amount: Decimal, currency: str, field: str, faults: list[Fault]) -> int:
    try:
        return parse_minor(amount, currency)
    except MoneyError as error:
        faults.append(Fault(field, str(error)))
        return 0


def _total(body: OrderBody, lines: tuple[Line, ...], currency: str, priced: bool, faults: list[Fault]) -> int:
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


# From here on: the slow road, for bodies that are refused.

_WHERE = re.compile(r" - at `(\$[^`]*)`$")


def _diagnose(body: bytes, kind: type[Any], first: Exception) -> BadRequest | InvalidInput:
    try:
        plain = _plain(body)
    except BadRequest as error:
        return error
    faults = _unclean(plain, "") or _faults(body, kind, "") + _misspelt(plain, "")
    return InvalidInput(faults[:FAULTS_MAX] or [_fault("", first)])


def _plain(body: bytes) -> Any:
    """Return the body as plain Python objects. Raises BadRequest for what is not JSON or too deep."""
    if body.startswith(_BYTE_ORDER_MARKS):
        raise BadRequest("The body begins with a byte order mark: send JSON as UTF-8 without one")
    try:
        text = body.decode()
        # Numbers are judged by the typed decoder; here they would only cost time, or be too large to write out.
        plain = json.loads(
            text,
            object_pairs_hook=_each_once,
            parse_constant=_refuse_constant,
            parse_float=_passed_over,
            parse_int=_passed_over,
        )
    except RecursionError:
        raise BadRequest(f"The body is nested more than {DEPTH_MAX} levels deep") from None
    except ValueError as error:
        raise BadRequest(f"The body is not valid JSON: {error}") from error
    if _depth(plain, 0) > DEPTH_MAX:
        raise BadRequest(f"The body is nested more than {DEPTH_MAX} levels deep")
    return plain


def _each_once(members: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(members)
    if len(found) < len(members):
        seen: set[str] = set()
        for name, _ in members:
            if name in seen:
                raise BadRequest(f"The body names {json.dumps(name)} twice in one object")
            seen.add(name)
    return found


#: A colon that stands apart from its name.
_PARTED = re.compile(rb'"\s+:')
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


def _passed_over(number: str) -> None:
    return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _depth(value: Any, above: int) -> int:
    if above > DEPTH_MAX or not isinstance(value, (dict, list)):
        return above
    inner = value.values() if isinstance(value, dict) else value
    return max((_depth(each, above + 1) for each in inner), default=above + 1)


def _unclean(value: Any, pointer: str) -> list[Fault]:
    """Find texts that no database and no UTF-8 can hold."""
    if isinstance(value, str):
        if "\x00" in value:
            return [Fault(pointer, "must not contain NUL")]
        return [Fault(pointer, "contains half of a surrogate pair")] if _SURROGATE.search(value) else []
    if isinstance(value, dict):
        inner = list(value.items())
        found = [fault for key, _ in inner for fault in _unclean(key, f"{pointer}/{_shown(key)}")]
        return found + [fault for key, each in inner for fault in _unclean(each, f"{pointer}/{_shown(key)}")]
    if isinstance(value, list):
        return [fault for index, each in enumerate(value) for fault in _unclean(each, f"{pointer}/{index}")]
    return []


#: An amount as text that is no plain decimal number: the decoder reads Python's spellings too (1_0, other digits).
_DECIMAL = r"[+-]?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
_QUOTED_AMOUNT = re.compile(rf'"(?:price|unit_price|total_amount)"\s*:\s*"(?!{_DECIMAL}")'.encode())
_AMOUNTS = frozenset({"price", "unit_price", "total_amount"})


def _misspelt(value: Any, pointer: str) -> list[Fault]:
    """Find amounts whose text the decoder accepts and a reader of JSON would not call a decimal number."""
    if isinstance(value, list):
        return [fault for index, each in enumerate(value) for fault in _misspelt(each, f"{pointer}/{index}")]
    if not isinstance(value, dict):
        return []
    found = []
    for key, each in value.items():
        if key in _AMOUNTS and isinstance(each, str):
            if _readable(each) and not re.fullmatch(_DECIMAL, each):
                found.append(Fault(f"{pointer}/{key}", "must be a decimal number such as 12.99"))
        elif key != "metadata":
            found += _misspelt(each, f"{pointer}/{_shown(key)}")
    return found


def _readable(text: str) -> bool:
    """Return whether the decoder takes it for a finite number: what it does not, is a fault already."""
    try:
        return Decimal(text).is_finite()
    except ArithmeticError:
        return False


_SURROGATE = re.compile("[\ud800-\udfff]")


def _shown(key: str) -> str:
    """Return a key as a part of a JSON pointer (RFC 6901), fit for UTF-8."""
    return key.encode("utf-8", "replace").decode().replace("~", "~0").replace("/", "~1")


def _faults(raw: bytes, kind: Any, pointer: str) -> list[Fault]:
    """Decode field by field, so that every fault is found and not only the first."""
    struct = _struct_in(kind)
    if isinstance(struct, type) and issubclass(struct, msgspec.Struct):
        try:
            fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        except msgspec.ValidationError as error:
            return [_fault(pointer, error)]
        return _struct_faults(fields, struct, pointer)
    if get_origin(struct) is list:
        (inner,) = get_args(struct)
        try:
            elements = msgspec.json.decode(raw, type=list[msgspec.Raw])
            found = _first(
                fault
                for index, element in enumerate(elements)
                for fault in _faults(bytes(element), inner, f"{pointer}/{index}")
            )
            if found:
                return found
        except msgspec.ValidationError:
            pass  # not a list: the typed decoder says it best
    if get_origin(struct) is dict:
        try:
            entries = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
            inner = get_args(struct)[1]
            found = _first(
                fault
                for key, entry in entries.items()
                for fault in _faults(bytes(entry), inner, f"{pointer}/{_shown(key)}")
            )
            if found:
                return found
        except msgspec.ValidationError:
            pass  # not an object: the typed decoder says it best
    try:
        msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        return [_fault(pointer, error)]
    return []


def _first(faults: Iterable[Fault]) -> list[Fault]:
    return list(islice(faults, FAULTS_MAX))


def _struct_faults(fields: dict[str, msgspec.Raw], struct: type[msgspec.Struct], pointer: str) -> list[Fault]:
    hints = get_type_hints(struct, include_extras=True)
    unknown = (name for name in fields if name not in hints)
    faults = _first(Fault(f"{pointer}/{_shown(name)}", "is not a known field") for name in unknown)
    for field in msgspec.structs.fields(struct):
        if field.name in fields:
            faults += _faults(bytes(fields[field.name]), hints[field.name], f"{pointer}/{field.name}")
        elif field.required:
            faults.append(Fault(f"{pointer}/{field.name}", "is required"))
    return faults


def _struct_in(kind: Any) -> Any:
    """Return the struct, list or dict inside `Annotated[...] | None`, or `kind` itself."""
    for inner in get_args(kind) if get_origin(kind) not in (list, dict) else ():
        found = _struct_in(inner)
        if get_origin(found) in (list, dict) or (isinstance(found, type) and issubclass(found, msgspec.Struct)):
            return found
    return kind


def _fault(pointer: str, error: Exception) -> Fault:
    text = str(error)
    where = _WHERE.search(text)
    if where:
        text = text[: where.start()]
        pointer += where[1][1:].replace("[...]", "").replace(".", "/").replace("[", "/").replace("]", "")
    return Fault(pointer, text[:1].lower() + text[1:])
