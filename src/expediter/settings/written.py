"""How values of settings are written: each function takes one as it is given, or says what to write."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from expediter.orders.money import CURRENCY_DIGITS

#: The length of REDIS_PREFIX: it is in the name of every key.
REDIS_PREFIX_CHARACTERS_MAX = 64
#: What the names of keys begin with that end in an id, a key or a page. With one of these in its prefix, what one
#: installation keeps could have the name of what another one removes.
_OPEN_KEYS = ("orders:detail:", "orders:list:", "temp_order:", "temp_changes:", "idempotency:")


def currency(code: str) -> str:
    """Return the code of a currency in capitals. Raises ValueError."""
    if code.upper() not in CURRENCY_DIGITS:
        raise ValueError("write an ISO 4217 code such as USD")
    return code.upper()


def small(value: object) -> object:
    """Return a word in small letters."""
    return value.strip().lower() if isinstance(value, str) else value


def capital(value: object) -> object:
    """Return a word in capitals."""
    return value.strip().upper() if isinstance(value, str) else value


def stages(value: object) -> object:
    """Take them with blanks between, in any case, and as Americans write them."""
    return (
        re.sub(r"\s", "", value).lower().replace("fulfillment", "fulfilment") if isinstance(value, str) else value
    )


def key_part(text: str) -> str:
    """Return what may be a part of a key at the gateway. Raises ValueError."""
    if not re.fullmatch("[A-Za-z0-9._-]{0,64}", text):
        raise ValueError("write up to 64 letters, digits and . _ - such as shop-1")
    return text


def queue_name(text: str) -> str:
    """Return the name of a queue. Raises ValueError."""
    if not re.fullmatch("[A-Za-z0-9._-]{1,100}", text):
        raise ValueError("write up to 100 letters, digits and . _ - such as orders")
    return text


def database_address(address: str) -> str:
    """Return the address of a database. Raises ValueError."""
    if address and "://" not in address:
        raise ValueError(f"write sqlite:///{address} for the SQLite file of that name")
    return address


def redis_address(address: str) -> str:
    """Return the address of a Redis. Raises ValueError."""
    if address and "://" not in address:
        raise ValueError("write redis://host:6379, or rediss://host:6379 with TLS")
    return address


def origins(text: str) -> str:
    """Return the origins of web pages, with commas between. Raises ValueError."""
    found = [origin.strip() for origin in text.split(",") if origin.strip()]
    for origin in found:
        if origin != "*" and not re.fullmatch(
            r"https?://[A-Za-z0-9.-]+(?::\d{1,5})?|https?://\[[0-9a-f:]+\](?::\d{1,5})?", origin
        ):
            raise ValueError(f"{origin!r} is no origin: write scheme and host, such as https://shop.example, or *")
    return ",".join(found)


def networks(text: str) -> str:
    """Return addresses and networks, with commas between. Raises ValueError."""
    found = [each.strip() for each in text.split(",") if each.strip()]
    for each in found:
        try:
            ipaddress.ip_network(each)
        except ValueError:
            raise ValueError(
                f"{each!r} is neither an address nor a network: write 10.0.0.7, or 10.0.0.0/24"
            ) from None
    return ",".join(found)


class Rate(NamedTuple):
    """So many requests in so many seconds."""

    requests: int
    seconds: int


def rate(text: str) -> str:
    """Return a rate such as 600/minute. Raises ValueError."""
    if text:
        read_rate(text)
    return text


def read_rate(text: str) -> Rate:
    """Return what a rate means: 600/minute, 10 per 5 seconds. Raises ValueError."""
    from limits import parse_many

    try:
        (item,) = parse_many(text)
    except ValueError:
        item = None
    if item is None or item.amount < 1:
        raise ValueError("write a number and a span, such as 600/minute, 50/second or 1000 per 5 minutes")
    return Rate(item.amount, item.get_expiry())


def linked_port(value: object) -> object:
    """Return the port of a service link, as in tcp://10.0.0.1:5672, and anything else as it is.

    Kubernetes sets RABBITMQ_PORT to one in every container beside a service of the name `rabbitmq`. It sets no
    other setting: PORT would need a service without a name.
    """
    link = re.fullmatch(r"tcp://[^/]+:(\d{1,5})", value) if isinstance(value, str) else None
    return link[1] if link else value


def key_prefix(prefix: str) -> str:
    """Return what the names of keys may begin with. Raises ValueError."""
    # Nothing that a pattern of SCAN, a script or a cluster reads something into.
    if len(prefix) > REDIS_PREFIX_CHARACTERS_MAX or not re.fullmatch("[A-Za-z0-9._:/-]*", prefix):
        raise ValueError(
            f"write up to {REDIS_PREFIX_CHARACTERS_MAX} letters, digits and . _ - / : such as shop: (it is put "
            "before the names of keys as it is)"
        )
    if found := [name for name in _OPEN_KEYS if name in prefix]:
        raise ValueError(f"write one without {found[0]} in it, such as shop: (names of keys begin with that)")
    return prefix
