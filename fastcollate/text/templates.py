"""Record -> alternating prompt and response texts, prompt first; every response is trained, nothing else is.

Single-turn templates also work on whole columns at once, which is what makes short records cheap.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastcollate.errors import InputError, shown
from fastcollate.sources import records
from fastcollate.text.chat import pairs
from fastcollate.text.chat.chatml import Chat
from fastcollate.text.chat.template import ChatSettings, ChatTemplate, Tokens
from fastcollate.text.engines.backends import Texts, starts_of
from fastcollate.text.jinja_env import BEGIN, END, compile_template, variables_of
from fastcollate.text.record import BadRecordError as BadRecordError
from fastcollate.text.record import Parts, kind_of, refuse_labels
from fastcollate.text.record import Template as Template

_NAMES = {  # under which fields are recognised
    "instruction": ("instruction", "question", "prompt", "query", "problem"),
    "input": ("input", "context"),
    "output": ("output", "answer", "response", "completion", "solution"),
}
_CHAT_FIELDS = ("messages", "system", "tools")
_TEXT_FIELDS = {*_NAMES, *_CHAT_FIELDS, "prompt", "completion", "text"}
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


class SingleTurn(Template):
    """A prompt made of an instruction and perhaps an input, and a response.

    The heading of the response is trained with it, or part of the prompt if `mask_heading`.
    """

    def __init__(self, name: str, fields: Mapping[str, str], mask_heading: bool = False) -> None:
        super().__init__(name, {"fields": dict(fields), **({"mask_heading": True} if mask_heading else {})})
        self._head, self._before_input, heading = _TEXTS[name]
        self._after_prompt, self._before_output = (heading, "") if mask_heading else ("", heading)
        self._fields = fields
        self.names = [_candidates(fields, field) for field in ("instruction", "input", "output")]

    def parts(self, record: Any) -> Parts:
        """Prompt and response."""
        refuse_labels(record, self._fields)
        instructions, inputs, outputs = self.names or ()
        instruction = _text(record, instructions, "instruction")
        output = _text(record, outputs, "output")
        extra = _text(record, inputs, "input") if any(record.get(name) is not None for name in inputs) else ""
        if not instruction and not extra and not output:
            raise BadRecordError("no text: every field is empty")
        prompt = self._head + instruction
        prompt = prompt + self._before_input + extra if extra else prompt
        return [prompt + self._after_prompt, self._before_output + output]

    def columns(self, fields: Sequence[list[str | None]]) -> tuple[Texts, list[int]]:
        """The texts of many records, given as a column for each of `names`."""
        instructions, inputs, outputs = fields
        irregular = []
        if not (all(instructions) and all(outputs)):
            rows = enumerate(zip(instructions, inputs, outputs, strict=True))
            irregular = [i for i, (a, b, c) in rows if a is None or c is None or not (a or b or c)]
        count, head, before_output = len(outputs), self._head, self._after_prompt + self._before_output
        pieces = [head] * (5 * count)
        pieces[1::5] = [text or "" for text in instructions]
        pieces[2::5] = [self._before_input + text if text else "" for text in inputs]
        pieces[3::5] = [before_output] * count
        pieces[4::5] = [text or "" for text in outputs]
        text = "".join(pieces)
        is_ascii, columns = text.isascii(), [pieces[place::5] for place in (1, 2, 4)]
        lengths = [np.fromiter(map(len, c if is_ascii else map(str.encode, c)), np.int64, count) for c in columns]
        sizes = np.empty((count, 2), np.int64)
        sizes[:, 0] = len(head) + lengths[0] + lengths[1] + len(self._after_prompt)
        sizes[:, 1] = len(self._before_output) + lengths[2]
        return Texts(data=text.encode(), offsets=starts_of(sizes.reshape(-1))), irregular


class WholeText(Template):
    """A text, all of which is trained."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        super().__init__("text", {"fields": dict(fields)})
        self._fields = fields
        self.names = [(fields.get("text", "text"),)]

    def parts(self, record: Any) -> Parts:
        """No prompt, and the text."""
        refuse_labels(record, self._fields)
        text = _text(record, (self.names or [("text",)])[0], "text")
        if not text:
            raise BadRecordError("no text: it is empty")
        return ["", text]

    def columns(self, fields: Sequence[list[str | None]]) -> tuple[Texts, list[int]]:
        """The texts of many records, given as one column."""
        pieces = [""] * (2 * len(fields[0]))
        pieces[1::2] = [text or "" for text in fields[0]]
        return Texts(pieces), [number for number, text in enumerate(fields[0]) if not text]


class Document(WholeText):
    """A text of many that are trained end to end: a token that begins texts comes before it, an end-of-text behind."""

    kind = "documents"

    def __init__(self, fields: Mapping[str, str]) -> None:
        super().__init__(fields)
        self.name = "document"


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
            raise BadRecordError(f"not an object but {kind_of(record)}")
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

    `fields` says which columns are taken, as `fastcollate.ingest.ids.rows` knows them. Rows are exactly these ids, or
    with `end="append"` those without an end-of-text that closes them, which the collate appends.
    """

    single_turn = False

    def __init__(self, fields: Mapping[str, str], end: str = "in_row") -> None:
        super().__init__("tokenized", {"fields": dict(fields)})
        self.end = end


def load_template(
    name: str,
    fields: Mapping[str, str] | None = None,
    tokenizer: Any = None,
    *,
    saved: Mapping[str, Any] | None = None,
    **asked: Any,
) -> Template:
    """A template by name, or a Jinja template from a file (`*.jinja`, `*.j2`).

    Args:
        name: `alpaca`, `phi3`, `completion`, `text`, `document`, `chat`, `tokenizer` (the chat template that comes
            with it), or a file: a chat template where it reads `messages` and writes tokens of the tokenizer, else one
            of records; `preference:` before one of these is for pairs of answers, and for answers with verdicts.
        fields: where a template's field comes from, such as `{"instruction": "question"}`; fields that are not
            named are recognised by common names.
        tokenizer: for chat templates.
        saved: what a store's manifest says of its template; then a chat template is exactly the store's.
        asked: see `fastcollate.text.chat.template.ChatSettings`.

    Raises:
        InputError: no such template, a field or setting that it does not have, or a malformed file.
        MissingExtraError: a Jinja template without the package jinja2.
    """
    if saved is not None and "tokens" in saved:
        settings = ChatSettings(saved["arguments"], saved["date"], saved["train_on"], tuple(saved["allowed"]))
        tokens = Tokens(saved["tokens"], tokenizer.special_texts)
        return ChatTemplate(name, saved["source"], tokens, settings, saved["fields"])
    if name.startswith(f"{pairs.NAME}:"):
        return _preference(name.partition(":")[2], fields or {}, tokenizer, asked)
    fields, settings = dict(fields or {}), ChatSettings(**asked)
    if settings.source is not None and settings.end == "in_row":  # as a store keeps it
        return _chat_template(name, settings.source, fields, tokenizer, settings)
    if name.endswith((".jinja", ".j2", ".jinja2")):
        source = _read_template(Path(name))
        if settings.end == "in_row" or (settings.end == "auto" and is_chat_template(source, tokenizer)):
            return _chat_template(name, source, fields, tokenizer, settings)
        _refuse_settings(name, settings, ())
        if fields:
            raise InputError("fields: a Jinja template names the record's fields itself")
        return Jinja(name, source)
    if name == "tokenized":
        _refuse_settings(name, settings, ())
        return Tokenized(fields, "append" if settings.end == "append" else "in_row")
    if name == "tokenizer":
        own = tokenizer.chat_template if tokenizer is not None else None
        if not own:
            raise InputError(
                f"template 'tokenizer': {getattr(tokenizer, 'name', 'the tokenizer')!r} comes with no chat template; "
                "give one as a .jinja file, or use template 'chat'"
            )
        return _chat_template(name, own, fields, tokenizer, settings)
    if name not in ("chat", "text", "document", *_TEXTS):
        known = ", ".join((*_TEXTS, "text", "document", "chat", "tokenizer", "tokenized", pairs.NAME))
        raise InputError(f"template {name!r}: choose one of {known}, or give the path of a .jinja file")
    if settings.end == "in_row":
        raise InputError(
            f"end='in_row': template {name!r} writes no end of a row; use a chat template, or end='append'"
        )
    if name == "completion":
        fields = {{"prompt": "instruction", "completion": "output"}.get(key, key): f for key, f in fields.items()}
    _refuse_settings(name, settings, {"chat": ("train_on",), "text": (), "document": ()}.get(name, ("mask_heading",)))
    _check_fields(
        name,
        fields,
        {"chat": _CHAT_FIELDS, "text": ("text",), "document": ("text",)}.get(name, ("instruction", "input", "output")),
    )
    if name in ("text", "document"):
        return WholeText(fields) if name == "text" else Document(fields)
    return Chat(fields, settings.train_on) if name == "chat" else SingleTurn(name, fields, settings.mask_heading)


def _preference(base: str, fields: Mapping[str, str], tokenizer: Any, asked: dict[str, Any]) -> Template:
    """A template of records that are read as pairs, or as answers with verdicts; a heading belongs to what is asked."""
    if base in ("text", "document", "tokenized"):
        raise InputError(f"template '{pairs.NAME}:{base}': {base} knows no prompt, which two answers share")
    others = {name: field for name, field in fields.items() if name not in pairs.FIELDS}
    made = load_template(base, others, tokenizer, **{**asked, "mask_heading": base in ("alpaca", "phi3")})
    made.preference = pairs.Preference({name: field for name, field in fields.items() if name in pairs.FIELDS})
    made.settings = {**made.settings, pairs.NAME: {"fields": made.preference.fields, "reader": 1}}
    return made


def _chat_template(
    name: str, source: str, fields: Mapping[str, str], tokenizer: Any, settings: ChatSettings
) -> ChatTemplate:
    if tokenizer is None:
        raise InputError(f"template {name!r}: a chat template needs a tokenizer")
    made = ChatTemplate(name, source, _tokens_of(tokenizer), settings, fields)
    if made.of_records and not made.has_generation:
        raise InputError(f"template {name!r}: reads no messages, and has no {{% generation %}} to say what is trained")
    _refuse_settings(name, settings, ("arguments", "date", *(() if made.of_records else ("train_on", "allowed"))))
    _check_fields(name, fields, () if made.of_records else _CHAT_FIELDS)
    return made


def _tokens_of(tokenizer: Any) -> Tokens:
    return Tokens(tokenizer.special_tokens, tokenizer.special_texts)


def _check_fields(name: str, fields: Mapping[str, str], known: Sequence[str]) -> None:
    for key in fields:
        if key not in known:
            has = (
                f"has the fields {', '.join(known)}; give one of them" if known else "names the record's fields itself"
            )
            raise InputError(f"field {key!r}: template {name!r} {has}")


def _refuse_settings(name: str, settings: ChatSettings, known: Sequence[str]) -> None:
    """Refuse settings that a template does not know, in place of passing over them."""
    for key in ("arguments", "date", "train_on", "mask_heading", "allowed"):
        if (getattr(settings, key) or None) != (ChatSettings._field_defaults[key] or None) and key not in known:
            raise InputError(f"{key}={getattr(settings, key)!r}: template {name!r} has no use for it")


def is_chat_template(source: str, tokenizer: Any) -> bool:
    """Whether a Jinja template is one of turns for this tokenizer: reads `messages`, writes the tokenizer's tokens."""
    if tokenizer is None:
        return False
    names = variables_of(source)
    tokens = _tokens_of(tokenizer)
    writes = names & tokens.names.keys() or any(text in source for text in tokens.added)
    return "messages" in names and bool(writes)


def choose_template(
    record: Any, fields: Mapping[str, str], load: Callable[[], Any], end: str = "auto", asked: str = "auto"
) -> tuple[str, str, Mapping[str, str]]:
    """The template that `auto` or `preference` stands for, by the first record's fields; why, in words; what it takes.

    `load` gives the tokenizer, which only a chat needs.
    """
    record = record if isinstance(record, dict) else {}
    if asked == "auto":
        return *_template_of(record, fields, load, end), fields
    preference = pairs.Preference.of(record, fields)
    why = f"records hold {' and '.join(name for name in preference.fields if name != 'prompt')}"
    base = asked.partition(":")[2]
    if not base:
        others = {name: field for name, field in fields.items() if name not in pairs.FIELDS}
        try:
            base, reason = _template_of(preference.read(record).answers[0], others, load, end)
        except BadRecordError as error:
            raise InputError(f"template {asked!r}: the first record: {error}") from error
        why += f"; {base}: {reason.partition('; its ')[0]}"
    return f"{pairs.NAME}:{base}", why, {**fields, **preference.fields}


def _template_of(
    record: Mapping[str, Any], fields: Mapping[str, str], load: Callable[[], Any], end: str
) -> tuple[str, str]:
    def holds(name: str, kind: type) -> bool:
        return isinstance(record.get(fields.get(name, name)), kind)

    if "input_ids" in fields or (holds("input_ids", list) and _TEXT_FIELDS.isdisjoint(fields)):
        return "tokenized", "records hold ids"
    turns = next((n for n in ("messages", "conversations", "conversation") if n in fields or holds(n, list)), None)
    turns = turns or ("prompt and completion" if holds("prompt", list) and holds("completion", list) else None)
    if turns:
        tokenizer = load()
        own = tokenizer.chat_template
        if end == "append" or not own:
            why = "end='append'" if own else "the tokenizer comes with no chat template"
            return "chat", f"records hold {turns}; {why}: ChatML, and an end-of-text behind each row"
        unknown = ChatTemplate("tokenizer", own, _tokens_of(tokenizer), ChatSettings()).unknown_tokens()
        if unknown:
            return (
                "chat",
                f"records hold {turns}; the tokenizer's template writes {unknown[0]}, which it has no token for",
            )
        return "tokenizer", f"records hold {turns}: the chat template that comes with the tokenizer"
    if not any(name in fields for name in _NAMES):
        if "prompt" in fields or (holds("prompt", str) and holds("completion", str)):
            return "completion", "records hold prompt and completion"
        others = {*_NAMES["instruction"], *_NAMES["output"]}
        if "text" in fields or (holds("text", str) and others.isdisjoint(record)):
            return "text", "records hold text: all of it is trained"
    heading = "its '### Response:' is trained, as in the chapter; --mask-heading masks it"
    return "alpaca", f"records hold an instruction and its answer; {heading}"


def _candidates(fields: Mapping[str, str], field: str) -> tuple[str, ...]:
    return (fields[field],) if field in fields else _NAMES[field]


def _name(record: Any, names: Sequence[str], field: str) -> str:
    """The first of the names under which the record holds anything."""
    if not isinstance(record, dict):
        raise BadRecordError(f"not an object but {kind_of(record)}")
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
        raise BadRecordError(f"field {name!r} is {kind_of(record[name])}, not text")
    return str(record[name])


def _printable(value: Any) -> Any:
    """What a template prints: text and numbers; of anything else it would print what Python calls it."""
    if (
        value is None
        or isinstance(value, bool | list | dict | records.Unreadable)
        or kind_of(value) == "NaN or infinite"
    ):
        remedy = "give a default, such as {{ x or '' }}" if value is None else "print its parts, or {{ x | tojson }}"
        raise BadRecordError(f"the template prints {kind_of(value)} ({shown(value)}); {remedy}")
    return value


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"template {str(path)!r}: cannot be read ({error}); check the path") from error
