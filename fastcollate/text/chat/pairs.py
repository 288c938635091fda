"""Records of which some answers are better than others -> records of one answer each, which templates make rows of.

A pair holds `chosen` and `rejected`, as texts or as turns, and what was asked: `prompt`, or fields that a template
knows, or nothing: then it is what the two begin with alike, as TRL's `extract_prompt` takes it. An answer with a
verdict holds a `label`, or a `score`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastcollate.errors import InputError, shown
from fastcollate.text.record import BadRecordError, kind_of

NAME = "preference"
FIELDS = ("prompt", "chosen", "rejected", "label", "score", "margin", "score_chosen", "score_rejected")
_ASKED = ("instruction", "question", "query", "problem")
_ANSWERS = ("output", "answer", "response", "completion", "solution", "messages", "conversations", "conversation")
_OF_PAIRS, _OF_ANSWERS = ("score_chosen", "score_rejected", "margin"), ("label", "score")
_REMEDY = "name the fields that are to be taken, such as --field chosen=NAME --field rejected=NAME --field prompt=NAME"


class Judged(NamedTuple):
    """What a record says.

    Attributes:
        answers: records of what was asked and one answer to it: the chosen one, then the rejected one; or the only one.
        numbers: of each column a number for each answer.
    """

    answers: list[dict[str, Any]]
    numbers: dict[str, list[float]]


class Preference:
    """How records of pairs, or of answers with verdicts, are read.

    Args:
        fields: the fields that are taken, by what they are. `prompt` is no field ("") where both answers begin with it,
            and is left out where fields that the template knows ask.

    Attributes:
        kind: `pairs` or `answers`, as a store's manifest says it.
        columns: further columns of the store, by name: their NumPy types.

    Raises:
        InputError: they say neither or both.
    """

    def __init__(self, fields: Mapping[str, str]) -> None:
        pair, verdict = {"chosen", "rejected"} & fields.keys(), {*_OF_ANSWERS} & fields.keys()
        if len(pair) == 1 or bool(pair) == bool(verdict):
            raise InputError(
                f"template {NAME!r}: takes pairs (chosen and rejected) or answers (label or score), not "
                f"{', '.join(sorted(pair | verdict)) or 'neither'}; {_REMEDY}"
            )
        if len({"score_chosen", "score_rejected"} & fields.keys()) == 1:
            raise InputError(f"template {NAME!r}: score_chosen and score_rejected come together; {_REMEDY}")
        self.fields = dict(fields)
        self.kind = "pairs" if pair else "answers"
        known = {"label": "int8", "score": "float32", "score_chosen": "float32", "margin": "float32"}
        names = [name for name in known if name in fields and name in (_OF_PAIRS if pair else _OF_ANSWERS)]
        self.columns = {name.removesuffix("_chosen"): known[name] for name in names}

    @classmethod
    def of(cls, first: Mapping[str, Any], fields: Mapping[str, str]) -> Preference:
        """By a job's first record, as far as the fields are not named."""
        found = {name: fields[name] for name in FIELDS if name in fields}
        there = {name for name in FIELDS if first.get(name) is not None}
        if not {"chosen", "rejected", *_OF_ANSWERS} & found.keys():
            found |= {name: name for name in ("chosen", "rejected", *_OF_ANSWERS) if name in there}
        if "chosen" in found:
            found |= {name: name for name in _OF_PAIRS if name in there and name not in found}
        if "prompt" not in found:
            other = next((name for name in _ASKED if first.get(name) is not None), None)
            if "prompt" in there and other is not None:
                raise InputError(f"records hold 'prompt' and {other!r}: say which one asks, as --field prompt={other}")
            found |= {"prompt": "prompt"} if "prompt" in there else {"prompt": ""} if other is None else {}
        return cls(found)

    def read(self, record: Any) -> Judged:
        """What a record says.

        Raises:
            BadRecordError: it is not of this kind, or can be read in more than one way.
        """
        if not isinstance(record, dict):
            raise BadRecordError(f"not an object but {kind_of(record)}")
        taken = {*FIELDS, *self.fields.values()}
        rest = {name: value for name, value in record.items() if name not in taken}
        if self.kind == "pairs":
            rest = {name: value for name, value in rest.items() if name not in _ANSWERS}
            return Judged(self._pair(record, rest), self._numbers_of_pair(record))
        if record.get("chosen") is not None or record.get("rejected") is not None:
            raise BadRecordError("a pair of chosen and rejected answers, and the first record is none")
        if (prompt := self._prompt(record)) is not None:
            rest["prompt"] = prompt
        numbers = {name: [self._number(record, name)] for name in self.columns}
        if "label" in numbers and numbers["label"][0] not in (0, 1):
            raise BadRecordError(f"field {self.fields['label']!r} is {shown(numbers['label'][0])}, not true or false")
        return Judged([rest], numbers)

    def _numbers_of_pair(self, record: Mapping[str, Any]) -> dict[str, list[float]]:
        found = {}
        for name in _OF_PAIRS:
            if name not in self.fields and record.get(name) is not None:
                raise BadRecordError(f"field {name!r}, which the first record does not have: give all records one")
        if "score" in self.columns:
            found["score"] = [self._number(record, name) for name in ("score_chosen", "score_rejected")]
        if "margin" in self.columns:
            found["margin"] = [self._number(record, "margin")] * 2
        return found

    def _number(self, record: Mapping[str, Any], field: str) -> float:
        value = record.get(self.fields[field])
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise BadRecordError(f"field {self.fields[field]!r} is {kind_of(value)}, not a number")
        return value

    def _prompt(self, record: Mapping[str, Any]) -> Any:
        """What was asked, where the record holds it as a prompt."""
        name = self.fields.get("prompt")
        if name and record.get(name) is None:
            raise BadRecordError(f"no field {name!r}, which asks")
        return record[name] if name else None

    def _pair(self, record: Mapping[str, Any], rest: dict[str, Any]) -> list[dict[str, Any]]:
        answers = [record.get(self.fields[name]) for name in ("chosen", "rejected")]
        for name, answer in zip(("chosen", "rejected"), answers, strict=True):
            if not isinstance(answer, str | list):
                raise BadRecordError(f"field {self.fields[name]!r} is {kind_of(answer)}, not text or turns")
        chosen, rejected = answers
        if type(chosen) is not type(rejected):
            raise BadRecordError("of chosen and rejected one is text and the other a list of turns")
        if chosen == rejected:
            raise BadRecordError("chosen and rejected are the same: neither is preferred")
        prompt = self._prompt(record)
        if "prompt" not in self.fields:
            asks = next((name for name in _ASKED if record.get(name) is not None), None)
            if asks is None or not isinstance(chosen, str):
                raise BadRecordError(
                    f"no field {' or '.join(_ASKED)}, as the first record has"
                    if asks is None
                    else f"chosen and rejected are turns, and {asks!r} asks; say so with --field prompt={asks}"
                )
            return [{**rest, "output": answer} for answer in answers]
        rest = {name: value for name, value in rest.items() if name not in _ASKED}
        prompt, answers = _asked_and_answered(prompt, chosen, rejected)
        for name in ("prompt", *_ASKED) if not self.fields["prompt"] else ():
            if record.get(name) is not None and not _repeats(prompt, record[name]):
                raise BadRecordError(
                    f"chosen and rejected do not both begin with field {name!r}, which the first record does not have; "
                    f"if that asks, say so with --field prompt={name}"
                )
        return [{**rest, "prompt": prompt, "completion": answer} for answer in answers]


def _asked_and_answered(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, list[Any]]:
    """What was asked and the two answers to it, all of them texts or all of them turns."""
    answers = [chosen, rejected]
    if prompt is None:
        place = _first_difference(chosen, rejected)
        if place == 0:
            raise BadRecordError("no prompt, and chosen and rejected begin with nothing alike")
        return chosen[:place], [answer[place:] for answer in answers]
    if not isinstance(prompt, str | list):
        raise BadRecordError(f"the prompt is {kind_of(prompt)}, not text or turns")
    if isinstance(chosen, str):
        return prompt, answers if isinstance(prompt, str) else [[_turn("assistant", answer)] for answer in answers]
    if isinstance(prompt, str):
        place = next((i + 1 for i, turn in enumerate(chosen) if _said(turn) == ("user", prompt)), 0)
        if place and chosen[:place] == rejected[:place]:
            return chosen[:place], [answer[place:] for answer in answers]
        if any(answer and _said(answer[0])[0] != "assistant" for answer in answers):
            raise BadRecordError("the prompt is text that chosen and rejected, which are turns, do not both begin with")
        return [_turn("user", prompt)], answers
    if prompt and prompt in (chosen[: len(prompt)], rejected[: len(prompt)]):
        raise BadRecordError("chosen or rejected begins with the turns of the prompt, which would stand there twice")
    return prompt, answers


def _repeats(asked: Any, prompt: Any) -> bool:
    """Whether what two answers begin with alike says a record's prompt once more."""
    if isinstance(asked, str):
        return isinstance(prompt, str) and prompt in asked
    if isinstance(prompt, str):
        return any(_said(turn)[1] == prompt for turn in asked)
    return isinstance(prompt, list) and prompt == asked[: len(prompt)]


def _first_difference(chosen: Any, rejected: Any) -> int:
    """The place, of a character or a turn, where two answers part; before a blank, which goes with what follows it.

    Of two of which one begins with the other, that is before the last of the shorter one, as TRL has it.
    """
    shorter = min(len(chosen), len(rejected))
    place = next((i for i in range(shorter) if chosen[i] != rejected[i]), max(shorter - 1, 0))
    has_parted = place < shorter and chosen[place] != rejected[place]
    return place - 1 if has_parted and place > 0 and chosen[place - 1] == " " else place


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _said(turn: Any) -> tuple[Any, Any]:
    """Who says a turn, by the common name, and what."""
    if not isinstance(turn, dict):
        raise BadRecordError(f"a turn is {kind_of(turn)}, not an object")
    role = turn.get("role") or turn.get("from")
    role = {"human": "user", "gpt": "assistant"}.get(str(role), role)
    return role, turn.get("content") if turn.get("content") is not None else turn.get("value")
