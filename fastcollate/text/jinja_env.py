"""The environment in which Jinja templates run: sandboxed, with the filters, globals and tags of transformers.

A tokenizer's chat template runs as there, `strftime_now` at a date that is given. A user's own template of records is
held to more: a field that is missing and a value that is no text are errors.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from fastcollate.errors import InputError, import_extra

BEGIN, END = "\x00\ufdd0", "\x00\ufdd1"  # around what is trained; noncharacters: no text that means anything holds them
GENERATION = "generation block"  # a filter that no template writes down by name
GLOBALS = ("range", "dict", "lipsum", "cycler", "joiner", "namespace", "raise_exception", "strftime_now")
_MOST_SECONDS = 30.0  # a chat may take, of a template that nobody has read
_MOST_CHARACTERS = 1 << 28  # and write
_MOST_ITEMS = 1 << 20  # and count through by `range`
_OF_DICTS = frozenset(dir(dict))
_OF_TEXTS = frozenset(dir(str)) - {"format", "format_map"}  # which the sandbox wraps


class ChatProgram:
    """A compiled chat template.

    Args:
        name: for messages.
        source: its text.
        date: what `strftime_now` gives; without one a template that calls it is refused, for tomorrow it would give
            other rows.

    Raises:
        InputError: it is malformed; names the line.
        MissingExtraError: the package jinja2 is not installed.
    """

    def __init__(self, name: str, source: str, date: datetime | None = None) -> None:
        def strftime_now(form: str) -> str:
            if date is None:
                raise InputError(
                    f"template {name!r}: writes today's date, so that the same job would give other rows tomorrow; fix "
                    "it by --date 2026-01-31 (date=), or by the template's own argument for it, if it has one"
                )
            return date.strftime(form)

        environment = _environment(_noted)
        environment.globals.update(strftime_now=strftime_now, range=_range)
        self._template = _compiled(environment, name, source)
        self.has_generation = bool(getattr(environment, "has_generation", False))

    def run(self, variables: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """What it writes, and the `{% generation %}` blocks in it, in characters.

        Raises:
            jinja2.TemplateError: it fails, writes without end, or does not write a block where it stands.
        """
        run, blocks = _Run(), []
        token = _RUN.set(run)
        try:
            for block in self._template.generate(variables):
                blocks.append(block)
                run.written += len(block)
                if run.written > _MOST_CHARACTERS or time.monotonic() > run.deadline:
                    _refuse(f"it wrote {run.written:,} characters in {_MOST_SECONDS:.0f} seconds or less without end")
        finally:
            _RUN.reset(token)
        text = "".join(blocks)
        for start, block in run.blocks:
            if not text.startswith(block, start):
                _refuse("it changes what stands in {% generation %} after that, so that its place is not known")
        return text, [(start, start + len(block)) for start, block in run.blocks]


class _Run:
    """A chat that is being rendered: what is written, the generation blocks with their places, what is left of it."""

    __slots__ = ("blocks", "deadline", "items", "written")

    def __init__(self) -> None:
        self.blocks: list[tuple[int, str]] = []
        self.written = self.items = 0
        self.deadline = time.monotonic() + _MOST_SECONDS


_RUN: ContextVar[_Run | None] = ContextVar("run", default=None)


def _range(*bounds: int) -> range:
    """`range` of which a chat can count through so many items."""
    found, run = range(*bounds), _RUN.get()
    if run is not None:
        run.items += len(found)
        if run.items > _MOST_ITEMS:
            _refuse("it counts without end")
    return found


def compile_template(name: str, source: str, printable: Callable[[Any], Any]) -> Any:
    """A user's template of records, whose every printed value goes through `printable`.

    Raises:
        InputError: it is malformed; names the line.
        MissingExtraError: the package jinja2 is not installed.
    """
    undefined = import_extra("jinja2", "jinja").StrictUndefined
    return _compiled(_environment(_between_marks, undefined=undefined, finalize=printable), name, source)


def variables_of(source: str) -> set[str]:
    """The names that a template takes from outside; none where it is malformed."""
    jinja2 = import_extra("jinja2", "jinja")
    try:
        found = import_extra("jinja2.meta", "jinja").find_undeclared_variables(_environment(_noted).parse(source))
    except (jinja2.TemplateSyntaxError, RecursionError):
        return set()
    return {str(name) for name in found}


def literals_of(source: str) -> list[str]:
    """The texts that a well-formed template holds itself, between its tags and within them."""
    nodes = import_extra("jinja2", "jinja").nodes
    tree = _environment(_noted).parse(source)
    found = [node.data for node in tree.find_all(nodes.TemplateData)]
    return found + [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]


def _environment(mark: Callable[[str], str], **settings: Any) -> Any:
    sandbox = import_extra("jinja2.sandbox", "jinja")
    loop, namespace = import_extra("jinja2.runtime", "jinja").LoopContext, _namespace()
    safe = set[tuple[type, str]]()

    class Environment(sandbox.ImmutableSandboxedEnvironment):  # type: ignore[misc, name-defined]
        intercepted_binops = frozenset(["*", "**"])

        def getattr(self, obj: Any, attribute: str) -> Any:
            """As in the sandbox, which asks again each time: of a record's values their type and the name decide."""
            kind = type(obj)
            if kind is dict and attribute not in _OF_DICTS:
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
            if (kind, attribute) in safe and (kind is not namespace or hasattr(obj, attribute)):
                return getattr(obj, attribute)
            is_known = attribute in _OF_TEXTS if kind is str else kind in (loop, namespace) and hasattr(obj, attribute)
            if is_known and self.is_safe_attribute(obj, attribute, None):
                safe.add((kind, attribute))
            return super().getattr(obj, attribute)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """A product or power, of a size that a chat may need."""
            size = sum(len(value) if isinstance(value, str | list | tuple) else 0 for value in (left, right))
            times = next((value for value in (left, right) if isinstance(value, int)), 0)
            if size * times > _MOST_CHARACTERS or (
                operator == "**" and not (abs(left) < 1 << 64 and abs(right) < 1024)
            ):
                _refuse(f"it makes too much of {operator}")
            return super().call_binop(context, operator, left, right)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation(), "jinja2.ext.loopcontrols"], **settings
    )
    environment.filters["tojson"] = _tojson
    environment.filters[GENERATION] = mark
    environment.globals.update(raise_exception=_refuse, dict=_Dict(), namespace=namespace)
    return environment


def _compiled(environment: Any, name: str, source: str) -> Any:
    jinja2 = import_extra("jinja2", "jinja")
    try:
        template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"template {name!r}, line {error.lineno}: {error.message}") from error
    except RecursionError:
        raise InputError(f"template {name!r}: nested too deeply") from None
    template.globals = dict(template.globals)  # a chain of mappings is slow to copy, once a record
    return template


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


def _between_marks(text: str) -> str:
    return BEGIN + text + END


def _noted(text: str) -> str:
    """A block's text, which is noted with its place in what is written."""
    run = _RUN.get()
    if run is not None:
        run.blocks.append((run.written, text))
    return text


def _generation() -> type:
    """The tag `{% generation %}` ... `{% endgeneration %}`, what is trained: a block whose text goes through a filter,
    which costs a tenth of a macro that is called with it.
    """
    nodes = import_extra("jinja2", "jinja").nodes

    class Generation(import_extra("jinja2.ext", "jinja").Extension):  # type: ignore[misc]
        tags = {"generation"}  # noqa: RUF012 (jinja2's own convention)

        def parse(self, parser: Any) -> Any:
            self.environment.has_generation = True
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.FilterBlock(body, nodes.Filter(None, GENERATION, [], [], None, None)).set_lineno(line)

    return Generation
