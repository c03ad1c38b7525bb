"""Whose word counts on where a request comes from: the addresses of proxies that are trusted."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from functools import lru_cache

from expediter.web.http import Header

#: Bytes of `X-Forwarded-For` that are read; a longer one names nobody.
FORWARDED_BYTES_MAX = 1024
#: Addresses whose place, and values of `X-Forwarded-For` whose client, a process remembers.
ADDRESSES_REMEMBERED_MAX = 4096

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_FOR, _PROTO = b"x-forwarded-for", b"x-forwarded-proto"
#: A host of IPv6 has a network of this size to itself, and takes any address in it.
_HOST_BITS = 64


class Proxies:
    """The proxies whose `X-Forwarded-For` and `X-Forwarded-Proto` are believed."""

    def __init__(self, trusted: Sequence[str] = ()) -> None:
        """Trust these addresses and networks. Raises ValueError for what is neither."""
        self._networks = tuple(ipaddress.ip_network(each) for each in trusted)
        self._client = lru_cache(ADDRESSES_REMEMBERED_MAX)(self._find_client)

    def trusts(self, peer: str) -> bool:
        """Tell whether what this peer says about others is believed."""
        return bool(self._networks) and self._is_trusted(_read(peer))

    def client_of(self, peer: str, headers: Sequence[Header]) -> str:
        """Return who has asked a trusted `peer`: the rightmost hop that is not trusted itself.

        Where the headers name nobody, or the walk from the right meets what is no address, it is the peer.
        """
        value = b",".join([value for name, value in headers if name == _FOR])
        if not value or len(value) > FORWARDED_BYTES_MAX:
            return peer
        return self._client(value) or peer

    def _find_client(self, value: bytes) -> str:
        hop: _Address | None = None
        for text in reversed(value.decode("latin-1").split(",")):
            hop = _read(_without_port(text.strip()))
            if hop is None:
                return ""
            if not self._is_trusted(hop):
                break
        return str(hop)

    def _is_trusted(self, address: _Address | None) -> bool:
        return address is not None and any(address in network for network in self._networks)


def came_by_https(headers: Sequence[Header]) -> bool:
    """Tell whether a trusted proxy was asked by https: the last one says so, in its last word."""
    said = [value for name, value in headers if name == _PROTO]
    return bool(said) and said[-1].rpartition(b",")[2].strip().lower() == b"https"


@lru_cache(ADDRESSES_REMEMBERED_MAX)
def place_of(address: str) -> str:
    """Return what counts as one client: an address of IPv4, or the /64 around one of IPv6."""
    if ":" not in address:
        return address
    read = _read(address)
    if not isinstance(read, ipaddress.IPv6Address):
        return address if read is None else str(read)
    return f"{ipaddress.IPv6Address(int(read) >> _HOST_BITS << _HOST_BITS)}/{128 - _HOST_BITS}"


def plain(address: str) -> str:
    """Return the address of IPv4 that a socket of both families has mapped, and any other as it is."""
    return address.removeprefix("::ffff:") if "." in address else address


def _read(text: str) -> _Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _without_port(text: str) -> str:
    """Some proxies name the port, too: 192.0.2.1:80, or [2001:db8::1]:80."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text
