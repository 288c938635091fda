"""Rendered chats -> ids and spans, exactly those of transformers: its ids, and its rule of which token is trained.

A token is trained that holds a character of a trained range. gigatoken encodes what it is known to agree on; every
other chat goes to the reference, with the places that it tells.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcollate.text.chat.rendered import Rendered
from fastcollate.text.engines.backends import DifferentIdsError, Texts, UnencodableError, exchanged, starts_of
from fastcollate.text.engines.gigatoken import GigatokenBackend
from fastcollate.text.engines.tokenizer_json import TokenizerJson

_SURROGATES = re.compile("[\ud800-\udfff]")
_GUARDED_SHARE = 512  # one chat in so many is encoded by both
_AT_ONCE = 256  # chats, whose places take much memory
_HOLDS = "holds the text of a special token"
_Row = tuple[Sequence[int], Sequence[int]]  # ids, spans
_Int64Array = npt.NDArray[np.int64]


class EncodedChats(NamedTuple):
    """Rows end to end.

    Attributes:
        ids: uint16 or uint32 `(num_tokens,)`.
        offsets: int64 `(num_chats + 1,)`, where each row begins in `ids`.
        spans: uint32, how many tokens are not trained and how many are, by turns.
        span_offsets: int64 `(num_chats + 1,)`, where each row begins in `spans`.
    """

    ids: npt.NDArray[Any]
    offsets: _Int64Array
    spans: npt.NDArray[np.uint32]
    span_offsets: _Int64Array


def encode_chats(json: TokenizerJson, chats: Sequence[Rendered], *, seed: int = 0) -> EncodedChats:
    """The rows of some chats; what `protected` ranges hold is ordinary text.

    `seed` draws the chats that both backends encode.

    Raises:
        UnencodableError: a text of a record would become an added token all the same; says in which chats.
        DifferentIdsError: the two backends differ on a chat; names it.
    """
    chats = [chat if chat.text.isascii() else _encodable(chat) for chat in chats]
    json.full.begin(sum(len(chat.text) for chat in chats))
    fast = json.full.fast
    if fast is None or not chats:
        return _end_to_end(_by_reference(json, chats, range(len(chats))))
    texts = Texts([chat.text for chat in chats])
    odd = [] if texts.data.isascii() else fast.differing_texts(texts)
    slow = sorted({*odd, *(number for number, chat in enumerate(chats) if chat.protected)})
    chance = random.Random(seed)
    drawn = sorted({chance.randrange(len(chats)) for _ in range(1 + len(chats) // _GUARDED_SHARE)} - {*slow})
    exact = _by_reference(json, chats, [*slow, *drawn])
    for number in slow:
        chats[number] = Rendered("", [], [])
    encoded = _by_gigatoken(fast.fast, Texts([chat.text for chat in chats]) if slow else texts, chats)
    for number in drawn:
        _compare(encoded, number, exact[number], chats[number].text)
    ids, offsets = exchanged(encoded.ids, encoded.offsets, {number: exact[number][0] for number in slow})
    spans = exchanged(encoded.spans, encoded.span_offsets, {number: exact[number][1] for number in slow})
    return EncodedChats(ids, offsets, *spans)


def _encodable(chat: Rendered) -> Rendered:
    """The chat with U+FFFD for lone surrogates, which no place moves."""
    return chat._replace(text=_SURROGATES.sub("\ufffd", chat.text))


def _compare(encoded: EncodedChats, number: int, exact: _Row, text: str) -> None:
    ids = encoded.ids[encoded.offsets[number] : encoded.offsets[number + 1]].tolist()
    spans = encoded.spans[encoded.span_offsets[number] : encoded.span_offsets[number + 1]].tolist()
    if (ids, spans) != (list(exact[0]), list(exact[1])):
        raise DifferentIdsError(
            f"gigatoken and tokenizers give different ids for {text[:200]!r}; run again with --backend tokenizers, and "
            "please report the text"
        )


# -------------------------------------------------------------------------------------------------------- gigatoken


def _by_gigatoken(backend: GigatokenBackend, texts: Texts, chats: Sequence[Rendered]) -> EncodedChats:
    """Chats of which each token is so many bytes of its text."""
    ids, offsets = backend.encode_batch(texts)
    starts = starts_of(backend.num_bytes[ids])
    if not np.array_equal(starts[offsets], texts.offsets):
        number = int(np.flatnonzero(starts[offsets] != texts.offsets)[0]) - 1
        raise DifferentIdsError(
            f"gigatoken's tokens are not the whole text {texts[number][:200]!r}; run again with --backend tokenizers"
        )
    counts = [len(chat.trained) for chat in chats]
    owner = np.repeat(np.arange(len(chats)), counts)
    flat = chain.from_iterable(chain.from_iterable(chat.trained for chat in chats))
    places = _in_bytes(np.fromiter(flat, np.int64, 2 * len(owner)).reshape(-1, 2), owner, texts)
    first = np.searchsorted(starts[1:], places[:, 0], side="right")
    last = np.searchsorted(starts[:-1], places[:, 1], side="left")
    return EncodedChats(ids, offsets, *_spans_of(offsets, owner, first, last))


def _in_bytes(places: _Int64Array, owner: _Int64Array, texts: Texts) -> _Int64Array:
    """Places in characters of texts as places in the bytes of all of them; `owner` says of which text each is."""
    if texts.data.isascii():
        return places + texts.offsets[owner, None]
    inner = np.flatnonzero(np.frombuffer(texts.data, np.int8) < -64)  # bytes of a character after its first
    before = texts.offsets[:-1] - np.searchsorted(inner, texts.offsets[:-1])  # characters in earlier texts
    found = places + before[owner, None]
    return found + np.searchsorted(inner - np.arange(len(inner)), found, side="right")


def _spans_of(
    offsets: _Int64Array, owner: _Int64Array, first: _Int64Array, last: _Int64Array
) -> tuple[npt.NDArray[np.uint32], _Int64Array]:
    """The spans of rows from ranges of trained tokens, ascending; ranges that touch are one, empty ones are none."""
    kept = np.flatnonzero(first < last)
    owner, first, last = owner[kept], first[kept], last[kept]
    begins = np.ones(len(owner), bool)
    begins[1:] = (owner[1:] != owner[:-1]) | (first[1:] > last[:-1])
    ends = np.append(begins[1:], True)[: len(begins)]
    counts = np.bincount(owner[begins], minlength=len(offsets) - 1)
    bounds = starts_of(2 * counts + 2)  # a row's edges: its begin, those of its ranges, its end
    edges = np.empty(bounds[-1], np.int64)
    edges[bounds[:-1]], edges[bounds[1:] - 1] = offsets[:-1], offsets[1:]
    place = bounds[owner[begins]] + 1 + 2 * (np.arange(len(owner[begins])) - starts_of(counts)[owner[begins]])
    edges[place], edges[place + 1] = first[begins], last[ends]
    spans = np.diff(edges)
    is_kept = np.ones(len(spans), bool)
    is_kept[bounds[1:-1] - 1] = False  # from a row's end to the next one's begin
    is_empty = spans[bounds[1:] - 2] == 0  # nothing behind the last range
    is_kept[(bounds[1:] - 2)[is_empty]] = False
    return spans[is_kept].astype(np.uint32), starts_of(2 * counts + 1 - is_empty)


# -------------------------------------------------------------------------------------------------------- reference


def _by_reference(json: TokenizerJson, chats: Sequence[Rendered], numbers: Sequence[int]) -> dict[int, _Row]:
    """The ids and spans of some of the chats."""
    found: dict[int, _Row] = {}
    problems: dict[int, str] = {}
    control = {text: token for text, token in json.added.control.items() if token != json.unknown}
    tokens = {*control.values()}
    for begin in range(0, len(numbers), _AT_ONCE):
        some = numbers[begin : begin + _AT_ONCE]
        whole = iter(json.full.exact.encode_placed([chats[n].text for n in some if not chats[n].protected]))
        for number in some:
            chat = chats[number]
            if chat.protected and not json.has_pieces:
                problems[number] = f"{_HOLDS}, which this tokenizer cannot take as ordinary text"
                continue
            ids, places, written = _in_pieces(json, chat) if chat.protected else (*next(whole), None)
            if written is None and json.normalizes:
                written = [control.get(text, -1) for text in json.added.search.findall(chat.text)]
            if written is not None and [t for t in ids if t in tokens] != [t for t in written if t in tokens]:
                problems[number] = f"{_HOLDS} once it is normalized"
            found[number] = ids, _counts(places, chat.trained)
    if problems:
        raise UnencodableError(problems)
    return found


def _in_pieces(json: TokenizerJson, chat: Rendered) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """The ids of a chat with protected ranges, the tokens' places, and the added tokens that the template wrote."""
    pieces = json.added.pieces(chat.text, chat.protected)
    plain = iter(json.pieces.encode_placed([chat.text[p.start : p.stop] for p in pieces if p.token < 0]))
    ids, places = [], []
    for start, stop, token in pieces:
        more, where = next(plain) if token < 0 else ([token], [(0, stop - start)])
        ids += more
        places += [(start + first, start + last) for first, last in where]
    return ids, places, [piece.token for piece in pieces]


def _counts(places: Sequence[tuple[int, int]], trained: Sequence[tuple[int, int]]) -> list[int]:
    """The spans of a row; the loop is that of transformers' `apply_chat_template`."""
    mask, at = [], 0
    for start, end in places:
        while at < len(trained) and start >= trained[at][1]:
            at += 1
        mask.append(at < len(trained) and end > trained[at][0])
    counts = [len(list(group)) for _, group in groupby(mask)]
    return [0, *counts] if mask[:1] == [True] else counts


def _end_to_end(rows: Mapping[int, _Row]) -> EncodedChats:
    ids, spans = ([row[part] for row in rows.values()] for part in (0, 1))
    offsets, span_offsets = (starts_of(list(map(len, part))) for part in (ids, spans))
    flat = [np.fromiter(chain.from_iterable(part), np.uint32) for part in (ids, spans)]
    return EncodedChats(flat[0], offsets, flat[1], span_offsets)
