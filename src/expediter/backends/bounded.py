"""What a process keeps in memory, with a limit on its bytes: beyond that the oldest goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Bounded(Generic[K, V]):
    """Values by key. Change it from one thread at a time; `kept` may be read from any."""

    def __init__(self, bytes_max: int, size: Callable[[V], int]) -> None:
        """Keep up to `bytes_max`; `size` tells the bytes of a value, which do not change."""
        #: What is kept, the oldest first.
        self.kept: dict[K, V] = {}
        self._bytes_max = bytes_max
        self._size = size
        self._bytes = 0

    def keep(self, key: K, value: V) -> None:
        """Keep a value, in the place of the one that the key has, and of the oldest ones."""
        self.forget(key)
        self.kept[key] = value
        self._bytes += self._size(value)
        while self._bytes > self._bytes_max:
            self.forget(next(iter(self.kept)))

    def forget(self, key: K) -> None:
        """Keep nothing under this key."""
        if (value := self.kept.pop(key, None)) is not None:
            self._bytes -= self._size(value)
