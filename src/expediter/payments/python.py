"""The user's own gateway: a Python class named by `PAYMENT_GATEWAY=python:package.module:Name`."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from expediter.errors import ConfigurationError
from expediter.payments.port import PaymentGateway

_CALLS = ("charge", "find", "capture", "void", "refund", "close")


def load_gateway(named: str) -> PaymentGateway:
    """Return an instance of what `package.module:Name` names, made without arguments.

    Raises ConfigurationError if it cannot be imported or made, or lacks what the port has (payments/port.py).
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
    missing = [call for call in _CALLS if not inspect.iscoroutinefunction(getattr(made, call, None))]
    if missing:
        raise ConfigurationError(f"{where} has no `async def {missing[0]}`: see expediter.payments.PaymentGateway")
    if not isinstance(getattr(made, "name", None), str):
        raise ConfigurationError(f"{where} has no `name`, a text that people read")
    window = getattr(made, "key_window_seconds", None)
    if not isinstance(window, int | float) or window <= 0:
        raise ConfigurationError(
            f"{where} has no `key_window_seconds`: for how long the gateway does under one key nothing twice"
        )
    gateway: PaymentGateway = made
    return gateway
