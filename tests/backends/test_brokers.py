"""The broker contract, on real servers: nothing confirmed is lost, whatever is killed, wiped or cancelled."""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import aio_pika
import pytest
import structlog

from expediter.backends.brokers import Broker, Delivery, Depth, Topic, open_broker
from expediter.backends.brokers.rabbitmq import RabbitBroker
from expediter.backends.brokers.redis import DEAD, FORGET_CONSUMERS, GROUP, STREAMS, RedisBroker
from expediter.errors import BrokerUnavailable, ConfigurationError
from servers import RabbitServer, RedisServer, free_port

#: Seconds after which a fact that should come to hold never will.
PATIENCE = 120.0
#: Seconds that a busy machine may add to a deadline.
SLACK = 2.0


class At:
    """A place of a broker's own in a running server, and the brokers that a test opens there."""

    def __init__(self, server: RedisServer | RabbitServer, *, durable: bool = False) -> None:
        self.server = server
        self.durable = durable
        self.is_redis = isinstance(server, RedisServer)
        self.url = server.new_database() if isinstance(server, RedisServer) else server.url
        self.database = self.url.rpartition("/")[2]
        self.queue = "orders" if isinstance(server, RedisServer) else server.new_queue()
        self.opened: list[Broker] = []

    def broker(self, *, claim_idle_seconds: float = 60.0, url: str = "") -> Broker:
        made: Broker = (
            RedisBroker(url or self.url, claim_idle_seconds=claim_idle_seconds)
            if self.is_redis
            else RabbitBroker(url or self.url, queue_name=self.queue)
        )
        self.opened.append(made)
        return made

    async def tell(self, statement: str) -> object:
        return await asyncio.to_thread(self.server.query, self.database, statement)

    async def wipe(self) -> None:
        """Take away the commands, and everything that the broker made to hold them."""
        await self.tell("FLUSHDB" if self.is_redis else f"DELETE {self.queue}")

    async def settle(self) -> None:
        """Let seconds pass since the queues were made, as they have where a broker is killed in earnest.

        For three of them RabbitMQ 3.10 has the name of its newest quorum queue in memory only, and forgets the
        queue if it is killed; a newer one makes it write.
        """
        if not self.is_redis:
            async with await aio_pika.connect(self.url) as connection:
                arguments = dict[str, Any]({"x-queue-type": "quorum"})
                await (await connection.channel()).declare_queue(
                    f"{self.queue}.newer", durable=True, arguments=arguments
                )

    async def close(self) -> None:
        for broker in self.opened:
            await broker.close()


@pytest.fixture(params=["redis", "rabbitmq"])
async def at(request: pytest.FixtureRequest) -> AsyncIterator[At]:
    """A place of each kind in turn, in a server that is not to be stopped."""
    server = request.getfixturevalue("redis_server" if request.param == "redis" else "rabbitmq")
    place = At(server)
    yield place
    await place.close()


@pytest.fixture(params=["redis", "rabbitmq"])
async def mortal(request: pytest.FixtureRequest) -> AsyncIterator[At]:
    """A place of each kind in turn, in a server that keeps what it confirms and that the test may kill."""
    server = request.getfixturevalue("mortal_redis" if request.param == "redis" else "mortal_rabbitmq")
    place = At(server, durable=True)
    yield place
    if server.process.poll() is not None:
        server.restart()
    await place.close()


async def receive(
    broker: Broker, count: int, *, topic: Topic = Topic.COMMANDS, patient: bool = False
) -> list[Delivery]:
    """Return the next `count` messages, acknowledging none; the patient bear with a broker that is away."""
    found: list[Delivery] = []
    deadline = time.monotonic() + PATIENCE
    while len(found) < count:
        assert time.monotonic() < deadline, f"only {len(found)} of {count} messages came: {broker.failing}"
        try:
            found += await broker.receive(topic, limit=count - len(found), wait_seconds=0.5)
        except BrokerUnavailable:
            if not patient:
                raise
    return found


async def publish(broker: Broker, *bodies: str, topic: Topic = Topic.COMMANDS) -> None:
    for body in bodies:
        await broker.publish(topic, body.encode())


async def hint(broker: Broker, body: str) -> None:
    """Publish a hint until the broker has taken it; a slow one may have it twice then."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return await publish(broker, body, topic=Topic.HINTS)
        except BrokerUnavailable:
            assert time.monotonic() < deadline


async def until(fact: Callable[[], Awaitable[bool]]) -> None:
    """Wait until a fact holds; a broker that is away says nothing about it."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with suppress(BrokerUnavailable):
            if await fact():
                return
        assert time.monotonic() < deadline, "it never came to hold"
        await asyncio.sleep(0.02)


def bodies(deliveries: list[Delivery]) -> list[str]:
    return [delivery.body.decode() for delivery in deliveries]


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Hold what is inside against a deadline."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds + SLACK


async def test_messages_come_in_the_order_in_which_they_were_published(at: At) -> None:
    """First in, first out."""
    broker = at.broker()
    names = [f"order {number}" for number in range(60)]
    await publish(broker, *names)

    found: list[Delivery] = []
    while len(found) < len(names):
        some = await receive(broker, 10)
        await broker.acknowledge(Topic.COMMANDS, some)
        found += some

    assert bodies(found) == names


async def test_every_message_goes_to_one_of_two_receivers(at: At) -> None:
    """Two receivers share a queue: together they see everything, and nothing twice."""
    publisher, first, second = at.broker(), at.broker(), at.broker()
    names = [f"order {number}" for number in range(40)]
    found: list[Delivery] = []

    async def work(broker: Broker) -> None:
        while len(found) < len(names):
            try:
                some = await broker.receive(Topic.COMMANDS, limit=3, wait_seconds=0.2)
            except BrokerUnavailable:
                # RabbitMQ may end a connection that meets its queue while it comes to be (541 INTERNAL_ERROR).
                continue
            found.extend(some)
            await broker.acknowledge(Topic.COMMANDS, some)

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as tasks:
        tasks.create_task(work(first))
        tasks.create_task(work(second))
        await publish(publisher, *names)

    assert sorted(bodies(found)) == sorted(names)


async def test_messages_from_before_the_first_receiver_are_received(at: At) -> None:
    """Commands and hints wait for the first receiver there ever is."""
    publisher = at.broker()
    await publish(publisher, "a command")
    await hint(publisher, "a hint")
    await publisher.close()

    receiver = at.broker()

    assert bodies(await receive(receiver, 1)) == ["a command"]
    assert bodies(await receive(receiver, 1, topic=Topic.HINTS)) == ["a hint"]


async def test_what_was_not_acknowledged_comes_again_after_its_receiver_closed(at: At) -> None:
    """Closing gives back at once what was received and not acknowledged, and nothing else."""
    first, second = at.broker(), at.broker()
    await publish(first, "one", "two", "three", "four")
    mine = await receive(first, 3)
    await first.acknowledge(Topic.COMMANDS, mine[1:2])

    await first.close()
    again = await receive(second, 3)

    assert sorted(bodies(again)) == ["four", "one", "three"]
    assert {delivery.body.decode() for delivery in again if delivery.redelivered} >= {"one", "three"}


async def test_what_a_killed_process_had_received_comes_again(at: At) -> None:
    """A receiver that is killed loses nothing: somebody else gets its messages."""
    broker = at.broker(claim_idle_seconds=0.5)
    await publish(broker, "one", "two")
    program = (
        "import asyncio, sys\n"
        "from expediter.backends.brokers import Topic, open_broker\n"
        "async def main():\n"
        "    broker = open_broker(sys.argv[1], queue_name=sys.argv[2])\n"
        "    found = []\n"
        "    while len(found) < 2:\n"
        "        found += await broker.receive(Topic.COMMANDS, limit=2, wait_seconds=1)\n"
        "    print('received', flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    other = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, at.url, at.queue, stdout=asyncio.subprocess.PIPE
    )
    assert other.stdout is not None
    assert await other.stdout.readline() == b"received\n"
    other.kill()
    await other.wait()

    again = await receive(broker, 2)

    assert bodies(again) == ["one", "two"]
    assert all(delivery.redelivered for delivery in again)


async def test_what_was_acknowledged_never_comes_again(at: At) -> None:
    """An acknowledged message is gone for everybody, also where it is acknowledged twice."""
    first = at.broker()
    await publish(first, "one", "two", "three")
    mine = await receive(first, 3)
    await first.acknowledge(Topic.COMMANDS, [mine[2], mine[0]])
    await first.acknowledge(Topic.COMMANDS, mine)
    await first.acknowledge(Topic.COMMANDS, [])
    assert await first.depth(Topic.COMMANDS) == Depth(waiting=0, dead=0)
    await first.close()

    second = at.broker(claim_idle_seconds=0.01)

    assert await second.receive(Topic.COMMANDS, limit=10, wait_seconds=0.3) == []


async def test_receive_returns_nothing_after_its_wait(at: At) -> None:
    """Without a message `receive` ends after its wait, two seconds at most, and with none at once."""
    broker = at.broker()
    await broker.receive(Topic.COMMANDS, limit=1, wait_seconds=0)
    for wait_seconds, waited in [(0.0, 0.0), (0.3, 0.3), (60.0, 2.0)]:
        began = time.monotonic()
        with within(waited):
            assert await broker.receive(Topic.COMMANDS, limit=10, wait_seconds=wait_seconds) == []
        assert time.monotonic() - began > waited - 0.05


async def test_receive_returns_as_soon_as_a_message_comes(at: At) -> None:
    """A waiting receiver has a message as soon as it is published, in a message's own time."""
    broker = at.broker()
    await broker.receive(Topic.HINTS, limit=1, wait_seconds=0)
    waiting = asyncio.create_task(broker.receive(Topic.HINTS, limit=1, wait_seconds=2))
    await publish(broker, "warm up")
    await asyncio.sleep(0)
    began = time.monotonic()
    await hint(broker, "a hint")

    assert bodies(await waiting) == ["a hint"]
    assert time.monotonic() - began < 1


async def test_receive_returns_no_more_than_its_limit(at: At) -> None:
    """The limit holds, and what is beyond it waits for the next call."""
    broker = at.broker()
    await publish(broker, *"abcdefg")
    found: list[str] = []
    while len(found) < 7:
        some = await broker.receive(Topic.COMMANDS, limit=3, wait_seconds=0.5)
        assert 1 <= len(some) <= 3
        found += bodies(some)

    assert found == list("abcdefg")


async def test_many_publish_while_one_receives(at: At) -> None:
    """A broker may be used by many tasks at once, a waiting receiver among them."""
    broker = at.broker()
    waiting = asyncio.create_task(receive(broker, 45))

    await asyncio.gather(*(publish(broker, f"{task}.0", f"{task}.1", f"{task}.2") for task in range(15)))
    found = bodies(await waiting)

    assert sorted(found) == sorted(f"{task}.{step}" for task in range(15) for step in range(3))
    for task in range(15):
        assert [name for name in found if name.startswith(f"{task}.")] == [f"{task}.{step}" for step in range(3)]


async def test_a_cancelled_receive_loses_nothing(at: At) -> None:
    """Whenever a receiver is cancelled, what was on its way to it is received by the next call."""
    broker = at.broker()
    found: list[str] = []
    for number in range(40):
        waiting = asyncio.create_task(broker.receive(Topic.COMMANDS, limit=10, wait_seconds=2))
        await publish(broker, f"order {number}")
        for _ in range(number):
            await asyncio.sleep(0)
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            found += bodies(await waiting)

    found += bodies(await receive(broker, 40 - len(found)))

    assert sorted(found) == sorted(f"order {number}" for number in range(40))


async def test_a_cancelled_publish_spoils_nothing(at: At) -> None:
    """A publisher that is cancelled leaves a broker that works, and a message that is there once or not at all."""
    broker = at.broker()
    for number in range(40):
        cancelled = asyncio.create_task(publish(broker, f"cancelled {number}"))
        for _ in range(number):
            await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait([cancelled])
    await publish(broker, "last")

    found: list[str] = []
    while "last" not in found:
        found += bodies(await receive(broker, 1))
    assert len(found) == len(set(found))


async def test_a_rejected_command_is_put_aside_with_its_reason(at: At) -> None:
    """A command that nobody can use is among the dead, where its reason stands beside it; it never comes again."""
    broker = at.broker()
    await publish(broker, "garbage", "an order")
    garbage, order = await receive(broker, 2)

    await broker.reject(Topic.COMMANDS, garbage, "not a command: é")
    await broker.acknowledge(Topic.COMMANDS, [order])

    await until(lambda: depth_is(broker, waiting=0, dead=1))
    assert await dead_letters(at) == [("garbage", "not a command: é")]
    assert await broker.receive(Topic.COMMANDS, limit=1, wait_seconds=0.2) == []


async def dead_letters(at: At) -> list[tuple[str, str]]:
    """Return the body and the reason of every dead command, as a person would find them."""
    if at.is_redis:
        entries = await at.tell(f"XRANGE {DEAD} - +")
        assert isinstance(entries, list)
        return [(fields["body"], fields["reason"]) for _, fields in entries]
    async with await aio_pika.connect(at.url) as connection:
        queue = await (await connection.channel()).get_queue(f"{at.queue}.dead")
        message = await queue.get()
        assert message is not None
        return [(message.body.decode(), str(message.headers["reason"]))]


async def test_a_rejected_hint_is_dropped(at: At) -> None:
    """A hint that nobody can use is gone: losing it costs nothing."""
    broker = at.broker()
    await hint(broker, "garbage")
    rejected = []

    async def all_rejected() -> bool:
        for delivery in await broker.receive(Topic.HINTS, limit=10, wait_seconds=0):
            await broker.reject(Topic.HINTS, delivery, "not a hint")
            rejected.append(delivery)
        return bool(rejected) and await depth_is(broker, topic=Topic.HINTS, waiting=0, dead=0)

    await until(all_rejected)
    assert await broker.depth(Topic.COMMANDS) == Depth(0, 0)


async def depth_is(broker: Broker, *, waiting: int, dead: int, topic: Topic = Topic.COMMANDS) -> bool:
    return await broker.depth(topic) == Depth(waiting, dead)


async def test_depth_counts_what_waits_and_what_is_being_worked_on(at: At) -> None:
    """A message counts until it is acknowledged, for its own topic alone."""
    broker = at.broker()
    assert await broker.depth(Topic.COMMANDS) == Depth(0, 0)
    await publish(broker, "one", "two", "three")
    await until(lambda: depth_is(broker, waiting=3, dead=0))
    found = await receive(broker, 2)
    await until(lambda: depth_is(broker, waiting=3, dead=0))

    await broker.acknowledge(Topic.COMMANDS, found)

    await until(lambda: depth_is(broker, waiting=1, dead=0))
    assert await broker.depth(Topic.HINTS) == Depth(0, 0)


async def test_a_broker_that_is_wiped_goes_on(at: At) -> None:
    """Queues and streams that vanish are made again, while a receiver waits and before the next publish."""
    broker = at.broker()
    await publish(broker, "one")
    await broker.acknowledge(Topic.COMMANDS, await receive(broker, 1))
    for number in range(3):
        waiting = asyncio.create_task(receive(broker, 1, patient=True))
        await asyncio.sleep(0)
        await at.wipe()
        await publish(broker, f"order {number}")
        found = await waiting
        assert bodies(found) == [f"order {number}"]
        await broker.acknowledge(Topic.COMMANDS, found)

    await at.wipe()
    await publish(broker, "the last")
    assert bodies(await receive(broker, 1, patient=True)) == ["the last"]
    assert broker.failing is None


async def test_a_destroyed_group_loses_nothing(redis_server: RedisServer) -> None:
    """Redis: a group that was destroyed begins again at the stream's first entry."""
    at = At(redis_server)
    broker = at.broker()
    await publish(broker, "one", "two")
    assert bodies(await receive(broker, 1)) == ["one"]
    waiting = asyncio.create_task(broker.receive(Topic.HINTS, limit=1, wait_seconds=2))

    await at.tell(f"XGROUP DESTROY {STREAMS[Topic.COMMANDS]} {GROUP}")
    await publish(broker, "three")

    assert bodies(await receive(broker, 3)) == ["one", "two", "three"]
    assert await waiting == []
    await at.close()


async def test_a_killed_broker_is_refused_in_time_and_used_again_by_itself(mortal: At) -> None:
    """While a broker is dead every call fails in time; then it goes on, and what it confirmed is still there."""
    broker = mortal.broker()
    await publish(broker, "confirmed one", "confirmed two")
    held = await receive(broker, 1)
    await mortal.settle()

    with structlog.testing.capture_logs() as logs:
        waiting = asyncio.create_task(broker.receive(Topic.HINTS, limit=1, wait_seconds=2))
        await asyncio.to_thread(mortal.server.kill)
        for _ in range(2):
            await all_calls_fail(broker, held)
        with suppress(BrokerUnavailable):
            assert await waiting == []
        assert broker.failing
        await asyncio.to_thread(mortal.server.restart)
        again = await receive(broker, 1 if mortal.is_redis else 2, patient=True)
        await until(lambda: depth_is(broker, waiting=2, dead=0))

    assert "confirmed two" in bodies(again)
    await publish(broker, "after")
    assert "after" in bodies(await receive(broker, 1, patient=True))
    assert broker.failing is None
    events = [line["event"] for line in logs if not line["event"].startswith("hints")]
    assert events == ["the broker cannot be used", "the broker can be used again"]
    await broker.close()
    everything = await receive(mortal.broker(), 3)
    assert sorted(bodies(everything)) == ["after", "confirmed one", "confirmed two"]


async def all_calls_fail(broker: Broker, held: list[Delivery]) -> None:
    with within(5), pytest.raises(BrokerUnavailable):
        await publish(broker, "refused")
    with within(0.25), pytest.raises(BrokerUnavailable):
        await publish(broker, "refused", topic=Topic.HINTS)
    with within(5), pytest.raises(BrokerUnavailable):
        await broker.receive(Topic.COMMANDS, limit=1, wait_seconds=2)
    with within(5), pytest.raises(BrokerUnavailable):
        await broker.acknowledge(Topic.COMMANDS, held)
    with within(5), pytest.raises(BrokerUnavailable):
        await broker.depth(Topic.COMMANDS)
    with within(5), pytest.raises(BrokerUnavailable):
        await broker.durability()


async def test_a_broker_that_is_absent_at_the_start_is_used_once_it_is_there(mortal: At) -> None:
    """Opening needs no server; the calls fail until there is one."""
    await asyncio.to_thread(mortal.server.kill)
    broker = mortal.broker()
    assert broker.failing is None
    with within(5), pytest.raises(BrokerUnavailable):
        await publish(broker, "too early")
    waiting = asyncio.create_task(receive(broker, 1, patient=True))

    await asyncio.to_thread(mortal.server.restart)

    async def published() -> bool:
        await publish(broker, "in time")
        return True

    await until(published)
    assert bodies(await waiting) == ["in time"]


async def test_a_broker_that_stands_still_is_given_up_in_time(mortal: At) -> None:
    """A server that answers nothing costs a hint a quarter of a second, and works again when it goes on."""
    broker = mortal.broker()
    await publish(broker, "before")
    with mortal.server.frozen():
        with within(0.25), pytest.raises(BrokerUnavailable, match="250 ms"):
            await publish(broker, "a hint", topic=Topic.HINTS)
        assert broker.hints_failing

    await publish(broker, "after")
    assert bodies(await receive(broker, 2)) == ["before", "after"]
    assert broker.failing is None


async def test_a_closed_broker_refuses_everything(at: At) -> None:
    """After `close`, which may be called twice and ends what waits, every call fails."""
    broker = at.broker()
    await publish(broker, "one")
    held = await receive(broker, 1)
    waiting = asyncio.create_task(broker.receive(Topic.HINTS, limit=1, wait_seconds=2))
    await asyncio.sleep(0.05)

    with within(1):
        await broker.close()
        await broker.close()
        with pytest.raises(BrokerUnavailable, match="closed"):
            await waiting

    await all_calls_fail(broker, held)


async def test_a_broker_that_was_never_used_is_closed(at: At) -> None:
    """Opening connects to nothing, so that closing has nothing to do."""
    with within(0):
        await at.broker().close()


async def test_passwords_are_never_shown(at: At) -> None:
    """Neither the name, nor what fails, nor any error that leads to it says the password."""
    place = at.url.rpartition("@")[2].removeprefix("redis://")
    port = free_port()
    scheme = "redis" if at.is_redis else "amqp"
    for url in (f"{scheme}://somebody:hush-hush@{place}", f"{scheme}://somebody:hush-hush@127.0.0.1:{port}/0"):
        broker = at.broker(url=url)
        shown = [broker.name, repr(broker)]
        with structlog.testing.capture_logs() as logs:
            for call in (publish(broker, "x"), broker.receive(Topic.COMMANDS, limit=1, wait_seconds=0)):
                with pytest.raises(BrokerUnavailable) as caught:
                    await call
                shown += traceback.format_exception(caught.value)
                shown.append(str(broker.failing))
        assert broker.failing
        assert "hush" not in "\n".join([*shown, str(logs)])
        assert f"127.0.0.1:{broker.name.partition(':')[2].partition('/')[0].partition(',')[0]}" in broker.name


async def test_the_name_says_where_it_is(at: At) -> None:
    """The name is the kind of broker and its place."""
    port = at.server.port
    expected = (
        f"Redis Streams at 127.0.0.1:{port}/{at.database}"
        if at.is_redis
        else f"RabbitMQ at 127.0.0.1:{port}, queue {at.queue}"
    )
    assert at.broker().name == expected


async def test_durability_is_judged_by_the_servers_own_settings(mortal: At, redis_server: RedisServer) -> None:
    """A server that confirms what is on disk is power-safe; one that keeps nothing says what to set."""
    assert all(safe for _, safe, _ in await mortal.broker().durability())
    if not mortal.is_redis:
        return
    at = At(redis_server)
    verdicts = await at.broker().durability()
    await at.close()
    assert [(what, safe) for what, safe, _ in verdicts] == [
        ("appendonly no", False),
        ("appendfsync everysec", False),
    ]
    assert "appendonly yes" in verdicts[0][2]


async def test_a_full_redis_refuses_commands_and_still_hands_them_out(mortal_redis: RedisServer) -> None:
    """Redis: out of memory is a refusal with its reason; waiting commands can be worked off meanwhile."""
    at = At(mortal_redis)
    broker = at.broker()
    await publish(broker, "first", "second")
    await broker.acknowledge(Topic.COMMANDS, await receive(broker, 1))
    await at.tell("CONFIG SET maxmemory 1")
    try:
        with pytest.raises(BrokerUnavailable, match="maxmemory"):
            await publish(broker, "refused")
        found = await receive(broker, 1)
        await broker.acknowledge(Topic.COMMANDS, found)
        assert broker.failing is not None
    finally:
        await at.tell("CONFIG SET maxmemory 0")

    await publish(broker, "after")
    assert broker.failing is None
    assert bodies(await receive(broker, 1)) == ["after"]
    await at.close()


async def test_a_command_whose_confirmation_is_lost_is_stored_once(redis_server: RedisServer) -> None:
    """Redis: where the answer to a publish is lost the caller hears of it, and nothing is sent a second time."""
    at = At(redis_server)

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward, outward = await asyncio.open_connection("127.0.0.1", redis_server.port)
        while data := await reader.read(65536):
            outward.write(data)
            answer = await onward.read(65536)
            if b"XADD" in data:
                break
            writer.write(answer)
        outward.close()
        writer.close()

    async with await asyncio.start_server(forward, "127.0.0.1", 0) as proxy:
        port = proxy.sockets[0].getsockname()[1]
        broker = at.broker(url=f"redis://127.0.0.1:{port}/{at.database}")
        with pytest.raises(BrokerUnavailable):
            await publish(broker, "once")
        await broker.close()

    assert await at.broker().depth(Topic.COMMANDS) == Depth(1, 0)
    await at.close()


async def test_names_of_dead_consumers_are_removed(redis_server: RedisServer) -> None:
    """Redis: a consumer that is long gone and holds nothing is forgotten; one that holds something never is."""
    at = At(redis_server)
    broker = at.broker(claim_idle_seconds=0.05)
    stream = STREAMS[Topic.COMMANDS]
    await publish(broker, "one")
    await broker.receive(Topic.HINTS, limit=1, wait_seconds=0)
    await at.tell(f"XGROUP CREATE {stream} {GROUP} 0")
    await at.tell(f"XREADGROUP GROUP {GROUP} holder COUNT 1 STREAMS {stream} >")
    await at.tell(f"XGROUP CREATECONSUMER {stream} {GROUP} idler")

    async def names() -> set[str]:
        await broker.receive(Topic.HINTS, limit=1, wait_seconds=0)
        told = await at.tell(f"XINFO CONSUMERS {stream} {GROUP}")
        assert isinstance(told, list)
        return {consumer[consumer.index("name") + 1] for consumer in told}

    assert await names() == {"holder", "idler"}
    removed = await broker._publishing.eval(FORGET_CONSUMERS, 1, stream, GROUP, 0, "")  # type: ignore[attr-defined]
    assert removed == 1
    assert await names() == {"holder"}
    await at.close()


async def test_a_queue_of_another_form_is_named_with_what_to_do(rabbitmq: RabbitServer) -> None:
    """RabbitMQ: a queue that was declared by somebody else is an error that says what to do."""
    at = At(rabbitmq)
    async with await aio_pika.connect(at.url) as connection:
        await (await connection.channel()).declare_queue(at.queue, durable=True)
        broker = at.broker()
        with pytest.raises(BrokerUnavailable, match="set another RABBITMQ_QUEUE_NAME"):
            await publish(broker, "one")
        await asyncio.to_thread(rabbitmq.query, "", f"DELETE {at.queue}")

    async def published() -> bool:
        await publish(broker, "two")
        return True

    await until(published)
    await at.close()


@asynccontextmanager
async def turning_away(port: int, times: int) -> AsyncIterator[int]:
    """The port of a RabbitMQ whose first confirmations are nacks: the same frame but for the method's number."""
    left = times
    ack, nack = b"\x00\x3c\x00\x50", b"\x00\x3c\x00\x78"
    passing: set[asyncio.Task[None]] = set()

    async def pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter, *, answers: bool) -> None:
        nonlocal left
        with suppress(ConnectionError):
            while data := await source.read(1 << 16):
                found = min(left, data.count(ack)) if answers else 0
                left -= found
                target.write(data.replace(ack, nack, found))
        target.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        passing.add(asyncio.create_task(pass_on(reader, far_writer, answers=False)))
        passing.add(asyncio.create_task(pass_on(far_reader, writer, answers=True)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in passing:
            task.cancel()
        if passing:
            await asyncio.wait(passing)


@pytest.mark.parametrize(("times", "kept"), [(1, True), (3, True), (4, False)])
async def test_a_message_that_is_turned_away_for_a_moment_is_sent_again(
    rabbitmq: RabbitServer, times: int, kept: bool
) -> None:
    """RabbitMQ: three nacks are borne with, as a queue gives them that has just been made; then it is said."""
    at = At(rabbitmq)
    async with turning_away(rabbitmq.port, times) as port:
        broker = at.broker(url=at.url.replace(f":{rabbitmq.port}/", f":{port}/"))
        if kept:
            await publish(broker, "one")
            assert broker.failing is None
        else:
            with pytest.raises(BrokerUnavailable, match="turns messages away"):
                await publish(broker, "one")
            assert "turns messages away" in str(broker.failing)
        await publish(broker, "two")
        assert broker.failing is None
        found = bodies(await receive(broker, 1))
        while "two" not in found:  # what was turned away here had been kept in truth
            found += bodies(await receive(broker, 1))
        await at.close()
    assert set(found) == {"one", "two"}


async def test_a_full_queue_turns_messages_away_and_says_so(rabbitmq: RabbitServer) -> None:
    """RabbitMQ: a policy of the operator's bounds the queue; there is room again after work."""
    at = At(rabbitmq)
    broker = at.broker()
    bound = '{"max-length": 1, "overflow": "reject-publish"}'
    words = ("set_policy", "--apply-to", "queues", at.queue, f"^{at.queue}$", bound)
    await asyncio.to_thread(rabbitmq.control, *words)

    async def full() -> bool:
        try:
            with within(2.5):
                await publish(broker, "order")
        except BrokerUnavailable as error:
            return "turns messages away: the queue is full by a policy" in str(error)
        return False

    await until(full)
    assert "turns messages away" in str(broker.failing)

    async def room() -> bool:
        await broker.acknowledge(Topic.COMMANDS, await receive(broker, 1))
        await publish(broker, "another")
        return True

    await until(room)
    await asyncio.to_thread(rabbitmq.control, "clear_policy", at.queue)
    await at.close()


async def test_a_blocked_rabbitmq_takes_no_commands_in_time(mortal_rabbitmq: RabbitServer) -> None:
    """RabbitMQ: short of memory it takes nothing, says why, and still lets waiting commands be worked off."""
    at = At(mortal_rabbitmq)
    broker = at.broker()
    await publish(broker, "before")
    await asyncio.to_thread(mortal_rabbitmq.control, "set_vm_memory_high_watermark", "0.000001")
    try:
        reasons = []
        for _ in range(2):
            with within(5), pytest.raises(BrokerUnavailable) as refused:
                await publish(broker, "unknown")
            reasons.append(str(refused.value))
        assert reasons[1] == "RabbitMQ takes no messages now: it is short of memory or disk"
        found = await receive(broker, 1)
        await broker.acknowledge(Topic.COMMANDS, found)
        assert broker.failing == reasons[1]
    finally:
        await asyncio.to_thread(mortal_rabbitmq.control, "set_vm_memory_high_watermark", "0.4")

    async def published() -> bool:
        await publish(broker, "after")
        return True

    await until(published)
    found = []
    while "after" not in found:  # what nobody confirmed may have arrived after all
        found += bodies(await receive(broker, 1))
    await at.close()


class HintsApart:
    """A broker beside whose commands no queue of hints can be."""

    def __init__(self, rabbitmq: RabbitServer) -> None:
        self.at = At(rabbitmq)
        self.hints = f"{self.at.queue}.due"

    async def tried(self, broker: Broker) -> str:
        """Give and take hints in vain, and return what is said of them."""
        with within(0.25), pytest.raises(BrokerUnavailable):
            await publish(broker, "a hint", topic=Topic.HINTS)
        with within(5), pytest.raises(BrokerUnavailable):
            await broker.receive(Topic.HINTS, limit=1, wait_seconds=0)
        with within(5), pytest.raises(BrokerUnavailable) as refused:
            await broker.depth(Topic.HINTS)
        assert broker.hints_failing == str(refused.value)
        return str(refused.value)


async def commands_work(broker: Broker) -> None:
    """Publish commands, receive and acknowledge them, and see them leave; the broker has no trouble."""
    await publish(broker, "one", "two")
    found = await receive(broker, 2)
    await broker.acknowledge(Topic.COMMANDS, found)
    await until(lambda: depth_is(broker, waiting=0, dead=0))
    assert bodies(found) == ["one", "two"]
    assert [safe for _, safe, _ in await broker.durability()] == [True]
    assert broker.failing is None


async def test_hints_are_on_a_queue_of_the_cluster(rabbitmq: RabbitServer) -> None:
    """RabbitMQ: hints are on a quorum queue, which no single node takes away; the name of old is left alone."""
    apart = HintsApart(rabbitmq)
    broker = apart.at.broker()
    await hint(broker, "a hint")
    limits = dict[str, Any]({"x-max-length": 10_000, "x-message-ttl": 60_000, "x-overflow": "drop-head"})
    async with await aio_pika.connect(apart.at.url) as connection:
        channel = await connection.channel()
        # RabbitMQ compares the arguments: anything else would be refused.
        await channel.declare_queue(apart.hints, durable=True, arguments={"x-queue-type": "quorum"} | limits)
        with pytest.raises(aio_pika.exceptions.ChannelNotFoundEntity):
            await channel.declare_queue(f"{apart.at.queue}.hints", passive=True)
    assert set(bodies(await receive(broker, 1, topic=Topic.HINTS))) == {"a hint"}
    await apart.at.close()


async def test_a_queue_of_hints_in_another_form_is_no_trouble_of_commands(rabbitmq: RabbitServer) -> None:
    """RabbitMQ: where somebody declared it otherwise there are no hints, until it is deleted; commands go on."""
    apart = HintsApart(rabbitmq)
    await asyncio.to_thread(rabbitmq.query, "", f"DECLARE {apart.hints}")
    broker = apart.at.broker()
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            assert "the queue of hints is there in another form: delete it" in await apart.tried(broker)
            await commands_work(broker)
        await asyncio.to_thread(rabbitmq.query, "", f"DELETE {apart.hints}")
        await hint(broker, "a hint")
        assert bodies(await receive(broker, 1, topic=Topic.HINTS, patient=True)) == ["a hint"]

    assert broker.hints_failing is None
    assert [line["event"] for line in logs] == ["hints cannot be used", "hints can be used again"]
    await apart.at.close()


async def test_a_user_without_a_right_to_the_queue_of_hints_has_commands(rabbitmq: RabbitServer) -> None:
    """RabbitMQ: a user who may use the queues of commands alone has no hints, and is told of which."""
    apart = HintsApart(rabbitmq)
    await asyncio.to_thread(rabbitmq.control, "add_user", apart.at.queue, "secret")
    rights = [f"^{apart.at.queue}([.]dead)?$", f"^(amq[.]default|{apart.at.queue}([.]dead)?)$"]
    await asyncio.to_thread(rabbitmq.control, "set_permissions", apart.at.queue, rights[0], rights[1], rights[1])
    broker = apart.at.broker(url=apart.at.url.replace("guest:guest", f"{apart.at.queue}:secret"))

    assert f"'{apart.hints}'" in await apart.tried(broker)
    await commands_work(broker)
    await apart.at.close()


async def test_hints_that_nobody_may_read_are_said_to_be_missing(rabbitmq: RabbitServer) -> None:
    """RabbitMQ: hints that are taken in and never handed out count as missing, and the log says it once."""
    apart = HintsApart(rabbitmq)
    await asyncio.to_thread(rabbitmq.control, "add_user", apart.at.queue, "secret")
    readable = f"^{apart.at.queue}$"
    await asyncio.to_thread(rabbitmq.control, "set_permissions", apart.at.queue, ".*", ".*", readable)
    broker = apart.at.broker(url=apart.at.url.replace("guest:guest", f"{apart.at.queue}:secret"))
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            with pytest.raises(BrokerUnavailable):
                await broker.receive(Topic.HINTS, limit=1, wait_seconds=0)
            await hint(broker, "a hint")
            await broker.depth(Topic.HINTS)
            assert "ACCESS_REFUSED" in str(broker.hints_failing)

    assert [line["event"] for line in logs] == ["hints cannot be used"]
    await apart.at.close()


@pytest.mark.parametrize("url", ["redis://somebody:hush/hush@host:6379", "amqp://somebody:hush/hush@host:5672"])
def test_an_address_that_cannot_be_read_is_refused_without_showing_it(url: str) -> None:
    """A password that was not percent-encoded breaks the address; the error says so and does not quote it."""
    with pytest.raises(ConfigurationError) as refused:
        open_broker(url, queue_name="orders")

    assert "BROKER_URL" in str(refused.value)
    assert "hush" not in "".join(traceback.format_exception(refused.value))
