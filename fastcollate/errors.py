"""Errors that a user can mend, checks of integers and of words, and the one way to ask for an optional package."""

from __future__ import annotations

import difflib
import importlib
import itertools
import operator
import os
import reprlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

LARGEST_CAPACITY = 1 << 24  # of a pack, in cells: the packer keeps a list for each room from 0 to it
LARGEST = (1 << 40) - 1  # of any size: products of two that are used fit 64 bits
LONGEST_MESSAGE = 4000  # characters
MOST_NAMES = 10_000  # of a folder, looked through for one like another
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


class InputError(ValueError):
    """Something the user gave is wrong.

    The message names the value, the place (file, line, record) and the remedy. The command line prints it as
    one line without a traceback; every other exception is a bug and keeps its traceback. Of a message longer than
    `LONGEST_MESSAGE` the middle is left out: the place and the remedy stay.
    """

    def __init__(self, message: str) -> None:
        super().__init__(bounded(message))


class SourceReadError(InputError):
    """The storage failed, not the data: what a job has finished is worth keeping."""


class MissingExtraError(ImportError):
    """An optional package is needed and not installed; the message holds the command that installs it."""


def import_extra(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra of fastcollate brings it.

    Raises:
        MissingExtraError: `module` is not installed.

    Example:
        >>> import_extra("matplotlib.figure", "plot").Figure.__name__
        'Figure'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # the package is there and broken: hiding that would send the user the wrong way
        raise MissingExtraError(
            f"this needs the package {module.split('.')[0]!r}, which is not installed; "
            f"install it with: pip install 'fastcollate[{extra}]'"
        ) from error


def bounded(message: str) -> str:
    """A message, of a longer one than `LONGEST_MESSAGE` its ends."""
    half = LONGEST_MESSAGE // 2 - 4
    return message if len(message) <= LONGEST_MESSAGE else f"{message[:half]} [...] {message[-half:]}"


def shown(value: Any) -> str:
    """Any value for a message: not deeper than three levels, nor longer than 200 characters.

    Example:
        >>> shown({"a": [[[[1]]]], "b": "x" * 100_000})[:30]
        "{'a': [[[...]]], 'b': 'xxxxxxx"
    """
    try:
        return f"{_SHORT.repr(value):.200}"
    except Exception:  # an object may have any in its own; Python shows no number of thousands of digits
        return f"<{type(value).__name__}>"


def nearest(path: str) -> str:
    """The remedy for a file that is not there: the name in its folder that is most like it, or where to look."""
    folder, name = os.path.split(os.path.abspath(path))
    while not os.path.isdir(folder):
        folder, name = os.path.split(folder)
    with os.scandir(folder) as entries:
        names = [entry.name for entry in itertools.islice(entries, MOST_NAMES)]
    if like := difflib.get_close_matches(name, names, 1):
        found = os.path.join(folder, like[0])
        return f"did you mean {found if os.path.isabs(path) else os.path.relpath(found)}?"
    return f"{folder} holds no {name}: check the path, which begins at the folder that the command runs in"


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of some words; anything else is an `InputError` that names them."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name}={shown(value)}: choose one of {', '.join(map(repr, choices))}")
    return value


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """An integer of any kind, NumPy's too, as a plain one; anything else, or beyond the bounds, is an `InputError`."""
    try:
        if type(value).__name__ in ("bool", "bool_"):  # NumPy 1's is an index
            raise TypeError
        number = operator.index(value)
    except TypeError as error:
        raise InputError(f"{name}={shown(value)} is a {type(value).__name__}: give an integer") from error
    if (low is not None and number < low) or (high is not None and number > high):
        raise InputError(f"{name}={shown(number)}: give {f'at least {low}' if high is None else f'{low} to {high:,}'}")
    return number
