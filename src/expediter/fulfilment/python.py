"""The user's own fulfiller: a Python function named by `FULFILMENT=python:package.module:function`."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from expediter.errors import ConfigurationError
from expediter.fulfilment.port import Handed, ticket_of
from expediter.orders.order import Line, Order

#: Plain functions that run at once, each in a thread of its own.
THREADS_MAX = 100


class PythonFulfiller:
    """Calls a function with a Ticket: a plain one in a thread, an `async def` in the event loop.

    It returns None or Handed.DONE when the order is carried out, Handed.TAKEN when it will report later. A plain
    function that takes too long is not ended, but its order is handed over again.
    """

    by_hand = False

    def __init__(self, named: str) -> None:
        """Import what `package.module:function` names. Raises ConfigurationError."""
        module_name, _, name = named.partition(":")
        where = f"FULFILMENT=python:{named}"
        if not module_name or not name.isidentifier():
            raise ConfigurationError(f"{where} cannot be read: write python:package.module:function")
        try:
            found: Any = getattr(importlib.import_module(module_name), name)
        except ImportError as error:
            raise ConfigurationError(
                f"{where} cannot be imported: {error}; the module must be installed, or in a folder of PYTHONPATH"
            ) from error
        except AttributeError as error:
            raise ConfigurationError(f"{where}: {error}") from error
        try:
            inspect.signature(found).bind(object())
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"{where} is no function of one argument, the order: {error}") from error
        self._function: Callable[[Any], Any] = found
        self._threads: ThreadPoolExecutor | None = None
        self.name = f"python:{named}"

    async def fulfil(self, order: Order, lines: Callable[[], Awaitable[Sequence[Line]]]) -> Handed:
        """See Fulfiller. What the function raises besides FulfilmentError counts as a bug in it."""
        ticket = ticket_of(order, await lines())
        if inspect.iscoroutinefunction(self._function):
            said = await self._function(ticket)
        else:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="fulfil")
            said = await asyncio.get_running_loop().run_in_executor(self._threads, self._function, ticket)
        return Handed.DONE if said is None else Handed(said)

    async def close(self) -> None:
        """Wait for no thread: what still runs ends with the process."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
