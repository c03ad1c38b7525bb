"""Where webhooks may go: an address that somebody else chose must not lead into the network that this runs in."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from yarl import URL

#: Characters of an address.
URL_CHARACTERS_MAX = 2048

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: IPv4 that is not everybody's, by the registry of special addresses (RFC 6890 and its followers). Python's
#: `is_global` is not asked: what it says changes from one version to the next.
NOT_PUBLIC_4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # between carriers and their customers
            "127.0.0.0/8",  # this machine
            "168.63.129.16/32",  # a cloud's own services, at an address that looks public
            "169.254.0.0/16",  # this link; clouds tell machines their secrets there
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocols
            "192.0.2.0/24",  # documents
            "192.31.196.0/24",  # name servers for private addresses
            "192.52.193.0/24",  # multicast tunnels
            "192.88.99.0/24",  # relays of 6to4
            "192.168.0.0/16",  # private
            "192.175.48.0/24",  # name servers for private addresses
            "198.18.0.0/15",  # measurements
            "198.51.100.0/24",  # documents
            "203.0.113.0/24",  # documents
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, and broadcast
        ),
    )
)
#: Of IPv6 only this is given out, and of it these are not everybody's.
GIVEN_OUT_6 = ipaddress.IPv6Network("2000::/3")
NOT_PUBLIC_6 = tuple(
    map(
        ipaddress.IPv6Network,
        (
            "2001::/23",  # protocols, and Teredo, in which an IPv4 address is hidden
            "2001:db8::/32",  # documents
            "2002::/16",  # 6to4, in which an IPv4 address is hidden
            "2620:4f:8000::/48",  # name servers for private addresses
            "3fff::/20",  # documents
        ),
    )
)
#: A network that has only IPv6 reaches all of IPv4 through this; what is behind it is the last four bytes.
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class Destination(NamedTuple):
    """An address that webhooks may be sent to; `local`: it names this machine, and must lead there."""

    url: URL
    local: bool


def may_lead_to(address: str, *, local: bool) -> bool:
    """Return whether a connection may be made to this IP address, for a destination that is `local` or is not."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return found.is_loopback if local else is_public(found)


def is_public(address: Address) -> bool:
    """Return whether an address is one of the internet's at large."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in NOT_PUBLIC_4)
    if address.scope_id is not None:
        return False
    if address in NAT64:
        return is_public(ipaddress.IPv4Address(address.packed[-4:]))
    return address in GIVEN_OUT_6 and not any(address in network for network in NOT_PUBLIC_6)


def destination(text: str, *, allow_http: bool) -> Destination:
    """Return where `text` leads. Raises ValueError with what is wrong with it.

    http goes to this machine only, unless `allow_http`. Where a name leads is seen when it is connected to.
    """
    if len(text) > URL_CHARACTERS_MAX or not text.isascii() or any(sign <= " " or sign == "\x7f" for sign in text):
        raise ValueError(f"must be up to {URL_CHARACTERS_MAX} visible ASCII characters")
    try:
        url = URL(text)
        host, port = url.host, url.port
    except ValueError as error:
        raise ValueError("is no address such as https://shop.example/hooks") from error
    if url.scheme not in ("https", "http") or not host or not port or not url.absolute:
        raise ValueError("must begin with https:// and have a host, such as https://shop.example/hooks")
    if url.user is not None or url.password is not None or "@" in text.partition("://")[2].partition("/")[0]:
        raise ValueError("must have no user and no password in it: the signature tells who sends")
    if url.raw_fragment or "#" in text:
        raise ValueError("must have no #: it is not sent")
    try:
        address: Address | None = ipaddress.ip_address(host)
    except ValueError:
        address = None
    local = host.lower().rstrip(".") == "localhost" or (address is not None and address.is_loopback)
    if url.scheme == "http" and not local and not allow_http:
        raise ValueError("must begin with https://: without WEBHOOK_ALLOW_HTTP, http goes to this machine only")
    if address is not None and not local and not is_public(address):
        raise ValueError("is not an address of the public internet")
    return Destination(url, local)
