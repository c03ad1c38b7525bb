"""Every fault that is brought about, by kind, with what it needs and what clients are answered meanwhile."""

from __future__ import annotations

from bringing import (
    HOUR,
    PASSES,
    alarmed,
    amid_waiting,
    at_once,
    clock_off,
    frozen,
    full_disk,
    killed,
    killed_at,
    locked,
    nothing,
    power_cut,
    quota,
    read_only,
    repeated_hints,
    restarted,
    restored,
    told,
    wiped,
)
from enduring import EVERYTHING, Fault, Meanwhile
from expediter.payments.simulated import TOKEN_UNKNOWN

TAKEN, REFUSED, SOME, NOBODY = Meanwhile
#: Seconds for which a server does nothing: longer than any request may wait; in `make test-faults` a minute.
SICK = 60.0 if EVERYTHING else 13.0
#: Seconds for which a server is away.
AWAY = 4.0

#: How often what takes long comes: in `make test` once.
TWICE = 2 if EVERYTHING else 1
SERVERS = ("postgresql", "mariadb")
#: Points that only queued intake passes, and the one that only a broker's worker does.
QUEUED = ("kept", "sent", "applied")
#: On which database `make test` kills at a point: each database, each process and both intakes have a part.
QUICK = {"decided": ("sqlite",), "called": ("postgresql",), "applied": ("mariadb",)}

KILLS = tuple(
    Fault(
        f"`kill -9` at *{point}*" + (", queued" if point in QUEUED else ""),
        killed_at(point),
        NOBODY,
        times=TWICE,
        **({"intake": "queued", "broker": "redis"} if point in QUEUED else {}),
        quick=QUICK.get(point, ()),
    )
    for point in PASSES
)

PROCESSES = (
    Fault("a worker's clock an hour ahead", clock_off("worker", HOUR), TAKEN, on=SERVERS),
    Fault("a worker's clock an hour behind", clock_off("worker", -HOUR), TAKEN, on=SERVERS, quick=("postgresql",)),
    Fault("a serving process's clock an hour ahead", clock_off("door", HOUR), TAKEN, on=SERVERS),
    Fault("a serving process's clock an hour behind", clock_off("door", -HOUR), TAKEN, on=SERVERS),
)

DISKS = (
    Fault("power cut", power_cut, NOBODY, times=TWICE, disk=True, quick=("sqlite",)),
    Fault("full disk", full_disk, SOME, disk=True, quick=("sqlite",)),
    Fault("quota on files", quota, SOME, times=3, on=("sqlite",), quick=("sqlite",)),
)

DATABASE = (
    Fault("database frozen", frozen("database"), REFUSED, SICK, on=SERVERS, quick=SERVERS),
    Fault("database locked", locked, REFUSED, SICK, quick=SERVERS),
    Fault("database read-only", read_only, REFUSED, AWAY, on=SERVERS),
    Fault("database killed", killed("database", part="database"), REFUSED, AWAY, on=SERVERS),
    Fault("database restarted", restarted, NOBODY, times=2, on=SERVERS),
    Fault("an hour-old backup restored", restored, NOBODY, quick=("sqlite",)),
)


def broker_faults(broker: str, name: str) -> tuple[Fault, ...]:
    """Return what happens to one kind of broker; queued intake needs it most."""
    queued = {"broker": broker, "intake": "queued"}
    return (
        Fault(f"{name} killed, queued", amid_waiting(killed("broker", part="queue")), TAKEN, AWAY, **queued),
        Fault(f"{name} wiped, queued", amid_waiting(wiped), TAKEN, times=2, **queued),
        Fault(f"{name} out of memory, queued", alarmed, TAKEN, AWAY, **queued),
        Fault(f"{name} frozen, queued", frozen("broker"), TAKEN, SICK, **queued, quick=("sqlite",)),
        Fault(f"{name} frozen", frozen("broker"), TAKEN, SICK, broker=broker, quick=("sqlite",)),
        Fault(f"each hint five times, shuffled, by {name}", repeated_hints, TAKEN, times=2, broker=broker),
    )


BROKERS = (*broker_faults("redis", "Redis broker"), *broker_faults("rabbitmq", "RabbitMQ"))

CACHE = (
    Fault("cache killed", killed("cache", part="cache"), TAKEN, AWAY, cache=True),
    Fault("cache flushed", told("FLUSHALL"), TAKEN, times=2, cache=True),
    Fault("cache full", told("CONFIG SET maxmemory 1", undone="CONFIG SET maxmemory 0"), TAKEN, AWAY, cache=True),
    Fault("cache read-only", told("REPLICAOF 127.0.0.1 1", undone="REPLICAOF NO ONE"), TAKEN, AWAY, cache=True),
    Fault("cache frozen", frozen("cache"), TAKEN, SICK, cache=True, quick=("sqlite",)),
    Fault(
        "Redis and its broker killed, queued",
        amid_waiting(at_once(killed("broker", part="queue"), killed("cache", part="cache"))),
        TAKEN,
        AWAY,
        broker="redis",
        intake="queued",
    ),
)

#: A gateway that drops every line is one that is down: here the breaker does not come between.
UNBROKEN = {"CIRCUIT_BREAKER_FAILURE_THRESHOLD": "1000000"}
GATEWAY = (
    Fault(
        "the gateway drops the line after charging",
        nothing,
        TAKEN,
        token=TOKEN_UNKNOWN,
        settings=UNBROKEN,
        quick=("mariadb",),
    ),
)

FAULTS = (*KILLS, *PROCESSES, *DISKS, *DATABASE, *BROKERS, *CACHE, *GATEWAY)
