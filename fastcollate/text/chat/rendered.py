"""What a chat template gives, before it is encoded."""

from __future__ import annotations

from typing import NamedTuple


class Rendered(NamedTuple):
    """A chat as text. All places are in characters of `text`; ranges are `[start, end)`, ascending, apart.

    Attributes:
        text: what the tokenizer's chat template wrote, the beginning of a text and the ends of turns included.
        trained: ranges whose tokens are trained; a token that holds a character of one is, and, as in transformers, one
            within which an empty range lies.
        protected: ranges that came from the record's own texts and hold the text of an added token, and whether that
            stood in an answer; empty for nearly every record.
    """

    text: str
    trained: list[tuple[int, int]]
    protected: list[tuple[int, int, bool]]
