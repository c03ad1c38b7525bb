"""A service of a bench's own: started for one measurement, and ended by SIGTERM when that is over."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

#: Seconds that it may take to end.
END_SECONDS_MAX = 60


@contextmanager
def service(**settings: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Give the address of a service without workers, on an SQLite file unless told otherwise, and its process."""
    command = [sys.executable, "-m", "expediter", "serve", "--no-workers"]
    with tempfile.TemporaryDirectory() as folder:
        env = {"PATH": os.environ["PATH"], "PORT": "0", "DATABASE_URL": f"sqlite:///{folder}/orders.db"}
        process = subprocess.Popen(command, cwd=folder, env=env | settings, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        try:
            found = (re.search(r"listens on (http://[^\s\"]+)", line) for line in process.stderr)
            yield next(each[1] for each in found if each), process
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(END_SECONDS_MAX)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(END_SECONDS_MAX)
            process.stderr.close()
