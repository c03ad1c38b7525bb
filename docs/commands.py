"""Writes what the commands' `--help` says into docs/commands.md: `make docs`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from expediter.run.cli import app

DOCUMENT = Path(__file__).resolve().parent / "commands.md"
BEGIN = "<!-- commands: written from their --help by `make docs` -->\n"
END = "<!-- end of commands -->\n"

#: What every program of this kind has.
LEFT_OUT = {"help", "install_completion", "show_completion"}
#: What an option takes, by its type.
KINDS = {int: "NUMBER", float: "NUMBER", Path: "PATH"}


def commands(command: Any = None, words: tuple[str, ...] = ("expediter",)) -> Iterator[tuple[str, Any]]:
    """Give every command that does something, by its full name, the program itself first."""
    command = command or typer.main.get_command(app)
    inner = getattr(command, "commands", {})
    if not inner or len(words) == 1:
        yield " ".join(words), command
    for name, each in inner.items():
        if not each.hidden:
            yield from commands(each, (*words, name))


def examples(command: Any) -> list[str]:
    """Return the commands that a help ends with."""
    return [line.removeprefix("$ ") for line in (command.epilog or "").splitlines() if line]


def _takes(parameter: Any) -> str:
    if parameter.opts == [parameter.name]:
        left_out = "" if parameter.required else " (may be left out)"
        return f"`{(parameter.metavar or parameter.name).upper()}`{left_out}"
    names = ", ".join(f"`{name}`" for name in parameter.opts)
    if parameter.is_flag:
        return names
    kind = parameter.type_descriptor.annotation
    if issubclass(kind, Enum):
        return f"{names} {', '.join(f'`{choice.value}`' for choice in kind)}"
    return f"{names} {parameter.metavar or KINDS.get(kind, 'TEXT')}"


def section(name: str, command: Any) -> str:
    """Return what there is to say about one command."""
    lines = [f"## {name}", ""]
    for paragraph in (command.help or "").split("\n\n"):
        lines += [textwrap.fill(" ".join(paragraph.split()), 118), ""]
    parameters = [each for each in command.params if not getattr(each, "hidden", False)]
    parameters = [each for each in parameters if each.name not in LEFT_OUT]
    if parameters:
        lines += ["| option | what it does |", "| --- | --- |"]
        for each in parameters:
            default = each.default
            told = "" if default is None or default is False or callable(default) else f" Default: {default}."
            lines.append(f"| {_takes(each)} | {(each.help or '').replace('|', chr(92) + '|')}{told} |")
        lines.append("")
    lines += ["```sh", *examples(command), "```", ""]
    return "\n".join(lines)


def written() -> str:
    """Return the part of the page that comes from the program."""
    return "\n".join(section(name, command) for name, command in commands())


def drawn(text: str) -> str:
    """Return the page with that part as it should be."""
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: BEGIN + written() + END, text, flags=re.S)


if __name__ == "__main__":
    DOCUMENT.write_text(drawn(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
