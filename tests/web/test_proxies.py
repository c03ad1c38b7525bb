"""Behind a proxy: whose word counts on where a request comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from auditing import wait_until
from expediter.web.server.addresses import FORWARDED_BYTES_MAX, Proxies, place_of
from serving import Serving
from wire import exchange, request

NEAR, FAR, CLIENT = "10.0.0.1", "10.0.0.2", "203.0.113.9"
PROXIES = Proxies([f"{NEAR}/32", "10.0.0.0/24", "2001:db8:1::/48"])


def client(*values: str) -> str:
    return PROXIES.client_of(NEAR, [(b"x-forwarded-for", value.encode()) for value in values])


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([CLIENT], CLIENT),
        ([f"198.51.100.1, {CLIENT}, {FAR}"], CLIENT),  # what stands before the rightmost stranger is its own word
        (["198.51.100.1", f"{CLIENT} ,{FAR}"], CLIENT),  # several headers are one
        ([f"{CLIENT}:4711"], CLIENT),
        (["[2001:db8:2::9]:4711"], "2001:db8:2::9"),
        ([f"::ffff:{CLIENT}"], CLIENT),
        ([f"{FAR}, {NEAR}"], FAR),  # all of them are proxies: the first is the client
        ([], NEAR),
        ([""], NEAR),
        (["unknown"], NEAR),
        ([f"{CLIENT}, unknown"], NEAR),
        ([f"{CLIENT}, "], NEAR),
        ([f"{CLIENT}, 999.1.1.1"], NEAR),
        (["x" * FORWARDED_BYTES_MAX + f",{CLIENT}"], NEAR),
        (["\xff\x00"], NEAR),
    ],
)
def test_the_client_is_the_rightmost_hop_that_is_no_proxy(values: list[str], found: str) -> None:
    """The walk begins at the right and passes over trusted proxies; garbage on the way means the peer itself."""
    assert client(*values) == found


def test_only_named_peers_are_trusted() -> None:
    """An address counts by itself, by its network, and as IPv4 in IPv6; without the setting nobody is trusted."""
    assert all(PROXIES.trusts(peer) for peer in (NEAR, "10.0.0.77", "::ffff:10.0.0.1", "2001:db8:1:2::3"))
    assert not any(PROXIES.trusts(peer) for peer in ("10.0.1.1", CLIENT, "", "2001:db8:2::1", "unknown"))
    assert not Proxies().trusts(NEAR)


def test_a_host_of_ipv6_is_one_place() -> None:
    """Its 2^64 addresses count as one client; each address of IPv4 is its own."""
    assert place_of("2001:db8:1:2:3::4") == place_of("2001:db8:1:2::9") != place_of("2001:db8:1:3::4")
    assert place_of(CLIENT) == place_of(f"::ffff:{CLIENT}") == CLIENT


@pytest.mark.parametrize(("trusted", "logged"), [("127.0.0.1", CLIENT), ("192.0.2.0/24", "127.0.0.1")])
def test_the_access_log_has_the_client_that_a_trusted_proxy_names(folder: Path, trusted: str, logged: str) -> None:
    """A trusted peer's word is logged, a stranger's is not; the place of a new order holds whatever the scheme."""
    log = folder / "access.log"
    with Serving(folder, "--no-workers", TRUSTED_PROXIES=trusted, ACCESS_LOG_FILE=str(log)) as service:
        said = {"x_forwarded_for": CLIENT, "x_forwarded_proto": "https", "content_type": "application/json"}
        placed = exchange(
            service.url, request("POST", "/orders", b'{"user_id": 1, "order_id": "A", "item_ids": [1]}', **said)
        )
        assert (placed.status, placed.headers["location"]) == (201, "/orders/A")
        wait_until(lambda: "POST /orders" in log.read_text())
    (line,) = [line for line in log.read_text().splitlines() if "POST /orders" in line]
    assert line.split()[0] == logged
