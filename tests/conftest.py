"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from servers import DurableRedisServer, MariadbServer, PostgresServer, RabbitServer, RedisServer, Server
from serving import ADMIN_PASSWORD, Serving
from storing import Place

# By default a logged error is drawn with every local variable: a second of work for each, on a busy machine.
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
)


#: The modules that take longest, the longest first: begun late, each would be waited for alone.
LONGEST = (
    "test_all_in_turn",
    "test_faults",
    "test_real_orders",
    "test_restart",
    "test_queued_fallback",
    "test_cli_orders",
    "test_queued_sweep",
    "test_two_doors",
    "test_walk",
    "test_queued_changes",
    "test_processes_up",
    "test_cli",
    "test_simulation",
    "test_databases",
    "test_crash",
    "test_connections",
    "test_queued_delivery",
    "test_drain",
    "test_doctor",
    "test_operations",
    "test_processes",
    "test_brokers",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest; each process gets whole modules in this order."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One running service for the tests of a module, with a gateway that always succeeds at once."""
    with Serving(tmp_path_factory.mktemp("service"), ADMIN_PASSWORD=ADMIN_PASSWORD) as running:
        yield running


@pytest.fixture(scope="module")
def idle_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A service without workers: orders stay where its callers leave them. It believes X-Forwarded-For."""
    settings = {"ADMIN_PASSWORD": ADMIN_PASSWORD, "TRUSTED_PROXIES": "127.0.0.1"}
    with Serving(tmp_path_factory.mktemp("idle"), "--no-workers", **settings) as running:
        yield running


@pytest.fixture(scope="module")
def payment_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A service whose orders end when they are paid."""
    with Serving(tmp_path_factory.mktemp("payment"), STAGES="payment") as running:
        yield running


@pytest.fixture(scope="module")
def fulfilment_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A service that never charges, and takes two hundredths of a second to fulfil."""
    slow = {"FULFILMENT_MOCK_LATENCY_MIN": "20", "FULFILMENT_MOCK_LATENCY_MAX": "20"}
    with Serving(tmp_path_factory.mktemp("fulfilment"), STAGES="fulfilment", **slow) as running:
        yield running


@pytest.fixture(scope="module")
def failing_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A service of the payment road whose gateway takes no charge, and whose breaker stays closed."""
    settings = {"PAYMENT_MOCK_SUCCESS_RATE": "0", "CIRCUIT_BREAKER_FAILURE_THRESHOLD": "1000000"}
    with Serving(tmp_path_factory.mktemp("failing"), STAGES="payment", **settings) as running:
        yield running


@pytest.fixture(scope="module")
def cut_off_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A service of the payment road whose gateway takes no charge, and whose breaker opens after 5 failures."""
    settings = {"PAYMENT_MOCK_SUCCESS_RATE": "0", "CIRCUIT_BREAKER_FAILURE_THRESHOLD": "5"}
    with Serving(tmp_path_factory.mktemp("cut_off"), STAGES="payment", **settings) as running:
        yield running


@pytest.fixture(scope="module")
def slow_gateway_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A service whose gateway takes ten seconds to answer: a charge stays under way for a whole test."""
    settings = {"PAYMENT_MOCK_LATENCY_MIN": "10000", "PAYMENT_MOCK_LATENCY_MAX": "10000"}
    with Serving(tmp_path_factory.mktemp("slow"), **settings) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for a service of the test's own."""
    return tmp_path


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A PostgreSQL server of the session's own."""
    server = PostgresServer(tmp_path_factory.mktemp("postgresql"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A MariaDB server of the session's own."""
    server = MariadbServer(tmp_path_factory.mktemp("mariadb"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis of the session's own, which no test stops."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A RabbitMQ of the session's own, which no test stops."""
    server = RabbitServer(tmp_path_factory.mktemp("rabbitmq"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def mortal_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DurableRedisServer]:
    """A Redis that keeps what it confirms, and that tests may kill, if they start it again."""
    server = DurableRedisServer(tmp_path_factory.mktemp("mortal_redis"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def mortal_rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A RabbitMQ that tests may kill, if they start it again."""
    server = RabbitServer(tmp_path_factory.mktemp("mortal_rabbitmq"))
    yield server
    server.kill()


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def bare(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A database of each kind in turn that has no table yet."""
    if request.param == "sqlite":
        return Place(f"sqlite:///{tmp_path}/orders.db")
    server: Server = request.getfixturevalue(request.param)
    return Place(server.new_database(), server)


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def at(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A database of each kind in turn, at the newest step, without any order; on SQLite it is made when used."""
    if request.param == "sqlite":
        return Place(f"sqlite:///{tmp_path}/orders.db")
    server: Server = request.getfixturevalue(request.param)
    return Place(server.made_database(), server)
