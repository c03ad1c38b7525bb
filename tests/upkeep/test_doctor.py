"""What `expediter doctor` says of each part: well, away, wrong, or not as safe as it could be."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from expediter.backends.brokers import Topic, open_broker
from expediter.upkeep.doctor import Finding, examine_broker
from servers import DurableRedisServer, RabbitServer, RedisServer, free_port
from serving import environment

SECRET = "open-sesame"


class Examined:
    """What one run of `doctor --json` said."""

    def __init__(self, folder: Path, **settings: str) -> None:
        ended = subprocess.run(
            [sys.executable, "-m", "expediter", "doctor", "--json"],
            cwd=folder,
            env=environment(folder, **settings),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        self.status = ended.returncode
        self.said = ended.stdout + ended.stderr
        self.findings = [Finding(**each) for each in json.loads(ended.stdout or "[]")]
        assert "Traceback" not in ended.stderr
        assert SECRET not in self.said

    def about(self, what: str) -> list[tuple[str, str]]:
        return [(each.verdict, each.detail) for each in self.findings if each.what == what]

    def failed(self) -> list[str]:
        return [each.what for each in self.findings if each.verdict == "failed"]


@contextmanager
def configured(server: RedisServer, **settings: str) -> Iterator[None]:
    """Run the server with other settings for a while."""
    before = {name: server.query("", f"CONFIG GET {name}")[1] for name in settings}
    try:
        for name, value in settings.items():
            server.query("", f"CONFIG SET {name} {value}")
        yield
    finally:
        for name, value in before.items():
            server.query("", f"CONFIG SET {name} {value}")


@pytest.fixture(scope="module")
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis that keeps nothing on disk, and whose settings these tests change."""
    server = RedisServer(tmp_path_factory.mktemp("own_redis"))
    yield server
    server.stop()


def nobody_there() -> str:
    return f"127.0.0.1:{free_port()}"


def rabbit_settings(rabbitmq: RabbitServer) -> dict[str, str]:
    return {
        "RABBITMQ_HOST": "127.0.0.1",
        "RABBITMQ_PORT": str(rabbitmq.port),
        "RABBITMQ_QUEUE_NAME": rabbitmq.new_queue(),
    }


def test_a_cache_that_is_away_is_a_note(folder: Path) -> None:
    """Redis away as a cache: a note with its address and what to do, and exit 0, for nothing depends on it."""
    place = nobody_there()
    examined = Examined(folder, REDIS_URL=f"redis://:{SECRET}@{place}/0")
    ((verdict, detail),) = examined.about("cache")
    assert (examined.status, verdict) == (0, "warning")
    assert place in detail
    assert "the database answers" in detail
    assert "What to do: nothing listens there" in detail


def test_a_wrong_password_of_redis_is_said(folder: Path, own_redis: RedisServer) -> None:
    """A Redis that refuses the password: the advice is about the password, which is not shown."""
    own_redis.query("", "ACL SETUSER other on >right ~* +@all")
    examined = Examined(folder, REDIS_URL=f"redis://other:{SECRET}@127.0.0.1:{own_redis.port}/0")
    ((verdict, detail),) = examined.about("cache")
    assert verdict == "warning"
    assert "look at user and password" in detail


def test_a_redis_broker_that_keeps_nothing(folder: Path, own_redis: RedisServer) -> None:
    """A Redis broker without appendonly: notes that say what would be lost and what to set."""
    examined = Examined(folder, BROKER_URL=own_redis.new_database(), INTAKE="queued")
    found = examined.about("broker")
    assert examined.status == 0
    assert [verdict for verdict, _ in found] == ["ok", "warning", "warning"]
    assert "appendonly no" in found[1][1]
    assert "loses every waiting command" in found[1][1]
    assert "set appendonly yes" in found[1][1]
    assert "appendfsync everysec" in found[2][1]
    assert "power cut" in found[2][1]


async def test_a_broker_of_hints_may_lose_them(own_redis: RedisServer) -> None:
    """The same Redis that carries only hints is well as it is; what queued intake would need is said."""
    broker = open_broker(own_redis.new_database(), queue_name="orders")
    assert broker is not None
    findings: list[Finding] = []
    try:
        await examine_broker(broker, None, findings, queued=False)
    finally:
        await broker.close()
    assert {each.verdict for each in findings} == {"ok"}
    assert "before INTAKE=queued" in findings[1].detail


def test_a_redis_broker_that_keeps_everything(folder: Path, mortal_redis: DurableRedisServer) -> None:
    """With appendonly yes and appendfsync always a Redis broker is well, and nothing more is said of it."""
    examined = Examined(folder, BROKER_URL=mortal_redis.new_database(), INTAKE="queued")
    assert [verdict for verdict, _ in examined.about("broker")] == ["ok"] * 3
    assert examined.about("broker")[1:] == [("ok", "appendonly yes"), ("ok", "appendfsync always")]
    assert [verdict for verdict, _ in examined.about("queued intake")] == ["ok"]


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_redis_that_evicts_accepted_orders(
    folder: Path, own_redis: RedisServer, rabbitmq: RabbitServer, policy: str
) -> None:
    """A Redis that may evict what is at temp_order (it all expires) is noted with the policy to set."""
    settings = {"REDIS_URL": own_redis.new_database(), "INTAKE": "queued", **rabbit_settings(rabbitmq)}
    with configured(own_redis, maxmemory="100mb", **{"maxmemory-policy": policy}):
        ((verdict, detail),) = Examined(folder, **settings).about("queued intake")
    assert verdict == "warning"
    assert policy in detail
    assert "set maxmemory-policy noeviction" in detail


def test_a_redis_that_does_not_evict(folder: Path, own_redis: RedisServer, rabbitmq: RabbitServer) -> None:
    """A policy without a limit evicts nothing; RabbitMQ itself is well, with its queue named."""
    settings = {"REDIS_URL": own_redis.new_database(), "INTAKE": "queued", **rabbit_settings(rabbitmq)}
    with configured(own_redis, **{"maxmemory-policy": "allkeys-lru"}):
        examined = Examined(folder, **settings)
    assert (examined.status, examined.failed()) == (0, [])
    assert [verdict for verdict, _ in examined.about("queued intake")] == ["ok"]
    queue = settings["RABBITMQ_QUEUE_NAME"]
    assert examined.about("broker")[1] == ("ok", f"quorum queue {queue}, confirmed when on disk")


def test_a_redis_that_is_not_to_be_asked(folder: Path, own_redis: RedisServer, rabbitmq: RabbitServer) -> None:
    """Where CONFIG is forbidden, as at hosted ones, a note says what to look at instead."""
    own_redis.query("", f"ACL SETUSER hosted on >{SECRET} ~* +@all -config")
    url = f"redis://hosted:{SECRET}@127.0.0.1:{own_redis.port}/0"
    examined = Examined(folder, REDIS_URL=url, INTAKE="queued", **rabbit_settings(rabbitmq))
    ((verdict, detail),) = examined.about("queued intake")
    assert (examined.status, verdict) == (0, "warning")
    assert "see to it that maxmemory-policy is noeviction" in detail


def test_rabbitmq_away_is_a_failure(folder: Path, own_redis: RedisServer) -> None:
    """RabbitMQ away: exit 1, with its address, what happens meanwhile and what to do."""
    host, _, port = nobody_there().partition(":")
    settings = {"RABBITMQ_HOST": host, "RABBITMQ_PORT": port, "RABBITMQ_PASSWORD": SECRET}
    examined = Examined(folder, REDIS_URL=own_redis.new_database(), INTAKE="queued", **settings)
    ((verdict, detail),) = examined.about("broker")
    assert (examined.status, verdict) == (1, "failed")
    assert f"{host}:{port}" in detail
    assert "until it is back the database is the queue" in detail
    assert "What to do: nothing listens there: start it, or correct host and port" in detail


def test_a_wrong_password_of_rabbitmq_is_said(folder: Path, rabbitmq: RabbitServer) -> None:
    """A RabbitMQ that refuses the login: the advice is about user and password."""
    examined = Examined(folder, **rabbit_settings(rabbitmq), RABBITMQ_PASSWORD=SECRET)
    ((verdict, detail),) = examined.about("broker")
    assert verdict == "failed"
    assert "look at user and password" in detail


def test_a_rabbitmq_without_hints_is_a_note(folder: Path, rabbitmq: RabbitServer) -> None:
    """A queue of hints that cannot be used: a note that says which, and what to do; no order needs it, exit 0."""
    settings = rabbit_settings(rabbitmq)
    hints = f"{settings['RABBITMQ_QUEUE_NAME']}.due"
    rabbitmq.query("", f"DECLARE {hints}")
    examined = Examined(folder, **settings)
    (commands, durable, (verdict, detail)) = examined.about("broker")
    assert (examined.status, commands[0], durable[0], verdict) == (0, "ok", "ok", "warning")
    assert detail.startswith("no hints: the queue of hints is there in another form: delete it")
    assert f"'{hints}'" in detail


def test_queued_intake_without_its_redis(folder: Path, rabbitmq: RabbitServer) -> None:
    """Queued intake whose Redis is away: exit 1, and that orders are stored before they are answered."""
    url = f"redis://:{SECRET}@{nobody_there()}/0"
    examined = Examined(folder, REDIS_URL=url, INTAKE="queued", **rabbit_settings(rabbitmq))
    assert (examined.status, examined.failed()) == (1, ["queued intake"])
    ((_, detail),) = examined.about("queued intake")
    assert "orders are stored before they are answered" in detail
    assert "What to do" in detail


def test_queued_intake_without_a_broker_is_refused(folder: Path) -> None:
    """INTAKE=queued without a broker, or without a Redis, is a wrong setting: exit 2 and its name."""
    for settings in ({}, {"RABBITMQ_HOST": "127.0.0.1"}):
        examined = Examined(folder, INTAKE="queued", **settings)
        assert examined.status == 2
        assert "INTAKE=queued" in examined.said


def test_the_dead_are_reported(folder: Path, own_redis: RedisServer) -> None:
    """A message that was put aside is a note, with their number and where one reads what to do."""
    url = own_redis.new_database()

    async def put_aside() -> None:
        broker = open_broker(url, queue_name="orders")
        assert broker is not None
        await broker.publish(Topic.COMMANDS, b"not a command")
        (delivery,) = await broker.receive(Topic.COMMANDS, limit=1, wait_seconds=2)
        await broker.reject(Topic.COMMANDS, delivery, "it holds no commands")
        await broker.close()

    asyncio.run(put_aside())
    verdict, detail = Examined(folder, BROKER_URL=url).about("broker")[0]
    assert verdict == "warning"
    assert "1 are put aside as unusable" in detail
    assert "docs/operations.md, Dead letters" in detail


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("REDIS_URL", f"http://:{SECRET}@127.0.0.1/0"),
        ("BROKER_URL", f"http://:{SECRET}@127.0.0.1/0"),
        ("BROKER_URL", f"amqp://guest:{SECRET}/more@127.0.0.1/"),
    ],
)
def test_a_wrong_address_is_named(folder: Path, name: str, address: str) -> None:
    """An address of no known kind, or that cannot be read, fails with its setting's name and no password."""
    examined = Examined(folder, **{name: address})
    ((_, detail),) = [each for each in examined.about("settings") if each[0] == "failed"]
    assert examined.status == 1
    assert name in detail
