"""The road of an order, simulated: what an arrival rate does to acceptance, to the jobs that wait, to completion.

    python bench/simulate.py [--slots 25 100] [--seed 1] [--commit-ms 0.1] [--order-ms 0.09] [--step-ms 0.04]

Orders arrive at random (Poisson) at one process on one database. One transaction runs at a time; what arrives
meanwhile is in the next. A worker claims what is due, one claim at a time; an order keeps its slot through payment
and fulfilment, whose outcomes go through the same transactions. No call fails. docs/scaling.md reads the tables.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from random import Random
from statistics import fmean
from typing import Any

from expediter.settings import Settings
from expediter.store.gathering import BATCH_REQUESTS_MAX, QUEUE_REQUESTS_MAX
from expediter.work.worker import CLAIM_MAX


def latency(part: str) -> tuple[float, ...]:
    return tuple(Settings.model_fields[f"{part}_mock_latency_{end}"].default / 1000 for end in ("min", "max"))


#: What a transaction takes whatever is in it: one flush (docs/decisions/002: "a flush here takes 0.1 ms").
COMMIT_SECONDS = 0.000_1
#: What a placed order adds, HTTP included: the 3 ms of a batch of 32, less the flush, by 32 (docs/decisions/002).
ORDER_SECONDS = 0.000_09
#: What a claim, a payment, a completion add each: 4,432 to 5,152 orders/s come to rest (bench/README.md), which is
#: 0.21 ms an order; less its placing, over three steps.
STEP_SECONDS = 0.000_04
#: The mean time of an order's two calls.
CALL_SECONDS = (sum(latency("payment")) + sum(latency("fulfilment"))) / 2
#: A run has so many orders, or so many seconds if that is longer; its first fifth is not counted.
ORDERS_PER_RUN = 20_000
SECONDS_MIN = 10.0
#: Orders a second for intake alone; with slots, shares of slots / mean time of an order's calls.
INTAKE_RATES = (100, 1_000, 2_000, 5_000, 8_000, 10_000, 11_000, 15_000)
LOADS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.1)
SLOTS = (25, 100, 400, 1_600)


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is simulated; times in seconds, the rate in orders a second. Without slots nothing is worked off."""

    rate: float
    slots: int = 0
    seconds: float = SECONDS_MIN
    seed: int = 1
    commit: float = COMMIT_SECONDS
    order: float = ORDER_SECONDS
    step: float = STEP_SECONDS
    batch_max: int = BATCH_REQUESTS_MAX
    queue_max: int = QUEUE_REQUESTS_MAX
    payment: tuple[float, ...] = latency("payment")
    fulfilment: tuple[float, ...] = latency("fulfilment")


class Run:
    """One run and what was seen in it after its first fifth. An order is the time of its arrival."""

    def __init__(self, model: Model) -> None:
        self.model, self.random, self.now = model, Random(model.seed), 0.0
        self.begin, self.window = model.seconds / 5, model.seconds * 4 / 5
        self.tie, self.sums = count(), [0.0] * 4
        self.agenda: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        #: Requests: what follows their commit, and for which order (for a claim: how many it may take).
        self.queue: deque[tuple[Callable[..., None], Any]] = deque()
        self.due: deque[float] = deque()
        self.inside = self.busy = self.refused = self.stored = self.done = self.due_at_begin = 0
        self.committing = self.claiming = False
        self.batches, self.acceptance, self.completion = list[int](), list[float](), list[float]()
        self.at(self.random.expovariate(model.rate), self.arrive)
        while self.agenda[0][0] <= model.seconds:
            time, _, what, whom = heappop(self.agenda)
            self.pass_time(time)
            what(*whom)
        self.pass_time(model.seconds)
        #: Means over time: orders not at rest, jobs due, slots taken, transactions running.
        means = (total / self.window for total in self.sums)
        self.inside_mean, self.due_mean, self.busy_mean, self.committer_used = means
        self.due_growth = (len(self.due) - self.due_at_begin) / self.window

    def at(self, time: float, what: Callable[..., None], *whom: Any) -> None:
        heappush(self.agenda, (time, next(self.tie), what, whom))

    def pass_time(self, time: float) -> None:
        if self.now < self.begin <= time:
            self.due_at_begin = len(self.due)
        span = max(0.0, time - max(self.now, self.begin))
        for index, value in enumerate((self.inside, len(self.due), self.busy, self.committing)):
            self.sums[index] += value * span
        self.now = time

    def arrive(self) -> None:
        self.at(self.now + self.random.expovariate(self.model.rate), self.arrive)
        if len(self.queue) >= self.model.queue_max:
            self.refused += self.now >= self.begin
            return
        self.inside += 1
        self.ask(self.placed, self.now)

    def ask(self, then: Callable[..., None], whom: Any) -> None:
        # A worker's requests are never refused: they are at most as many as its slots, and one claim.
        self.queue.append((then, whom))
        if not self.committing:
            self.commit()

    def commit(self) -> None:
        batch, seconds = [], self.model.commit
        for _ in range(min(len(self.queue), self.model.batch_max)):
            then, whom = self.queue.popleft()
            if then == self.claimed:
                whom = [self.due.popleft() for _ in range(min(whom, len(self.due)))]
                self.busy += len(whom)
                seconds += self.model.step * len(whom)
            else:
                seconds += self.model.order if then == self.placed else self.model.step
            batch.append((then, whom))
        self.batches += [len(batch)] * (self.now >= self.begin)
        self.committing = True
        self.at(self.now + seconds, self.committed, batch)

    def committed(self, batch: list[tuple[Callable[..., None], Any]]) -> None:
        for then, whom in batch:
            then(whom)
        self.committing = False
        if self.due and not self.claiming and (free := self.model.slots - self.busy) > 0:
            self.claiming = True
            self.queue.append((self.claimed, min(free, CLAIM_MAX)))
        if self.queue:
            self.commit()

    def placed(self, order: float) -> None:
        self.stored += self.now >= self.begin
        self.acceptance += [self.now - order] * (order >= self.begin)
        self.inside -= not self.model.slots
        self.due.extend([order] * bool(self.model.slots))

    def claimed(self, orders: list[float]) -> None:
        self.claiming = False
        for order in orders:
            self.at(self.now + self.random.uniform(*self.model.payment), self.ask, self.paid, order)

    def paid(self, order: float) -> None:
        self.at(self.now + self.random.uniform(*self.model.fulfilment), self.ask, self.completed, order)

    def completed(self, order: float) -> None:
        self.busy -= 1
        self.inside -= 1
        self.done += self.now >= self.begin
        self.completion += [self.now - order] * (order >= self.begin)


def quantiles(values: Sequence[float], digits: int) -> str:
    ordered = sorted(values)
    return " / ".join(f"{ordered[int(share * (len(ordered) - 1))] * 1000:,.{digits}f}" for share in (0.5, 0.99))


def row(rate: float, slots: int, **costs: Any) -> str:
    run = Run(Model(rate=rate, slots=slots, seconds=max(SECONDS_MIN, ORDERS_PER_RUN / rate), **costs))
    flows = [rate, (run.done if slots else run.stored) / run.window, run.refused / run.window]
    cells = [f"{flow:,.0f}" for flow in ([slots] if slots else []) + flows]
    cells += [quantiles(run.acceptance, 1), f"{fmean(run.batches):,.1f}", f"{run.committer_used:.0%}"]
    if slots:
        cells += [f"{run.busy_mean / slots:.0%}", f"{run.due_mean:,.0f}", f"{round(run.due_growth):,}"]
        cells.append(quantiles(run.completion, 0))
    return f"| {' | '.join(cells)} |"


def table(slots: int, **costs: Any) -> list[str]:
    heads = ["slots", "orders/s", "completed/s"] if slots else ["orders/s", "stored/s"]
    heads += ["503/s", "accepted in, ms", "batch", "committer"]
    heads += ["slots in use", "jobs due", "growth/s", "completed in, ms"] if slots else []
    rates = [load * slots / CALL_SECONDS for load in LOADS] if slots else INTAKE_RATES
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    return lines + [row(rate, slots, **costs) for rate in rates]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, nargs="+", default=[0, *SLOTS], help="0: intake alone")
    parser.add_argument("--seed", type=int, default=1)
    for name in ("commit", "order", "step"):
        parser.add_argument(f"--{name}-ms", type=float, default=getattr(Model, name) * 1000)
    given = parser.parse_args()
    costs = {name: getattr(given, f"{name}_ms") / 1000 for name in ("commit", "order", "step")}
    for slots in given.slots:
        print(*table(slots, seed=given.seed, **costs), "", sep="\n")


if __name__ == "__main__":
    main()
