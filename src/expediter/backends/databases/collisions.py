"""Transactions that collide with others (a deadlock, the same id placed twice) are run again from their start."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from expediter.backends.databases import T
from expediter.errors import ConstraintViolated

#: How often a transaction may collide before it is given up.
COLLISIONS_MAX = 10
#: The longest pause before the next try, in seconds.
PAUSE_SECONDS_MAX = 0.1


async def until_it_does_not_collide(
    once: Callable[[], Awaitable[T]], collisions: tuple[type[Exception], ...]
) -> T:
    """Run a transaction until it does not end in one of `collisions`.

    Raises ConstraintViolated after COLLISIONS_MAX times: what always collides is a row that can never be stored.
    """
    for collided in range(1, COLLISIONS_MAX):
        try:
            return await once()
        except collisions:
            await asyncio.sleep(min(PAUSE_SECONDS_MAX, 0.002 * 2**collided) * random.random())
    try:
        return await once()
    except collisions as error:
        raise ConstraintViolated(str(error)) from error
