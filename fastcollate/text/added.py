"""A tokenizer's added tokens: the search for their texts, and where they part a text in pieces.

Each text of one that stands in a record is refused or ordinary text, flagged `special` or not. Only unflagged ones of
white space, which some vocabularies have, are text anyhow.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import msgspec

from fastcollate.text.saved import SavedToken

ALLOWED_IN_ANSWERS = tuple(
    f"<{slash}{name}>"
    for name in ("think", "tool_call", "tool_calls", "tool_response", "tool_responses", "tools", "answer")
    for slash in ("", "/")
)
"""Tags that models write in answers and templates write again."""
_BLANK = re.compile(r"[\s▁]*")


class Piece(NamedTuple):
    """A part of a text, in characters; the id of the added token that it is, or -1."""

    start: int
    stop: int
    token: int


class AddedTokens:
    """The added tokens of a tokenizer, and how they are found in texts.

    Attributes:
        control: those whose text in a record is never taken for them, with their ids.
        blank: the others.
    """

    def __init__(self, tokens: Sequence[SavedToken]) -> None:
        self._tokens = {token.content: token for token in tokens}
        self.control = {t.content: t.id for t in tokens if t.special or not _BLANK.fullmatch(t.content)}
        self.blank = [token for token in tokens if token.content not in self.control]

    def without_control(self, vocab_size: int) -> list[SavedToken]:
        """What stands in for them where no text is to become one of `control`: tokens of white space keep their ids."""
        if not self.blank:
            return []
        held = sorted(self._tokens.values(), key=lambda token: token.id)
        nonce = secrets.token_hex(16)  # no text holds it
        return [
            msgspec.structs.replace(token, content=f"{nonce}-{token.id}") if token.content in self.control else token
            for token in held
            if token.id >= vocab_size or token.content not in self.control
        ]

    @cached_property
    def are_simple(self) -> bool:
        """Whether each is found wherever its text stands, alone: none takes white space with it or overlaps another."""
        tokens = self._tokens.values()
        if any(token.lstrip or token.rstrip or token.single_word for token in tokens):
            return False
        if len({token.normalized for token in tokens}) < 2:
            return True
        heads = {text[:stop] for text in self._tokens for stop in range(1, len(text) + 1)}
        everywhere = search_for([*self._tokens])
        return not any(
            everywhere.search(text, 1) or any(text[start:] in heads for start in range(1, len(text)))
            for text in self._tokens
        )

    @cached_property
    def search(self) -> re.Pattern[str]:
        """One search for all of them: whether a record's text holds one."""
        return search_for(self.control)

    @cached_property
    def _searches(self) -> list[re.Pattern[str]]:
        """Those that are found in the text itself, then those that are found in what remains, normalized."""
        groups = [[t.content for t in self._tokens.values() if t.normalized is kind] for kind in (False, True)]
        return [search_for(group) for group in groups if group]

    def pieces(
        self, text: str, protected: Sequence[tuple[int, int, bool]], allowed: Collection[str]
    ) -> Iterator[Piece]:
        """What a text is parted into: added tokens, and ordinary text between them.

        Args:
            text: the text.
            protected: ranges of it in which their texts are ordinary, and whether it is an answer: there, those of
                `allowed` are tokens.
            allowed: texts.
        """
        pieces = [Piece(0, len(text), -1)]
        for search in self._searches:
            pieces = [
                p for q in pieces for p in ([q] if q.token >= 0 else self._parted(text, q, search, protected, allowed))
            ]
        return (piece for piece in pieces if piece.start < piece.stop)

    def _parted(
        self,
        text: str,
        piece: Piece,
        search: re.Pattern[str],
        protected: Sequence[tuple[int, int, bool]],
        allowed: Collection[str],
    ) -> Iterator[Piece]:
        place = done = piece.start
        while (found := search.search(text, place, piece.stop)) is not None:
            start, stop = found.span()
            touched = [is_answer for first, last, is_answer in protected if start < last and stop > first]
            token = self._tokens[found.group()]
            if touched and token.content in self.control and not (all(touched) and token.content in allowed):
                place = start + 1
                continue
            if token.lstrip:
                start = max(done, len(text[done:start].rstrip()) + done)
            if token.rstrip:
                stop += len(text[stop : piece.stop]) - len(text[stop : piece.stop].lstrip())
            yield Piece(done, start, -1)
            yield Piece(start, stop, token.id)
            place = done = stop
        yield Piece(done, piece.stop, -1)


def search_for(texts: Collection[str]) -> re.Pattern[str]:
    """A search for the leftmost of some texts, of several that begin there the longest."""
    return re.compile(_alternatives(sorted({*texts} - {""})) if texts else "(?!)")


def _alternatives(texts: Sequence[str]) -> str:
    """A pattern for sorted texts in which what they begin with alike stands once."""
    found = []
    for _, group in groupby([text for text in texts if text], key=lambda text: text[0]):
        words = list(group)
        first, last = words[0], words[-1]
        head = first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
        rest = [word[len(head) :] for word in words]
        more = _alternatives(rest) if len(words) > 1 else ""
        found.append(re.escape(head) + (f"(?:{more})?" if more and "" in rest else more))
    return f"(?:{'|'.join(found)})" if len(found) > 1 else "".join(found)
