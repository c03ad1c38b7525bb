"""Writes docs/settings.md and .env.example from the fields of the settings: `make docs`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from expediter.settings import Settings
from expediter.settings.fields import SECTIONS
from expediter.settings.reading import (
    COMPAT_DEFAULTS,
    ENV_FILE_VARIABLE,
    FOREIGN,
    OTHER_NAMES,
    choices,
    default,
    is_secret,
    numbers,
)

ROOT = Path(__file__).resolve().parents[1]
#: The longest line of .env.example, in characters.
LINE_CHARACTERS_MAX = 115

PAGE_HEAD = f"""\
# Settings

<!-- Written from src/expediter/settings/fields.py by `make docs`. -->

Settings come from the environment or from `.env` in the folder where you start Expediter; the environment wins.
`.env.example` has them all. `expediter --env-file FILE ...` reads another file, and so does
`{ENV_FILE_VARIABLE}=FILE`. An empty value counts as not given. Words may be written in any case.

`expediter config` shows each setting as it counts, and where it comes from. If a value is invalid, the program
exits at startup with status 2 and a sentence that says what to write instead.
"""
EXAMPLE_HEAD = (
    "# Copy to .env and change what you need; the environment wins over this file. More: docs/settings.md"
)


def sections() -> Iterator[tuple[str, list[str]]]:
    """Yield each heading with its settings."""
    names = list(Settings.model_fields)
    starts = [names.index(first) for first in SECTIONS.values()]
    for heading, start, end in zip(SECTIONS, starts, [*starts[1:], len(names)], strict=True):
        yield heading, names[start:end]


def page() -> str:
    """Return docs/settings.md."""
    parts = [PAGE_HEAD]
    for heading, names in sections():
        parts.append(f"\n## {heading}\n")
        if notes := AFTER_HEADING.get(heading):
            parts.append(_paragraph(notes))
        parts.append(_table("setting", "default", "may be", "what it is", rows=map(_row, names)))
        if notes := AFTER_TABLE.get(heading):
            parts.append(_paragraph(notes))
    return "".join(parts) + _other_names() + _compat()


def example() -> str:
    """Return .env.example: every setting with its default, switched off."""
    lines = [EXAMPLE_HEAD]
    for heading, names in sections():
        lines += ["", f"# === {heading} ==="]
        for name in names:
            said = ". ".join(filter(None, [_text(name).replace("`", ""), _may_be(name)]))
            lines += ["", *(f"# {line}" for line in textwrap.wrap(said, LINE_CHARACTERS_MAX - 2))]
            lines.append(f"# {name.upper()}={default(name)}")
    return "\n".join(lines) + "\n"


#: What stands before and after the table of a section.
AFTER_HEADING = {
    "Where orders are kept": "SQLite is built in. For a server, give its address, or the parts of it.",
}
AFTER_TABLE = {
    "Payment": "The simulated gateway recognises three payment tokens, whatever its success rate: `tok_declined`, "
    "`tok_unavailable`, and `tok_unknown` (the charge goes through, but its response is lost).",
}


def _paragraph(text: str) -> str:
    return "\n" + textwrap.fill(text, LINE_CHARACTERS_MAX, break_long_words=False, break_on_hyphens=False) + "\n"


def _table(*heads: str, rows: Iterator[tuple[str, ...]]) -> str:
    every = [heads, ("---",) * len(heads), *rows]
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in every)


def _row(name: str) -> tuple[str, ...]:
    said = re.sub(r"docs/(\S+\.md)", r"[\1](\1)", _text(name))
    words = ", ".join(f"`{word}`" for word in choices(name))
    shown = default(name)
    return f"`{name.upper()}`", f"`{shown}`" if shown else "", words or numbers(name), said


def _text(name: str) -> str:
    text = Settings.model_fields[name].description or ""
    others = [f"`{other}`" for other, meant in OTHER_NAMES.items() if meant == name]
    if is_secret(name):
        others.append(f"`{name.upper()}_FILE`, which names a file to read it from")
    return f"{text}; also by the name {' or '.join(others)}" if others else text


def _may_be(name: str) -> str:
    """Return what a setting may be as a sentence; nothing for a switch, whose text says it."""
    if words := [word for word in choices(name) if word not in ("true", "false")]:
        return f"One of: {' | '.join(words)}"
    return numbers(name).capitalize()


def _other_names() -> str:
    secrets = [f"`{name.upper()}_FILE`" for name in Settings.model_fields if is_secret(name)]
    known = [(f"`{other}`", f"the same as `{name.upper()}`") for other, name in OTHER_NAMES.items()]
    foreign = [(f"`{name}`", f"not read: {why}") for name, why in FOREIGN.items()]
    return (
        "\n## Other names\n"
        + _paragraph(
            f"A secret may stand in a file of its own: {', '.join(secrets[:-1])} and {secrets[-1]} name the "
            "files. Other order services have settings that are called something else here, or that do not exist."
        )
        + _table("name", "here", rows=iter([*known, *foreign]))
    )


def _compat() -> str:
    rows = (
        (f"`{compat}`", ", ".join(f"`{name.upper()}={value}`" for name, value in given.items()))
        for compat, given in COMPAT_DEFAULTS.items()
    )
    return (
        "\n## Defaults with COMPAT\n"
        + _paragraph(
            "`COMPAT` is for clients of another order service ([coming-from.md](coming-from.md)). It changes the "
            "default of other settings. A setting that you give yourself wins."
        )
        + _table("`COMPAT`", "default", rows=rows)
    )


#: Every document that is written here, and what writes it.
DOCUMENTS = {ROOT / "docs" / "settings.md": page, ROOT / ".env.example": example}

if __name__ == "__main__":
    for document, written in DOCUMENTS.items():
        document.write_text(written(), encoding="utf-8")
