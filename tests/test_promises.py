"""Every promise of the five services to their clients is kept by a service that was started with COMPAT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from auditing import wait_until
from promises import PROMISES, Is, Promise
from servers import RedisServer
from serving import ADMIN_PASSWORD, Serving

#: By name, a service started as its users start it: with COMPAT, and what that one needs.
Services = Callable[[str], Serving]


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> Iterator[Services]:
    """Start each service when it is first asked for."""
    running: dict[str, Serving] = {}
    with ExitStack() as stack:

        def service(name: str) -> Serving:
            if name not in running:
                address = redis_server.new_database() if name == "queued" else ""
                settings = {"BROKER_URL": address, "REDIS_URL": address} if address else {}
                running[name] = stack.enter_context(
                    Serving(tmp_path_factory.mktemp(name), COMPAT=name, ADMIN_PASSWORD=ADMIN_PASSWORD, **settings)
                )
            return running[name]

        yield service


ROWS = [
    pytest.param(name, promise, id=f"{name}-{number}-{promise.call}")
    for name, promises in PROMISES.items()
    for number, promise in enumerate(promises, 1)
]


def test_there_are_as_many_promises_as_were_found() -> None:
    """The five services make 28 promises in their documents, and their clients rely on 28 things more."""
    assert len(ROWS) >= 56


@pytest.mark.parametrize(("name", "promise"), ROWS)
def test_a_promise_is_kept(services: Services, name: str, promise: Promise) -> None:
    """The call is answered as that service answers it."""
    service = services(name)
    method, path, *_ = promise.call.split(" ")
    body, shown = promise.before
    order_id = ""
    if body is not None:
        order_id = service.client.post("/orders", json=body).json()["order_id"]
        if shown is not None and method == "GET":
            wait_until(lambda: service.client.get(f"/orders/{order_id}").json()["status"] == shown)
    sent = {} if promise.send is None else {"json": promise.send}

    def call() -> bool:
        nonlocal answer
        answer = service.client.request(method, path.replace("{id}", order_id), headers=promise.headers, **sent)
        return answer.status_code != 503

    answer = None
    wait_until(call)  # a Redis that has just started is asked again what it may have forgotten
    assert answer is not None
    assert answer.status_code == promise.status, answer.text
    assert {name: answer.headers.get(name) for name in promise.answers} == promise.answers
    if promise.members:
        document = answer.json()
        for name, wanted in promise.members.items():
            if isinstance(wanted, Is):
                assert wanted.holds(document[name]), f"{name} should be {wanted.words}: {document[name]!r}"
            else:
                assert document[name] == wanted, name
        assert not promise.alone or document.keys() == promise.members.keys()
    if method == "PATCH" and shown is not None:
        wait_until(lambda: service.client.get(f"/orders/{order_id}").json()["status"] == shown)
