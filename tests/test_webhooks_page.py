"""docs/webhooks.md, carried out: its calls as they stand there, its receiver, and the numbers that it names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import httpx2

from auditing import wait_until
from expediter.backends import outside
from expediter.store import deliveries, webhooks
from expediter.work.webhooks import backoff, reader, sending
from servers import free_port
from serving import PATIENCE_SECONDS, Serving, environment

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "webhooks.md").read_text(encoding="utf-8")
COMMANDS = "\n".join(re.findall(r"^```sh\n(.*?)```", TEXT, re.M | re.S)).replace("\\\n", " ")


def command(part: str) -> tuple[str, str]:
    """Return the command of the page that has this in it, and what the page says that it prints."""
    lines = COMMANDS.splitlines()
    (index,) = [index for index, line in enumerate(lines) if part in line]
    printed = lines[index + 1] if lines[index + 1 : index + 2] else ""
    return lines[index], printed.removeprefix("# ")


def looks_like(printed: str, shape: str) -> bool:
    """Return whether it is what the page shows, where `...` is more of it."""
    return re.fullmatch(".*".join(map(re.escape, shape.split("..."))), printed.strip()) is not None


def run(line: str) -> str:
    return subprocess.run(
        line, shell=True, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True
    ).stdout


def test_the_page_works_as_it_is_written(folder: Path) -> None:
    """Subscribe, start the receiver, send a test, place an order: each event is printed once, no forged one."""
    port = free_port()
    with Serving(folder) as service:

        def here(line: str) -> str:
            return line.replace("http://127.0.0.1:8000", service.url).replace(
                "127.0.0.1:9000", f"127.0.0.1:{port}"
            )

        line, shape = command('"url": "http://127.0.0.1:9000/hooks"')
        printed = run(here(line))
        assert looks_like(printed, here(shape)), printed
        made = json.loads(printed)

        start, _ = command("examples/receive_webhooks.py")
        assert start == "WEBHOOK_SECRET=whsec_... .venv/bin/python examples/receive_webhooks.py 9000"
        receiver = subprocess.Popen(
            [sys.executable, str(ROOT / "examples" / "receive_webhooks.py"), str(port)],
            env=environment(folder) | {"WEBHOOK_SECRET": made["secret"]},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            line, shape = command("WEBHOOK_ID/test")
            line = here(line).replace("WEBHOOK_ID", made["id"])
            wait_until(lambda: looks_like(run(line), shape))
            order = {"order_id": "W1", "customer_name": "Ann", "items": [{"name": "Pen", "quantity": 1}]}
            service.client.post("/orders", json=order)
            service.until_rest("W1")
            again = {"since": "2020-01-01"}
            wait_until(lambda: service.client.get(f"/api/v1/webhooks/{made['id']}").json()["behind"] == 0)
            service.client.post(f"/api/v1/webhooks/{made['id']}/redeliver", json=again)
            wait_until(lambda: service.client.get(f"/api/v1/webhooks/{made['id']}").json()["behind"] == 0)
            headers = {"webhook-id": "evt_1", "webhook-timestamp": "1", "webhook-signature": "v1,AAAA"}
            for forged in (headers, {}, headers | {"webhook-signature": "x"}):
                answer = httpx2.post(f"http://127.0.0.1:{port}/", content=b"{}", headers=forged)
                assert answer.status_code == 401
        finally:
            receiver.terminate()
        printed, _ = receiver.communicate(timeout=PATIENCE_SECONDS)
        types = [line.split()[0] for line in printed.splitlines()]
        assert [each for each in types if each != "webhook.test"] == ["order.placed", "order.completed"]


def test_the_numbers_are_those_of_the_code() -> None:
    """What the page says of failures and limits is what the constants say."""
    for said in (
        f"There may be {webhooks.ENDPOINTS_MAX} endpoints",
        f"for {webhooks.ROTATION_SECONDS // 3600} hours the old one signs",
        f"up to {backoff.REQUESTS_MAX} at once",
        f"no answer within {outside.ANSWER_SECONDS_MAX:g} s",
        f"pause of up to {backoff.AGAIN_SECONDS_MIN:g} s",
        f"so on up to {backoff.AGAIN_SECONDS_MAX / 3600:g} hours",
        f"fails for {backoff.GIVE_UP_SECONDS // 86_400} days",
        f"kept for {deliveries.GIVEN_UP_DAYS} days",
        f"pauses of up to {backoff.FAILING_SECONDS_MAX:g} s",
        f"{reader.WAITING_MAX:,} events wait",
        f"{outside.ANSWER_BYTES_MAX // 1024} KiB of it are read, {sending.ANSWER_KEPT:,} characters kept",
        f"the newest {deliveries.DELIVERED_KEPT} are listed",
    ):
        assert said in TEXT, said
    assert backoff.FAILING_AFTER == 5
    assert "five failures in a row" in TEXT
    assert backoff.RETRY_AFTER_SECONDS_MAX == 3600
