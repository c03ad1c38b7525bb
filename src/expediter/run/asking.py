"""Asking the service from the command line: one at an address, or the settings' own, in this process.

Both answer the same, because both are the same application: at an address it is reached by HTTP, here by a call.
"""

from __future__ import annotations

import asyncio
import http.client
import re
import ssl
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import msgspec
from pydantic import SecretStr

from expediter.errors import ConfigurationError, ExpediterError, Refused, reason
from expediter.settings import Compat, Settings

if TYPE_CHECKING:
    from expediter.web.http import App

#: Amounts keep the digits that they are written with.
_decode = msgspec.json.Decoder(float_hook=Decimal).decode

#: Seconds that an answer over HTTP may take beyond what the call itself waits for.
ANSWER_SECONDS_MAX = 30.0
#: Times that a change is sent, always with the same Idempotency-Key, and seconds before it is sent again.
TRIES_MAX = 4
TRY_AGAIN_SECONDS = 0.5


class NotAnswered(ExpediterError):
    """Nobody answered; or what was answered is not from this service."""


class Answer(NamedTuple):
    """What the service answered; `document` is the decoded body."""

    status: int
    headers: Mapping[str, str]
    document: Any


class Asked(Protocol):
    """Whoever answers."""

    name: str

    async def send(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Send one request. Raises NotAnswered."""
        ...


class Remote:
    """A service at an address."""

    def __init__(self, url: str, key: SecretStr | None = None) -> None:
        """`key` is the API key to ask with. Raises ConfigurationError for an address, or a key, that is none."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            self._port = parts.port
        except ValueError:
            self._port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or self._port == -1:
            raise ConfigurationError(f"--url {url} is no address; write one like http://127.0.0.1:8000")
        self._secure, self._host, self._path = parts.scheme == "https", parts.hostname, parts.path.rstrip("/")
        self.name = url
        self._headers: dict[str, str] = {}
        if key is not None:
            if not re.fullmatch("[!-~]+", key.get_secret_value()):
                raise ConfigurationError("EXPEDITER_API_KEY is no API key: one begins with exp_")
            self._headers["Authorization"] = f"Bearer {key.get_secret_value()}"

    async def send(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """See Asked."""
        return await asyncio.to_thread(self._send, method, target, dict(headers), body)

    def _send(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        connection = (
            http.client.HTTPSConnection(
                self._host, self._port, timeout=ANSWER_SECONDS_MAX, context=ssl.create_default_context()
            )
            if self._secure
            else http.client.HTTPConnection(self._host, self._port, timeout=ANSWER_SECONDS_MAX)
        )
        try:
            connection.request(method, self._path + target, body or None, {**self._headers, **headers})
            answer = connection.getresponse()
            return _answer(self.name, answer.status, dict(answer.getheaders()), answer.read())
        except (OSError, http.client.HTTPException) as error:
            said = (error.strerror if isinstance(error, OSError) else None) or reason(error)
            raise NotAnswered(
                f"Nobody answers at {self.name}: {said}; --url names the address of a service that runs"
            ) from error
        finally:
            connection.close()


class Local:
    """The service that the settings describe, opened in this process: it needs no other one to run."""

    def __init__(self, app: App, name: str) -> None:
        """`name` says where its orders are."""
        self._app = app
        self.name = name

    async def send(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """See Asked."""
        from expediter.web.http import Body, Call, answered

        given = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        call = Call(method, target.encode(), [(b"host", b"localhost"), *given], Body(body))
        reply = await answered(self._app(call))
        found = {name.decode(): value.decode("latin-1") for name, value in reply.headers}
        return _answer(self.name, reply.status, found, reply.body)


def _answer(name: str, status: int, headers: Mapping[str, str], body: bytes) -> Answer:
    lower = {key.lower(): value for key, value in headers.items()}
    try:
        return Answer(status, lower, _decode(body) if body else None)
    except msgspec.DecodeError as error:
        raise NotAnswered(f"What answers at {name} is not Expediter: status {status}, and no JSON") from error


class Client:
    """Calls of the interface. Every refusal is an error."""

    def __init__(self, asked: Asked) -> None:
        """Nothing is sent yet."""
        self._asked = asked
        self.name = asked.name

    async def read(self, target: str) -> Any:
        """Return the document at `target`. Raises Refused, NotAnswered."""
        return _accepted(await self._asked.send("GET", target, {}, b""))

    async def look(self, target: str) -> Answer:
        """Return the answer at `target`, whatever it is. Raises NotAnswered."""
        return await self._asked.send("GET", target, {}, b"")

    async def change(self, method: str, target: str, body: bytes = b"", key: str | None = None) -> Answer:
        """Ask for a change, once however often it has to be sent; `key` is its Idempotency-Key.

        Raises Refused; NotAnswered, with the key, if it is not known whether the change was made.
        """
        key = key or f"cli-{uuid.uuid4()}"
        headers = {"Idempotency-Key": key}
        if body:
            headers["Content-Type"] = "application/json"
        for last in (*[False] * (TRIES_MAX - 1), True):
            try:
                answer = await self._asked.send(method, target, headers, body)
            except NotAnswered as error:
                if last:
                    again = f"the same command with --key {key} does it once"
                    raise NotAnswered(f"{error}. Whether it was done is not known: {again}") from error
            else:
                if answer.status != 503 or last:
                    _accepted(answer)
                    return answer
            await asyncio.sleep(TRY_AGAIN_SECONDS)
        raise AssertionError


def _accepted(answer: Answer) -> Any:
    if answer.status < 400:
        return answer.document
    said = answer.document if isinstance(answer.document, dict) else {}
    lines = [str(said.get("error") or said.get("detail") or f"status {answer.status}")]
    faults = [fault for fault in said.get("errors") or [] if isinstance(fault, dict)]
    if len(faults) > 1:  # a single one is the sentence itself
        lines += [f"  {fault.get('field', '')}: {fault.get('message', '')}" for fault in faults]
    raise Refused("\n".join(lines))


@asynccontextmanager
async def opened(settings: Settings, url: str | None) -> AsyncIterator[Client]:
    """Open the service at `url`; without one, that of the settings, in this process."""
    if url is not None:
        yield Client(Remote(url, settings.expediter_api_key))
        return
    # Who asks at an address need not wait until all of this is loaded.
    from expediter.run.service import open_service
    from expediter.run.serving import context_of
    from expediter.web import create_app

    # Its answers are read here, so nobody's dialect: what the dialect's settings say of new orders stays.
    plain = settings.model_copy(update={"compat": Compat.NONE})
    async with open_service(plain, working=False) as service:
        yield Client(Local(create_app(context_of(service, working=False)), service.database.describe()))
