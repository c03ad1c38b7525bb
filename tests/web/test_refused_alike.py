"""What the service refuses /openapi.json refuses, as far as JSON Schema can say it; what it cannot is listed."""

from __future__ import annotations

import re
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from expediter.web import operations_document
from serving import PATIENCE_SECONDS, Serving

DOCUMENT: dict[str, Any] = operations_document()
PEN = {"name": "Pen", "quantity": 1}

REFUSED_BODIES = {
    "no customer": {"items": [PEN]},
    "a customer who is null": {"customer_id": None, "items": [PEN]},
    "no items": {"user_id": 1},
    "items that are null": {"user_id": 1, "items": None, "item_ids": None},
    "an empty list": {"user_id": 1, "items": []},
    "two lists": {"user_id": 1, "items": [PEN], "item_ids": [1]},
    "an item without a name": {"user_id": 1, "items": [{"quantity": 1}]},
    "an item whose name is null": {"user_id": 1, "items": [{"name": None, "quantity": 1}]},
    "no quantity": {"user_id": 1, "items": [{"name": "Pen"}]},
    "a quantity of 0": {"user_id": 1, "items": [{"name": "Pen", "quantity": 0}]},
    "a quantity of 1.5": {"user_id": 1, "items": [{"name": "Pen", "quantity": 1.5}]},
    "a quantity as a text": {"user_id": 1, "items": [{"name": "Pen", "quantity": "1"}]},
    "a price below 0": {"user_id": 1, "items": [{**PEN, "price": -1}]},
    "a price in words": {"user_id": 1, "items": [{**PEN, "price": "ten"}]},
    "a price as Python writes it": {"user_id": 1, "items": [{**PEN, "price": "1_0"}]},
    "a currency that is none": {"user_id": 1, "items": [PEN], "currency": "ZZZ"},
    "a currency in small letters": {"user_id": 1, "items": [PEN], "currency": "usd"},
    "an id with a slash": {"user_id": 1, "items": [PEN], "order_id": "a/b"},
    "an id that is a path": {"user_id": 1, "items": [PEN], "order_id": "metrics"},
    "an id of 65 characters": {"user_id": 1, "items": [PEN], "order_id": "a" * 65},
    "NUL in a name": {"user_id": 1, "items": [{"name": "Pen\0", "quantity": 1}]},
    "NUL in an item's id": {"user_id": 1, "item_ids": ["\0"]},
    "NUL in a name in metadata": {"user_id": 1, "items": [PEN], "metadata": {"\0": 1}},
    "NUL in metadata": {"user_id": 1, "items": [PEN], "metadata": {"note": "\0"}},
    "metadata in metadata": {"user_id": 1, "items": [PEN], "metadata": {"note": {}}},
    "an unknown field": {"user_id": 1, "items": [PEN], "colour": "red"},
}
REFUSED_PARAMETERS = [
    ("limit", "0"),
    ("limit", "201"),
    ("limit", "1.5"),
    ("limit", "many"),
    ("offset", "-1"),
    ("offset", "1000001"),
    ("page", "0"),
    ("page", "1000002"),
    ("page_size", "201"),
    ("cursor", "no cursor"),
    ("cursor", ""),
    ("status", "lost"),
    ("created_after", "yesterday"),
]
#: What JSON Schema cannot say: rules between the parts of a request, a currency's digits, what is in a cursor.
BEYOND_SCHEMA = re.compile(
    r"^(page and page_size do not go with limit, offset or cursor|does not go with cursor"
    r"|is not a cursor of this list: .*|must be a whole number from 1 to \d+"
    r"|is another name for \w+, and says something else|other lines have a price: .*"
    r"|is [\d.]+, but the lines add up to .*|add up to more than .*|must be at most .*|has more digits .*)$"
)
#: Generated requests of each kind.
EXAMPLES_MAX = 60


def fits(schema: Any, value: Any) -> bool:
    whole = {**schema, "components": DOCUMENT["components"]}
    return jsonschema_rs.Draft202012Validator(whole, validate_formats=True).is_valid(value)


def body_schema(path: str) -> Any:
    return DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


@pytest.mark.parametrize("what", REFUSED_BODIES)
def test_a_refused_order_is_refused_by_the_document(idle_service: Serving, what: str) -> None:
    """The service answers 422, and the schema of the body does not hold either."""
    body = REFUSED_BODIES[what]
    assert idle_service.client.post("/api/v1/orders", json=body).status_code == 422
    assert not fits(body_schema("/api/v1/orders"), body)


@pytest.mark.parametrize(("name", "value"), REFUSED_PARAMETERS)
def test_a_refused_parameter_is_refused_by_the_document(idle_service: Serving, name: str, value: str) -> None:
    """The service answers 422, and the schema of the parameter does not hold either."""
    described = DOCUMENT["paths"]["/api/v1/orders"]["get"]["parameters"]
    (schema,) = [each["schema"] for each in described if each["name"] == name]
    is_number = schema["type"] == "integer" and re.fullmatch(r"-?[\d.]+", value)
    assert idle_service.client.get("/api/v1/orders", params={name: value}).status_code == 422
    assert not fits(schema, float(value) if is_number else value)


@pytest.mark.parametrize("names", [("page", "limit"), ("page_size", "cursor"), ("cursor", "offset")])
def test_parameters_that_exclude_each_other_say_so(idle_service: Serving, names: tuple[str, str]) -> None:
    """No schema can: the description of each names the other, and the service refuses both together."""
    described = DOCUMENT["paths"]["/api/v1/orders"]["get"]["parameters"]
    texts = {each["name"]: each["description"] for each in described}
    for one, other in (names, names[::-1]):
        assert f"`{other}`" in texts[one].partition("Not together with")[2]
    assert idle_service.client.get("/api/v1/orders", params=dict.fromkeys(names, "1")).status_code == 422


def test_a_whole_number_with_a_point_is_refused(idle_service: Serving) -> None:
    """To JSON Schema 2.0 is the whole number 2: the document says in words that it is not taken."""
    assert "`2`, not `2.0`" in DOCUMENT["info"]["description"]
    body = '{"user_id": 1, "items": [{"name": "Pen", "quantity": 2.0}]}'
    headers = {"content-type": "application/json"}
    assert idle_service.client.post("/orders", content=body, headers=headers).status_code == 422
    assert idle_service.client.get("/orders", params={"limit": "2.0"}).status_code == 422


def whole(value: Any) -> Any:
    """Write whole numbers without a point."""
    if isinstance(value, dict):
        return {name: whole(each) for name, each in value.items()}
    if isinstance(value, list):
        return [whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@pytest.mark.parametrize("method", ["get", "post"])
def test_what_the_document_takes_is_taken(idle_service: Serving, method: str) -> None:
    """A generated list or order that fits the document is refused only by rules that no schema can say."""
    schema = schemathesis.openapi.from_url(f"{idle_service.url}/openapi.json")
    operation = schema["/api/v1/orders"][method.upper()]
    taken = []

    @settings(
        max_examples=EXAMPLES_MAX,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
    def ask(case: schemathesis.Case) -> None:
        case.headers.clear()  # one key for several orders would be refused for that
        case.body, case.query = whole(case.body), whole(case.query)
        answer = case.call(timeout=PATIENCE_SECONDS)
        if answer.status_code == 422:
            assert [each for each in answer.json()["errors"] if not BEYOND_SCHEMA.match(each["message"])] == []
        else:
            assert answer.status_code in (200, 202, 409), answer.text
            taken.append(answer)

    ask()
    assert len(taken) >= EXAMPLES_MAX // 10
