"""Where gigatoken and the reference part: code points that only one of their Unicode tables knows.

Which these are is found by asking both, once for a vocabulary and two releases; texts that hold one go to the
reference, which is tiktoken or, for a `tokenizer.json`, tokenizers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcollate.text.engines.backends import Engine, RaggedIds, Texts, exchanged, serial_tokenizers
from fastcollate.text.engines.gigatoken import GigatokenBackend

_NUM_CODES = 0x110000
_CODES = (*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xF0000))  # those that are not for private use
_RUN = 256  # code points that are asked about at once
_SLICE = 1 << 20  # bytes looked through at once


HARD_TEXTS = (
    "", " ", "\n\n\n", "  \n \t x", "a  b   c\r\n\r\nd", "I'll we've they'Re it's don't 'tis",
    "3.14159 1234567890 x1y2 ½ ² ٣", "naïve café Ünïcödé ﬁ", "日本語のテキスト 中文 한국어",
    "👩‍👩‍👧‍👦 👍🏽 \u200d\ufe0f", "e\u0301 \u0345 \u0e33 नमस्ते", "<|endoftext|> <|im_start|>",
    "\x00\x01\x7f\x80\xa0\u2028\u3000\ufeff", "{}[]();:==!=->// __init__ \\n",
    "Below is an instruction.\n\n### Response:\n  indented", "word " * 40,
)  # fmt: skip


class AgreeingBackend:
    """gigatoken; the reference for texts that hold a code point on which the two differ.

    `fingerprint` is the vocabulary's. Where the tokenizer `normalizes` (NFC), texts that this changes are also the
    reference's.
    """

    name = "gigatoken"

    def __init__(self, fast: GigatokenBackend, exact: Engine, fingerprint: str, *, normalizes: bool = False) -> None:
        self.fast = fast
        self._exact = exact
        self._fingerprint = fingerprint
        self._normalizes = normalizes

    def trim(self) -> None:
        """Give back memory that earlier texts have left behind."""
        self.fast.trim()

    def encode_batch(self, texts: Texts) -> RaggedIds:
        """The ids of each text."""
        odd = [] if texts.data.isascii() else self.differing_texts(texts)
        if not odd:
            return self.fast.encode_batch(texts)
        strings = texts.strings()
        exact = {number: self._exact.encode(strings[number]) for number in odd}
        for number in odd:
            strings[number] = ""
        return RaggedIds(*exchanged(*self.fast.encode_batch(Texts(strings)), exact))

    def differing_texts(self, texts: Texts) -> list[int]:
        """The numbers of the texts that hold a code point of `differing_codes`, or that are to be normalized."""
        values, found = np.frombuffer(texts.data + bytes(3), np.uint8), [np.zeros(0, np.int64)]
        if self._normalizes:
            beyond = np.searchsorted(texts.offsets, np.flatnonzero(values >= 0x80), side="right") - 1
            changed = [i for i in np.unique(beyond).tolist() if not unicodedata.is_normalized("NFC", texts[i])]
            found.append(texts.offsets[changed])
        is_code, is_pair, is_lead = self._tables
        for start in range(0, len(texts.data), _SLICE):
            places = np.flatnonzero(values[start : start + _SLICE] >= 0x80) + start
            places = places[is_lead[values[places]]]
            places = places[is_pair[values[places].astype(np.uint16) << 8 | values[places + 1]]]
            found.append(places[is_code[_codes_at(values, places)]])
        numbers: list[int] = np.unique(np.searchsorted(texts.offsets, np.concatenate(found), side="right") - 1).tolist()
        return numbers

    @cached_property
    def _tables(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Whether a code point is one, whether two bytes begin one in UTF-8, and whether one byte does."""
        is_code, is_pair, is_lead = np.zeros(_NUM_CODES, bool), np.zeros(1 << 16, bool), np.zeros(256, bool)
        for code in self.differing_codes():
            first, second = chr(code).encode()[:2]
            is_code[code] = is_pair[first << 8 | second] = is_lead[first] = True
        return is_code, is_pair, is_lead

    def differing_codes(self) -> list[int]:
        """The code points on which gigatoken and the reference differ, from the cache or by asking both."""
        releases = f"{version('gigatoken')} {version(self._exact.name)} {self._fingerprint}"
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastcollate"
        path = folder / f"unicode-{hashlib.sha256(releases.encode()).hexdigest()[:16]}.json"
        with contextlib.suppress(OSError, ValueError, RecursionError):
            seal, _, kept = path.read_bytes().partition(b" ")
            if seal == hashlib.sha256(kept).hexdigest().encode():  # else somebody is writing it, or it is damaged
                return [int(code) for code in json.loads(kept)]
        codes = self._ask_both()
        with contextlib.suppress(OSError):  # a place that cannot be written: asked again by the next process
            folder.mkdir(parents=True, exist_ok=True)
            kept = json.dumps(codes).encode()
            path.write_bytes(hashlib.sha256(kept).hexdigest().encode() + b" " + kept)
        return codes

    def _ask_both(self) -> list[int]:
        found = []
        runs = [_CODES[start : start + _RUN] for start in range(0, len(_CODES), _RUN)]
        for number in self._differences(["".join(map(_in_context, run)) for run in runs]):
            found += [runs[number][i] for i in self._differences(list(map(_in_context, runs[number])))]
        self.fast.trim()
        unknown = (code for code in _CODES if self._normalizes and unicodedata.category(chr(code)) == "Cn")
        return sorted({*found, *unknown})  # of what Python does not know it cannot say whether it is normalized

    def _differences(self, texts: list[str]) -> list[int]:
        halves = [Texts(texts[: len(texts) // 2]), Texts(texts[len(texts) // 2 :])]
        with ThreadPoolExecutor(len(halves)) as pool, serial_tokenizers():
            exact = [row for half in pool.map(self._exact.encode_batch, halves) for row in _rows(half)]
        rows = _rows(self.fast.encode_batch(Texts(texts)))
        return [number for number, (a, b) in enumerate(zip(rows, exact, strict=True)) if not np.array_equal(a, b)]


def _rows(encoded: RaggedIds) -> list[npt.NDArray[Any]]:
    return [encoded.ids[start:stop] for start, stop in pairwise(encoded.offsets.tolist())]


def _in_context(code: int) -> str:
    """A code point where letters, marks, numbers, spaces and what no table knows part each in another way."""
    return f"{chr(code)}'s {chr(code)}1234 {chr(code)}s {chr(code)}\n"


def _codes_at(values: npt.NDArray[np.uint8], places: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """The code points that begin at some places in UTF-8."""
    first, *rest = (values[places + i].astype(np.uint32) for i in range(4))
    second, third, fourth = (byte & 0x3F for byte in rest)
    two = (first & 0x1F) << 6 | second
    three = (first & 0x0F) << 12 | second << 6 | third
    four = (first & 0x07) << 18 | second << 12 | third << 6 | fourth
    return np.select([first < 0xE0, first < 0xF0], [two, three], four)
