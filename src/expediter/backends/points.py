"""Named moments at which a test may stop, delay or kill a process. Inert unless EXPEDITER_TEST_POINTS is set.

`EXPEDITER_TEST_POINTS="seed=7 committed:kill:0.01 called:pause:0.02:3000 *:pause:0.05:20"`: at the moment
`committed`, one time in a hundred, the process kills itself (SIGKILL); at `called` it stands still for 3,000 ms
one time in fifty, and at every moment for 20 ms one time in twenty. What it draws follows the seed.
"""

from __future__ import annotations

import os
import signal
import time
from random import Random
from typing import NamedTuple

import structlog

from expediter.errors import ConfigurationError

VARIABLE = "EXPEDITER_TEST_POINTS"
#: The moments, in the order in which an order passes them.
NAMES = (
    "loaded",  # its row and job were read and are locked
    "decided",  # what becomes of it is known and not written
    "announced",  # the cache was told, nothing is written
    "visible",  # others can read it, this process has not heard of it; on SQLite, in the writer's thread
    "committed",  # it is stored, nobody was told
    "told",  # whoever asked was answered
    "claimed",  # a worker holds it, and the intent is stored
    "called",  # the gateway or the fulfiller has answered
    "handed in",  # what they answered is stored
    "kept",  # queued intake: Redis has it, the broker has not
    "sent",  # the broker has it, nobody was answered
    "applied",  # it is stored, Redis was not told
)

log = structlog.get_logger(__name__)


class _Action(NamedTuple):
    point: str
    what: str
    chance: float
    seconds: float


class _Plan:
    def __init__(self, text: str) -> None:
        seed, actions = "0", []
        for word in text.split(" "):
            point, *rest = word.replace("_", " ").split(":")
            if word.startswith("seed="):
                seed = word.removeprefix("seed=")
            elif word:
                what, chance, *more = rest
                actions.append(_Action(point, what, float(chance), float(more[0]) / 1000 if more else 0.0))
                if point not in (*NAMES, "*") or what not in ("kill", "pause"):
                    raise ValueError(word)
        self._random = Random(seed)
        self._actions = actions

    def reach(self, name: str) -> None:
        for action in self._actions:
            if action.point in (name, "*") and self._random.random() < action.chance:
                if action.what == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(action.seconds)


_plan: _Plan | None = None


def switch_on(text: str) -> None:
    """Do at the named moments what `text` says. Raises ConfigurationError."""
    global _plan
    try:
        _plan = _Plan(text)
    except ValueError as error:
        raise ConfigurationError(f"{VARIABLE} cannot be read: {error}; moments are {', '.join(NAMES)}") from error
    log.warning("this process stops, stalls or dies at named moments: it is under test", points=text)


def reach(name: str) -> None:
    """Be at a named moment. It blocks the thread, as a process does that gets no time."""
    if _plan is not None:
        _plan.reach(name)
