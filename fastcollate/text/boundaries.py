"""Where texts provably tokenize apart: the pre-tokenizer joins nothing across such a place, nor looks across it.

The patterns of tiktoken's encodings are searched for counter-examples in `tests/text/test_boundaries.py`.
"""

from __future__ import annotations

import numpy as np

from fastcollate.text.engines.backends import Texts

_SPACE_BYTES = np.isin(np.arange(256), list(b" \t\n\v\f\r"))
_SURE_BYTES = {  # behind these, and before white space, texts always part
    "gpt2": np.isin(np.arange(256), [byte for byte in range(128) if not chr(byte).isspace()]),
    **dict.fromkeys(("cl100k", "o200k"), np.isin(np.arange(256), [b for b in range(128) if chr(b).isalnum()])),
}


def parts_at(scheme: str, left: str, right: str) -> bool:
    """Whether `left` and `right` provably tokenize apart: the ids of `left + right` are theirs, end to end.

    `False` says only that this is not proved.

    Args:
        scheme: `gpt2`, `cl100k` or `o200k`; of others nothing is proved.
        left: a text.
        right: the text that follows it.
    """
    if not left or not right:
        return True
    last, first = left[-1], right[0]
    if scheme == "gpt2":
        if not last.isspace():
            return _is_space(first)  # no alternative of the pattern holds white space after anything else
        return last == "\n" and len(left) > 1 and not left[-2].isspace() and not first.isspace()
    if scheme in ("cl100k", "o200k"):
        if last.isascii() and last.isalnum():
            return _is_space(first)
        # o200k's punctuation takes line breaks and slashes with it
        return last == "\n" and not first.isspace() and not (scheme == "o200k" and first == "/")
    return False


def pairs_that_join(scheme: str, texts: Texts) -> list[int]:
    """Of texts that are left and right by turns, the pairs' numbers that `parts_at` does not clear."""
    suspects = list(range(len(texts) // 2))
    if scheme in _SURE_BYTES and len(texts.data):
        data = np.frombuffer(texts.data, np.uint8)
        left, middle, right = texts.offsets[:-1:2], texts.offsets[1::2], texts.offsets[2::2]
        sure = (left < middle) & (middle < right) & _SURE_BYTES[scheme][data[middle - 1]]
        suspects = np.flatnonzero(~(sure & _SPACE_BYTES[data[np.minimum(middle, len(data) - 1)]])).tolist()
    return [i for i in suspects if not parts_at(scheme, texts[2 * i], texts[2 * i + 1])]


def _is_space(character: str) -> bool:
    r"""What the pre-tokenizers call white space: Python's, without the separators U+001C to U+001F."""
    return character.isspace() and not "\x1c" <= character <= "\x1f"
