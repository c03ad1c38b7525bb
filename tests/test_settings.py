"""What some settings may be, and what is made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from expediter.errors import ConfigurationError
from expediter.settings import Settings, effective, in_users_words, load_settings, unknown_names
from expediter.settings.written import REDIS_PREFIX_CHARACTERS_MAX


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
    with pytest.raises(ConfigurationError, match=f"^{name}=.* cannot be used: "):
        load_settings()


LONGEST = "x" * REDIS_PREFIX_CHARACTERS_MAX


@pytest.mark.parametrize(
    ("name", "given", "instead"),
    [
        ("RATE_LIMIT", "often", "write a number and a span, such as 600/minute"),
        ("RATE_LIMIT", "10", "write a number and a span"),
        ("RATE_LIMIT", "0/minute", "write a number and a span"),
        ("RATE_LIMIT", "5/second;100/minute", "write a number and a span"),
        ("TRUSTED_PROXIES", "10.0.0.1,proxy", "'proxy' is neither an address nor a network: write 10.0.0.7"),
        ("TRUSTED_PROXIES", "10.0.0.1/8", "'10.0.0.1/8' is neither an address nor a network"),
    ],
)
def test_a_limit_that_cannot_be_read_says_how_it_is_written(
    name: str, given: str, instead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start ends with the name, the value, and an example."""
    monkeypatch.setenv(name, given)
    with pytest.raises(ConfigurationError, match=f"^{name}={given} cannot be used: {instead}"):
        load_settings()


@pytest.mark.parametrize(
    ("written", "rate"), [("600/minute", (600, 60)), ("10 per 5 seconds", (10, 5)), ("1/day", (1, 86_400))]
)
def test_a_rate_is_so_many_requests_in_so_many_seconds(
    written: str, rate: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written as the `limits` library reads it; without it there is none."""
    assert load_settings().rate is None
    monkeypatch.setenv("RATE_LIMIT", written)
    assert load_settings().rate == rate


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
        ConfigurationError,
        match=r"(?s)^REDIS_PREFIX=.* cannot be used: write up to 64 letters, digits .* such as shop:",
    ):
        load_settings()


@pytest.mark.parametrize(
    "name", ["orders:detail:", "orders:list:", "temp_order:", "temp_changes:", "idempotency:"]
)
def test_a_prefix_that_is_also_a_name_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys under it could have the names of another installation's keys, whose names end in whatever there is."""
    monkeypatch.setenv("REDIS_PREFIX", f"shop:{name}")
    with pytest.raises(
        ConfigurationError, match=f"^REDIS_PREFIX=.* cannot be used: write one without {name} in it"
    ):
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


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("LOG_LEVEL", "loud", "LOG_LEVEL=loud cannot be used: write one of DEBUG, INFO, WARNING, ERROR"),
        ("STAGES", "shipping", "STAGES=shipping cannot be used: write payment,fulfilment, payment or fulfilment"),
        ("PORT", "http", "PORT=http cannot be used: write a whole number from 0 to 65535"),
        ("WORKER_COUNT", "0", "WORKER_COUNT=0 cannot be used: write a whole number from 1 to 256"),
        ("LEASE_SECONDS", "0.1", "LEASE_SECONDS=0.1 cannot be used: write a number from 1 to 3600"),
        ("ORDERS_CACHE_TTL", "0", "ORDERS_CACHE_TTL=0 cannot be used: write a number above 0"),
        ("CACHE_DISABLED", "maybe", "CACHE_DISABLED=maybe cannot be used: write true or false"),
        ("DEFAULT_CURRENCY", "euro", "DEFAULT_CURRENCY=euro cannot be used: write an ISO 4217 code such as USD"),
        (
            "COMPAT",
            "flask",
            "COMPAT=flask cannot be used: write one of cached, queued, processor, delivery, streams",
        ),
        (
            "DATABASE_URL",
            "a.db",
            "DATABASE_URL cannot be used: write sqlite:///a.db for the SQLite file of that name",
        ),
        ("REDIS_URL", "h:1", "REDIS_URL cannot be used: write redis://host:6379, or rediss://host:6379 with TLS"),
        ("PAYMENT_MOCK_LATENCY_MIN", "999", "PAYMENT_MOCK_LATENCY_MIN is above PAYMENT_MOCK_LATENCY_MAX"),
    ],
)
def test_what_cannot_be_used_says_what_to_write(
    name: str, given: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting, its value unless that may hold a password, and what it may be; no word of the library's."""
    monkeypatch.setenv(name, given)
    with pytest.raises(ConfigurationError) as refused:
        load_settings()
    assert str(refused.value) == said


def test_every_setting_says_what_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused anywhere is refused in plain words."""
    for name in Settings.model_fields:
        monkeypatch.setenv(name.upper(), "\x01~")
        said = name.upper()
        try:
            load_settings()
        except ConfigurationError as error:
            said = str(error)
        assert said.startswith(name.upper())
        assert not [word for word in ("Value error", "Input should", "pattern", "_error") if word in said], said
        monkeypatch.delenv(name.upper())


@pytest.mark.parametrize(
    ("name", "given", "read"),
    [
        ("STAGES", "Payment, Fulfillment", "payment,fulfilment"),
        ("STAGES", "fulfillment", "fulfilment"),
        ("LOG_LEVEL", "debug", "DEBUG"),
        ("LOG_FORMAT", "JSON", "json"),
        ("DEFAULT_CURRENCY", "eur", "EUR"),
        ("INTAKE", "Direct", "direct"),
    ],
)
def test_words_are_taken_as_people_write_them(
    name: str, given: str, read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any case, with blanks, and as Americans spell them."""
    monkeypatch.setenv(name, given)
    assert str(getattr(load_settings(), name.lower())) == read


def test_every_setting_is_shown_as_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value and where it comes from; of secrets, and of passwords in addresses, stars."""
    (tmp_path / "shop.env").write_text("DATABASE_URL=postgresql://u:hush@h/d\nADMIN_PASSWORD=hush\nPORT=1\n")
    (tmp_path / "password").write_text("hush")
    monkeypatch.setenv("EXPEDITER_ENV_FILE", "shop.env")
    monkeypatch.setenv("PORT", "2")
    monkeypatch.setenv("COMPAT", "streams")
    monkeypatch.setenv("RABBITMQ_PASSWORD_FILE", str(tmp_path / "password"))
    monkeypatch.setenv("CIRCUIT_BREAKER_RECOVERY_TIMEOUT", "7")
    shown = {each.name: (each.value, each.source) for each in effective(load_settings())}
    assert shown.keys() == {name.upper() for name in Settings.model_fields}
    assert shown["DATABASE_URL"] == ("postgresql://u:********@h/d", "shop.env")
    assert shown["ADMIN_PASSWORD"] == ("********", "shop.env")
    assert shown["RABBITMQ_PASSWORD"] == ("********", "RABBITMQ_PASSWORD_FILE")
    assert shown["PORT"] == ("2", "environment")
    assert shown["STAGES"] == ("fulfilment", "COMPAT=streams")
    assert shown["CIRCUIT_BREAKER_RECOVERY_SECONDS"] == ("7", "CIRCUIT_BREAKER_RECOVERY_TIMEOUT")
    assert shown["LEASE_SECONDS"] == ("30", "default")
    assert "hush" not in str(shown)


def test_a_named_file_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only .env may be missing."""
    monkeypatch.setenv("EXPEDITER_ENV_FILE", "none.env")
    with pytest.raises(ConfigurationError, match=r"none\.env cannot be read: there is no such file"):
        load_settings()


def test_a_message_names_what_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever set DB_PATH is not sent to look for DATABASE_URL."""
    said = "create it, or change DATABASE_URL"
    monkeypatch.setenv("DB_PATH", "a.db")
    assert in_users_words(said, load_settings()) == "create it, or change DB_PATH"
    monkeypatch.delenv("DB_PATH")
    assert in_users_words(said, load_settings()) == said


def test_a_misspelt_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nothing reads is said, with what may be meant; what is read is not."""
    read = "ADMIN_PASSWORD_FILE=x\nOTEL_SERVICE_NAME=x\nPORT=1\nCIRCUIT_BREAKER_RECOVERY_TIMEOUT=1\n"
    (tmp_path / ".env").write_text(f"WORKER_CONUT=4\n{read}XYZ=1\n")
    monkeypatch.setenv("API_THREADS", "4")
    foreign, misspelt, unknown = unknown_names()
    assert foreign.startswith("API_THREADS is not read here")
    assert misspelt == "WORKER_CONUT in .env is no setting: is WORKER_COUNT meant?"
    assert unknown == "XYZ in .env is no setting"
