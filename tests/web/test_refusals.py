"""What a refusal costs: whoever sends what cannot be taken holds nobody up, and fills no memory."""

from __future__ import annotations

import json
from contextlib import ExitStack

import psutil
import pytest

from auditing import wait_until
from serving import Serving
from wire import Answer, connect, read_answer

JSON = {"Content-Type": "application/json"}
NDJSON = {"Content-Type": "application/x-ndjson"}
BODY_BYTES = 1024 * 1024
#: Seconds of the processor that the refusal of one body may cost, parsing by the server included. It takes a tenth
#: of that; machines differ. Most of these bodies took one to seven seconds.
CPU_SECONDS_MAX = 0.5
#: Bytes of a refusal: a hundred faults, each with a pointer of 32 names.
REFUSAL_BYTES_MAX = 600_000


def filled(head: str, piece: str, tail: str) -> bytes:
    """Return a body of 1 MiB that repeats one piece."""
    count = (BODY_BYTES - len(head) - len(tail)) // (len(piece) + 1)
    return (head + ",".join([piece] * count) + tail).encode()


def numbered(head: str, piece: str, tail: str) -> bytes:
    """The same, with a number in each piece."""
    count = (BODY_BYTES - len(head) - len(tail)) // (len(piece) + 5)
    return (head + ",".join([piece % number for number in range(count)]) + tail).encode()


ITEMS = '{"user_id":1,"items":['
LONG_NAME = "k" * 500_000
BODIES: dict[str, bytes] = {
    "items of another type": filled(ITEMS, "1", "]}"),
    "items without anything": filled(ITEMS, "{}", "]}"),
    "items of which each is good": filled(ITEMS, '{"quantity":1,"name":"a","price":1e999}', "]}"),
    "items with six faults each": filled(
        ITEMS, '{"quantity":"x","item_id":[],"name":1,"item_name":2,"price":"x","unit_price":[]}', "]}"
    ),
    "2,000 items, the last one wrong": (
        ITEMS + '{"quantity":1,"name":"Pen","price":"1.25"},' * 1999 + '{"quantity":0}]}'
    ).encode(),
    "lists for ids": filled('{"user_id":1,"item_ids":[', "[]", "]}"),
    "unknown fields": numbered("{", '"f%d":1', "}"),
    "metadata without end": numbered('{"metadata":{', '"k%d":[]', "}}"),
    "objects in 32 levels": filled('{"metadata":{"a":[', '{"a":' * 28 + "1" + "}" * 28, "]}}"),
    "lists in 32 levels": filled('{"metadata":{"a":[', "[" * 28 + "]" * 28, "]}}"),
    "a long name over many values": filled('{"user_id":[],"' + LONG_NAME + '":[', "1", "]}"),
    "a long name over texts with NUL": ('{"' + LONG_NAME + '":[' + '"\\u0000",' * 14_000 + "1]}").encode(),
    "texts with half a surrogate pair": filled('{"metadata":{"a":[', '"\\ud800"', "]}}"),
    "numbers": filled("[", "1", "]"),
    "a number of a million digits": f'{{"user_id":{"1" * (BODY_BYTES - 20)}}}'.encode(),
    "a total of a million digits": filled(
        '{"user_id":1,"items":[{"quantity":1,"name":"a"}],"total_amount":', "1" * 999_999, "}"
    ),
    "a text of a million characters": f'{{"user_id":"{"x" * (BODY_BYTES - 20)}"}}'.encode(),
    "a name with what looks like a place": f'{{"{" - at `$" * 110_000}":1}}'.encode(),
}


@pytest.mark.parametrize("name", BODIES)
def test_no_refused_body_takes_the_processor_from_others(idle_service: Serving, name: str) -> None:
    """Whatever is in a body of 1 MiB, it is refused for what is wrong with it, soon and in few words."""
    process = psutil.Process(idle_service.process.pid)
    before = process.cpu_times()
    answer = idle_service.client.post("/orders", content=BODIES[name], headers=JSON)
    spent = process.cpu_times()
    problem = answer.json()
    assert answer.status_code == 422
    assert 1 <= len(problem["errors"]) <= 100
    assert len(answer.content) < REFUSAL_BYTES_MAX
    assert len(problem["error"]) < 1_000
    assert spent.user + spent.system - before.user - before.system < CPU_SECONDS_MAX


def test_a_refusal_says_that_there_are_more_faults(idle_service: Serving) -> None:
    """Whoever mends the hundred faults that are named, or the one, is told that these were not all."""
    hundred = idle_service.client.post(
        "/orders", content=b'{"user_id":1,"items":[%s1]}' % (b"1," * 1_500), headers=JSON
    )
    assert len(hundred.json()["errors"]) == 100
    assert "more than 100 faults" in hundred.json()["error"]
    alone = idle_service.client.post("/orders", content=BODIES["items of another type"], headers=JSON)
    assert "more than 30000 values" in alone.json()["error"]
    whole = idle_service.client.post("/orders", json={"user_id": 1, "items": [{"quantity": 0, "name": 1}]})
    assert len(whole.json()["errors"]) == 2
    assert "faults" not in whole.json()["error"]


def test_a_refusal_does_not_repeat_what_it_was_sent(idle_service: Serving) -> None:
    """Of a status with a million characters, or a name that is given twice, it says how it begins."""
    status = idle_service.client.patch("/orders/x/status", json={"status": "x" * 1_000_000})
    twice = idle_service.client.post("/orders", content=f'{{"{LONG_NAME}":1,"{LONG_NAME}":2}}', headers=JSON)
    assert (status.status_code, twice.status_code) == (422, 400)
    assert len(status.content) < 2_000 and len(twice.content) < 2_000
    assert "xxx" in status.json()["error"] and "kkk" in twice.json()["error"]


def test_a_large_body_that_is_no_json_is_400(idle_service: Serving) -> None:
    """Also where nobody looks for every fault, broken JSON and too many levels are told from wrong values."""
    items = b"{}," * 300_000
    for body, word in (
        (b'{"items":[' + items + b"{}]", "not valid JSON"),
        (b'{"items":[' + items + b"{}]}}", "not valid JSON"),
        (b'{"items":[' + items + b'"\xff"]}', "not valid JSON"),
        (b'{"items":[' + items + b"[" * 31 + b"]" * 31 + b"]}", "32 levels"),
    ):
        answer = idle_service.client.post("/orders", content=body, headers=JSON)
        assert answer.status_code == 400
        assert word in answer.json()["error"]


def test_the_faults_of_a_batch_are_bounded(idle_service: Serving) -> None:
    """A verdict names ten faults and all together ten thousand; then each has the first in a sentence."""
    row = b'{"user_id":1,"items":[' + b'{"quantity":0},' * 99 + b'{"quantity":0}]}\n'
    process = psutil.Process(idle_service.process.pid)
    before = process.cpu_times()
    answer = idle_service.client.post("/orders/batch", content=row * 2_000, headers=NDJSON)
    spent = process.cpu_times()
    verdicts = [json.loads(line) for line in answer.text.splitlines()]
    assert [verdict["row"] for verdict in verdicts] == list(range(1, 2_001))
    assert {verdict["status"] for verdict in verdicts} == {422}
    assert [len(verdict.get("errors", ())) for verdict in verdicts] == [10] * 1_000 + [0] * 1_000
    assert all(verdict["error"].startswith("/items/0/quantity: ") for verdict in verdicts)
    assert "more than 10 faults" in verdicts[0]["error"]
    assert "several faults" in verdicts[-1]["error"]
    # It took 56 seconds while every row was searched for all of its faults.
    assert spent.user + spent.system - before.user - before.system < 10


def test_batches_beyond_the_limit_are_told_to_come_back(idle_service: Serving) -> None:
    """Sixteen batches are read at one time; the next is a 503 with Retry-After, until one of them has ended."""
    head = b"POST /orders/batch HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
    head += b"content-type: application/x-ndjson\r\ncontent-length: 6\r\n\r\n"
    row = json.dumps({"user_id": 1, "items": [{"name": "Pen", "quantity": 1}]})

    def one_more() -> Answer:
        with connect(idle_service.url) as connection:
            connection.sendall(head.replace(b"content-length: 6", b"content-length: %d" % len(row)) + row.encode())
            return read_answer(connection)

    with ExitStack() as stack:
        halves = [stack.enter_context(connect(idle_service.url)) for _ in range(16)]
        for connection in halves:
            connection.sendall(head + b"{}\n")
        wait_until(lambda: one_more().status == 503)
        refused = one_more()
        assert refused.headers["retry-after"] == "1"
        assert "16 batches" in refused.json()["error"]
        for connection in halves:
            connection.sendall(b"{}\n")
        assert {read_answer(connection).status for connection in halves} == {200}
    wait_until(lambda: one_more().status == 200)
