"""Carrying orders out by a function of one's own: `FULFILMENT=python:own_fulfilment:fulfil`.

This folder must be in PYTHONPATH. The kitchen here is a file, named by OWN_KITCHEN, with a line for each order.
"""

import os

from expediter.errors import FulfilmentRefused, FulfilmentUnavailable
from expediter.fulfilment import Handed, Ticket


def fulfil(ticket: Ticket) -> Handed:
    dishes = [f"{line.quantity} x {line.name or line.item_id}" for line in ticket.items]
    if "1 x Blowfish" in dishes:
        raise FulfilmentRefused("The kitchen does not make blowfish")
    try:
        with open(os.environ.get("OWN_KITCHEN", "kitchen.txt"), "a") as kitchen:
            kitchen.write(f"{ticket.key}: {', '.join(dishes)}\n")
    except OSError as error:
        raise FulfilmentUnavailable(f"The kitchen is closed: {error.strerror}") from error
    return Handed.TAKEN if "table" in ticket.metadata else Handed.DONE
