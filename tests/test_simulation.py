"""The simulation behind docs/scaling.md against what queueing theory knows, and the document against both."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expediter.backends.databases import Connection, open_database
from expediter.store.lookups import history
from servers import Server
from storing import Place, applied, ask, claimed, open_committer, place, position

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")

_spec = importlib.util.spec_from_file_location("simulate", ROOT / "bench" / "simulate.py")
assert _spec is not None and _spec.loader is not None
simulate = importlib.util.module_from_spec(_spec)
sys.modules["simulate"] = simulate  # its dataclass looks its own module up
_spec.loader.exec_module(simulate)

#: Model parameters for an order that takes 2 ms of calls: many orders in little time.
QUICK = {"payment": (0.000_5, 0.001_5), "fulfilment": (0.000_5, 0.001_5), "commit": 0.0, "order": 0.0, "step": 0.0}


def run(**model: Any) -> Any:
    return simulate.Run(simulate.Model(**model))


def test_a_seed_repeats_itself() -> None:
    """The same seed gives the same run, another one another."""
    first, again, other = (run(rate=300, slots=100, seed=seed).completion for seed in (1, 1, 2))
    assert first == again != other


@settings(max_examples=12, deadline=None)
@given(load=st.floats(0.1, 0.9), slots=st.integers(5, 100), seed=st.integers(1, 1000))
def test_littles_law_holds(load: float, slots: int, seed: int) -> None:
    """Orders not at rest = orders completed a second × mean time to completion."""
    seen = run(rate=load * slots / simulate.CALL_SECONDS, slots=slots, seconds=60.0, seed=seed)
    assert seen.inside_mean == pytest.approx(seen.done / seen.window * fmean(seen.completion), rel=0.08)


@settings(max_examples=12, deadline=None)
@given(load=st.floats(0.2, 0.9), slots=st.integers(5, 60), seed=st.integers(1, 1000))
def test_slots_needed_are_rate_times_time(load: float, slots: int, seed: int) -> None:
    """Below saturation the slots in use are the rate × the time of an order's calls, and nothing piles up."""
    seen = run(rate=load * slots / 0.002, slots=slots, seconds=2.0, seed=seed, **QUICK)
    assert seen.busy_mean == pytest.approx(seen.done / seen.window * 0.002, rel=0.05)
    assert abs(seen.due_growth) < 0.05 * seen.model.rate


@pytest.mark.parametrize("slots", [25, 100, 400])
def test_above_saturation_the_queue_grows_by_rate_less_capacity(slots: int) -> None:
    """Where more comes than slots / time, that much is completed, the rest piles up, acceptance stays fast."""
    capacity = slots / simulate.CALL_SECONDS
    seen = run(rate=1.3 * capacity, slots=slots, seconds=20.0)
    assert seen.done / seen.window == pytest.approx(capacity, rel=0.03)
    assert seen.due_growth == pytest.approx(0.3 * capacity, rel=0.15)
    assert seen.refused == 0
    assert max(seen.acceptance) < 0.01


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_with_batches_of_one_it_is_the_single_server(load: float) -> None:
    """One order a transaction of fixed time: the mean wait is Pollaczek and Khinchine's (M/D/1)."""
    time = simulate.COMMIT_SECONDS + simulate.ORDER_SECONDS
    seen = run(rate=load / time, seconds=20.0, batch_max=1)
    assert seen.committer_used == pytest.approx(load, rel=0.02)
    assert fmean(seen.acceptance) == pytest.approx(time + load * time / (2 * (1 - load)), rel=0.05)


@settings(max_examples=12, deadline=None)
@given(rate=st.floats(50, 10_000), seed=st.integers(1, 1000))
def test_nobody_is_accepted_before_a_transaction_of_their_own(rate: float, seed: int) -> None:
    """Acceptance takes a commit and an order's time at least; below the bulk limit none is refused."""
    seen = run(rate=rate, seconds=2.0, seed=seed)
    assert min(seen.acceptance) >= simulate.COMMIT_SECONDS + simulate.ORDER_SECONDS - 1e-9
    assert seen.refused == 0
    assert len(seen.queue) <= simulate.BATCH_REQUESTS_MAX


def test_a_busy_committer_has_the_batch_that_pays_for_its_commit() -> None:
    """Near saturation what arrives in a transaction is the next batch: n = rate × (commit + n × order)."""
    seen = run(rate=10_500, seconds=10.0)
    size = 10_500 * simulate.COMMIT_SECONDS / (1 - 10_500 * simulate.ORDER_SECONDS)
    assert fmean(seen.batches) == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize("batch_max", [1, 8, 256])
def test_above_the_bulk_limit_the_rest_is_refused(batch_max: int) -> None:
    """Full batches back to back are all there is; what arrives beyond them is a 503 once the queue is full."""
    limit = batch_max / (simulate.COMMIT_SECONDS + batch_max * simulate.ORDER_SECONDS)
    seen = run(rate=1.4 * limit, seconds=4.0, batch_max=batch_max, queue_max=500)
    assert seen.stored / seen.window == pytest.approx(limit, rel=0.03)
    assert seen.refused / seen.window == pytest.approx(0.4 * limit, rel=0.1)
    assert len(seen.queue) <= 500


@settings(max_examples=12, deadline=None)
@given(
    rate=st.floats(1_000, 20_000),
    sizes=st.lists(st.integers(1, 256), min_size=2, max_size=2).map(sorted),
    seed=st.integers(1, 1000),
)
def test_more_room_in_a_batch_never_stores_less(rate: float, sizes: list[int], seed: int) -> None:
    """With the same arrivals, larger batches store as many orders, but for the batches at the window's edges."""
    small, large = (run(rate=rate, seconds=1.0, seed=seed, batch_max=size).stored for size in sizes)
    assert large >= small - 2 * sizes[1]


def test_the_document_shows_the_table_of_intake_alone() -> None:
    """The first table of docs/scaling.md is what `python bench/simulate.py` prints first."""
    assert "\n".join(simulate.table(0)) in TEXT


@pytest.mark.parametrize(
    "shown", [line for line in TEXT.splitlines() if re.match(r"\| [\d,]+ (\| [^|]+){10}\|$", line)]
)
def test_the_document_shows_the_rows_of_the_slots(shown: str) -> None:
    """Each row for worker slots in docs/scaling.md is what the simulation prints for those slots and that rate."""
    slots, rate = (cell.strip().replace(",", "") for cell in shown.split("|")[1:3])
    assert simulate.row(float(rate), int(slots)) == shown


async def test_events_can_be_partitioned_by_position(postgresql: Server) -> None:
    """After the SQL of docs/scaling.md orders are placed, claimed, read and cleared across the bounds."""
    found = re.search(r"```sql\n(BEGIN;.*?)```", TEXT, re.S)
    assert found is not None
    at = Place(postgresql.new_database(), postgresql)
    async with open_committer(at) as committer:
        await ask(committer, *(place(f"A{number}") for number in range(10)))
    # Three partitions within thirty events: before 15, from 15 to 25, the rest.
    _change(at, found[1].replace("100000000", "15").replace("200000000", "25"))
    async with open_committer(at) as committer:
        await ask(committer, *(place(f"B{number}") for number in range(10)))
        await applied(committer, place("C1"))
        assert len((await claimed(committer)).claimed) == 21
        parts = at.rows("SELECT tableoid::regclass::text, count(*) FROM events GROUP BY 1 ORDER BY 1")
        assert parts == [("events_2", 10), ("events_before", 14), ("events_rest", 18)]
        assert at.rows("SELECT max(position) FROM events") == [(42,)]
        assert position(at) == 42
        assert await _history(at, "A0") == ["order.placed", "payment.started"]
        removed = await committer.clear()
    assert removed == 21
    assert at.rows("SELECT count(*) FROM events") == [(0,)]


def _change(at: Place, script: str) -> None:
    """Carry out statements one after the other in a transaction, comments left out."""
    body = re.sub(r"^--.*\n|^BEGIN;\n|^COMMIT;\n", "", script, flags=re.M)
    at.change(f"DO $$ BEGIN {body} END $$")


async def _history(at: Place, order_id: str) -> list[str]:
    database = open_database(at.address)

    async def work(connection: Connection) -> list[str]:
        return [row.type for row in await history(connection, order_id) or []]

    try:
        return await database.read(work)
    finally:
        await database.close()
