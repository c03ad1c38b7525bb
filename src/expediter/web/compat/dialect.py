"""What may differ in how another service's clients speak: words, codes, keys and defaults, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import msgspec


class Kind(StrEnum):
    """What a request asks for."""

    PLACE = "place"
    LIST = "list"
    GET = "get"
    CHANGE = "change"
    DELETE = "delete"
    METRICS = "metrics"
    POPULATE = "populate"
    ADMIN = "admin"
    OTHER = "other"


class Refusals(StrEnum):
    """What the body of a refusal is: `{"error": sentence}`, or FastAPI's `detail`."""

    ERROR = "error"
    DETAIL = "detail"


class Dialect(msgspec.Struct, frozen=True, kw_only=True):
    """One service's way to speak. Whatever is not given is as it is here.

    `canonical`: it holds for `/api/v1/orders`, too, not only for the short paths. `shown` has words for statuses,
    `meant` the status for each word that its clients send (in small letters). `through`: a change of status goes
    all the way, by several moves in one transaction. `codes` has the status code of an answer by what was asked
    and by its code here; `refused` that of refusals. `naive_times`: times without their zone, which is UTC.
    `digits`: a quantity may be a text of digits. `lenient`: unknown keys and parameters are passed over.
    `whole_lists`: a list without `limit` has all orders, and limits out of range are brought into it. `counted`: a
    list always says how many orders there are. `empty_ids`: metrics without ids have an empty list. `attempts`: an
    order that is read has its payment attempts, and each its id as `id`. `placed_as`: the status in the answer to
    a new order. `deleted`: the message after a deletion.
    """

    canonical: bool = False
    shown: Mapping[str, str] = {}
    meant: Mapping[str, str] = {}
    through: bool = False
    codes: Mapping[tuple[Kind, int], int] = {}
    refusals: Refusals | None = None
    refused: Mapping[tuple[Kind | None, int], int] = {}
    naive_times: bool = False
    digits: bool = False
    lenient: bool = False
    whole_lists: bool = False
    counted: bool = False
    empty_ids: bool = False
    attempts: bool = False
    placed_as: str | None = None
    deleted: str | None = None
