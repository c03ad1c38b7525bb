"""The service as `expediter serve` runs it, with one more path: `POST /echo` decodes an order and stores nothing.

    python bench/served.py [--workers]

`/echo` is a plain Starlette route with msgspec, in the same process and under the same server: what remains of a
request when nothing is stored.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from expediter import cli, service
from expediter.settings import load_settings
from expediter.web.payloads import OrderBody

_decode = msgspec.json.Decoder(OrderBody).decode
_encode = msgspec.json.Encoder(decimal_format="number").encode


async def echo(request: Request) -> Response:
    return Response(_encode(_decode(await request.body())), 202, media_type="application/json")


def with_echo(app: Any) -> Any:
    plain = Starlette(routes=[Route("/echo", echo, methods=["POST"])])

    async def both(scope: Any, receive: Any, send: Any) -> None:
        await (plain if scope["path"] == "/echo" else app)(scope, receive, send)

    return both


def main() -> None:
    create_app = service.create_app
    service.create_app = lambda context: with_echo(create_app(context))  # type: ignore[assignment]
    sys.setswitchinterval(cli.SWITCH_SECONDS)
    uvloop.run(
        service.serve(
            load_settings(),
            working="--workers" in sys.argv,
            insecure=False,
            announce=lambda opened, address: print(address, flush=True),
        )
    )


main()
