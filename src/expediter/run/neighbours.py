"""How the processes of one supervisor ask each other what they have measured: a local socket for each.

The sockets lie in a folder that the supervisor makes, each under the name of its process. Whoever connects is sent
everything as JSON, and no more is said.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import structlog

from expediter.telemetry.meters import Family

#: Seconds that a process may take to answer another one.
ANSWER_SECONDS_MAX = 1.0
#: Bytes of its answer, at most: some thousand times what it has.
ANSWER_BYTES_MAX = 16 * 1024 * 1024

log = structlog.get_logger(__name__)

_families = msgspec.json.Decoder(list[Family])


@asynccontextmanager
async def answering(place: Path | None, measured: Callable[[], list[Family]]) -> AsyncIterator[None]:
    """Answer at `place` for as long as this lasts; None: there is nobody beside this process.

    A process that takes another's place takes its name over when it begins.
    """
    if place is None:
        yield
        return

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(msgspec.json.encode(measured()))
        writer.close()

    own = place.with_name(f".{place.name}.{os.getpid()}")
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(str(own))
            listener.listen()
            listener.setblocking(False)
            own.replace(place)
        except OSError as error:
            log.warning("the other processes cannot tell what this one measures", error=str(error))
            yield
            return
        server = await asyncio.start_unix_server(answer, sock=listener)
        try:
            yield
        finally:
            server.close()


async def ask(place: Path) -> dict[str, list[Family] | None]:
    """Ask every process beside the one at `place`; return what each has measured, by name.

    None: it did not answer within ANSWER_SECONDS_MAX, or has ended.
    """
    try:
        others = sorted(each for each in place.parent.iterdir() if each != place and each.name[0] != ".")
    except OSError as error:
        log.warning("the other processes cannot be asked what they measure", error=str(error))
        return {}
    answers = await asyncio.gather(*(_ask_one(each) for each in others))
    return {each.name: answer for each, answer in zip(others, answers, strict=True)}


async def _ask_one(place: Path) -> list[Family] | None:
    try:
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            reader, writer = await asyncio.open_unix_connection(str(place))
            try:
                answer = bytearray()
                while (part := await reader.read(1 << 20)) and len(answer) <= ANSWER_BYTES_MAX:
                    answer += part
                return _families.decode(answer)
            finally:
                writer.close()
    except (OSError, TimeoutError, msgspec.MsgspecError):
        return None
