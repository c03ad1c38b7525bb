"""What schemathesis cannot know from the document, for it is in words there: good requests keep to it.

docs/decisions/006-openapi-from-the-route-table.md has these rules.
"""

from __future__ import annotations

import uuid
from typing import Any

import schemathesis
from schemathesis import GenerationMode

#: Orders that one request may make up, seconds that one may wait, and pages that may be turned.
MADE_UP_MAX, WAIT_SECONDS_MAX, PAGES_MAX = 20, 0.2, 1000
#: What only one of these may say, and what is a text of the service's own making, or of more than letters.
_ONE_OF = (("user_id", "customer_id"), ("item_ids", "items"), ("total_amount", "items"))
_MADE_HERE = ("from",)


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    """Bound what a request asks for, and keep good ones to the rules that no schema can say."""
    query, body = case.query or {}, case.body
    if isinstance(body, dict):
        for name in ("count", "total_entries"):
            if type(body.get(name)) in (int, float) and body[name] > MADE_UP_MAX:
                body[name] = MADE_UP_MAX
    if case.meta is None or case.meta.generation.mode is not GenerationMode.POSITIVE:
        return
    if case.headers and "Idempotency-Key" in case.headers:
        case.headers["Idempotency-Key"] = uuid.uuid4().hex  # the same key again goes with the same request alone
    if "wait" in query:
        query["wait"] = 0 if case.path.startswith("/api/v1/events") else WAIT_SECONDS_MAX
    if "page" in query or "page_size" in query:
        query["page"] = min(int(query.get("page") or 1), PAGES_MAX)
        for name in ("limit", "offset", "cursor"):
            query.pop(name, None)
    if "cursor" in query:
        query.pop("offset", None)
    for name in ("after", "cursor", "types"):
        query.pop(name, None)  # a text of the service's own making
    case.body = {"since": "2026-11-21T09:30:00Z"} if case.path.endswith("/redeliver") else fitting(whole(body))


def fitting(body: Any) -> Any:
    """Return a body without members that others contradict."""
    if isinstance(body, list):
        return [fitting(each) for each in body]
    if not isinstance(body, dict):
        return body
    kept = {name: value for name, value in body.items() if name not in _MADE_HERE}
    if kept.get("url") is not None:
        kept["url"] = "http://127.0.0.1:9/"
    if kept.get("types") is not None:
        kept["types"] = ["order.*"]
    for one, other in _ONE_OF:
        if kept.get(one) is not None and kept.get(other) is not None:
            del kept[one]
    if "items" in kept:
        kept["items"] = [{"name": "Pen", "quantity": 2, "price": "1.20"}]
    return kept


def whole(value: Any) -> Any:
    """Write 238.0 as 238: JSON Schema takes both for a whole number."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: whole(each) for name, each in value.items()}
    return [whole(each) for each in value] if isinstance(value, list) else value
