"""The application: how a command gets its options, and how it ends."""

from __future__ import annotations

import contextlib
import inspect as inspect_module
import io
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from fastcollate.errors import InputError, MissingExtraError

app = typer.Typer(
    name="fastcollate",
    help="Tokenize instruction data once, then train on it without waiting for data.",
    epilog="Start with: fastcollate train --out runs/first",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_SAID: set[str] = set()  # warnings: a source is read more than once
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object and show no progress.")]
Fields = Annotated[
    list[str] | None, typer.Option(help="Where a template field comes from, as instruction=question; repeatable.")
]


def main() -> None:
    """Run the command line; a user's mistake ends in one line on standard error and status 1, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what an encoding has no character for is written as its number
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = _show_warning
    try:
        if (status := app(standalone_mode=False)) == 130:  # some releases of typer catch Ctrl-C, others let it through
            fail(_interrupted(), status=130)
        sys.exit(status)
    except (InputError, MissingExtraError) as error:
        fail(str(error))
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        fail(_interrupted(), status=130)
    except Exception as error:
        if type(error).__name__ == "Abort":
            fail(_interrupted(), status=130)
        if not hasattr(error, "format_message"):  # else one of typer's, or of click's below an older typer
            raise
        _fail_of_usage(error)


def _fail_of_usage(error: Any) -> None:
    """A command that was written wrongly: in one line, with the help of what is missing, and where to look."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(error.exit_code)
    context, missing = getattr(error, "ctx", None), getattr(error, "param", None)
    command = f"fastcollate {context.info_name}" if context and context.parent else "fastcollate"
    said = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")
    if type(error).__name__ == "MissingParameter" and (text := getattr(missing, "help", "")):
        said = f"{said} ({text.rstrip('.')})"
    fail(f"{said}{' See' if said.endswith('?') else '; see'}: {command} --help", status=error.exit_code)


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """A line of its own, without the place in the code, which is nothing to a reader of a command's output."""
    if str(message) in _SAID:
        return
    _SAID.add(str(message))
    with contextlib.suppress(OSError):
        print(f"{'note' if category is FutureWarning else 'warning'}: {message}", file=sys.stderr)


def say_next(*command: object) -> None:
    """One line at the end of a command, on standard error: what one does next."""
    with contextlib.suppress(OSError):
        print(f"next: fastcollate {shlex.join(map(str, command))}", file=sys.stderr)


def _interrupted() -> str:
    """What Ctrl-C leaves behind: what is finished of `prepare` and of copies, and of `train` before its first step."""
    keeps = sys.argv[1:2] in (["prepare"], ["train"], ["push"], ["pull"])
    return "interrupted; what was finished is kept, and the same command goes on" if keeps else "interrupted"


def fail(message: str, status: int = 1) -> None:
    """End the command in one line on standard error."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def telling_of_kernels(*, quiet: bool) -> Iterator[None]:
    """Within a block that needs kernels, say that they are compiled, before it is done for the first time."""
    from fastcollate.jit import compiling

    with compiling(lambda: None if quiet else print("compiling kernels (once)", file=sys.stderr)):
        yield


def print_json(result: Any) -> None:
    """A result as one line of JSON."""
    print(json.dumps(result, default=str))


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """A command that has an option for each field of the dataclasses among `function`'s parameters.

    Name, type, default and help come from the field; the function receives each dataclass made up.
    """
    types = get_type_hints(function, include_extras=True)
    kinds: list[tuple[str, Any]] = [(name, kind) for name, kind in types.items() if is_dataclass(kind)]
    signature = inspect_module.signature(function).parameters.values()
    own = [p.replace(annotation=types[p.name]) for p in signature if p.kind is not p.VAR_KEYWORD]
    parameters = [part for p in own for part in (_options_of(p.annotation) if is_dataclass(p.annotation) else [p])]

    @wraps(function)
    def command(**values: Any) -> None:
        values = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
        made = {name: kind(**{item.name: values.pop(item.name) for item in fields(kind)}) for name, kind in kinds}
        function(**values, **made)

    parameters.sort(key=lambda p: p.default is not p.empty)  # those without a default come first
    command.__signature__ = inspect_module.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _options_of(kind: Any) -> list[inspect_module.Parameter]:
    """A parameter for each field of an option dataclass, as typer reads them."""
    types = get_type_hints(kind)
    return [_parameter(item, types[item.name]) for item in fields(kind)]


def options_from(kind: Any, *names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command that takes these fields of an option dataclass too, as keywords."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        types, known = get_type_hints(kind), {item.name: item for item in fields(kind)}
        more = [
            _parameter(known[name], types[name]).replace(kind=inspect_module.Parameter.KEYWORD_ONLY) for name in names
        ]

        @wraps(function)
        def command(**values: Any) -> None:
            function(**{name: value.value if isinstance(value, Enum) else value for name, value in values.items()})

        old = inspect_module.signature(function).parameters.values()
        command.__signature__ = inspect_module.Signature([*old, *more])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in (*old, *more)}
        return command

    return decorate


def _parameter(item: Field[Any], kind: Any) -> inspect_module.Parameter:
    """A field as typer reads it; its choices are checked, and stand in the help, before anything is loaded."""
    default = item.default
    if item.metadata["choices"]:
        words = Enum(item.name, {word: word for word in item.metadata["choices"]}, type=str)  # type: ignore[misc]
        kind = words if default is not None else words | None
        default = default and words(default)
    return inspect_module.Parameter(
        item.name,
        inspect_module.Parameter.POSITIONAL_OR_KEYWORD,
        default=default,
        annotation=Annotated[kind, typer.Option(*item.metadata["flags"], help=item.metadata["help"])],
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        from fastcollate import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """The options before a command."""
