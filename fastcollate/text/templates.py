"""Record -> alternating prompt and response texts, prompt first; every response is trained, nothing else is.

Single-turn templates also work on whole columns at once, which is what makes short records cheap.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastcollate.errors import InputError
from fastcollate.sources import records
from fastcollate.text.chat.rendered import Rendered
from fastcollate.text.engines.backends import Texts, starts_of
from fastcollate.text.jinja_env import BEGIN, END, compile_template

Parts = list[str]
"""A record's texts: prompt, response, prompt, ..."""

_NAMES = {  # under which fields are recognised
    "instruction": ("instruction", "question", "prompt", "query", "problem"),
    "input": ("input", "context"),
    "output": ("output", "answer", "response", "completion", "solution"),
    "messages": ("messages", "conversations"),
}
_TEXTS = {  # before the instruction, the input and the output
    "alpaca": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\n",
        "\n\n### Input:\n",
        "\n\n### Response:\n",
    ),
    "phi3": ("<|user|>\n", "\n", "\n<|assistant|>:\n"),
    "completion": ("", "\n", ""),
}
_TURN_NAMES = (("role", "from"), ("content", "value"))
_ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool", "function")}
_ROLES |= {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


class BadRecordError(Exception):
    """A record that does not give a text; the message is the reason, without the place."""


class Template:
    """How a record becomes text.

    Attributes:
        name: what the user asked for.
        settings: what decides the texts, beside the name.
        single_turn: whether every record gives exactly one prompt and one response.
        names: the fields that `columns` takes, each by all its names; `None` where only `parts` makes texts.
        end: `append`, where an end-of-text follows each row; `in_row`, where the template writes rows' ends: a record
            gives one text by `render`, and not `parts`.
    """

    single_turn = True
    end = "append"
    names: Sequence[Sequence[str]] | None = None

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.name = name
        self.settings = settings

    def identity(self) -> dict[str, Any]:
        """What decides the texts."""
        return {"name": self.name, **self.settings}

    def parts(self, record: Any) -> Parts:
        """The record's texts.

        Raises:
            BadRecordError: a field is missing or of the wrong type, or there is no text.
        """
        raise NotImplementedError

    def render(self, record: Any) -> Rendered:
        """The record as one text, where the template writes rows' ends.

        Raises:
            BadRecordError: it cannot be rendered, or what of it is trained is not certain.
        """
        raise NotImplementedError

    def columns(self, fields: Sequence[list[str | None]]) -> tuple[Texts, list[int]]:
        """The texts of many records, given as a column for each of `names`: prompt, response, prompt, ...

        Behind them the numbers of records that need `parts`: a fault, an unusual field; they have some texts too.
        """
        raise NotImplementedError


class SingleTurn(Template):
    """A prompt made of an instruction and perhaps an input, and a response."""

    def __init__(self, name: str, fields: Mapping[str, str]) -> None:
        super().__init__(name, {"fields": dict(fields)})
        self._head, self._before_input, self._before_output = _TEXTS[name]
        self.names = [_candidates(fields, field) for field in ("instruction", "input", "output")]

    def parts(self, record: Any) -> Parts:
        """Prompt and response."""
        instructions, inputs, outputs = self.names or ()
        instruction = _text(record, instructions, "instruction")
        output = _text(record, outputs, "output")
        extra = _text(record, inputs, "input") if any(record.get(name) is not None for name in inputs) else ""
        if not instruction and not extra and not output:
            raise BadRecordError("no text: every field is empty")
        prompt = self._head + instruction
        return [prompt + self._before_input + extra if extra else prompt, self._before_output + output]

    def columns(self, fields: Sequence[list[str | None]]) -> tuple[Texts, list[int]]:
        """The texts of many records, given as a column for each of `names`."""
        instructions, inputs, outputs = fields
        irregular = []
        if not (all(instructions) and all(outputs)):
            rows = enumerate(zip(instructions, inputs, outputs, strict=True))
            irregular = [i for i, (a, b, c) in rows if a is None or c is None or not (a or b or c)]
        count, head, before_output = len(outputs), self._head, self._before_output
        pieces = [head] * (5 * count)
        pieces[1::5] = [text or "" for text in instructions]
        pieces[2::5] = [self._before_input + text if text else "" for text in inputs]
        pieces[3::5] = [before_output] * count
        pieces[4::5] = [text or "" for text in outputs]
        text = "".join(pieces)
        is_ascii, columns = text.isascii(), [pieces[place::5] for place in (1, 2, 4)]
        lengths = [np.fromiter(map(len, c if is_ascii else map(str.encode, c)), np.int64, count) for c in columns]
        sizes = np.empty((count, 2), np.int64)
        sizes[:, 0] = len(head) + lengths[0] + lengths[1]
        sizes[:, 1] = len(before_output) + lengths[2]
        return Texts(data=text.encode(), offsets=starts_of(sizes.reshape(-1))), irregular


class Chat(Template):
    """ChatML over `messages` (`role`, `content`) or ShareGPT's `conversations` (`from`, `value`).

    Every assistant turn and its `<|im_end|>` are a response; headings, other roles and line breaks are prompt.
    """

    single_turn = False

    def __init__(self, fields: Mapping[str, str]) -> None:
        super().__init__("chat", {"fields": dict(fields)})
        self._turns = _candidates(fields, "messages")

    def parts(self, record: Any) -> Parts:
        """Prompt, response, prompt, ..."""
        turns = record[_name(record, self._turns, "messages")]
        if not isinstance(turns, list):
            raise BadRecordError(f"messages is {_kind(turns)}, not a list of turns")
        if not turns:
            raise BadRecordError("no text: there are no turns")
        parts, prompt = [], ""
        for number, turn in enumerate(turns):
            role, content = _turn(turn, number)
            heading = f"<|im_start|>{role}\n"
            if number:
                heading = "\n" + heading
            if role == "assistant":
                parts += [prompt + heading, content + "<|im_end|>"]
                prompt = ""
            else:
                prompt += heading + content + "<|im_end|>"
        return [*parts, prompt] if prompt else parts


class Jinja(Template):
    """A user's own template; what lies between `{% generation %}` and `{% endgeneration %}` is a response.

    It runs sandboxed and sees the record's fields by name, and the whole record as `record`.
    """

    single_turn = False

    def __init__(self, name: str, source: str) -> None:
        settings = {"source": source}
        if "tojson" in source:  # before, Jinja's own: other texts
            settings["tojson"] = "transformers"
        super().__init__(name, settings)
        self._template = compile_template(name, source, _printable)

    def parts(self, record: Any) -> Parts:
        """Prompt, response, prompt, ..."""
        import jinja2

        if not isinstance(record, dict):
            raise BadRecordError(f"not an object but {_kind(record)}")
        try:
            text = self._template.render({**record, "record": record})
        except BadRecordError:
            raise
        except RecursionError:
            raise BadRecordError("the template fails: it calls itself without end") from None
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise BadRecordError(f"the template fails: {error}") from error
        parts = [piece for begin in text.split(BEGIN) for piece in begin.split(END)]
        marks = re.findall(f"{BEGIN}|{END}", text)
        if marks != [BEGIN, END] * (len(marks) // 2):
            raise BadRecordError("the generation spans are nested, or a field holds U+FDD0 or U+FDD1")
        if not any(parts):
            raise BadRecordError("no text: the template gives nothing")
        return parts if parts[-1] else parts[:-1]


class Tokenized(Template):
    """Records that hold ids already, with what of them is trained: no text is made of them.

    `fields` says which columns are taken, as `fastcollate.ingest.ids.rows` knows them.
    """

    single_turn = False
    end = "in_row"

    def __init__(self, fields: Mapping[str, str]) -> None:
        super().__init__("tokenized", {"fields": dict(fields)})


def load_template(name: str, fields: Mapping[str, str] | None = None) -> Template:
    """A template by name, or a Jinja template from a file (`*.jinja`, `*.j2`).

    Args:
        name: `alpaca`, `phi3`, `completion`, `chat`, or a file.
        fields: where a template's field comes from, such as `{"instruction": "question"}`; fields that are not
            named are recognised by common names.

    Raises:
        InputError: no such template, a field that it does not have, or a malformed file.
        MissingExtraError: a Jinja template without the package jinja2.
    """
    fields = dict(fields or {})
    if name.endswith((".jinja", ".j2", ".jinja2")):
        if fields:
            raise InputError("fields: a Jinja template names the record's fields itself")
        return Jinja(name, _read_template(Path(name)))
    if name == "tokenized":
        return Tokenized(fields)
    if name != "chat" and name not in _TEXTS:
        known = ", ".join((*_TEXTS, "chat", "tokenized"))
        raise InputError(f"template {name!r}: choose one of {known}, or give the path of a .jinja file")
    if name == "completion":
        fields = {{"prompt": "instruction", "completion": "output"}.get(key, key): f for key, f in fields.items()}
    known_fields = ("messages",) if name == "chat" else ("instruction", "input", "output")
    for key in fields:
        if key not in known_fields:
            raise InputError(f"field {key!r}: template {name!r} has the fields {', '.join(known_fields)}")
    return Chat(fields) if name == "chat" else SingleTurn(name, fields)


def _candidates(fields: Mapping[str, str], field: str) -> tuple[str, ...]:
    return (fields[field],) if field in fields else _NAMES[field]


def _name(record: Any, names: Sequence[str], field: str) -> str:
    """The first of the names under which the record holds anything."""
    if not isinstance(record, dict):
        raise BadRecordError(f"not an object but {_kind(record)}")
    there = [name for name in names if name in record]
    if not there:
        have = ", ".join(map(repr, list(record)[:8])) or "none"
        raise BadRecordError(
            f"no field {' or '.join(map(repr, names))} (fields here: {have}); map it with --field {field}=NAME"
        )
    return next((name for name in there if record[name] is not None), there[0])


def _text(record: Any, names: Sequence[str], field: str) -> str:
    name = _name(record, names, field)
    if not isinstance(record[name], str):
        raise BadRecordError(f"field {name!r} is {_kind(record[name])}, not text")
    return str(record[name])


def _turn(turn: Any, number: int) -> tuple[str, str]:
    place = f"turn {number + 1}"
    if not isinstance(turn, dict):
        raise BadRecordError(f"{place} is {_kind(turn)}, not an object")
    role, content = (turn[first] if turn.get(first) is not None else turn.get(second) for first, second in _TURN_NAMES)
    if not isinstance(role, str) or not role:
        raise BadRecordError(f"{place} has no role")
    if role not in _ROLES:
        raise BadRecordError(f"{place}: the role {role!r} is not known; use one of {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise BadRecordError(f"{place}: its content is {_kind(content)}, not text")
    return _ROLES[role], content


def _kind(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN or infinite"
    if isinstance(value, records.Unreadable):
        return f"unreadable ({value.reason})"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _printable(value: Any) -> Any:
    """What a template prints: text and numbers; of anything else it would print what Python calls it."""
    if value is None or isinstance(value, bool | list | dict | records.Unreadable) or _kind(value) == "NaN or infinite":
        remedy = "give a default, such as {{ x or '' }}" if value is None else "print its parts, or {{ x | tojson }}"
        raise BadRecordError(f"the template prints {_kind(value)} ({str(value)[:40]}); {remedy}")
    return value


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"template {str(path)!r}: cannot be read ({error})") from error
