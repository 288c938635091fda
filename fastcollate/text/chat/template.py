"""The tokenizer's own chat template: each chat is rendered once, and its `{% generation %}` blocks are trained.

Where a template has none of these blocks, or only some of a chat's answers are to be trained, the chat is rendered
again with marks around what the assistant says; see `fastcollate.text.chat.marks`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

from fastcollate.errors import InputError
from fastcollate.text.added import Joints, search_for
from fastcollate.text.chat import marks
from fastcollate.text.chat.rendered import Rendered
from fastcollate.text.chat.turns import Chat, join_parts, other_parts, question_of, read_chat
from fastcollate.text.jinja_env import GLOBALS, ChatProgram, literals_of, variables_of
from fastcollate.text.record import ROLES, BadRecordError, Template, kind_of, refuse_labels

_REMEDY = "give a template that has {% generation %} around it, such as --template my_training.jinja"
_NOT_TEXT = {"role", "type", "id", "tool_call_id"}  # of a turn: names, not what is said
_PROBE = "8236459170"  # which no filter changes
_LIKE_TOKENS = re.compile(r"<[|｜][^<>\s]+[|｜]>|<\w+_of_\w+>")


_ALLOWED = (  # what templates write again of an answer: tags of thoughts and of calls, no role and no end
    "<think>", "</think>", "[THINK]", "[/THINK]", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
)  # fmt: skip


class ChatSettings(NamedTuple):
    """What is asked of a template besides its text.

    Attributes:
        arguments: further arguments of a chat template, such as `enable_thinking`.
        date: what `strftime_now` gives, as 2026-01-31.
        train_on: `all` answers or the `last` one.
        allowed: texts of added tokens that stand for them in an answer, such as `<think>`; `None`: tags of thoughts
            and tool calls.
        end: `in_row` for a chat template, `append` for one of records; `auto` goes by the template.
        mask_heading: a template's constant heading of the response is not trained.
        source: a chat template's text, in place of a file's or the tokenizer's.
    """

    arguments: Mapping[str, Any] | None = None
    date: str | None = None
    train_on: str = "all"
    allowed: Collection[str] | None = None
    end: str = "auto"
    mask_heading: bool = False
    source: str | None = None


class Tokens(NamedTuple):
    """What a template knows of a tokenizer: `bos_token` and such with their texts, the texts of all added tokens."""

    names: Mapping[str, str]
    added: Collection[str]


class ChatTemplate(Template):
    """A Jinja template of turns, in the environment of `transformers`; one that reads no `messages` is of records.

    Such a one sees the record's fields by name, and the whole record as `record`; what it has between
    `{% generation %}` and `{% endgeneration %}` is trained.

    Args:
        name: what the user asked for.
        source: the template.
        tokens: of the tokenizer.
        settings: see there.
        fields: where `messages`, `system` and `tools` come from.

    Raises:
        InputError: it is malformed, or a setting is.
    """

    single_turn = False
    end = "in_row"

    def __init__(
        self, name: str, source: str, tokens: Tokens, settings: ChatSettings, fields: Mapping[str, str] | None = None
    ) -> None:
        arguments, self._fields = dict(settings.arguments or {}), dict(fields or {})
        asked = {"fields": self._fields, "arguments": arguments, "date": settings.date, "train_on": settings.train_on}
        self._allowed = frozenset(_ALLOWED if settings.allowed is None else settings.allowed) & {*tokens.added}
        ends = {tokens.names.get(f"{name}_token") for name in ("bos", "eos", "pad")}
        if never := sorted(self._allowed & ends):
            raise InputError(f"allow_special: {never[0]!r} begins, ends or fills texts; no answer holds it as a token")
        tokens_asked = {"tokens": dict(tokens.names), "allowed": sorted(self._allowed)}
        super().__init__(name, {"source": source, **tokens_asked, **asked, "reader": 1})
        self._program = ChatProgram(name, source, _date(settings.date))
        names = variables_of(source)
        self.of_records = "messages" not in names
        self._arguments = {**tokens.names, **arguments, "add_generation_prompt": False}
        self._reads = {name for name in names if not name.endswith("_token")} - {*self._arguments, *GLOBALS, "record"}
        self._added = search_for(tokens.added)
        self._joints = Joints(tokens.added, literals_of(source), ROLES)
        self._train_last = settings.train_on == "last"

    @property
    def has_generation(self) -> bool:
        """Whether it says by itself what is trained."""
        return self._program.has_generation

    def unknown_tokens(self) -> list[str]:
        """What the template writes as if it were a token, but the tokenizer knows no such token."""
        text = self._added.sub(" ", self._probe_text)
        return list(dict.fromkeys(_LIKE_TOKENS.findall(text)))

    def variables_of(self, record: Any) -> dict[str, Any]:
        """What the template sees of a record."""
        return self._variables(self._read(record))

    def _read(self, record: Any) -> Chat:
        if not self.of_records:
            return read_chat(record, self._fields)
        if not isinstance(record, dict):
            raise BadRecordError(f"not an object but {kind_of(record)}")
        refuse_labels(record, self._fields)
        if missing := sorted(self._reads - record.keys()):
            raise BadRecordError(f"no field {missing[0]!r}; write record.{missing[0]} where it may be missing")
        filled = {name: "" if value is None else value for name, value in record.items()}
        given: dict[str, Any] = {"messages": [], "record": filled}
        given |= {name: filled.get(name) for name in ("tools", "documents")}
        return Chat(given, [], frozenset(record))

    def _variables(self, chat: Chat) -> dict[str, Any]:
        variables = {**self._arguments, **chat.variables}
        if any(type(turn.get("content")) is list for turn in variables["messages"]) and not self._takes_parts:
            variables["messages"] = join_parts(variables["messages"])
        return variables

    def trains_all(self, record: Any) -> bool:
        """Whether `{% generation %}` alone says what is trained of a record."""
        chat = self._read(record)
        answers = [turn.get("role") == "assistant" for turn in chat.variables["messages"]]
        return self._program.has_generation and answers == chat.trains and not (self._train_last and sum(answers) > 1)

    def render(self, record: Any) -> Rendered:
        """The record's chat as one text."""
        chat = self._read(record)
        return self._rendered(chat, self._variables(chat))

    def asked_and_whole(self, record: Any) -> tuple[Rendered, Rendered]:
        """The turns before the record's `completion`, or before its last, with the head of an answer; and all turns."""
        if self.of_records:
            found = self.render(record)
            stop = found.trained[0][0] if found.trained else len(found.text)
            protected = [place for place in found.protected if place[1] <= stop]
            return Rendered(found.text[:stop], [], protected), found._replace(trained=[])
        chat = self._read(record)._replace(trains=[])
        answer, variables = record.get("completion"), self._variables(chat)
        count = len(variables["messages"]) - (len(answer) if isinstance(answer, list) else 1)
        asked = {**variables, "messages": variables["messages"][:count], "add_generation_prompt": True}
        return self._rendered(chat, asked), self._rendered(chat, variables)

    def question(self, text: str, more: str = "") -> Rendered:
        """A user's turn, and what the template writes before an answer to it."""
        if self.of_records:
            found = self.render({"instruction": text, "input": more, "output": "-"})
            stop = found.trained[0][0]
            return Rendered(found.text[:stop], [], [place for place in found.protected if place[1] <= stop])
        chat = read_chat({"messages": question_of(text, more)}, {})
        return self._rendered(chat, {**self._variables(chat), "add_generation_prompt": True})

    def _rendered(self, chat: Chat, variables: dict[str, Any]) -> Rendered:
        text, blocks = self._run(variables)
        if not text:
            raise BadRecordError("no text: the template gives nothing")
        for number, part in other_parts(variables["messages"]):
            if part["text"].strip() not in text:
                raise BadRecordError(f"turn {number}: the template does not write a part of the type {part['type']!r}")
        trained = self._trained(chat, variables, text, blocks)
        seen = {name: variables[name] for name in chat.variables}
        given = "\0".join(["", *marks.texts_of(seen), ""])
        holds = self._added.search(given) is not None
        if (holds or self._joints.may_join(given)) and (token := self._joints.joined(given, text)):
            raise BadRecordError(f"holds parts of the special token {token!r}, which the template puts together")
        return Rendered(text, trained, self._protected(seen, variables, text) if holds else [])

    def _run(self, variables: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        import jinja2

        try:
            return self._program.run({**variables["record"], **variables} if "record" in variables else variables)
        except InputError:  # the job's fault, not this record's
            raise
        except RecursionError:
            raise BadRecordError("the template fails: it calls itself without end") from None
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            MemoryError,
        ) as error:
            raise BadRecordError(f"the template fails: {error}") from error

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether a content of several parts is written as their text."""
        texts = []
        for content in (_PROBE, [{"type": "text", "text": _PROBE}]):
            try:
                texts.append(self._run({**self._arguments, **_one_turn("user", content)})[0])
            except BadRecordError:
                texts.append("")
        return _PROBE in texts[1] and (texts[0] == texts[1] or _PROBE not in texts[0])

    @cached_property
    def _probe_text(self) -> str:
        """What it writes of a question and an answer; nothing where it fails on them."""
        chat = _one_turn("user", "Hello")
        chat["messages"].append({"role": "assistant", "content": _PROBE})
        with contextlib.suppress(BadRecordError):
            return self._run({**self._arguments, **chat})[0]
        return ""

    @cached_property
    def _end_of_turn(self) -> re.Pattern[str]:
        """What the template writes behind an answer, up to the token that ends a turn; nothing where none does."""
        behind = self._probe_text.partition(_PROBE)[2]
        found = re.match(rf"\s*({self._added.pattern}|{_LIKE_TOKENS.pattern})", behind)
        return re.compile(r"(?:\s*</?think>)*" + (r"\s*" + re.escape(found[1]) if found else ""))

    def _trained(
        self, chat: Chat, variables: dict[str, Any], text: str, blocks: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """What is trained of the text."""
        if self.of_records:
            return blocks
        turns = variables["messages"]
        trains = chat.trains if len(chat.trains) == len(turns) else []
        answers = [number for number, turn in enumerate(turns) if turn.get("role") == "assistant"]
        if self._train_last:
            trains = [is_trained and number == answers[-1] for number, is_trained in enumerate(trains)]
        if not any(trains):
            return []
        if self._program.has_generation and all(trains[number] for number in answers):
            return blocks
        ranges = self._answers(variables, text)
        if not self._program.has_generation:
            return [self._with_end(text, turns[turn], *place) for turn, place in sorted(ranges.items()) if trains[turn]]
        trained = []
        for number, (start, stop) in enumerate(blocks):
            within = [turn for turn, place in ranges.items() if start <= place[0] and place[1] <= stop]
            if not within and len(blocks) == len(answers):
                within = [answers[number]]  # one that says nothing
            if not within or len({trains[turn] for turn in within}) > 1:
                raise BadRecordError(f"{self.unproved}, and not all of it is to be trained")
            if trains[within[0]]:
                trained.append((start, stop))
        return trained

    def _answers(self, variables: dict[str, Any], text: str) -> dict[int, tuple[int, int]]:
        """Where what each turn of the assistant says lies in the text."""
        if not marks.MARKS.search(text) and not any(map(marks.MARKS.search, marks.leaves(variables["messages"]))):
            for turns in marks.with_answers(variables["messages"]):
                try:
                    marked = marks.without_marks(self._run({**variables, "messages": turns})[0])
                except BadRecordError:
                    continue
                ranges = marks.answer_ranges(marked.marks) if marked.text == text else None
                if ranges is not None:
                    return ranges
        raise BadRecordError(f"{self.unproved}; {_REMEDY}")

    def _with_end(self, text: str, turn: Mapping[str, Any], start: int, stop: int) -> tuple[int, int]:
        """The range of an answer with the tag of a thought before it and the end of turn behind it."""
        if turn.get("tool_calls"):
            raise BadRecordError(f"a turn calls tools, and {self.unproved}; {_REMEDY}")
        found = self._end_of_turn.match(text, stop)
        if found is None:
            raise BadRecordError(f"no end of turn stands behind what the assistant says; {_REMEDY}")
        if thought := re.search(r"<think>\s*$", text[max(start - 16, 0) : start]):
            start -= len(thought[0])
        return start, found.end()

    def _protected(self, seen: dict[str, Any], variables: dict[str, Any], text: str) -> list[tuple[int, int, bool]]:
        """Where the text holds texts of added tokens that the record has brought, of which `seen` is all there is."""
        if not any(map(marks.MARKS.search, [text, *marks.leaves(seen["messages"])])):
            marked_seen = marks.with_protected(seen, self._added, self._allowed)
            if marked_seen == seen:
                return []  # they are allowed
            with contextlib.suppress(BadRecordError):
                marked = marks.without_marks(self._run({**variables, **marked_seen})[0])
                ranges = marks.protected_ranges(marked.marks) if marked.text == text else None
                if ranges is not None:
                    return ranges
        raise BadRecordError("holds the text of a special token, whose place in what the template writes is not known")


def _one_turn(role: str, content: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}], "tools": None, "documents": None}


def _date(text: str | None) -> datetime | None:
    try:
        return None if text is None else datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(f"date={text!r}: write it as 2026-01-31 ({error})") from error
