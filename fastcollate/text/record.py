"""What a template of any kind is, and what it says of a record that it cannot use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastcollate.errors import bounded, shown
from fastcollate.sources import records
from fastcollate.text.chat.dropped import carries_text, dropped_fields
from fastcollate.text.chat.rendered import Rendered
from fastcollate.text.engines.backends import Texts

if TYPE_CHECKING:
    from fastcollate.text.chat.pairs import Preference

Parts = list[str]
"""A record's texts: prompt, response, prompt, ..."""

_ANSWERS = frozenset(("messages", "output", "completion", "text"))  # as a user names what is to be learnt
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool", "function")}
ROLES |= {"human": "user", "observation": "tool", "tool_response": "tool", "ipython": "ipython"}
ROLES |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant")


class BadRecordError(Exception):
    """A record that does not give a text; the message is the reason, without the place, and as short as any."""

    def __init__(self, message: str) -> None:
        super().__init__(bounded(message))


class Template:
    """How a record becomes text.

    Attributes:
        name: what the user asked for.
        settings: what decides the texts, beside the name.
        single_turn: whether every record gives exactly one prompt and one response.
        names: the fields that `columns` takes, each by all its names; `None` where only `parts` makes texts.
        end: `append`, where an end-of-text follows each row; `in_row`, where the template writes rows' ends: a record
            gives one text by `render`, and not `parts`.
        of_records: whether a template that writes rows' ends knows of no turns.
        kind: of the rows that records give: `rows`, or `documents`, which begin with the tokenizer's first token.
        preference: how a record is read as answers of which some are better; `None` where it is one to follow.
        unproved: what a `BadRecordError` says where it is not certain what of a record is trained.
    """

    unproved = "what the assistant says cannot be told from the rest of what the template writes"
    single_turn = True
    end = "append"
    of_records = False
    kind = "rows"
    names: Sequence[Sequence[str]] | None = None
    preference: Preference | None = None

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

    def asked_and_whole(self, record: Any) -> tuple[Rendered, Rendered]:
        """What a model is asked by a record, and the record whole, as a text each; of none anything is trained.

        Raises:
            BadRecordError: it cannot be rendered.
        """
        parts = self.parts(record)
        return Rendered(parts[0], [], []), Rendered("".join(parts), [], [])

    def dropped(self, record: Any, text: str) -> list[str]:
        """The names of a record's fields that carry text which does not stand in the text made of it."""
        return dropped_fields(record, text)

    def dropped_by_record(
        self, others: Mapping[str, Sequence[Any]], texts: Sequence[Sequence[str | None]]
    ) -> dict[int, list[str]]:
        """The same of many records, by number, from columns of the fields that are not taken and of those that are."""
        found: dict[int, dict[str, Any]] = {}
        for name, column in others.items():
            for number, value in enumerate(column):
                if value is not None and carries_text(name, value):
                    found.setdefault(number, {})[name] = value
        return {i: self.dropped(some, "\0".join(text[i] or "" for text in texts)) for i, some in found.items()}

    def refused_for(self, others: Mapping[str, Sequence[Any]]) -> set[int]:
        """The records that `parts` refuses for what is not taken of them, or may."""
        labelled = {i for i, value in enumerate(others.get("label", ())) if isinstance(value, bool)}
        columns = [others.get("chosen", ()), others.get("rejected", ())]
        return labelled.union(i for column in columns for i, value in enumerate(column) if value is not None)

    def question(self, text: str, more: str = "") -> Rendered:
        """What stands before the answer to a question, and perhaps its input.

        Raises:
            BadRecordError: it cannot be rendered.
        """
        return Rendered(self.parts({"instruction": text, "input": more, "output": "-"})[0], [], [])

    def variables_of(self, record: Any) -> dict[str, Any]:
        """What a chat template sees of a record."""
        raise NotImplementedError

    def trains_all(self, record: Any) -> bool:
        """Whether the marks of a chat template alone say what is trained of a record."""
        raise NotImplementedError

    def columns(self, fields: Sequence[list[str | None]]) -> tuple[Texts, list[int]]:
        """The texts of many records, given as a column for each of `names`: prompt, response, prompt, ...

        Behind them the numbers of records that need `parts`: a fault, an unusual field; they have some texts too.
        """
        raise NotImplementedError


def role_of(name: Any, number: int) -> str:
    """The role that a name stands for, in the turn of this number, from 1."""
    if not isinstance(name, str) or not name:
        raise BadRecordError(f"turn {number} has no role")
    if name not in ROLES:
        raise BadRecordError(f"turn {number}: the role {shown(name)} is not known; use one of {', '.join(ROLES)}")
    return ROLES[name]


def refuse_labels(record: Any, fields: Mapping[str, str]) -> None:
    """Refuse what is no example to follow: a pair of which one is rejected, an answer with a verdict.

    A pair is none where `fields` says which field is to be learnt.
    """
    if not isinstance(record, dict):
        return
    if _ANSWERS.isdisjoint(fields) and not (record.get("rejected") is None and record.get("chosen") is None):
        raise BadRecordError(
            "a pair of chosen and rejected answers, not one to learn; for preferences use --template preference; to "
            "learn the chosen ones name their field: --field messages=chosen where they are turns, else --field "
            "output=chosen"
        )
    if isinstance(record.get("label"), bool) and record.get("completion") is not None:
        raise BadRecordError(
            f"an answer labelled {str(record['label']).lower()}, not one to learn; keep the records whose label is "
            "true, and leave the field label out; or use --template preference"
        )


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN or infinite"
    if isinstance(value, records.Unreadable):
        return f"unreadable ({value.reason})"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
