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
        self.any_of_single_words = any(token.single_word for token in tokens)
        self.any_normalized = any(token.normalized for token in tokens)
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
        """Whether the leftmost, longest ones are found, as they stand, though normalized ones are looked for last."""
        if self.any_of_single_words or any(token.lstrip or token.rstrip for token in self._tokens.values()):
            return False
        first, last = ([t.content for t in self._tokens.values() if t.normalized is kind] for kind in (False, True))
        heads = {text[:stop] for text in first for stop in range(1, len(text) + 1)} if last else set()
        search = search_for(first)
        return not any(search.search(text) or any(text[i:] in heads for i in range(1, len(text))) for text in last)

    @cached_property
    def search(self) -> re.Pattern[str]:
        """One search for all of them: whether a record's text holds one."""
        return search_for(self.control)

    @cached_property
    def _searches(self) -> list[re.Pattern[str]]:
        """Those that are found in the text itself, then those that are found in what remains, normalized."""
        groups = [[t.content for t in self._tokens.values() if t.normalized is kind] for kind in (False, True)]
        return [search_for(group) for group in groups if group]

    def pieces(self, text: str, protected: Sequence[tuple[int, int, bool]]) -> list[Piece]:
        """What a text is parted into: added tokens, which no `protected` range touches, and the text between them."""
        pieces = [Piece(0, len(text), -1)]
        for search in self._searches:
            parted = (self._parted(text, piece, search, protected) for piece in pieces)
            pieces = [piece for found in parted for piece in found if piece.start < piece.stop]
        return pieces

    def _parted(
        self, text: str, piece: Piece, search: re.Pattern[str], protected: Sequence[tuple[int, int, bool]]
    ) -> Iterator[Piece]:
        if piece.token >= 0:
            yield piece
            return
        place = done = piece.start
        while (found := search.search(text, place, piece.stop)) is not None:
            start, stop = found.span()
            token = self._tokens[found.group()]
            if token.content in self.control and any(start < last and stop > first for first, last, _ in protected):
                place = start + 1
                continue
            if token.lstrip:
                start = done + len(text[done:start].rstrip())
            if token.rstrip:
                stop = piece.stop - len(text[stop : piece.stop].lstrip())
            yield Piece(done, start, -1)
            yield Piece(start, stop, token.id)
            place = done = stop
        yield Piece(done, piece.stop, -1)


class Joints:
    """Whether a template puts the text of an added token together, of which a record's texts hold only parts.

    Args:
        tokens: the texts of the added tokens.
        literals: the template's own texts, which may end where a token's text begins, or begin where it ends.
        known: what it may put together with these: no free texts.
    """

    def __init__(self, tokens: Collection[str], literals: Collection[str], known: Collection[str]) -> None:
        self._search, self._known = search_for(tokens), known
        heads = {token[:cut] for token in tokens for cut in range(1, len(token))}
        tails = {token[cut:] for token in tokens for cut in range(1, len(token))}
        longest = max(map(len, tokens), default=0)
        self._heads = {text[-cut:] for text in literals for cut in range(1, min(len(text), longest) + 1)} & heads
        self._tails = {text[:cut] for text in literals for cut in range(1, min(len(text), longest) + 1)} & tails
        begins = "".join(sorted({re.escape(token[0]) for token in tokens if token}))
        self._text_ends_so = re.compile(rf"[{begins}][^\0]{{0,{longest}}}?\s*\0" if begins else "(?!)")

    def may_join(self, given: str) -> bool:
        """Whether `joined` is to be asked: a text may end as a token begins; the first character near its end tells."""
        return bool(self._heads) or self._text_ends_so.search(given) is not None

    def joined(self, given: str, text: str) -> str | None:
        """The first token of a text that may be put together so; `given` is the record's texts, each between NULs."""
        given = re.sub(r"\s*\0\s*", "\0", self._search.sub("\0", given))
        for token in map(str, dict.fromkeys(self._search.findall(text))):
            for cut in range(1, len(token)):
                head, begins = token[:cut], f"{token[:cut]}\0" in given
                if not begins and head not in self._heads:
                    continue
                for end in range(cut, len(token)):
                    middle, tail = token[cut:end], token[end:]
                    ends = f"\0{tail}" in given
                    if (
                        (ends or tail in self._tails)
                        and (f"\0{middle}\0" in given if middle else begins or ends)
                        and middle not in self._known
                    ):
                        return token
        return None


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
