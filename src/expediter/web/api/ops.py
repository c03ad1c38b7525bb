"""For operators: where to look, and the pages that show the interface without an internet connection."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import re
from functools import lru_cache
from typing import NamedTuple

import msgspec

from expediter import __version__
from expediter.web.context import Context
from expediter.web.http import Call, Reply, json_reply
from expediter.web.operations import service_read


class Index(msgspec.Struct, frozen=True):
    """Where to look."""

    service: str
    version: str
    orders: str
    docs: str
    health: str


async def index(call: Call, context: Context) -> Reply:
    """Return where to look."""
    call.query()
    return json_reply(200, Index("expediter", __version__, "/api/v1/orders", "/docs", "/health"))


async def swagger(call: Call, context: Context) -> Reply:
    """The interface as a page to try calls on (Swagger UI)."""
    return await _page(call, "SWAGGER")


async def redoc(call: Call, context: Context) -> Reply:
    """The interface as a page to read (ReDoc)."""
    return await _page(call, "REDOC")


class _Page(NamedTuple):
    """A page that does not change while the process runs: as it is, packed by gzip, its tag, and its policy."""

    body: bytes
    packed: bytes
    tag: str
    policy: bytes


#: What the pages are told apart from the template: a title, calls that can be tried at the first click, no logo.
_TOLD = (
    ("<title>SwaggerUI</title>", "<title>Expediter: try the API</title>"),
    ("<title>ReDoc</title>", "<title>Expediter: the API</title>"),
    ('layout: "StandaloneLayout",', 'layout: "StandaloneLayout", tryItOutEnabled: true, deepLinking: true,'),
    ("https://cdn.redoc.ly/redoc/logo-mini-full.svg", "data:,"),
    ("https://cdn.redoc.ly/redoc/logo-mini.svg", "data:,"),
)
#: Their own scripts run and no others, and fetch from here alone. What styles there are, the scripts make as they
#: run: these have no hash.
_POLICY = (
    "default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src 'self' data:; font-src data:; "
    "connect-src 'self'; worker-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SCRIPT = re.compile(r"<script\b[^>]*>(.*?)</script>", re.S)


@lru_cache
def _template(name: str) -> _Page:
    # Imported on the first visit: it reads several megabytes of scripts, which most processes never need.
    from offapi import OpenAPITemplate

    text: str = OpenAPITemplate[name].value.format(spec_url="/openapi.json")
    for found, told in _TOLD:
        text = text.replace(found, told)
    body = text.encode()
    scripts = " ".join([f"'sha256-{_hash(script)}'" for script in _SCRIPT.findall(text)])
    policy = _POLICY.format(scripts=scripts).encode()
    return _Page(body, gzip.compress(body, mtime=0), f'"{hashlib.sha256(body).hexdigest()[:32]}"', policy)


def _hash(script: str) -> str:
    """Return the hash of a script as Content-Security-Policy has it: of its lines as a browser reads them."""
    lines = script.replace("\r\n", "\n").replace("\r", "\n")
    return base64.b64encode(hashlib.sha256(lines.encode()).digest()).decode()


async def _page(call: Call, name: str) -> Reply:
    page = await asyncio.to_thread(_template, name)
    headers = [
        (b"content-type", b"text/html; charset=utf-8"),
        (b"content-security-policy", page.policy),
        (b"cache-control", b"no-cache"),  # kept, and asked for again by its tag
        (b"vary", b"accept-encoding"),
        (b"etag", page.tag.encode()),
    ]
    if page.tag in (call.header(b"if-none-match") or ""):
        return Reply(304, b"", headers)
    if re.search(r"\bgzip\b(?!\s*;\s*q=0(?:\.0*)?(?:,|\s|$))", call.header(b"accept-encoding") or ""):
        return Reply(200, page.packed, [*headers, (b"content-encoding", b"gzip")])
    return Reply(200, page.body, headers)


OPERATIONS = (
    service_read("/", index, "Where to look", {200: Index}),
    service_read("/docs", swagger, "The interface, to try", {200: "text/html; charset=utf-8", 304: None}),
    service_read("/redoc", redoc, "The interface, to read", {200: "text/html; charset=utf-8", 304: None}),
)
