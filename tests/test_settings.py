"""What some settings may be, and what is made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from expediter.errors import ConfigurationError
from expediter.settings import REDIS_PREFIX_CHARACTERS_MAX, load_settings, unknown_names


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


def test_settings_by_the_names_of_other_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the replaced services call in another way is understood; its own name wins."""
    (tmp_path / ".env").write_text(
        "CIRCUIT_BREAKER_RECOVERY_TIMEOUT=7\nREDIS_HOST=cache\nDB_USER=shop\nDB_NAME=orders\n"
    )
    read = load_settings()
    assert read.circuit_breaker_recovery_seconds == 7
    assert read.redis == "redis://cache:6379"
    assert read.database == "mysql://shop:@localhost/orders"
    monkeypatch.setenv("REDIS_PORT", "tcp://10.0.0.1:6380")
    monkeypatch.setenv("CIRCUIT_BREAKER_RECOVERY_SECONDS", "8")
    assert (load_settings().redis, load_settings().circuit_breaker_recovery_seconds) == ("redis://cache:6380", 8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"DATABASE_URL": "sqlite:///a.db", "DB_HOST": "db"}, "DATABASE_URL and DB_HOST both say"),
        ({"DATABASE_URL": "sqlite:///a.db", "DB_USER": "shop"}, "DATABASE_URL and DB_USER both say"),
        ({"DATABASE_URL": "postgresql://h/d", "DB_PATH": "a.db"}, "DATABASE_URL and DB_PATH both say"),
        ({"REDIS_URL": "redis://a", "REDIS_HOST": "b"}, "REDIS_URL and REDIS_HOST both say"),
        ({"CORS_ORIGINS": "shop.example"}, "'shop.example' is no origin"),
        ({"CORS_ORIGINS": "https://shop.example/"}, "is no origin"),
    ],
)
def test_what_contradicts_is_refused(given: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to guess which of two addresses counts."""
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=said):
        load_settings()


@pytest.mark.parametrize(
    ("given", "origins"),
    [
        ("", []),
        ("*", ["*"]),
        (" https://a.example , http://[::1]:3000", ["https://a.example", "http://[::1]:3000"]),
    ],
)
def test_origins_are_a_list(given: str, origins: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blanks around them do not count."""
    monkeypatch.setenv("CORS_ORIGINS", given)
    assert load_settings().origins == origins


def test_a_misspelt_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nothing reads is said, with what may be meant; what is read is not."""
    read = "ADMIN_PASSWORD_FILE=x\nOTEL_SERVICE_NAME=x\nPORT=1\nCIRCUIT_BREAKER_RECOVERY_TIMEOUT=1\n"
    (tmp_path / ".env").write_text(f"WORKER_CONUT=4\n{read}XYZ=1\n")
    monkeypatch.setenv("API_THREADS", "4")
    foreign, misspelt, unknown = unknown_names()
    assert foreign.startswith("API_THREADS is not read here")
    assert misspelt == "WORKER_CONUT in .env is no setting: is WORKER_COUNT meant?"
    assert unknown == "XYZ in .env is no setting"
