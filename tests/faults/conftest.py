"""Servers that fall ill."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from enduring import Mortals


@pytest.fixture(scope="session")
def mortals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mortals]:
    """Servers that any test of a fault may kill."""
    running = Mortals(tmp_path_factory)
    yield running
    running.stop()
