"""Faces of packages whose names are imported on first use, so that `--help` loads neither torch nor Numba (PEP 562)."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping


def face(package: str, module_of: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package: each name comes from the module of the package it is given with."""

    def get(name: str) -> object:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *module_of})


def warn_moved(module: str, instead: str) -> None:
    """Say once, to who imports a module at its old place, where its names are now."""
    warnings.warn(f"{module} has moved, and goes with the next release: {instead}", FutureWarning, stacklevel=3)
