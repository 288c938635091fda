"""How an option is declared: once, as a field of a frozen dataclass, with its default and its help."""

from __future__ import annotations

import inspect
import os
import re
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, TypeVar

from fastcollate.errors import InputError

T = TypeVar("T")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # two letters or more: C:/ is a drive; a Path has made s3:// s3:/


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path of this machine, `~` expanded. A URL is refused: it would be a folder named after its scheme.

    Example:
        >>> local_path("s3://bucket/store")
        Traceback (most recent call last):
            ...
        fastcollate.errors.InputError: a URL (s3://...) cannot stand here: give a path of this machine, and copy ...
    """
    if found := _SCHEME.match(os.fspath(path)):  # not shown whole: a URL may hold a secret
        raise InputError(
            f"a URL ({found[1]}://...) cannot stand here: give a path of this machine; only sources and stores may be "
            "URLs, as text with both slashes, and fastcollate pull copies a store"
        )
    return Path(os.path.expanduser(path))


def option(default: Any, help_text: str, *flags: str, fixed: bool = False, choices: tuple[str, ...] = ()) -> Any:
    """A field of an option dataclass, declared and explained once: the command line takes it from there.

    `flags` is what that calls it, the plainest first (`--its-name` without). A `fixed` option decides what is trained
    on what, and cannot change when the run is resumed. Of an option with `choices` nothing else is taken.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Options:
        ...     limit: int = option(5, "At most so many rows.")
        >>> Options().limit
        5
    """
    return field(default=default, metadata={"help": help_text, "flags": flags, "fixed": fixed, "choices": choices})


def flag_of(item: Field[Any]) -> str:
    """What the command line calls an option."""
    return str(next(iter(item.metadata["flags"]), f"--{item.name.replace('_', '-')}")).split("/")[0]


def explained(kind: type[T]) -> type[T]:
    """The same option dataclass with its fields' help in its docstring."""
    lines = [f"    {item.name}: {item.metadata['help']}" for item in fields(kind)]  # type: ignore[arg-type]
    kind.__doc__ = "\n".join([inspect.cleandoc(kind.__doc__ or ""), "", "Attributes:", *lines])
    return kind
