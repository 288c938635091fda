"""Errors that a user can mend, integers of any kind, and the one way to ask for an optional package."""

from __future__ import annotations

import importlib
import operator
from types import ModuleType
from typing import Any

LARGEST_CAPACITY = 1 << 24  # of a pack, in cells: the packer keeps a list for each room from 0 to it
LARGEST = (1 << 40) - 1  # of any size: products of two that are used fit 64 bits


class InputError(ValueError):
    """Something the user gave is wrong.

    The message names the value, the place (file, line, record) and the remedy. The command line prints it as
    one line without a traceback; every other exception is a bug and keeps its traceback.
    """


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


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """An integer of any kind, NumPy's too, as a plain one.

    Raises:
        InputError: a bool, a fraction or something else, or beyond the bounds; it says the name.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError as error:
        raise InputError(f"{name}={value!r} is a {type(value).__name__}: give an integer") from error
    if (low is not None and number < low) or (high is not None and number > high):
        raise InputError(f"{name}={number}: give {f'at least {low}' if high is None else f'{low} to {high:,}'}")
    return number
