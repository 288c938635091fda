"""Which turn of a chat each token of a row belongs to: a turn begins where the store's template writes its heading.

The headings are read off a chat that is known. A row of any other store has prompts and responses by turns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from fastcollate.errors import InputError
from fastcollate.store import TokenStore
from fastcollate.text import BadRecordError, Tokenizer, load_template

_ROLES = ("user", "assistant", "user", "assistant")
_SAID = "82364{}9170"  # which no template changes
_HEADING_TOKENS = 24  # more than a heading has


class Turn(NamedTuple):
    """The tokens `[start, stop)` of a row, a turn's heading among them.

    `role` is `beginning` for what stands before the first heading, `prompt` or `response` where there are no turns.
    """

    role: str
    start: int
    stop: int


def turns_of(store: TokenStore, row: int, tokenizer: Tokenizer | None) -> list[Turn]:
    """The turns of a row.

    Example:
        >>> turns_of(store, 3, None)
        [Turn(role='prompt', start=0, stop=38), Turn(role='response', start=38, stop=52)]
    """
    example = store[row]
    ids = example.input_ids.tolist()
    heading = None if tokenizer is None else _heading(store.manifest["template"], tokenizer)
    if tokenizer is not None and heading is not None and (begins := list(_begins(ids, tokenizer, heading))):
        first = [("beginning", 0)] * (begins[0][1] > 0)
        return [Turn(role, at, stop) for (role, at), (_, stop) in pairwise([*first, *begins, ("", len(ids))])]
    bounds = [min(place, len(ids)) for place in accumulate(example.spans.tolist(), initial=0)]
    found = [Turn("response" if i % 2 else "prompt", *pair) for i, pair in enumerate(pairwise(bounds))]
    return [turn for turn in found if turn.start < turn.stop]


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """The added tokens, which no text of a record is, with their texts."""
    control = {} if tokenizer.json is None else tokenizer.json.added.control
    return {tokenizer.end_token_id: tokenizer.end_text, **{token: text for text, token in control.items()}}


class _Heading(NamedTuple):
    """What a turn begins with: a pattern with the group `role`, or with a group for each; the texts it begins with."""

    pattern: re.Pattern[str]
    starts: tuple[str, ...]


def _begins(ids: Sequence[int], tokenizer: Tokenizer, heading: _Heading) -> Iterator[tuple[str, int]]:
    """Where headings begin, each with its role; what begins with an added token is no text that looks like it."""
    special = special_tokens(tokenizer).items()
    tokens = {token for token, text in special if any(start.startswith(text) for start in heading.starts)}
    for place, token in enumerate(ids):
        if token in tokens if tokens else tokenizer.decode([token]).strip():
            match = heading.pattern.match(tokenizer.decode(ids[place : place + _HEADING_TOKENS]).lstrip())
            if match is not None:
                yield match.groupdict().get("role") or str(match.lastgroup), place


def _heading(saved: Mapping[str, Any], tokenizer: Tokenizer) -> _Heading | None:
    """The headings that a store's template writes; `None` where it has none of turns."""
    is_chat = "tokens" in saved
    if not is_chat and saved.get("name") != "chat":
        return None
    template = load_template(saved["name"], saved["fields"], tokenizer, **({"saved": saved} if is_chat else {}))
    turns = [{"role": role, "content": _SAID.format(number)} for number, role in enumerate(_ROLES)]
    try:
        text = template.render({"messages": turns}).text if is_chat else "".join(template.parts({"messages": turns}))
    except (BadRecordError, InputError):
        return None
    gaps = re.split(_SAID.format("[0-9]"), text)
    if len(gaps) != len(turns) + 1:
        return None
    answer, user = (_behind_end(gap, gaps[-1]) for gap in gaps[1:3])
    for name in ("assistant", "model"):
        before, is_named, behind = user.partition("user")
        if before and is_named and answer == f"{before}{name}{behind}":  # so is any role's
            return _Heading(re.compile(rf"{re.escape(before)}(?P<role>\w+){re.escape(behind)}"), (before,))
    if not user or not answer:
        return None
    pattern = re.compile(f"(?P<user>{re.escape(user)})|(?P<assistant>{re.escape(answer)})")
    return _Heading(pattern, (user, answer))


def _behind_end(gap: str, end: str) -> str:
    """What stands between two turns without the end of the first, which also stands behind the last one."""
    while end and not (gap.startswith(end) and end[-1] in ">]\n "):  # no part of a token's text
        end = end[:-1]
    return gap.removeprefix(end).strip()
