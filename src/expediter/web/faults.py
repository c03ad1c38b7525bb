"""Why a body is refused: the slow road, which finds every fault and its JSON pointer, within limits.

Meanwhile the event loop serves nobody else, and whoever sends a body chooses what is in it. So only code in C
reads the whole of a large one. Python looks at a limited number of values and names a limited number of faults,
and what a refusal repeats of the body has a limited length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from functools import cache
from itertools import chain
from typing import Any, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

import msgspec

from expediter.errors import BadRequest, Fault, InvalidInput

#: How deep a body may be nested.
DEPTH_MAX = 32
#: Values of one body that are looked at for faults, counted by commas, colons and opening brackets: an order with
#: everything that it may have has fewer. Of a body with more only the first fault is named.
VALUES_MAX = 30_000
#: Characters of a name, and of a message, that a refusal repeats.
NAME_CHARACTERS_MAX = 128
MESSAGE_CHARACTERS_MAX = 256
#: How a decimal number is written.
DECIMAL = r"[+-]?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"

_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
_AMOUNTS = frozenset({"price", "unit_price", "total_amount"})
_SURROGATE = re.compile("[\ud800-\udfff]")
_WHERE = re.compile(r" - at `(\$[^`]*)`$")
_DECIMAL = re.compile(DECIMAL)


def refusal(body: bytes, kind: Any, first: Exception, faults_max: int) -> BadRequest | InvalidInput:
    """Return why a body is no `kind`; `first` is what the typed decoder says."""
    try:
        plain = _plain(body)
    except BadRequest as error:
        return error
    if plain is None:
        rest = f"the body has more than {VALUES_MAX} values: nobody has looked for more faults"
        return InvalidInput([_fault("", first)], rest=rest)
    unclean = next(_unclean(plain.value, ""), None)
    faults = _unclean(plain.value, "") if unclean else chain(_faults(body, kind, ""), _misspelt(plain.value, ""))
    some = next(faults, None) or _fault("", first)
    return InvalidInput(chain([some], faults), faults_max=faults_max)


def refuse_unfit(body: bytes, faults_max: int) -> None:
    """Refuse what the typed decoder accepts and must not be taken. Raises BadRequest, InvalidInput."""
    plain = _plain(body)
    if plain is None:
        raise BadRequest(f"The body has more than {VALUES_MAX} values, which is more than anything here can have")
    for faults in (_unclean(plain.value, ""), _misspelt(plain.value, "")):
        if some := next(faults, None):
            raise InvalidInput(chain([some], faults), faults_max=faults_max)


def refuse_twice(body: bytes) -> None:
    """Refuse a body that names something twice in one object: which one would count? Raises BadRequest."""
    _plain(body)


def without_numbers(body: bytes) -> Any:
    """Return a body that was decoded before as plain Python objects, None for each number."""
    return _read(body.decode())


class _Plain(NamedTuple):
    """A body as plain Python objects, without its numbers."""

    value: Any


def _plain(body: bytes) -> _Plain | None:
    """Return the body as plain objects; None: it has too many values. Raises BadRequest for what is not JSON."""
    if body.startswith(_BYTE_ORDER_MARKS):
        raise BadRequest("The body begins with a byte order mark: send JSON as UTF-8 without one")
    outside = _outside_texts(body)
    holders = outside.count(b"{") + outside.count(b"[")
    few = holders + outside.count(b",") + outside.count(b":") <= VALUES_MAX
    plain = None
    try:
        text = body.decode()
        if holders <= VALUES_MAX:
            value = _read(text)  # also of many values: a name may be given twice
            plain = _Plain(value) if few else None
        else:
            _raw.decode(body)  # builds nothing: half a million lists would take a second
    except RecursionError:
        raise BadRequest(_TOO_DEEP) from None
    except (ValueError, msgspec.MsgspecError) as error:
        raise BadRequest(f"The body is not valid JSON: {error}") from error
    brackets = outside.translate(_BRACKETS, _NO_BRACKETS)
    for _ in range(DEPTH_MAX):
        brackets = brackets.replace(b"[]", b"")  # the innermost level
    if brackets:
        raise BadRequest(_TOO_DEEP)
    return plain


def _outside_texts(body: bytes) -> bytes:
    """Return what stands outside the texts, which are every other part between two quotes."""
    return b"".join(body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])


_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_TOO_DEEP = f"The body is nested more than {DEPTH_MAX} levels deep"
_raw = msgspec.json.Decoder(msgspec.Raw)


def _read(text: str) -> Any:
    # Numbers are judged by the typed decoder; here they would only cost time, or be too large to write out.
    return json.loads(
        text,
        object_pairs_hook=each_once,
        parse_constant=refuse_constant,
        parse_float=_no_number,
        parse_int=_no_number,
    )


#: Makes None of every number; not a function in Python, for it may be called half a million times.
_no_number = dict[str, None]().get


def refuse_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity, which Python would read."""
    raise ValueError(f"{name} is not a JSON number")


def each_once(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's members. Raises BadRequest for a name that is given twice."""
    found = dict(members)
    if len(found) < len(members):
        seen: set[str] = set()
        for name, _ in members:
            if name in seen:
                shown = json.dumps(name[:NAME_CHARACTERS_MAX])
                raise BadRequest(f"The body names {shown} twice in one object")
            seen.add(name)
    return found


def _unclean(value: Any, pointer: str) -> Iterator[Fault]:
    """Find texts that no database and no UTF-8 can hold."""
    if isinstance(value, str):
        if "\x00" in value:
            yield Fault(pointer, "must not contain NUL")
        elif _SURROGATE.search(value):
            yield Fault(pointer, "contains half of a surrogate pair")
    elif isinstance(value, dict):
        for key in value:
            if "\x00" in key or _SURROGATE.search(key):
                yield from _unclean(key, f"{pointer}/{_shown(key)}")
        for key, each in value.items():
            if each is not None and not isinstance(each, bool):
                yield from _unclean(each, f"{pointer}/{_shown(key)}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            if each is not None and not isinstance(each, bool):
                yield from _unclean(each, f"{pointer}/{index}")


def _misspelt(value: Any, pointer: str) -> Iterator[Fault]:
    """Find amounts whose text the decoder accepts and a reader of JSON would not call a decimal number."""
    if isinstance(value, list):
        for index, each in enumerate(value):
            if isinstance(each, (dict, list)):
                yield from _misspelt(each, f"{pointer}/{index}")
    elif isinstance(value, dict):
        for key, each in value.items():
            if key in _AMOUNTS and isinstance(each, str):
                if _readable(each) and not _DECIMAL.fullmatch(each):
                    yield Fault(f"{pointer}/{key}", "must be a decimal number such as 12.99")
            elif key != "metadata" and isinstance(each, (dict, list)):
                yield from _misspelt(each, f"{pointer}/{_shown(key)}")


def _readable(text: str) -> bool:
    """Return whether the decoder takes it for a finite number: what it does not, is a fault already."""
    try:
        return Decimal(text).is_finite()
    except ArithmeticError:
        return False


def _shown(key: str) -> str:
    """Return a key as a part of a JSON pointer (RFC 6901), fit for UTF-8; of a long one, how it begins."""
    return _cut(key, NAME_CHARACTERS_MAX).encode("utf-8", "replace").decode().replace("~", "~0").replace("/", "~1")


def _cut(text: str, characters_max: int) -> str:
    return text if len(text) <= characters_max else f"{text[:characters_max]}..."


class _Form(NamedTuple):
    """What a type asks for, taken apart once: a struct's fields, or what each member of a list or object is."""

    decoder: msgspec.json.Decoder[Any]
    fields: dict[str, Any] | None
    required: tuple[str, ...]
    members: Any
    listed: bool


_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_elements = msgspec.json.Decoder(list[msgspec.Raw])


@cache
def _form(kind: Any) -> _Form:
    decoder = msgspec.json.Decoder(kind)
    inner = _inner(kind)
    if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
        required = tuple(field.name for field in msgspec.structs.fields(inner) if field.required)
        return _Form(decoder, get_type_hints(inner, include_extras=True), required, None, False)
    if get_origin(inner) in (list, dict):
        return _Form(decoder, None, (), get_args(inner)[-1], get_origin(inner) is list)
    return _Form(decoder, None, (), None, False)


def _inner(kind: Any) -> Any:
    """Return the struct, list or dict inside `Annotated[...] | None`, or `kind` itself."""
    for inner in get_args(kind) if get_origin(kind) not in (list, dict) else ():
        found = _inner(inner)
        if get_origin(found) in (list, dict) or (isinstance(found, type) and issubclass(found, msgspec.Struct)):
            return found
    return kind


def _faults(raw: bytes, kind: Any, pointer: str) -> Iterator[Fault]:
    """Decode field by field, so that every fault is found and not only the first; what is good costs one call."""
    form = _form(kind)
    try:
        form.decoder.decode(raw)
        return
    except msgspec.ValidationError as error:
        first = _fault(pointer, error)
    if form.fields is not None:
        try:
            given = _members.decode(raw)
        except msgspec.ValidationError as error:
            yield _fault(pointer, error)
            return
        yield from _struct_faults(given, form, pointer)
        return
    inside: Iterator[Fault] = iter(())
    try:
        if form.members is not None and form.listed:
            inside = _list_faults(_elements.decode(raw), form.members, pointer)
        elif form.members is not None:
            inside = _dict_faults(_members.decode(raw), form.members, pointer)
    except msgspec.ValidationError:
        pass  # neither list nor object: the typed decoder says it best
    yield next(inside, first)
    yield from inside


def _list_faults(elements: list[msgspec.Raw], kind: Any, pointer: str) -> Iterator[Fault]:
    for index, element in enumerate(elements):
        yield from _faults(bytes(element), kind, f"{pointer}/{index}")


def _dict_faults(members: dict[str, msgspec.Raw], kind: Any, pointer: str) -> Iterator[Fault]:
    for key, member in members.items():
        yield from _faults(bytes(member), kind, f"{pointer}/{_shown(key)}")


def _struct_faults(given: dict[str, msgspec.Raw], form: _Form, pointer: str) -> Iterator[Fault]:
    fields = form.fields or {}
    for name in given:
        if name not in fields:
            yield Fault(f"{pointer}/{_shown(name)}", "is not a known field")
    for name, kind in fields.items():
        if name in given:
            yield from _faults(bytes(given[name]), kind, f"{pointer}/{name}")
        elif name in form.required:
            yield Fault(f"{pointer}/{name}", "is required")


def _fault(pointer: str, error: Exception) -> Fault:
    text = str(error)
    where = _WHERE.search(text)
    if where:
        text = text[: where.start()]
        pointer += where[1][1:].replace("[...]", "").replace(".", "/").replace("[", "/").replace("]", "")
    return Fault(_cut(pointer, MESSAGE_CHARACTERS_MAX), _cut(text[:1].lower() + text[1:], MESSAGE_CHARACTERS_MAX))
