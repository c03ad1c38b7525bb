"""Who calls, and whether they may: API keys in two headers, and the admin password in three places."""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from typing import NoReturn

from expediter.errors import Forbidden, Unauthorized
from expediter.store.keys import PREFIX, KeyRing
from expediter.store.scopes import Scope
from expediter.web.context import Context
from expediter.web.http import Call
from expediter.web.operations import Operation
from expediter.web.problems import RequestRefused

_HEADERS = (b"authorization", b"x-api-key")
_BEARER = re.compile(rb"bearer(?:[ \t]+(.*))?", re.I | re.S)
_KEY = re.compile(PREFIX.encode() + b"[0-9a-f]{64}")

#: How to give a key, as RFC 6750 says it, and the password.
_BEARER_CHALLENGE = 'Bearer realm="expediter"'
_BASIC_CHALLENGE = 'Basic realm="expediter admin"'

_NO_KEY = "Give an API key, as Authorization: Bearer, or in X-API-Key"
_NO_KEY_HERE = "This is no API key: one is exp_ and 64 hexadecimal digits, and a request has one"
_WRONG_KEY = "This API key is unknown, revoked or over"
_ASK_ADMIN = "Give the admin password in X-Admin-Password, by HTTP Basic, or as admin_password in the body"


def identify(call: Call, ring: KeyRing) -> None:
    """Note at a call which API key it has come with, or why it counts as a stranger's. Asked once a call."""
    if call.key_id or call.stranger is not None:
        return
    given = given_keys(call)
    if not given:
        call.stranger = Unauthorized(_NO_KEY, guessed=False, challenge=_BEARER_CHALLENGE)
        return
    secret = given.pop()
    holder = ring.holder(secret) if not given else None
    if holder is not None:
        call.key_id, call.scopes = holder.key_id, holder.scopes
    else:
        call.stranger = _wrong(_WRONG_KEY if _KEY.fullmatch(secret) and not given else _NO_KEY_HERE)


def given_keys(call: Call) -> set[bytes]:
    """Return the different keys that a request gives: in either header, and however often. More than one is wrong.

    What comes by another scheme than Bearer is none.
    """
    named = call.named
    if len(named) == len(call.headers):  # none comes twice
        own = named.get(b"x-api-key")
        if own is not None and b"authorization" not in named:
            return {own.strip()}
        values = [(name, named[name]) for name in _HEADERS if name in named]
    else:
        values = [(name, value) for name, value in call.headers if name in _HEADERS]
    found = set()
    for name, value in values:
        if name == b"x-api-key":
            found.add(value.strip())
        elif (bearer := _BEARER.fullmatch(value.strip())) is not None:
            found.add((bearer[1] or b"").strip())
    return found


def allow(call: Call, operation: Operation) -> None:
    """Let a call through that may ask for this operation, where callers need a key.

    Raises Unauthorized, and Forbidden, which names the scope that its key lacks. Of admin calls `admit` is the
    judge, for it knows their bodies.
    """
    scope = operation.scope
    if scope is None or scope is Scope.ADMIN or scope in call.scopes or Scope.ADMIN in call.scopes:
        return
    if call.key_id:
        raise Forbidden(scope)
    refuse(call, call.stranger or Unauthorized(_NO_KEY, guessed=False, challenge=_BEARER_CHALLENGE))


def check_admin_calls_are_on(context: Context) -> None:
    """Raise RequestRefused while there is neither an admin password nor a key for admin calls."""
    if not _password(context) and not context.ring.has_admin:
        raise RequestRefused(
            403,
            "Admin calls are off",
            f"Set ADMIN_PASSWORD to allow admin calls, or make an API key for {Scope.ADMIN}",
        )


def admit(call: Call, context: Context, in_body: str | None) -> None:
    """Let an admin call through: by a key for that, or by the password, which may be in the body.

    Raises Unauthorized, and Forbidden for a key that is for other things.
    """
    if Scope.ADMIN in call.scopes:
        return
    if call.stranger is not None and call.stranger.guessed:
        refuse(call, call.stranger)
    password = _password(context)
    given = _given_password(call, in_body)
    if password and any([hmac.compare_digest(each, password) for each in given]):
        return
    if call.key_id and not given:
        raise Forbidden(Scope.ADMIN)
    if given:  # who sends none has not guessed
        context.secrets.wrong_secret(call)
    ways = [_BASIC_CHALLENGE] if password else []
    said = _ASK_ADMIN if password else _NO_KEY
    if context.ring.asks:
        ways.append(_BEARER_CHALLENGE)
        said = f"{_ASK_ADMIN}; or an API key for {Scope.ADMIN}" if password else said
    refuse(call, Unauthorized(said, guessed=bool(given), challenge=", ".join(ways)))


def refuse(call: Call, error: Unauthorized) -> NoReturn:
    """Refuse a caller who gives no key or password, or (`error.guessed`) a wrong one: all are refused here."""
    raise error


def _wrong(said: str) -> Unauthorized:
    return Unauthorized(said, guessed=True, challenge=f'{_BEARER_CHALLENGE}, error="invalid_token"')


def _password(context: Context) -> bytes:
    setting = context.settings.admin_password
    return setting.get_secret_value().encode() if setting is not None else b""


def _given_password(call: Call, in_body: str | None) -> list[bytes]:
    """Return the password that a call gives, in UTF-8; a header may be read in two ways. None: an empty list."""
    raw = call.named.get(b"x-admin-password") or _basic_password(call)
    if not raw:
        return [in_body.encode()] if in_body else []
    # Clients send it as they like: most in UTF-8, some, as HTTP had it once, in Latin-1.
    return [raw, raw.decode("latin-1").encode()]


def _basic_password(call: Call) -> bytes:
    scheme, _, credentials = call.named.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    except (ValueError, binascii.Error):
        return b""
