"""Servers that are there and do nothing: frozen, locked by a backup, or read-only.

No request waits longer than ten seconds, whoever asks for the health is answered within two, and when the server
is well again so is the service, by itself. What was answered with a 2xx is there, and every law holds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from auditing import wait_until
from servers import MariadbServer, PostgresServer, RabbitServer, RedisServer, Server
from serving import Serving

#: Seconds for which a server does nothing.
SICK_SECONDS = 13.0
#: From when to when what clients are answered says what the illness does, in seconds from its beginning.
MIDST_SECONDS = (3.0, SICK_SECONDS - 1.5)
#: Seconds that a write, and a look at the health, may take; with what a busy machine adds.
ANSWER_SECONDS_MAX = 10.0 + 2.0
LOOK_SECONDS_MAX = 2.0 + 1.0
#: Seconds after which everything is back.
BACK_SECONDS_MAX = 5.0 + 5.0
BODY = {"customer_id": "c", "items": [{"item_id": "i", "quantity": 1, "price": 1}]}


class Clients:
    """Clients that place and read orders without a pause, and note how long they wait, and for what."""

    def __init__(self, service: Serving) -> None:
        self.service = service
        self.placed: list[str] = []
        self.slowest: dict[str, float] = {}
        self.statuses: dict[str, set[int]] = {}
        self.refused: list[str] = []
        self.unwell = threading.Event()
        self._over = threading.Event()

    def _ask(self, client: httpx2.Client, what: str, method: str, path: str, **more: Any) -> httpx2.Response:
        began = time.monotonic()
        answer = client.request(method, path, **more)
        took = time.monotonic() - began
        self.slowest[what] = max(self.slowest.get(what, 0.0), took)
        if self.unwell.is_set():
            if answer.status_code >= 300:
                self.refused.append(answer.text)
            self.statuses.setdefault(what, set()).add(answer.status_code)
        return answer

    def place(self) -> None:
        with httpx2.Client(base_url=self.service.url, timeout=60) as client:
            while not self._over.is_set():
                answer = self._ask(client, "POST", "POST", "/orders", json=BODY)
                if answer.status_code in (201, 202):
                    self.placed.append(answer.json()["order_id"])
                elif answer.status_code == 503:
                    self._over.wait(0.05)

    def read(self) -> None:
        with httpx2.Client(base_url=self.service.url, timeout=60) as client:
            while not self._over.wait(0.02):
                if self.placed:
                    self._ask(client, "GET", "GET", f"/orders/{self.placed[-1]}")

    def look(self) -> None:
        with httpx2.Client(base_url=self.service.url, timeout=60) as client:
            while not self._over.wait(0.1):
                self._ask(client, "health", "GET", "/health")
                self._ask(client, "readyz", "GET", "/readyz")

    @contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(work) for work in (self.place, self.place, self.place, self.read, self.look)]
            try:
                yield
            finally:
                self._over.set()
            for each in running:
                each.result()


def endure(service: Serving, sick: Callable[[], Any], *, down: bool) -> Clients:
    """Let `sick` do its work amid clients, and check what they saw; `down`: orders cannot be taken meanwhile."""
    clients = Clients(service)
    with clients.running():
        wait_until(lambda: len(clients.placed) > 20)
        with ThreadPoolExecutor(1) as other:
            illness = other.submit(sick)
            # Only what is answered in its midst counts: not what was under way when it began, or as it ends.
            timers = (
                threading.Timer(MIDST_SECONDS[0], clients.unwell.set),
                threading.Timer(MIDST_SECONDS[1], clients.unwell.clear),
            )
            for timer in timers:
                timer.start()
            illness.result()
            for timer in timers:
                timer.join()
        began = time.monotonic()
        before = len(clients.placed)
        wait_until(lambda: service.client.get("/readyz").status_code == 200)
        wait_until(lambda: len(clients.placed) > before + 5)
        back = time.monotonic() - began
    assert back < BACK_SECONDS_MAX
    assert clients.slowest["POST"] < ANSWER_SECONDS_MAX, clients.slowest
    assert clients.slowest["GET"] < ANSWER_SECONDS_MAX, clients.slowest
    assert clients.slowest["health"] < LOOK_SECONDS_MAX, clients.slowest
    assert clients.slowest["readyz"] < LOOK_SECONDS_MAX, clients.slowest
    if down:
        assert clients.statuses["readyz"] == {503}
        assert clients.statuses["health"] == {503}
    else:
        assert clients.statuses["readyz"] == {200}
        assert clients.statuses["POST"] <= {201, 202}, clients.refused[:3]
    for order_id in clients.placed:
        assert service.client.get(f"/orders/{order_id}").status_code == 200
    return clients


@pytest.fixture
def mortal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the test's own."""
    server: Server = request.param(tmp_path_factory.mktemp("mortal"))
    yield server
    server.kill()


DATABASES = [PostgresServer, MariadbServer]


@pytest.mark.parametrize("mortal", DATABASES, indirect=True)
def test_a_frozen_database_is_not_waited_for(folder: Path, mortal: Server) -> None:
    """It takes connections and answers nothing: 503 within ten seconds, and nothing is lost or made twice."""
    with Serving(folder, "--no-workers", DATABASE_URL=mortal.new_database()) as service:

        def freeze() -> None:
            with mortal.frozen():
                time.sleep(SICK_SECONDS)

        clients = endure(service, freeze, down=True)
        assert clients.statuses["POST"] == {503}


@pytest.mark.parametrize("mortal", DATABASES, indirect=True)
def test_a_lock_that_a_backup_holds_is_not_waited_for(folder: Path, mortal: Server) -> None:
    """All writes wait for somebody else's lock: they are answered in time, and so is a look at the health."""
    address = mortal.new_database()
    name = address.rpartition("/")[2]
    with Serving(folder, "--no-workers", DATABASE_URL=address) as service:

        def lock() -> None:
            if isinstance(mortal, PostgresServer):
                mortal.query(name, f"DO $$ BEGIN LOCK TABLE orders; PERFORM pg_sleep({SICK_SECONDS}); END $$")
            else:
                mortal.hold(name, "FLUSH TABLES WITH READ LOCK", SICK_SECONDS)

        endure(service, lock, down=True)


@pytest.mark.parametrize("mortal", DATABASES, indirect=True)
def test_a_database_that_became_read_only_is_found_out_by_looking(folder: Path, mortal: Server) -> None:
    """No write need fail first: readiness is 503, and back once the database takes writes again."""
    address = mortal.new_database()
    name = address.rpartition("/")[2]
    if isinstance(mortal, PostgresServer):
        setting = f"ALTER DATABASE {name} SET default_transaction_read_only"
        off, on = f"{setting} = on", f"{setting} = off"
    else:
        off, on = "SET GLOBAL read_only = 1", "SET GLOBAL read_only = 0"
        mortal.query("root", "CREATE USER shop@'127.0.0.1'")
        mortal.query("root", f"GRANT ALL ON {name}.* TO shop@'127.0.0.1'")
        address = address.replace("root@", "shop@")
    with Serving(folder, "--no-workers", DATABASE_URL=address) as service:
        mortal.query(mortal.user, off)
        if isinstance(mortal, PostgresServer):  # sessions that are open have it as it was
            ours = f"usename = '{mortal.user}' AND pid <> pg_backend_pid()"
            mortal.query(name, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {ours}")
        for path in ("/readyz", "/health"):
            wait_until(lambda path=path: service.client.get(path).status_code == 503)  # type: ignore[misc]
        mortal.query(mortal.user, on)
        wait_until(lambda: service.client.get("/readyz").status_code == 200)
        assert service.client.post("/orders", json=BODY).status_code == 201


@pytest.mark.parametrize("mortal", [RedisServer, RabbitServer], indirect=True)
def test_a_frozen_broker_is_not_waited_for(folder: Path, mortal: Server) -> None:
    """With direct intake orders are taken as always; the workers find what is due by themselves."""
    with ExitStack() as stack:
        settings = {"BROKER_URL": mortal.url if isinstance(mortal, RabbitServer) else mortal.new_database()}
        service = stack.enter_context(Serving(folder, **settings))

        def freeze() -> None:
            with mortal.frozen():
                time.sleep(SICK_SECONDS)

        clients = endure(service, freeze, down=False)
        for order_id in clients.placed[-3:]:
            assert service.until_rest(order_id)["status"] == "completed"


@pytest.mark.parametrize("mortal", [RedisServer], indirect=True)
def test_a_frozen_cache_is_not_waited_for(folder: Path, mortal: Server) -> None:
    """The database answers instead."""
    with Serving(folder, "--no-workers", REDIS_URL=mortal.new_database()) as service:

        def freeze() -> None:
            with mortal.frozen():
                time.sleep(SICK_SECONDS)

        endure(service, freeze, down=False)


@pytest.mark.parametrize("mortal", [RedisServer, RabbitServer], indirect=True)
def test_queued_intake_goes_on_beside_a_frozen_broker(
    folder: Path, mortal: Server, redis_server: RedisServer
) -> None:
    """What the broker cannot take is stored at once; with Redis itself frozen, too."""
    if isinstance(mortal, RabbitServer):
        settings = {"BROKER_URL": mortal.url, "REDIS_URL": redis_server.new_database()}
    else:
        settings = dict.fromkeys(("BROKER_URL", "REDIS_URL"), mortal.new_database())
    with Serving(folder, INTAKE="queued", **settings) as service:

        def freeze() -> None:
            with mortal.frozen():
                time.sleep(SICK_SECONDS)

        endure(service, freeze, down=False)
