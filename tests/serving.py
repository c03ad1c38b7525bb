"""Runs the real program for tests: on a free port, on a database of its own, ended by its pid."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import httpx2

from expediter.errors import DatabaseUnavailable
from expediter.store.migrations import upgrade
from verifying import assert_verified

#: Seconds that a start, a stop or a wanted state may take before the test fails.
PATIENCE_SECONDS = 120.0

ADMIN_PASSWORD = "open sesame"
FAST = {
    "LEASE_SECONDS": "4",
    "LOG_FORMAT": "text",
    "PAYMENT_MOCK_SUCCESS_RATE": "1",
    "PAYMENT_MOCK_LATENCY_MIN": "0",
    "PAYMENT_MOCK_LATENCY_MAX": "0",
    "FULFILMENT_MOCK_LATENCY_MIN": "0",
    "FULFILMENT_MOCK_LATENCY_MAX": "0",
}


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """Return an environment without settings of the machine, for a database in `folder`."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    defaults = {"DATABASE_URL": f"sqlite:///{folder}/orders.db", "PORT": "0", **FAST}
    return {**kept, **defaults, **settings}


def _made() -> bytes:
    """Return a database file at the newest step, without any order."""
    with _making:  # programs are started from several threads, and alembic works in one at a time
        return _make()


@cache
def _make() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "orders.db"
        upgrade(f"sqlite:///{path}")
        return path.read_bytes()


def make_database(folder: Path, settings: dict[str, str]) -> None:
    """Put a made database into a new folder: a start there costs less. First starts have tests of their own."""
    path = folder / "orders.db"
    if "DATABASE_URL" not in settings and folder.is_dir() and not path.exists():
        with suppress(OSError):
            path.write_bytes(_made())


_making = threading.Lock()
#: What the settings of secrets end with, and what is too short to be looked for in a log.
_SECRET_NAMES = ("PASSWORD", "TOKEN", "SECRET", "API_KEY")
SECRET_MIN = 6
#: A payment token, as orders in these tests have it. Of no program that the tests run the log may have one.
_TOKEN = re.compile(r"\btok_\w")
#: How many programs run on a database now, by its address.
_running: Counter[str] = Counter()


@contextmanager
def attending(folder: Path, settings: dict[str, str]) -> Iterator[None]:
    """Where the last program on a database leaves it, the conservation laws must hold.

    Not after an error, and not where the database is away then.
    """
    used = environment(folder, **settings)
    address, gateway = used["DATABASE_URL"], used.get("PAYMENT_GATEWAY", "")
    ledger = Path(gateway.removeprefix("simulated://").partition("?")[0])
    _running[address] += 1
    try:
        yield
    except BaseException:
        _running[address] -= 1
        raise
    _running[address] -= 1
    if not _running[address]:
        with suppress(DatabaseUnavailable):
            assert_verified(address, ledger if ledger.is_file() else None)


class Died(AssertionError):
    """A program ended before it was ready."""


class Program:
    """One `expediter` process; what it writes to stderr is kept in `log`, and its data in the file `printed`."""

    def __init__(self, folder: Path, *arguments: str, printed: Path | None = None, **settings: str) -> None:
        self.log: list[str] = []
        self._secrets = [
            value for name, value in settings.items() if name.endswith(_SECRET_NAMES) and len(value) >= SECRET_MIN
        ]
        self._lines: queue.Queue[str | None] = queue.Queue()
        with (printed or Path(os.devnull)).open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "expediter", *arguments],
                cwd=folder,
                env=environment(folder, **settings),
                stdout=output,
                stderr=subprocess.PIPE,
                text=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())
            self._lines.put(line)
        self._lines.put(None)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Return the match of the first log line, from now on, that has `pattern`."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            line = self._lines.get(timeout=max(0.01, deadline - time.monotonic()))
            if line is None:
                raise Died(f"the program ended without saying {pattern!r}: {self.log}")
            if match := re.search(pattern, line):
                return match

    def kill(self) -> None:
        """End it as a power cut would: SIGKILL."""
        self.process.kill()
        self._end()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to stop and return its exit status."""
        self.process.send_signal(number)
        return self._end()

    def _end(self) -> int:
        status = self.process.wait(PATIENCE_SECONDS)
        self._reader.join(PATIENCE_SECONDS)
        if self.process.stderr is not None:
            self.process.stderr.close()
        told = [
            line for line in self.log if any(secret in line for secret in self._secrets) or _TOKEN.search(line)
        ]
        assert not told, f"the log has a secret or a payment token: {told}"
        return status


class Serving(Program):
    """A running service: `url`, and an HTTP client for it."""

    def __init__(self, folder: Path, *arguments: str, **settings: str) -> None:
        make_database(folder, settings)
        super().__init__(folder, "serve", *arguments, **settings)
        self._attending = attending(folder, settings)
        try:
            self.url = self.wait_for(r'listens on (http://[^\s"]+)')[1]
            self.client = httpx2.Client(base_url=self.url, timeout=PATIENCE_SECONDS)
            self._wait_until_ready()
        except BaseException:
            self.process.kill()
            super()._end()
            raise

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                if self.client.get("/readyz").status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            if self.process.poll() is not None:
                raise Died(f"the service ended before it was ready: {self.log}")
            if time.monotonic() > deadline:
                raise AssertionError(f"the service is not ready: {self.log}")
            time.sleep(0.01)

    def _end(self) -> int:
        self.client.close()
        return super()._end()

    def __enter__(self) -> Serving:
        self._attending.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._attending.__exit__(kind, error, trace)

    def until_version(self, order_id: str, version: int) -> dict[str, object]:
        """Return the order once it has this version or a newer one."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            order: dict[str, object] = self.client.get(f"/orders/{order_id}", params={"wait": "0.2"}).json()
            if int(str(order["version"])) >= version:
                return order
        raise AssertionError(f"{order_id} has not come to version {version}: {order}")

    def until_rest(self, order_id: str) -> dict[str, object]:
        """Return the order once nothing more happens to it unasked."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if self.client.get(f"/orders/{order_id}/explain").json()["at_rest"]:
                order: dict[str, object] = self.client.get(f"/orders/{order_id}").json()
                return order
            self.client.get(f"/orders/{order_id}", params={"wait": "0.2"})
        raise AssertionError(f"{order_id} is not at rest: {self.client.get(f'/orders/{order_id}/explain').json()}")
