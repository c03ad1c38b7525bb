"""Starts localstripe for a test: `start.py PORT`. Run by the Python of `.localstripe`.

By itself it listens to the whole network and keeps everything in one file of the machine. It lists the oldest
PaymentIntents first and knows no filter by time, and it refuses one parameter that Stripe takes.
"""

import sys

from aiohttp import web
from localstripe import resources
from localstripe.resources import PaymentIntent, try_convert_to_int

resources.Store.dump_to_disk = lambda self: None

_create, _list = PaymentIntent._api_create, PaymentIntent._api_list_all


def create(cls, automatic_payment_methods=None, **data):
    return _create(**data)


def newest_first(cls, url, created=None, limit=None, starting_after=None):
    found = _list(url, limit=limit, starting_after=starting_after)
    since = try_convert_to_int((created or {}).get("gte", 0))
    until = try_convert_to_int((created or {}).get("lt", 2**60))
    found._list = [each for each in reversed(found._list) if since <= each.created < until]
    return found


PaymentIntent._api_create = classmethod(create)
PaymentIntent._api_list_all = classmethod(newest_first)

from localstripe.server import app  # noqa: E402 -- its routes take what is patched above

web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)
