"""Where a record's own texts lie in what a template writes: characters that no text holds are put around them.

A place counts only where the text without these marks is the one that the template writes without them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise, product
from typing import Any, NamedTuple

Turns = list[dict[str, Any]]
_FIRST, _LAST = 0xF0000, 0xFFFFD  # a plane for private use
MARKS = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")
_TAGS = re.compile("(</?think>)")
_KEYS = ("content", "reasoning_content", "thinking", "tool_calls")


class Marked(NamedTuple):
    """What a template wrote with marks: the text without them, and each mark's number and place in that."""

    text: str
    marks: list[tuple[int, int]]


def without_marks(text: str) -> Marked:
    """Take the marks out of a text."""
    pieces, marks, start, place = [], [], 0, 0
    for match in MARKS.finditer(text):
        pieces.append(text[start : match.start()])
        place += match.start() - start
        marks.append((ord(match[0]) - _FIRST, place))
        start = match.end()
    return Marked("".join([*pieces, text[start:]]), marks)


def leaves(value: Any) -> Iterator[str]:
    """All texts in a value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)


def texts_of(variables: Mapping[str, Any]) -> list[str]:
    """All texts that a template sees of a record."""
    found = [*leaves([value for name, value in variables.items() if name != "messages"])]
    for turn in variables["messages"]:
        if len(turn) == 2 and type(turn.get("content")) is str:  # and a role
            found += turn.values()
            continue
        found += turn
        for value in turn.values():
            if type(value) is str:
                found.append(value)
            else:
                found += leaves(value)
    return found


def changed(value: Any, change: Callable[[str], str], *, keys: bool = False) -> Any:
    """A value with all texts in it changed; names of fields too, if `keys`."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key) if keys else key: changed(item, change, keys=keys) for key, item in value.items()}
    return [changed(item, change, keys=keys) for item in value] if isinstance(value, list) else value


def _around(text: str, number: int) -> str:
    return f"{chr(_FIRST + number)}{text}{chr(_FIRST + number + 1)}" if text else text


def with_protected(variables: dict[str, Any], pattern: re.Pattern[str], allowed: frozenset[str]) -> dict[str, Any]:
    """What a template sees, with marks around the texts of added tokens: 0 and 1, in answers 2 and 3.

    In answers those that are `allowed` have none.
    """

    def of_others(text: str) -> str:
        return pattern.sub(lambda match: _around(match[0], 0), text)

    def of_answers(text: str) -> str:
        return pattern.sub(lambda match: match[0] if match[0] in allowed else _around(match[0], 2), text)

    messages = [
        changed(turn, of_answers if turn.get("role") == "assistant" else of_others, keys=True)
        for turn in variables["messages"]
    ]
    return {name: changed(value, of_others, keys=True) for name, value in variables.items()} | {"messages": messages}


def protected_ranges(marks: list[tuple[int, int]]) -> list[tuple[int, int, bool]] | None:
    """The ranges that such marks lie around; `None` where a template has torn a pair apart."""
    begins, ends = ([number for number, _ in side] for side in (marks[::2], marks[1::2]))
    if any(number % 2 for number in begins) or ends != [number + 1 for number in begins]:
        return None
    return [(start, end, number == 2) for (number, start), (_, end) in zip(marks[::2], marks[1::2], strict=True)]


def with_answers(turns: Turns) -> Iterator[Turns]:
    """The turns with marks around what the assistant says, in some ways of which the first that changes no text is
    the best: around white space that belongs to it or within, which a template may take off, and beside what an answer
    without text has.

    The marks of the turn at `i` are `2 * i` and `2 * i + 1`.
    """
    answers = [turn for turn in turns if turn.get("role") == "assistant"]
    texts = [
        part for turn in answers for text in leaves([turn.get(key) for key in _KEYS]) for part in _TAGS.split(text)
    ]
    bare = all(text == text.strip() for text in texts)
    says_nothing = any(_is_blank(turn.get("content")) for turn in answers)
    ways = [(False, False)] if bare else [*product((False, True), repeat=2)]
    for blank, (left, right) in product((True, False) if says_nothing else (False,), ways):
        marked = []
        for number, turn in enumerate(turns):
            if turn.get("role") == "assistant":
                change = _within(2 * number, left=left, right=right)
                turn = {**turn, **{key: changed(turn[key], change) for key in _KEYS if key in turn}}
                if blank and _is_blank(content := turns[number].get("content", "x")):
                    pair = chr(_FIRST + 2 * number) + chr(_FIRST + 2 * number + 1)
                    turn["content"] = f"{content}{pair}" if left else f"{pair}{content}"
            marked.append(turn)
        yield marked


def _is_blank(content: Any) -> bool:
    return isinstance(content, str) and not content.strip()


def _within(number: int, *, left: bool, right: bool) -> Callable[[str], str]:
    """What puts marks around a text, or around the parts that tags of thoughts cut it into."""

    def of_part(text: str) -> str:
        if _TAGS.fullmatch(text):
            return text
        start = len(text) - len(text.lstrip()) if left else 0
        stop = len(text.rstrip()) if right else len(text)
        return text[:start] + _around(text[start:stop], number) + text[stop:] if start < stop else text

    return lambda text: "".join(map(of_part, _TAGS.split(text)))


def answer_ranges(marks: list[tuple[int, int]]) -> dict[int, tuple[int, int]] | None:
    """Where each turn's text begins and ends; `None` where a template has torn it apart or written it twice."""
    found: dict[int, tuple[int, int]] = {}
    order = [number // 2 for number, _ in marks]
    if any(after < before for before, after in pairwise(order)):
        return None
    for turn in dict.fromkeys(order):
        own = [(number % 2, place) for number, place in marks if number // 2 == turn]
        if [side for side, _ in own][-1] != 1 or own[0][0] != 0:
            return None
        found[turn] = own[0][1], own[-1][1]
    return found
