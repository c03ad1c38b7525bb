"""The settings that are one of a few words."""

from enum import StrEnum


class Intake(StrEnum):
    """Where an order is safe when its client is answered: in the database, or first in the broker."""

    DIRECT = "direct"
    QUEUED = "queued"


class PaymentCapture(StrEnum):
    """When the money of an order is taken."""

    AT_ONCE = "at_once"
    ON_COMPLETION = "on_completion"


class Compat(StrEnum):
    """The order service whose clients are understood, besides Expediter's own."""

    NONE = ""
    CACHED = "cached"
    QUEUED = "queued"
    PROCESSOR = "processor"
    DELIVERY = "delivery"
    STREAMS = "streams"
