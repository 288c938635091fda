"""Errors that a user can mend, and the one way to ask for an optional package."""

from __future__ import annotations

import importlib
from types import ModuleType


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
