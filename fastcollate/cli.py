"""The command line: parse, call, print. Each command imports what it needs when it runs, so `--help` is instant."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from fastcollate.errors import InputError, MissingExtraError

app = typer.Typer(
    name="fastcollate",
    help="Tokenize instruction data once, then train on it without waiting for data.",
    epilog="Start with: fastcollate train --out runs/first",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object and show no progress.")]


def main() -> None:
    """Run the command line; a user's mistake ends in one line on standard error and status 1, never a traceback."""
    try:
        app()
    except (InputError, MissingExtraError) as error:
        _fail(str(error))
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        _fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        _fail("interrupted; what was finished is kept", status=130)


def _fail(message: str, status: int = 1) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _print_json(result: Any) -> None:
    print(json.dumps(result, default=str))


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        from fastcollate import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def prepare(
    sources: Annotated[list[str], typer.Argument(help="Files of records: JSON array or JSON Lines.")],
    store: Annotated[Path, typer.Argument(help="Directory of the token store to write (the last argument).")],
    template: Annotated[str, typer.Option(help="How a record becomes text: alpaca or phi3.")] = "alpaca",
    tokenizer: Annotated[str, typer.Option(help="Vocabulary: gpt2.")] = "gpt2",
    field: Annotated[
        Optional[list[str]],  # noqa: UP045 (typer on Python 3.10)
        typer.Option(help="Where a template field comes from, as instruction=question; repeatable."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Tokenize records once into a memory-mapped store."""
    from fastcollate.prepare import prepare as run

    report = run(sources, store, template=template, tokenizer=tokenizer, fields=_parse_fields(field))
    if json_output:
        _print_json(asdict(report))
    else:
        print(report)


def _parse_fields(pairs: list[str] | None) -> dict[str, str] | None:
    fields = {}
    for pair in pairs or []:
        name, found, source = pair.partition("=")
        if not (name and found and source):
            raise InputError(f"--field {pair!r}: write it as NAME=SOURCE, such as instruction=question")
        fields[name] = source
    return fields or None
