"""The user's own gateway: a Python class named by `PAYMENT_GATEWAY=python:package.module:Name`."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from expediter.errors import ConfigurationError, PaymentDeclined
from expediter.payments.port import Payment, PaymentGateway

#: What a class must have, and what it needs besides for PAYMENT_CAPTURE=on_completion.
_CALLS = ("charge", "find", "refund", "close")
_RESERVING = ("capture", "void")


class AtOnce:
    """A gateway whose class cannot reserve: the calls for that say so, and the others are its own."""

    def __init__(self, own: Any) -> None:
        self.name: str = own.name
        self.key_window_seconds: float = own.key_window_seconds
        self.charge, self.find, self.refund, self.close = own.charge, own.find, own.refund, own.close

    async def capture(self, key: str, amount_minor: int) -> Payment:
        """Refuse."""
        raise PaymentDeclined(f"{self.name} has no `async def capture`")

    async def void(self, key: str) -> Payment:
        """Refuse."""
        raise PaymentDeclined(f"{self.name} has no `async def void`")


def load_gateway(named: str, *, reserving: bool) -> PaymentGateway:
    """Return an instance of what `package.module:Name` names, made without arguments.

    With `reserving` it must be able to capture and to void, too. Raises ConfigurationError if it cannot be
    imported or made, or lacks what the port has (payments/port.py).
    """
    module_name, _, name = named.partition(":")
    where = f"PAYMENT_GATEWAY=python:{named}"
    if not module_name or not name.isidentifier():
        raise ConfigurationError(f"{where} cannot be read: write python:package.module:Name")
    try:
        made: Any = getattr(importlib.import_module(module_name), name)()
    except ImportError as error:
        raise ConfigurationError(
            f"{where} cannot be imported: {error}; the module must be installed, or in a folder of PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise ConfigurationError(f"{where}: {error}") from error
    except TypeError as error:
        raise ConfigurationError(f"{where} cannot be made without arguments: {error}") from error
    missing = [
        call for call in (*_CALLS, *_RESERVING) if not inspect.iscoroutinefunction(getattr(made, call, None))
    ]
    if missing and missing[0] in _CALLS:
        raise ConfigurationError(f"{where} has no `async def {missing[0]}`: see expediter.payments.PaymentGateway")
    if missing and reserving:
        raise ConfigurationError(
            f"{where} has no `async def {missing[0]}`, which PAYMENT_CAPTURE=on_completion needs"
        )
    if not isinstance(getattr(made, "name", None), str):
        raise ConfigurationError(f"{where} has no `name`, a text that people read")
    window = getattr(made, "key_window_seconds", None)
    if not isinstance(window, int | float) or window <= 0:
        raise ConfigurationError(
            f"{where} has no `key_window_seconds`: for how long the gateway does under one key nothing twice"
        )
    gateway: PaymentGateway = AtOnce(made) if missing else made
    return gateway
