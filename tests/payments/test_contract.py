"""The same suite over every gateway: what the service relies on, whoever moves the money."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from expediter.errors import ConfigurationError, PaymentUnavailable
from expediter.payments import Charge, Payment, PaymentGateway, Refund, Refunded, open_gateway
from expediter.payments.simulated import SimulatedGateway
from expediter.testing import exercise_gateway
from trying import TrialGateway

Open = Callable[[], PaymentGateway]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def opened(address: str, token: str | None = None) -> PaymentGateway:
    return open_gateway(address, success_rate=1.0, latency_ms_min=0, latency_ms_max=0, token=token)


@pytest.fixture(params=["simulated", "http", "python"])
def opening(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """What opens a gateway of each kind, again and again onto the same place."""
    if request.param == "simulated":
        yield lambda: opened(f"simulated://{folder}/ledger.jsonl")
    elif request.param == "python":
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setenv("OWN_GATEWAY_BOOK", str(folder / "book.json"))
        yield lambda: opened("python:own_gateway:OwnGateway")
    else:
        with TrialGateway(folder, PAYMENT_GATEWAY_TOKEN="let me in") as gateway:
            yield lambda: opened(gateway.url, "let me in")


async def test_it_does_what_the_service_relies_on(opening: Open) -> None:
    """Charges, the same again, finding, refunds, declines."""
    shown = await exercise_gateway(opening, declined_token="tok_declined")
    assert len(shown) > 10


class Forgetful(SimulatedGateway):
    """A gateway that honours no key."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    async def charge(self, charge: Charge) -> Payment:
        self._count += 1
        made = await super().charge(charge)
        return Payment(
            reference=f"{made.reference}-{self._count}",
            state=made.state,
            amount_minor=made.amount_minor,
            currency=made.currency,
        )


class Generous(SimulatedGateway):
    """A gateway that refunds what was never charged."""

    async def refund(self, refund: Refund) -> Refunded:
        return Refunded(reference="re")


@pytest.mark.parametrize(
    ("gateway", "word"), [(Forgetful, "the same charge again"), (Generous, "a refund is seen at its charge")]
)
async def test_the_suite_names_what_does_not_hold(gateway: type[SimulatedGateway], word: str) -> None:
    """A gateway that breaks a rule fails with the sentence of that rule."""
    one = gateway()
    with pytest.raises(AssertionError, match=word):
        await exercise_gateway(lambda: one)


HALF = """
class HalfAGateway:
    name = "half"
    async def charge(self, charge): ...

class Nameless(HalfAGateway):
    name = 5
    async def find(self, key): ...
    async def refund(self, refund): ...
    async def close(self): ...

class WithArguments(Nameless):
    def __init__(self, account): ...
"""


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("python:own_gateway", "write python:package.module:Name"),
        ("python:not_there:Gateway", "must be installed, or in a folder of PYTHONPATH"),
        ("python:own_gateway:Nobody", "has no attribute 'Nobody'"),
        ("python:half_a_gateway:HalfAGateway", "has no `async def find`"),
        ("python:half_a_gateway:Nameless", "has no `name`"),
        ("python:half_a_gateway:WithArguments", "cannot be made without arguments"),
        ("https://user:s3cret@gateway.example/", "PAYMENT_GATEWAY_TOKEN"),
        ("https://gateway.example/?key=s3cret", "PAYMENT_GATEWAY_TOKEN"),
        ("https:///base", "has no host"),
        ("ftp://gateway.example", "is not known"),
        ("https://gateway.example:99999/", "cannot be read"),
    ],
)
def test_what_cannot_be_opened_is_named(
    address: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address or a class that cannot be used is refused by a sentence, never with a secret in it."""
    (tmp_path / "half_a_gateway.py").write_text(HALF)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with pytest.raises(ConfigurationError) as refused:
        opened(address)
    assert words in str(refused.value)
    assert "s3cret" not in str(refused.value)
    sys.modules.pop("half_a_gateway", None)


async def test_a_gateway_that_is_not_there_has_done_nothing() -> None:
    """Nobody listens, and there is no such name: unavailable, not unknown."""
    charge = Charge(key="k", order_id="A1", amount_minor=1, currency="USD")
    for address in ("http://127.0.0.1:1", "http://nobody.invalid"):
        gateway = opened(address)
        with pytest.raises(PaymentUnavailable, match="cannot be reached"):
            await gateway.charge(charge)
        await gateway.close()
