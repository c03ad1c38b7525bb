"""API keys: made, listed and revoked by whoever may make admin calls."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from expediter.errors import Fault, InvalidInput
from expediter.orders.documents import microseconds, timestamp
from expediter.store.keys import ApiKey
from expediter.store.scopes import Scope
from expediter.store.submissions import Answer, Replayed
from expediter.web.api.admin import admin_body, slowed, unkept
from expediter.web.context import Context
from expediter.web.http import Call, Reply, answer_reply, json_reply, to_json
from expediter.web.operations import IDEMPOTENCY_KEY, Operation
from expediter.web.payloads import AdminPassword, KeyBody


class KeyDocument(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An API key. `key`, the key itself, is there only in the answer that makes it, and never again."""

    id: str
    name: str
    scopes: list[Scope]
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    last_used_at: str | None
    key: str | UnsetType = UNSET


class KeyList(msgspec.Struct, frozen=True):
    """Every API key, the oldest first, also those that are revoked."""

    keys: list[KeyDocument]


def key_document(key: ApiKey, secret: str | UnsetType = UNSET) -> KeyDocument:
    """Return a key as it is shown; with its `secret` only to whoever has just made it."""
    return KeyDocument(
        id=key.key_id,
        name=key.name,
        scopes=list(key.scopes),
        created_at=timestamp(key.created_at) or "",
        expires_at=timestamp(key.expires_at),
        revoked_at=timestamp(key.revoked_at),
        last_used_at=timestamp(key.last_used_at),
        key=secret,
    )


async def create_key(call: Call, context: Context) -> Reply:
    """Make an API key, which is shown here only. From the first one on every call needs one.

    Under an Idempotency-Key the answer is kept without the key: a repeat makes no second one, and cannot show the
    first. If its answer was lost, revoke it and make another.
    """
    body = await admin_body(call, context, KeyBody)
    expires_at = None
    if body.expires_at is not None:
        try:
            expires_at = microseconds(body.expires_at)
        except ValueError as error:
            raise InvalidInput([Fault("/expires_at", str(error))]) from error
    asked = {"name": body.name, "scopes": body.scopes, "expires_at": body.expires_at}
    key = call.idempotency_key(asked, context.keep)
    made = await context.keys.create(
        body.name, body.scopes, expires_at, key=key, word=lambda made: _kept(201, made)
    )
    if isinstance(made, Replayed):
        return answer_reply(made.answer, replayed=True)
    await context.ring.look_now()
    return json_reply(201, key_document(made.key, made.secret))


async def list_keys(call: Call, context: Context) -> Reply:
    """Return every API key, without the keys themselves. When one was used last may be a minute old."""
    await admin_body(call, context, AdminPassword)
    return json_reply(200, KeyList([key_document(each) for each in await context.keys.all()]))


async def revoke_key(call: Call, context: Context) -> Reply:
    """Revoke an API key for good; within a second it counts nowhere any more. One that is revoked stays so."""
    await admin_body(call, context, AdminPassword)
    key = call.idempotency_key("", context.keep)
    named = call.path_values["key_id"]
    revoked = await context.keys.revoke(named, key=key, word=lambda revoked: _kept(200, revoked))
    if isinstance(revoked, Replayed):
        return answer_reply(revoked.answer, replayed=True)
    await context.ring.look_now()
    return json_reply(200, key_document(revoked))


def _kept(status: int, key: ApiKey) -> Answer:
    return Answer(status, {"content-type": "application/json"}, to_json(key_document(key)).decode())


OPERATIONS = (
    Operation(
        method="POST",
        paths=("/admin/keys",),
        handler=unkept(create_key),
        at_once=slowed,
        scope=Scope.ADMIN,
        summary="Make an API key",
        tag="admin",
        answers={201: KeyDocument},
        problems=(401, 403, 409),
        body=KeyBody,
        parameters=(IDEMPOTENCY_KEY,),
        fault=("/expires_at", "must be in the future"),
    ),
    Operation(
        paths=("/admin/keys",),
        handler=unkept(list_keys),
        at_once=slowed,
        scope=Scope.ADMIN,
        summary="List API keys",
        tag="admin",
        answers={200: KeyList},
        problems=(401, 403, 422),
    ),
    Operation(
        method="DELETE",
        paths=("/admin/keys/{key_id}",),
        handler=unkept(revoke_key),
        at_once=slowed,
        scope=Scope.ADMIN,
        summary="Revoke an API key",
        tag="admin",
        answers={200: KeyDocument},
        problems=(401, 403, 404),
        parameters=(IDEMPOTENCY_KEY,),
    ),
)
