"""Which of a record's fields carry text that does not stand in the text that a template makes of it.

A field counts under its name, one of a turn as `messages[].reasoning_content`, however deep in it the text lies.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

_CARRIERS = frozenset((  # names of what is said, or said about; any text in them counts
    "content", "value", "system", "system_prompt", "history", "tools", "functions", "tool_calls", "function_call",
    "documents", "reasoning_content", "reasoning", "thinking", "thought", "image", "images", "video", "videos", "audio",
    "audios", "chosen", "rejected", "messages", "conversations", "conversation",
))  # fmt: skip
_NAMES = frozenset(("role", "from", "type", "id", "tool_call_id"))  # of a kind or a speaker: nothing that is said
_WORDS = re.compile(r"\S\s+\S|[\u0e00-\u17ff\u2e80-\ufffc]")  # more than one word, or a script without blanks between
_TAGS = re.compile("</?think>")
_HEAD = 24
THOUGHTS = " (thoughts)"  # behind the name of a field of which only these are missing


def carries_text(name: str, value: Any) -> bool:
    """Whether a field says anything: under the name of what is said any text, elsewhere text of more than one word."""
    kind = type(value)
    if name in _NAMES:
        return False
    if kind is str:
        return bool(value) if name in _CARRIERS else _WORDS.search(value) is not None
    if kind is list or kind is tuple or kind is dict:
        return any(_leaves(value, name in _CARRIERS))
    return kind is bytes and bool(value) and name in _CARRIERS


def dropped_fields(record: Any, text: str) -> list[str]:
    """The names of a record's fields whose text does not stand in `text`.

    Blanks at the ends, JSON's escapes and white space around thoughts may differ; JSON may be written anew.

    Example:
        >>> turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No", "thinking": "Hm"}]
        >>> dropped_fields({"messages": turns, "system": "Be kind.", "id": 7}, "User: Hi Assistant: No")
        ['messages[].thinking', 'system']
    """
    found: dict[str, None] = {}
    for name, value in record.items() if isinstance(record, dict) else ():
        if type(value) is list and value and type(value[0]) is dict and ("role" in value[0] or "from" in value[0]):
            _look_at_turns(name, value, text, found)
        elif carries_text(name, value):
            _, missing = _search(name, value, text, 0)
            if missing is not None:
                found[name + missing] = None
    return [*found]


def _look_at_turns(name: str, turns: list[Any], text: str, found: dict[str, None]) -> None:
    """Add what is missing of the turns' fields; these mostly follow each other in the text."""
    place = 0
    for turn in turns:
        turn = turn if type(turn) is dict else {"content": turn}
        if len(turn) == 2 and "role" in turn and type(said := turn.get("content")) is str:  # as nearly all
            at = text.find(said[:_HEAD], place)  # much sooner found than a long text
            if at >= 0 and text.startswith(said, at):
                place = at + len(said)
                continue
        start = place
        for key, value in turn.items():
            if (path := f"{name}[].{key}") not in found and carries_text(key, value):
                at, missing = _search(key, value, text, start)
                place = max(place, at)
                if missing is not None:
                    found[path + missing] = None


def _search(name: str, value: Any, text: str, start: int) -> tuple[int, str | None]:
    """Where the text of a field ends, first looked for from `start` on, and what of it is missing: `None`, `""` for
    all, or `THOUGHTS`.
    """
    place = start
    for leaf in [value] if isinstance(value, str) else _leaves(value, name in _CARRIERS):
        at, missing = _search_text(leaf, text, place)
        if missing is not None:
            return start, missing
        place = max(place, at)
    return place, None


def _search_text(said: str, text: str, start: int) -> tuple[int, str | None]:
    said = said.strip()
    for form in (said, *{json.dumps(said, ensure_ascii=escapes)[1:-1] for escapes in (False, True)} - {said}):
        at = text.find(form, start)
        at = text.find(form) if at < 0 else at
        if at >= 0:
            return at + len(form), None
    if said[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):
            return _search("tools", json.loads(said), text, start)
    if "think>" in said:
        if all(piece.strip() in text for piece in _TAGS.split(said)):
            return start, None
        rest = re.sub("<think>.*?</think>", "", said, flags=re.S).rpartition("</think>")[2].strip()
        return start, THOUGHTS if rest in text else ""
    return start, ""


def _leaves(value: Any, is_carrier: bool) -> Iterator[str]:
    """The texts in a value, in order; where it is no carrier only those of more than one word. Bytes are in no text."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            if value if is_carrier else _WORDS.search(value):
                yield value
        elif isinstance(value, dict):
            waiting += [item for key, item in reversed(value.items()) if key not in _NAMES]
        elif isinstance(value, list | tuple):
            waiting += reversed(value)
        elif is_carrier and isinstance(value, bytes) and value:
            yield f"\0{len(value)} bytes"
