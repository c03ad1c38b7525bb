"""docs/payments.md, carried out: its commands, its table of tokens and its table of answers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_http import CHARGE, ERROR, PAID, answer, asking

from expediter.errors import PaymentConflict, PaymentDeclined, PaymentUnavailable, PaymentUnknown
from expediter.trial.gateway import TOKENS
from serving import Program, Serving, environment
from trying import TrialGateway

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "payments.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", TEXT, re.M | re.S)
#: What a row's word means to whoever asks.
MEANINGS = {
    "done": None,
    "declined": PaymentDeclined,
    "conflict": PaymentConflict,
    "not done": PaymentUnavailable,
    "unknown": PaymentUnknown,
}
ANSWERS = [
    (int(status), said, meaning)
    for said, meaning in re.findall(r"^\| ((?:\d{3}|any other)[^|]*) \| ([a-z ]+) \|", TEXT, re.M)
    for status in re.findall(r"\d{3}", said)
]


def test_the_tokens_are_those_of_the_gateway() -> None:
    """The table has what the gateway's own says."""
    assert dict(re.findall(r"^\| `(tok_\w+)` \| (.*) \|$", TEXT, re.M)) == TOKENS


@pytest.mark.parametrize(("status", "said", "meaning"), ANSWERS)
async def test_an_answer_means_what_the_page_says(status: int, said: str, meaning: str) -> None:
    """Each row of the table of answers, asked for and given."""
    headers = ("Retry-After: 1",) if "with `Retry-After`" in said else ()
    document = PAID if status in (200, 201) else ERROR
    async with asking(answer(status, document, *headers)) as (gateway, _):
        expected = MEANINGS[meaning]
        if expected is None:
            assert (await gateway.charge(CHARGE)).reference
        else:
            with pytest.raises(expected):
                await gateway.charge(CHARGE)


def test_the_table_of_answers_is_whole() -> None:
    """Every meaning has a row that was read."""
    assert {meaning for _, _, meaning in ANSWERS} == set(MEANINGS)
    assert len(ANSWERS) >= 11


def told(command: str, folder: Path, **settings: str) -> str:
    """Run what the page shows, and return what it prints."""
    bin = Path(sys.executable).parent
    env = environment(folder, **settings) | {"PATH": f"{bin}:/usr/bin:/bin"}
    ended = subprocess.run(
        ["bash", "-ec", command], cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_lost_answer_is_tried_as_the_page_says(folder: Path) -> None:
    """The gateway, the service and the order whose charge is answered by nobody: paid, and charged once."""
    begun, served, tried, _ = BLOCKS
    assert begun == "expediter gateway --port 9100 --ledger payments.jsonl\n"
    assert served == "PAYMENT_GATEWAY=http://127.0.0.1:9100 expediter serve\n"
    with TrialGateway(folder) as gateway, Serving(folder, PAYMENT_GATEWAY=gateway.url) as service:
        lines = told(tried.replace("http://127.0.0.1:8000", service.url), folder).splitlines()
        assert lines[0] == "Placed LOST-1: 1.20 USD, pending"
        assert any("payment.unknown" in line for line in lines)
        assert lines[-2].endswith("status completed")
        assert lines[-1] == "1"
        assert service.stop() == 0


def test_the_example_gateway_moves_an_order(folder: Path) -> None:
    """A class of one's own charges and refunds, by the name that the page gives it."""
    settings = dict(re.findall(r"(\w+)=(\S+) ", BLOCKS[-1]))
    settings["PYTHONPATH"] = str(ROOT / settings["PYTHONPATH"])
    with Serving(folder, **settings, FULFILMENT="manual") as service:
        order = {
            "order_id": "A1",
            "customer_name": "Al",
            "items": [{"name": "Pen", "quantity": 1, "price": "1.20"}],
        }
        service.client.post("/orders", json=order)
        service.until_version("A1", 3)
        assert service.client.get("/orders/A1").json()["payment_status"] == "paid"
        service.client.post("/orders/A1/cancel")
        assert service.until_rest("A1")["payment_status"] == "refunded"
        assert '"captured":120' in (folder / "own-gateway.json").read_text().replace(" ", "")


def test_a_gateway_that_asks_for_a_token_is_shown_none_in_vain(folder: Path) -> None:
    """Without its token nothing is charged, the order says why, and the token is in no log and in no answer."""
    with (
        TrialGateway(folder, PAYMENT_GATEWAY_TOKEN="sesame-1") as gateway,
        Serving(folder, PAYMENT_GATEWAY=gateway.url, PAYMENT_GATEWAY_TOKEN="sesame-2") as service,
    ):
        order = {
            "order_id": "A1",
            "customer_name": "Al",
            "items": [{"name": "Pen", "quantity": 1, "price": "1.20"}],
        }
        service.client.post("/orders", json=order)
        service.until_version("A1", 3)
        shown = service.client.get("/orders/A1/explain").text
        assert "Bring the gateway's token" in shown
        assert gateway.entries() == []
        assert "sesame" not in shown + "".join(service.log) + "".join(gateway.log)


def test_a_second_gateway_on_one_ledger_is_refused(folder: Path) -> None:
    """Two that write one ledger would each know half of it."""
    with TrialGateway(folder) as gateway:
        second = Program(folder, "gateway", "--port", "0", "--ledger", str(gateway.ledger))
        second.wait_for("is another gateway's, which runs")
        assert second.process.wait(60) == 2
        second.stop()


def test_the_books_outlive_the_gateway(folder: Path) -> None:
    """After `kill -9` it knows every charge; half a line at the end was told to nobody, and goes."""
    with TrialGateway(folder) as gateway:
        with Serving(folder, PAYMENT_GATEWAY=gateway.url) as service:
            order = {"customer_name": "Al", "items": [{"name": "Pen", "quantity": 1, "price": "1.20"}]}
            service.until_rest(service.client.post("/orders", json=order).json()["order_id"])
        gateway.kill()
    (before,) = gateway.entries()
    with gateway.ledger.open("a") as file:
        file.write('{"action":"charge","key":"ha')
    with TrialGateway(folder) as again:
        with Serving(folder, PAYMENT_GATEWAY=again.url) as service:
            found = service.client.post("/orders", json=order | {"order_id": "A2"}).json()["order_id"]
            service.until_rest(found)
        assert [entry["order_id"] for entry in again.entries()] == [before["order_id"], "A2"]
