"""Reading the settings, and saying what is wrong with one in words that help.

They come from the environment, or from `.env` in the working directory (or the file that EXPEDITER_ENV_FILE
names); the environment wins. A secret may also be given as a file: `ADMIN_PASSWORD_FILE=/run/secrets/admin`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, get_args

from dotenv import dotenv_values
from pydantic import SecretStr, ValidationError

from expediter.errors import ConfigurationError
from expediter.settings.choices import Compat
from expediter.settings.fields import OTHERWISE, Settings

#: What names the file in which settings may stand, and its name where that says nothing.
ENV_FILE_VARIABLE = "EXPEDITER_ENV_FILE"
ENV_FILE = ".env"
#: Characters of a value that a message repeats.
SHOWN_CHARACTERS_MAX = 80

#: Settings by the names that they have in other order services.
OTHER_NAMES = {"CIRCUIT_BREAKER_RECOVERY_TIMEOUT": "circuit_breaker_recovery_seconds"}
#: Settings of other order services that have no counterpart, and what there is instead.
FOREIGN = {"API_THREADS": "one process takes many requests at once; API_WORKERS says how many processes there are"}
#: What settings are by default where COMPAT is given.
COMPAT_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    Compat.CACHED: {"fulfilment": "manual", "cors_origins": "*"},
    Compat.QUEUED: {"fulfilment": "manual", "cors_origins": "*", "intake": "queued"},
    Compat.PROCESSOR: {"stages": "fulfilment"},
    Compat.DELIVERY: {"stages": "payment", "cors_origins": "*"},
    Compat.STREAMS: {"stages": "fulfilment"},
}
#: Settings that are no secrets by their type, and may hold one: an address with a password.
_ADDRESSES = frozenset({"database_url", "redis_url", "broker_url", "payment_gateway"})


class Effective(NamedTuple):
    """One setting as it counts now: its name, its value (stars for a secret), and where it comes from."""

    name: str
    value: str
    source: str


class _Given(NamedTuple):
    """What is given: by `names` in any place, and of these what stands in the file alone."""

    file: Path
    written: Mapping[str, str | None]
    names: Mapping[str, str]


def _given() -> _Given:
    """Return what is given. Raises ConfigurationError for a file that cannot be read, or is named and missing."""
    named = os.environ.get(ENV_FILE_VARIABLE)
    file = Path(named or ENV_FILE)
    try:
        if named and not file.is_file():
            raise ConfigurationError(f"{file} cannot be read: there is no such file")
        written = dotenv_values(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}") from error
    return _Given(file, written, {name: text for name, text in {**written, **os.environ}.items() if text})


def load_settings(**overrides: Any) -> Settings:
    """Read the settings; `overrides` win over the environment. Raises ConfigurationError with the name."""
    given = _given()
    values = {**_defaults(given.names, overrides), **_by_other_names(given.names), **_secrets(given.names)}
    try:
        return Settings(_env_file=given.file, **(values | overrides))
    except ValidationError as error:
        raise ConfigurationError(_sentence(error, given.names)) from error


def _defaults(given: Mapping[str, str], overrides: Mapping[str, Any]) -> dict[str, str]:
    """Return what COMPAT makes the default of settings that are not given."""
    compat = str(overrides.get("compat") or given.get("COMPAT") or "").strip().lower()
    return {name: text for name, text in COMPAT_DEFAULTS.get(compat, {}).items() if name.upper() not in given}


def _by_other_names(given: Mapping[str, str]) -> dict[str, str]:
    found = {name: given[other] for other, name in OTHER_NAMES.items() if other in given}
    return {name: text for name, text in found.items() if name.upper() not in given}


def _secrets(given: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for name in Settings.model_fields:
        path = given.get(f"{name.upper()}_FILE")
        if path and is_secret(name):
            try:
                found[name] = Path(path).read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigurationError(f"{name.upper()}_FILE cannot be read: {error}") from error
    return found


def _sentence(error: ValidationError, given: Mapping[str, str]) -> str:
    """Return what is wrong with the first setting that is: its name, its value, and what to write instead."""
    first = error.errors()[0]
    name = "_".join(str(part) for part in first["loc"])
    instead = _instead(first["type"], first.get("ctx", {}), name)
    if not name:
        return instead
    secret = name in _ADDRESSES or is_secret(name)
    written = given.get(name.upper()) or str(first["input"])
    value = "" if secret else f"={written[:SHOWN_CHARACTERS_MAX]}"
    return f"{name.upper()}{value} cannot be used: {instead}"


def _instead(kind: str, context: Mapping[str, Any], name: str) -> str:
    if kind == "value_error":
        return str(context["error"])
    if kind in ("enum", "literal_error"):
        known = str(context["expected"]).replace("'', ", "").replace("'", "")
        return f"write one of {known.replace(' or ', ', ')}" if name != "stages" else f"write {known}"
    if kind.startswith("bool"):
        return "write true or false"
    if kind.startswith(("int", "float", "greater", "less", "finite")):
        return f"write {numbers(name)}"
    return str(kind)


def choices(name: str) -> list[str]:
    """Return the words that a setting may be; none for a number or a text."""
    kind: Any = Settings.model_fields[name].annotation
    if kind is bool:
        return ["true", "false"]
    enumerated = isinstance(kind, type) and issubclass(kind, StrEnum)
    return [str(word) for word in (kind if enumerated else get_args(kind)) if word and isinstance(word, str)]


def numbers(name: str) -> str:
    """Return the numbers that a setting may be, in words; nothing for a word or a text."""
    field = Settings.model_fields[name]
    if field.annotation not in (int, int | None, float):
        return ""
    what = "a number" if field.annotation is float else "a whole number"
    limits = {
        limit: value
        for rule in field.metadata
        for limit in ("ge", "gt", "le")
        if (value := getattr(rule, limit, None)) is not None
    }
    low = f" from {limits['ge']:g}" if "ge" in limits else f" above {limits['gt']:g}" if "gt" in limits else ""
    return f"{what}{low} to {limits['le']:g}" if "le" in limits else what + low.replace("from", "of at least")


def is_secret(name: str) -> bool:
    """Whether a setting is never shown, and may also be given as a file."""
    return bool(Settings.model_fields[name].annotation == SecretStr | None)


def default(name: str) -> str:
    """Return what counts where a setting is not given, as it would be written."""
    return OTHERWISE.get(name) or _shown(Settings.model_fields[name].default)


def unknown_names() -> list[str]:
    """Return a sentence for each setting that is given and that nothing reads, with what may be meant."""
    given = _given()
    known = {name.upper() for name in Settings.model_fields}
    found = [f"{name} is not read here: {why}" for name, why in FOREIGN.items() if name in given.names]
    for name in given.written:
        read = name in known or name in OTHER_NAMES or name in FOREIGN or name.removesuffix("_FILE") in known
        if not read and not name.startswith("OTEL_"):
            near = get_close_matches(name.upper(), known, 1)
            found.append(f"{name} in {given.file} is no setting" + (f": is {near[0]} meant?" if near else ""))
    return found


def effective(settings: Settings) -> list[Effective]:
    """Return every setting as it counts, in the order of the documentation."""
    given = _given()
    compat = _defaults(given.names, {})
    found = []
    for name in Settings.model_fields:
        value = getattr(settings, name)
        upper = name.upper()
        others = [other for other, meant in OTHER_NAMES.items() if meant == name and other in given.names]
        shown = _shown(settings.database if name == "database_url" else value)
        if upper in given.names:
            source = "environment" if os.environ.get(upper) else str(given.file)
        elif is_secret(name) and f"{upper}_FILE" in given.names:
            source = f"{upper}_FILE"
        else:
            source = next(iter(others), f"COMPAT={settings.compat}" if name in compat else "default")
        found.append(Effective(upper, shown, source))
    return found


def _shown(value: object) -> str:
    if isinstance(value, SecretStr):
        return "********"
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else _bare(str(value))


def _bare(text: str) -> str:
    """Return a value without the password that an address may hold, or the key behind `stripe:`."""
    if text.startswith("stripe:") and text != "stripe:":
        return "stripe:********"
    head, found, rest = text.partition("://")
    who, at, where = rest.rpartition("@")
    user, colon, _ = who.partition(":")
    return f"{head}://{user}:********@{where}" if found and at and colon else text


def in_users_words(text: str, settings: Settings) -> str:
    """Return a message with the settings by which a person has said it: DB_PATH where that names the database."""
    for name, others in (
        ("database_url", ("db_host", "db_user", "db_path")),
        ("redis_url", ("redis_host",)),
        ("broker_url", ("rabbitmq_host",)),
    ):
        if not getattr(settings, name):
            said = next((other for other in others if getattr(settings, other)), name)
            text = text.replace(name.upper(), said.upper())
    return text
