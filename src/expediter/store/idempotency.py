"""Idempotency keys: the answers that are kept under them, in the transactions that they caused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from sqlalchemy import bindparam, delete, select

from expediter.backends.databases import Connection
from expediter.errors import IdempotencyMismatch
from expediter.store import schema
from expediter.store.statements import among
from expediter.store.submissions import Answer, IdempotencyKey, Replayed

#: An answer and what identifies the request that it was given to.
Kept = tuple[str, Answer]

_LOAD_KEYS = select(schema.idempotency_keys).where(
    among(schema.idempotency_keys.c.idempotency_key),
    schema.idempotency_keys.c.expires_at > bindparam("now"),
)
REMOVE_KEYS = delete(schema.idempotency_keys).where(among(schema.idempotency_keys.c.idempotency_key))
_REMOVE_EXPIRED = REMOVE_KEYS.where(schema.idempotency_keys.c.expires_at <= bindparam("now"))


class _About(msgspec.Struct):
    order_id: str | None = None


_to_json = msgspec.json.Encoder().encode


async def load_answers(connection: Connection, keys: list[str], now: int) -> dict[str, Kept]:
    """Return what is kept under these keys, by key."""
    rows = await connection.fetch(_LOAD_KEYS, ids=keys, now=now)
    return {row[0]: (row[1], Answer(row[2], msgspec.json.decode(row[3]), row[4])) for row in rows}


def names_of(key: IdempotencyKey) -> tuple[str, ...]:
    """Return the names under which the answer to a request with this key may be kept."""
    return (key.key, key.unowned) if key.unowned else (key.key,)


def find_answer(key: IdempotencyKey, answers: Mapping[str, Kept]) -> Replayed | None:
    """Return what is kept under this key; None: nothing. Raises IdempotencyMismatch.

    What was kept before callers had API keys was kept for anyone. It counts for the very same request alone: so
    that a retry places nothing twice, and a text that others have used is free for whatever else.
    """
    if (kept := answers.get(key.key)) is not None:
        return replay_answer(key, kept)
    kept = answers.get(key.unowned) if key.unowned else None
    return Replayed(kept[1]) if kept is not None and kept[0] == key.fingerprint else None


async def kept_answer(connection: Connection, key: IdempotencyKey, now: int) -> Replayed | None:
    """Return what is kept under this key; None: nothing. Raises IdempotencyMismatch."""
    return find_answer(key, await load_answers(connection, list(names_of(key)), now))


def replay_answer(key: IdempotencyKey, kept: Kept) -> Replayed:
    """Return the kept answer. Raises IdempotencyMismatch if it was given to another request."""
    fingerprint, answer = kept
    if fingerprint != key.fingerprint:
        raise IdempotencyMismatch(_order_of(answer))
    return Replayed(answer)


def _order_of(answer: Answer) -> str | None:
    """Return the order that an answer is about, as far as it says so."""
    if location := answer.headers.get("location"):
        return location.rpartition("/")[2]
    try:
        return msgspec.json.decode(answer.body, type=_About).order_id
    except msgspec.MsgspecError:
        return None


async def keep_answers(connection: Connection, answers: Sequence[tuple[IdempotencyKey, Answer]], now: int) -> None:
    """Keep these answers until their time is over."""
    rows = [
        (
            key.key,
            key.fingerprint,
            answer.status_code,
            _to_json(answer.headers).decode(),
            answer.body,
            now + key.keep,
        )
        for key, answer in answers
    ]
    # An expired row of the same key may still be there. One that is not expired is another process's, which was
    # faster: inserting beside it collides, and the next try finds its answer.
    await connection.run(_REMOVE_EXPIRED, ids=[row[0] for row in rows], now=now)
    await connection.insert(schema.idempotency_keys, rows)
