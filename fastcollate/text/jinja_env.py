"""The environment in which a user's Jinja template runs: sandboxed, with the filters, globals and tags of transformers.

Different on purpose: a field that is missing and a value that is no text are errors, `tojson` refuses NaN, and there is
no `strftime_now`, by which the same job would give other rows tomorrow.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn

from fastcollate.errors import InputError, import_extra

BEGIN, END = "\x00\ufdd0", "\x00\ufdd1"  # around what is trained; noncharacters: no text that means anything holds them


def compile_template(name: str, source: str, printable: Callable[[Any], Any]) -> Any:
    """A template whose every printed value goes through `printable`.

    Raises:
        InputError: it is malformed; names the line.
        MissingExtraError: the package jinja2 is not installed.
    """
    jinja2 = import_extra("jinja2", "jinja")
    environment = import_extra("jinja2.sandbox", "jinja").ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        extensions=[_generation(), "jinja2.ext.loopcontrols"],
        finalize=printable,
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_refuse, dict=_Dict(), namespace=_namespace())
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"template {name!r}, line {error.lineno}: {error.message}") from error
    except RecursionError:
        raise InputError(f"template {name!r}: nested too deeply") from None


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes HTML and sorts keys: not what a model has seen."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, allow_nan=False
    )


def _refuse(message: str) -> NoReturn:
    raise import_extra("jinja2", "jinja").TemplateError(message)


class _Dict:
    """`dict` without the attributes of the class."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """The keys, each with the same value."""
        return dict.fromkeys(*args)


def _namespace() -> type:
    """`namespace`, by which no attribute of Python's own can be set."""
    jinja2 = import_extra("jinja2", "jinja")

    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a namespace takes no name that begins with an underscore ({name!r})")

    class Namespace(jinja2.utils.Namespace):  # type: ignore[misc, name-defined]
        def __init__(*args: Any, **values: Any) -> None:  # `self` may be a name in it
            self, *given = args
            found = dict(*given, **values)
            for name in found:
                check(name)
            jinja2.utils.Namespace.__init__(self, found)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    return Namespace


def _generation() -> type:
    """The tag `{% generation %}` ... `{% endgeneration %}`: what is trained."""
    nodes = import_extra("jinja2", "jinja").nodes

    class Generation(import_extra("jinja2.ext", "jinja").Extension):  # type: ignore[misc]
        tags = {"generation"}  # noqa: RUF012 (jinja2's own convention)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return BEGIN + caller() + END

    return Generation
