"""What release 0.1 offered still works: names at their places, parameters with their defaults, the command's options.

`release_0_1.json` was written from commit 3981236: what `__all__`, README, docs and integrations held.
"""

from __future__ import annotations

import importlib
import inspect
import json
import typing
import warnings
from pathlib import Path
from typing import Any

import pytest

RELEASE = json.loads((Path(__file__).parent / "release_0_1.json").read_text())
# Under torch.distributed every rank got all rows by these defaults, in silence.
CHANGED = {("fastcollate.BatchLoader", "rank"): "None", ("fastcollate.BatchLoader", "world_size"): "None"}
OPTIONAL = {"lightning": "lightning", "huggingface": "datasets"}


def parameters_of(public: Any) -> dict[str, Any]:
    """Each parameter's default as text (`None` without one); of `**options: Unpack[...]`, each option's name."""
    found: dict[str, Any] = {}
    for parameter in inspect.signature(public).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            found[parameter.name] = None if parameter.default is parameter.empty else repr(parameter.default)
            continue
        hints = typing.get_type_hints(public.__init__ if inspect.isclass(public) else public, include_extras=True)
        for options in typing.get_args(hints[parameter.name]):
            found |= dict.fromkeys(typing.get_type_hints(options), ...)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASE["names"])
def test_a_name_of_the_release_takes_and_has_what_it_did(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    if module.split(".")[-1] in OPTIONAL:
        pytest.importorskip(OPTIONAL[module.split(".")[-1]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        public = getattr(importlib.import_module(module), attribute)
    old = RELEASE["names"][name]
    if old["parameters"]:
        new = parameters_of(public)
        assert old["parameters"].keys() <= new.keys(), name
        for parameter, default in old["parameters"].items():
            default = CHANGED.get((name, parameter), default)
            assert new[parameter] in (default, ...), f"{name}: the default of {parameter} was {default}"
        assert list(new)[: len(old["positional"])] == old["positional"]
    for member in old["attributes"]:
        assert hasattr(public, member) or member in typing.get_type_hints(public), f"{name}.{member} is gone"


def test_the_command_line_of_the_release_is_still_accepted() -> None:
    typer = pytest.importorskip("typer")
    from fastcollate.cli import app

    commands = typer.main.get_command(app).commands
    for name, options in RELEASE["commands"].items():
        new = {option for parameter in commands[name].params for option in [*parameter.opts, *parameter.secondary_opts]}
        assert set(options) <= new, f"fastcollate {name}: {sorted(set(options) - new)} are gone"
