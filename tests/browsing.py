"""A real browser: a page as it stands at rest, and a tab in which scripts are run."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from servers import missing
from serving import PATIENCE_SECONDS


def drawn_by_chromium(folder: Path, address: str) -> str:
    """Open a page, wait until it is at rest, and return it as it stands then."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        missing("chromium")
        raise AssertionError
    command = [
        program,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1200,1400",
        f"--user-data-dir={folder}/profile",
    ]
    command += ["--virtual-time-budget=100000", "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True).stdout


@asynccontextmanager
async def a_tab(folder: Path, address: str) -> AsyncIterator[Callable[[str], Awaitable[Any]]]:
    """A page in Chromium; what is yielded runs a script in it and returns what it comes to."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        missing("chromium")
        raise AssertionError
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0"]
    chromium = await asyncio.create_subprocess_exec(
        program, *options, f"--user-data-dir={folder}/profile", "about:blank", stderr=asyncio.subprocess.PIPE
    )
    try:
        assert chromium.stderr is not None
        found = None
        while found is None:
            line = await asyncio.wait_for(chromium.stderr.readline(), PATIENCE_SECONDS)
            assert line, "Chromium has ended"
            found = re.search(r"ws://(127\.0\.0\.1:\d+)/", line.decode())
        async with aiohttp.ClientSession() as session:
            async with session.put(f"http://{found[1]}/json/new?{address}") as answer:
                socket = (await answer.json())["webSocketDebuggerUrl"]
            async with session.ws_connect(socket) as tab:

                async def run(script: str) -> Any:
                    asked = {"expression": script, "awaitPromise": True, "returnByValue": True}
                    await tab.send_json({"id": 1, "method": "Runtime.evaluate", "params": asked})
                    while (said := await tab.receive_json(timeout=PATIENCE_SECONDS)).get("id") != 1:
                        pass
                    assert "exceptionDetails" not in said["result"], said
                    return said["result"]["result"].get("value")

                while await run("document.readyState + location.href") != f"complete{address}":
                    pass
                yield run
    finally:
        chromium.kill()
        await chromium.wait()
