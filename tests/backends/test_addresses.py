"""Where webhooks may go: never into the network that this runs in, however an address is written."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expediter.backends.addresses import destination, is_public, may_lead_to

V4 = st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address)
V6 = st.integers(0, 2**128 - 1).map(ipaddress.IPv6Address)
#: Addresses of networks that are known for something else than the internet at large.
SPECIAL = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/4", "240.0.0.0/4", "255.255.255.255/32", "::/128", "::1/128", "::/96", "::ffff:0:0/96",
    "64:ff9b:1::/48", "100::/64", "2001::/32", "2001:2::/48", "2001:20::/28", "2001:db8::/32", "2002::/16",
    "3fff::/20", "5f00::/16", "fc00::/7", "fd00:ec2::/32", "fe80::/10", "fec0::/10", "ff00::/8",
]  # fmt: skip
PRIVATE_4 = [network for network in map(ipaddress.ip_network, SPECIAL) if network.version == 4]


def within(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> st.SearchStrategy[str]:
    first, last = int(network.network_address), int(network.broadcast_address)
    kind = ipaddress.IPv4Address if network.version == 4 else ipaddress.IPv6Address
    return st.integers(first, last).map(lambda number: str(kind(number)))


def test_no_end_of_a_special_network_is_public() -> None:
    """Neither its first address nor its last."""
    networks = list(map(ipaddress.ip_network, SPECIAL))
    ends = [str(end) for network in networks for end in (network.network_address, network.broadcast_address)]
    assert [end for end in ends if may_lead_to(end, local=False)] == []


@given(st.sampled_from(SPECIAL).map(ipaddress.ip_network).flatmap(within))
def test_no_address_of_a_special_network_is_public(address: str) -> None:
    """Nor any in between."""
    assert not may_lead_to(address, local=False)


@given(V4 | V6)
def test_what_python_calls_not_global_is_not_public(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    """The table refuses whatever the standard library does, and more; multicast, too."""
    if not address.is_global or address.is_multicast or address.is_reserved:
        assert address in ipaddress.ip_network("64:ff9b::/96") or not is_public(address)


@given(st.sampled_from(PRIVATE_4).flatmap(within).map(ipaddress.IPv4Address))
def test_no_private_address_comes_in_another_one(inner: ipaddress.IPv4Address) -> None:
    """As an IPv4 address in one of IPv6: mapped, compatible, 6to4, NAT64 and Teredo."""
    number = int(inner)
    hidden = [
        ipaddress.IPv6Address(0xFFFF << 32 | number),
        ipaddress.IPv6Address(number),
        ipaddress.IPv6Address(0x2002 << 112 | number << 80),
        ipaddress.IPv6Address(int(ipaddress.IPv6Address("64:ff9b::")) | number),
        ipaddress.IPv6Address(0x20010000 << 96 | number << 64),
        ipaddress.IPv6Address(0x20010000 << 96 | (number ^ 0xFFFFFFFF)),
    ]
    assert [str(each) for each in hidden if is_public(each)] == []


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "64:ff9b::101:101"])
def test_the_internet_can_be_reached(address: str) -> None:
    """What is everybody's is let through, also from a network that reaches IPv4 through NAT64."""
    assert may_lead_to(address, local=False)
    assert not may_lead_to(address, local=True)


def test_only_this_machine_is_this_machine() -> None:
    """What names this machine leads to it and nowhere else."""
    assert [each for each in ("127.0.0.1", "127.9.9.9", "::1") if not may_lead_to(each, local=True)] == []
    elsewhere = ("10.0.0.1", "1.1.1.1", "0.0.0.0", "::", "::ffff:127.0.0.1", "localhost", "")
    assert [each for each in elsewhere if may_lead_to(each, local=True)] == []


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("http://shop.example/hooks", "must begin with https://"),
        ("ftp://shop.example/", "must begin with https://"),
        ("shop.example/hooks", "must begin with https://"),
        ("https://", "have a host"),
        ("https://shop.example:0/", "have a host"),
        ("https://shop.example:99999/", "no address"),
        ("https://user@shop.example/", "no user"),
        ("https://user:word@shop.example/", "no user"),
        ("https://@shop.example/", "no user"),
        ("https://shop.example/#part", "must have no #"),
        ("https://shop.example/a b", "visible ASCII"),
        ("https://shop.example/\nHost: x", "visible ASCII"),
        ("https://" + "a" * 2048, "up to 2048"),
        ("https://10.0.0.1/", "public internet"),
        ("https://169.254.169.254/latest/meta-data", "public internet"),
        ("https://[::ffff:127.0.0.1]/", "public internet"),
        ("https://[64:ff9b::7f00:1]/", "public internet"),
        ("https://[2002:7f00:1::]/", "public internet"),
        ("https://[fe80::1%25eth0]/", "public internet"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(text: str, word: str) -> None:
    """The sentence says what is wrong with it."""
    with pytest.raises(ValueError, match=word):
        destination(text, allow_http=False)


@pytest.mark.parametrize(
    "text", ["http://localhost:9/", "http://LOCALHOST/", "http://127.0.0.1/x", "https://[::1]:9/"]
)
def test_this_machine_may_be_named(text: str) -> None:
    """By its name or an address of its own, also without TLS."""
    assert destination(text, allow_http=False).local


def test_http_goes_elsewhere_only_where_that_is_allowed() -> None:
    """With WEBHOOK_ALLOW_HTTP; what is private stays refused."""
    assert not destination("http://shop.example/hooks", allow_http=True).local
    with pytest.raises(ValueError, match="public internet"):
        destination("http://192.168.1.1/", allow_http=True)
