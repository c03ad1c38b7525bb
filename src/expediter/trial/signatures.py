"""Signatures of webhooks by the Standard Webhooks specification, made and checked by its own library."""

from __future__ import annotations

import base64
from collections.abc import Mapping

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from expediter.errors import ConfigurationError

_PREFIX = "whsec_"
#: What the library says, and what is said here.
_WORDS = {
    "Missing required headers": "no signature",
    "Invalid Signature Headers": "bad timestamp",
    "Message timestamp too old": "too old",
    "Message timestamp too new": "from the future",
    "No matching signature found": "bad signature",
}


def webhook_of(secret: str, named: str) -> Webhook:
    """Return what signs and checks with `secret`. Raises ConfigurationError, by the name of where it stands."""
    text = secret.removeprefix(_PREFIX)
    try:
        key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        key = b""
    if not secret.startswith(_PREFIX) or not key:
        raise ConfigurationError(f"{named} must be {_PREFIX} and a key in base64 behind it")
    return Webhook(key)


def what_is_wrong(webhook: Webhook, body: bytes, headers: Mapping[str, str]) -> str | None:
    """Return why a webhook cannot be trusted, None if it can; whatever its body and its headers are."""
    try:
        webhook.verify(body, dict(headers), json_parse=False)
    except WebhookVerificationError as error:
        return _WORDS.get(str(error), str(error))
    except ValueError:
        # What is no base64, no pair of version and signature, or no text: the library checks none of it.
        return "bad signature"
    return None
