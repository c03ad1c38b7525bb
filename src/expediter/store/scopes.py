"""What an API key may be used for, and what its name may be."""

from __future__ import annotations

from enum import StrEnum

#: Characters of a key's name.
NAME_CHARACTERS_MAX = 128
#: What a name is: a terminal shows it as it is, so it has no control characters.
NAME_PATTERN = "^[^\\x00-\\x1f\\x7f]+$"


class Scope(StrEnum):
    """What a key may be used for; `admin` is for everything."""

    ORDERS_READ = "orders:read"
    ORDERS_WRITE = "orders:write"
    EVENTS_READ = "events:read"
    WEBHOOKS = "webhooks"
    ADMIN = "admin"
