"""How an option is declared: once, as a field of a frozen dataclass, with its default and its help."""

from __future__ import annotations

from dataclasses import Field, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: Any, help_text: str, *flags: str, fixed: bool = False) -> Any:
    """A field of an option dataclass, declared and explained once: the command line takes it from there.

    `flags` is what that calls it, the plainest first (`--its-name` without). A `fixed` option decides what is trained
    on what, and cannot change when the run is resumed.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Options:
        ...     limit: int = option(5, "At most so many rows.")
        >>> Options().limit
        5
    """
    return field(default=default, metadata={"help": help_text, "flags": flags, "fixed": fixed})


def flag_of(item: Field[Any]) -> str:
    """What the command line calls an option."""
    return str(next(iter(item.metadata["flags"]), f"--{item.name.replace('_', '-')}")).split("/")[0]


def explained(kind: type[T]) -> type[T]:
    """The same option dataclass with its fields' help in its docstring."""
    lines = [f"    {item.name}: {item.metadata['help']}" for item in fields(kind)]  # type: ignore[arg-type]
    kind.__doc__ = "\n".join([kind.__doc__ or "", "", "Attributes:", *lines])
    return kind
