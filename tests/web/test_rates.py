"""How often somebody may come: rates, over one process and several, and guesses of the admin password."""

from __future__ import annotations

import re
import time
import tracemalloc
from pathlib import Path

import httpx2

from expediter.backends.tallies import COUNTED_MAX, Tally, window_of
from expediter.web.limits import WRONG_SECRETS_MAX, WRONG_SECRETS_SECONDS
from servers import DurableRedisServer, RedisServer
from serving import ADMIN_PASSWORD, Serving

#: A day, so that no window ends in the middle of a test: each name's begins at a moment of its own.
DAILY = "5/day"


def client(url: str, address: str = "127.0.0.1") -> httpx2.Client:
    """Return a client that comes from one of this machine's addresses."""
    return httpx2.Client(base_url=url, transport=httpx2.HTTPTransport(local_address=address), timeout=60)


def statuses(service: httpx2.Client, path: str, times: int) -> list[int]:
    return [service.get(path).status_code for _ in range(times)]


def test_an_address_has_its_rate_and_others_have_theirs(folder: Path) -> None:
    """Beyond it comes a 429 that says when to come again; each answer before says what is left."""
    with (
        Serving(folder, "--no-workers", RATE_LIMIT=DAILY) as service,
        client(service.url, "127.0.0.2") as one,
        client(service.url, "127.0.0.3") as other,
    ):
        first = one.get("/orders")
        assert first.headers["ratelimit-policy"] == '"default";q=5;w=86400'
        assert re.fullmatch(r'"default";r=4;t=\d+', first.headers["ratelimit"])
        assert statuses(one, "/orders/nobody", 4) == [404] * 4
        refused = one.get("/orders", headers={"X-Request-ID": "mine"})
        assert (refused.status_code, refused.headers["x-request-id"]) == (429, "mine")
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.json()["title"] == "Too many requests"
        assert 1 <= int(refused.headers["retry-after"]) <= 86400
        assert f";r=0;t={refused.headers['retry-after']}" in refused.headers["ratelimit"]
        assert other.get("/orders").status_code == 200
        for path in ("/health", "/healthz", "/readyz"):
            assert (answer := one.get(path)).status_code == 200
            assert "ratelimit" not in answer.headers


def test_a_client_behind_a_trusted_proxy_has_a_rate_of_its_own(folder: Path) -> None:
    """It is counted by the address that the proxy names, IPv6 by the /64; what is no address is the proxy."""
    with Serving(folder, "--no-workers", RATE_LIMIT=DAILY, TRUSTED_PROXIES="127.0.0.0/8") as service:

        def ask(address: str) -> int:
            return service.client.get("/orders", headers={"X-Forwarded-For": address}).status_code

        assert [ask(f"2001:db8::{number}") for number in range(6)] == [200] * 5 + [429]
        assert [ask(word) for word in ("203.0.113.1", "2001:db8:0:1::1")] == [200, 200]
        assert [ask(f"garbage {number}") for number in range(6)] == [200] * 5 + [429]


def test_a_window_ends(folder: Path) -> None:
    """After the seconds of `Retry-After` the address is served again."""
    with Serving(folder, "--no-workers", RATE_LIMIT="3/second") as service:
        refused = next(
            answer for _ in range(10_000) if (answer := service.client.get("/orders")).status_code == 429
        )
        assert refused.headers["retry-after"] == "1"
        deadline = time.monotonic() + 30
        while service.client.get("/orders").status_code == 429:
            assert time.monotonic() < deadline


def test_processes_count_together_in_redis(folder: Path, redis_server: RedisServer) -> None:
    """Whoever goes from one process to the other has one rate."""
    redis = redis_server.new_database()
    (folder / "other").mkdir()
    settings = {"RATE_LIMIT": DAILY, "REDIS_URL": redis, "DATABASE_URL": f"sqlite:///{folder}/shared.db"}
    with Serving(folder, "--no-workers", **settings) as one, Serving(folder, "--no-workers", **settings) as two:
        assert statuses(one.client, "/orders", 3) + statuses(two.client, "/orders", 3) == [200] * 5 + [429]
        assert statuses(one.client, "/orders", 1) == [429]


def test_without_redis_each_process_counts_on_alone(folder: Path, mortal_redis: DurableRedisServer) -> None:
    """When Redis goes the rate holds on in this process, no answer waits long, and the log says so once."""
    redis = mortal_redis.new_database()
    with Serving(folder, "--no-workers", RATE_LIMIT="40/day", REDIS_URL=redis) as service:
        assert statuses(service.client, "/orders", 10) == [200] * 10
        mortal_redis.kill()
        try:
            assert statuses(service.client, "/orders", 31) == [200] * 30 + [429]
        finally:
            mortal_redis.restart()
        assert len([line for line in service.log if "counted in each process alone" in line]) == 1


def test_any_number_of_addresses_takes_bounded_memory() -> None:
    """A process counts so many at once and forgets those that have been away longest."""
    tally = Tally()
    tracemalloc.start()
    for number in range(COUNTED_MAX + 10):
        tally.add(f"2001:db8:{number:x}::/64", 1)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(tally) == COUNTED_MAX
    assert used < 25_000_000
    assert tally.count("2001:db8:0::/64", 1) == 0
    assert tally.add(f"2001:db8:{COUNTED_MAX + 9:x}::/64", 1) == 2


def test_windows_begin_at_a_moment_of_each_name() -> None:
    """Not all who wait come back together, and a window is as long as it says."""
    left = {window_of(f"192.0.2.{number}", 60, 1_000_000.0).seconds_left for number in range(100)}
    assert len(left) > 20
    assert max(left) <= 60
    window = window_of("192.0.2.1", 60, 1_000_000.0)
    assert window_of("192.0.2.1", 60, 1_000_000.0 + window.seconds_left).number == window.number + 1


def guess(service: httpx2.Client, password: str) -> httpx2.Response:
    return service.post("/admin/verify", headers={"X-Admin-Password": password})


def test_guessing_slows_the_guesser_alone(folder: Path) -> None:
    """After some wrong passwords whatever comes from there is 429, the right one too; elsewhere it opens."""
    addresses = (f"127.0.0.{number}" for number in range(2, 250))
    at_leisure = (
        each for each in addresses if window_of(each, WRONG_SECRETS_SECONDS, time.time()).seconds_left > 40
    )
    with (
        Serving(folder, "--no-workers", ADMIN_PASSWORD=ADMIN_PASSWORD) as service,
        client(service.url, next(at_leisure)) as guesser,
        client(service.url, next(at_leisure)) as other,
    ):
        assert guesser.post("/admin/verify").status_code == 401  # it asks, and does not guess
        found = [guess(guesser, f"guess {number}").status_code for number in range(WRONG_SECRETS_MAX + 5)]
        wrong = found.count(401)
        assert found == [401] * wrong + [429] * (len(found) - wrong)
        assert wrong == WRONG_SECRETS_MAX
        refused = guess(guesser, ADMIN_PASSWORD)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.headers["cache-control"] == "no-store"
        assert guesser.get("/orders").status_code == 200
        assert (opened := guess(other, ADMIN_PASSWORD)).status_code == 200
        assert opened.headers["cache-control"] == "no-store"
