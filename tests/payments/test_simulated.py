"""The simulated gateway's memory has an end, and what it has forgotten costs nobody a refund."""

from __future__ import annotations

import uuid
from pathlib import Path

import msgspec
import pytest

from expediter.errors import PaymentDeclined, PaymentUnavailable
from expediter.payments import Charge, Refund
from expediter.payments.simulated import ACCOUNTS_MAX, LEDGER_ENTRIES_MAX, LedgerEntry, SimulatedGateway


async def charge(gateway: SimulatedGateway, key: str, amount_minor: int = 100) -> str:
    payment = await gateway.charge(Charge(key=key, order_id="A1", amount_minor=amount_minor, currency="USD"))
    return payment.reference


async def refund(gateway: SimulatedGateway, key: str) -> str:
    asked = Refund(key=f"{key}-refund", payment_key=key, amount_minor=100, currency="USD")
    return (await gateway.refund(asked)).reference


async def test_it_remembers_so_many_charges_and_refunds_what_it_forgot() -> None:
    """The oldest go, one for each new one; a refund of one of these succeeds, as with a real gateway."""
    gateway = SimulatedGateway()
    keys = [str(number) for number in range(ACCOUNTS_MAX + 1)]
    await charge(gateway, keys[0])
    with pytest.raises(PaymentDeclined):
        await refund(gateway, "never charged")
    for key in keys[1:]:
        await charge(gateway, key)
    assert await gateway.find(keys[0]) is None
    assert await gateway.find(keys[-1]) is not None
    assert await refund(gateway, keys[0])
    assert await refund(gateway, keys[-1])


async def test_a_full_ledger_says_what_to_do(tmp_path: Path) -> None:
    """No more is read into memory than that; what is in it still has its answer."""
    path = tmp_path / "ledger.jsonl"
    entries = (LedgerEntry("charge", str(uuid.UUID(int=number)), 1, "USD") for number in range(LEDGER_ENTRIES_MAX))
    path.write_bytes(b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries))
    gateway = SimulatedGateway(ledger=path)
    with pytest.raises(PaymentUnavailable, match="name a new file in PAYMENT_GATEWAY"):
        await charge(gateway, "new")
    assert await charge(gateway, str(uuid.UUID(int=5)), 1)
    await gateway.close()
