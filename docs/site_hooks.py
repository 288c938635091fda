"""What mkdocs cannot read from the source by itself: the help of options, and that of the command line."""

from __future__ import annotations

import dataclasses
import html
import importlib
import inspect
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

import griffe
import typer.main


class RuntimeDocstrings(griffe.Extension):
    """What the package's docstrings have that griffe does not see in the source."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Name the examples as the section with `>>>` lines that they are, not as a note."""
        if any("explained" in str(decorator.value) for decorator in getattr(obj, "decorators", ())):
            self.take_help(obj)
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)

    def take_help(self, obj: griffe.Object) -> None:
        """Take an option dataclass from the import, which writes its fields' help into its docstring."""
        module, _, name = obj.path.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        obj.docstring = griffe.Docstring(inspect.getdoc(found) or "", parent=obj)
        for field in dataclasses.fields(found):
            obj.members["__init__"].parameters[field.name].default = repr(field.default)


def command_lines() -> Iterator[str]:
    """Each command with its arguments and options, as `--help` has them."""
    from fastcollate.cli.app import app

    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        context = command.make_context(name, [], resilient_parsing=True)
        yield f"## fastcollate {name}\n\n{command.help}\n\n| option | what it is | default |\n|---|---|---|"
        for one in command.params:
            flags = ", ".join(f"`{flag}`{{.flag}}" for flag in [*one.opts, *one.secondary_opts])
            told = html.escape(getattr(one, "help", None) or "").replace("|", "\\|")
            default = one.get_default(context)
            if isinstance(default, Enum):
                told += f" One of {', '.join(f'`{choice.value}`' for choice in type(default))}."
                default = default.value
            shown = "" if default in (None, [], False) else f"`{default}`"
            yield f"| {flags if one.param_type_name == 'option' else one.name} | {told} | {shown} |"
        yield ""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the command line's help where a page asks for it."""
    place = "<!-- commands -->"
    return markdown.replace(place, "\n".join(command_lines())) if place in markdown else markdown
