"""What some settings may be, and what is made of them."""

from __future__ import annotations

import pytest

from expediter.errors import ConfigurationError
from expediter.settings import REDIS_PREFIX_CHARACTERS_MAX, load_settings


@pytest.fixture(autouse=True)
def _nothing_else(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    monkeypatch.setenv("RABBITMQ_HOST", "rabbitmq")


@pytest.mark.parametrize(
    ("given", "port"),
    [("5673", 5673), ("tcp://10.0.0.1:5673", 5673), ("tcp://[fd00::1]:5673", 5673), ("tcp://rabbitmq:1", 1)],
)
def test_the_port_of_a_service_link_is_taken(given: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes sets RABBITMQ_PORT to an address: its port counts, the host is that of RABBITMQ_HOST."""
    monkeypatch.setenv("RABBITMQ_PORT", given)
    assert load_settings().broker == f"amqp://guest:guest@rabbitmq:{port}/"


def test_a_service_link_alone_makes_no_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where RabbitMQ is not asked for, a service of that name changes nothing."""
    monkeypatch.delenv("RABBITMQ_HOST")
    monkeypatch.setenv("RABBITMQ_PORT", "tcp://10.0.0.1:5672")
    assert load_settings().broker == ""


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("RABBITMQ_PORT", "udp://10.0.0.1:5672"),
        ("RABBITMQ_PORT", "tcp://10.0.0.1"),
        ("RABBITMQ_PORT", "tcp://10.0.0.1:0"),
        ("RABBITMQ_PORT", "tcp://10.0.0.1:65536"),
        ("RABBITMQ_PORT", "tcp://10.0.0.1:5672/path"),
        ("PORT", "tcp://10.0.0.1:8000"),
    ],
)
def test_what_is_no_port_is_refused(name: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address of another kind is a mistake, and so is any for PORT, which no service can set."""
    monkeypatch.setenv(name, given)
    with pytest.raises(ConfigurationError, match=f"^{name}: "):
        load_settings()


LONGEST = "x" * REDIS_PREFIX_CHARACTERS_MAX


@pytest.mark.parametrize("prefix", ["", "shop:", "Shop-1/eu.west_2:", "orders:", "shop:orders:", LONGEST])
def test_a_plain_prefix_is_taken_as_it_is(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is added to REDIS_PREFIX, and nothing taken from it."""
    monkeypatch.setenv("REDIS_PREFIX", prefix)
    assert load_settings().redis_prefix == prefix


@pytest.mark.parametrize(
    "prefix",
    ["a*", "a?", "[a]", "a]", "{a}", "a}", "a\\", "a b", "a\n", "a\tb", "a'", "caf\u00e9:", LONGEST + "x"],
)
def test_a_prefix_with_a_meaning_of_its_own_is_refused(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pattern or a script reads something into is refused, and a long one; it is said what to write."""
    monkeypatch.setenv("REDIS_PREFIX", prefix)
    with pytest.raises(
        ConfigurationError, match=r"^REDIS_PREFIX: .*write up to 64 letters, digits .* such as shop:"
    ):
        load_settings()


@pytest.mark.parametrize(
    "name", ["orders:detail:", "orders:list:", "temp_order:", "temp_changes:", "idempotency:"]
)
def test_a_prefix_that_is_also_a_name_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys under it could have the names of another installation's keys, whose names end in whatever there is."""
    monkeypatch.setenv("REDIS_PREFIX", f"shop:{name}")
    with pytest.raises(ConfigurationError, match=f"^REDIS_PREFIX: .*write one without {name} in it"):
        load_settings()
