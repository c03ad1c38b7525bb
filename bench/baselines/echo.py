"""Echo: decodes an order, answers it, stores nothing. What is left of a request when nothing is kept.

uvicorn echo:app --loop uvloop --http httptools --no-access-log
"""

from __future__ import annotations

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from expediter.web.payloads import OrderBody

_decode = msgspec.json.Decoder(OrderBody).decode
_encode = msgspec.json.Encoder(decimal_format="number").encode


async def echo(request: Request) -> Response:
    return Response(_encode(_decode(await request.body())), 202, media_type="application/json")


app = Starlette(routes=[Route("/orders", echo, methods=["POST"])])
