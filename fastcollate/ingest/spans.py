"""Tokens -> rows: where prompt and response part, which prompts are too long, what is counted.

The prompt's length is what tokenizing the prompt by itself gives, as in the reference. Where prompt and response
provably tokenize apart they are encoded once, end to end; elsewhere the whole text and the prompt are encoded both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from fastcollate.errors import InputError
from fastcollate.ingest.options import PrepareOptions
from fastcollate.ingest.spec import Counts
from fastcollate.sources import Block, Unit, records
from fastcollate.text import BadRecordError, Template, Texts, Tokenizer, starts_of

_Made = TypeVar("_Made")


class BadRecord(NamedTuple):
    """A record that cannot be used: its position in all sources, its line (0 where unknown), the reason."""

    row: int
    line: int
    reason: str


def read_blocks(
    unit: Unit, digests: list[bytes], note: Callable[[Block, bytes, list[BadRecord]], object]
) -> Iterator[tuple[Block, bytes, list[BadRecord]]]:
    """Each block of a unit and its bytes, with a list for the records that give no row, of which `note` is told."""
    for block in unit.blocks:
        data = block.read()
        digests.append(block.digest(data))
        bad = [BadRecord(block.first_row, block.first_line, block.fault)] if block.fault else []
        yield block, data, bad
        note(block, data, bad)


def made_of_records(block: Block, data: bytes, bad: list[BadRecord], make: Callable[[Any], _Made]) -> dict[int, _Made]:
    """What is made of a block's records, by their numbers; those that nothing can be made of go to `bad`."""
    found, row = {}, block.first_row
    for chunk in records.read_records(block, data):
        for number in range(len(chunk)):
            try:
                found[row + number] = make(chunk[number])
            except InputError:  # the template's fault, not the record's
                raise
            except (BadRecordError, ValueError) as error:
                bad.append(BadRecord(row + number, 0, str(error)))
        row += len(chunk)
    return found


class Rows(NamedTuple):
    """Rows end to end, as in a shard; see `store.shards.ShardColumns`."""

    ids: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]
    spans: npt.NDArray[np.uint32]
    span_offsets: npt.NDArray[np.int64]
    source_row: npt.NDArray[np.uint64]


class Parts(NamedTuple):
    """All rows' texts end to end; `starts` `(num_rows + 1,)` says where each row's begin; `rows` are their places."""

    texts: Texts
    starts: npt.NDArray[np.int64]
    rows: npt.NDArray[np.uint64]


def encode_parts(
    parts: Parts, tokenizer: Tokenizer, template: Template, options: PrepareOptions, counts: Counts, *, seed: int
) -> Rows:
    """Rows and spans: the parts' own tokens where the parts provably part, else those of the whole text.

    `seed` draws the texts of which the ids are compared with the reference's.

    Raises:
        UnencodableError: the tokenizer fails on a row's texts; names one of as many as the row has parts.
    """
    starts = parts.starts
    joined = _rows_that_join(parts.texts, starts, tokenizer)
    texts = _with_whole(parts, joined) if joined else parts.texts
    encoded = tokenizer.encode_batch(texts)
    tokenizer.check(texts, encoded, seed=seed)
    spans = np.diff(encoded.offsets).astype(np.uint32)
    replaced = {}
    for row in joined:
        whole, prompt = (encoded.ids[slice(*encoded.offsets[i : i + 2])] for i in (starts[row], starts[row] + 1))
        if template.single_turn and options.boundary == "reference":
            found = [len(prompt), len(whole) - len(prompt)] if len(prompt) <= len(whole) else [len(whole) + 1]
            is_same = np.array_equal(whole[: len(prompt)], prompt)
        else:
            found = _exact_spans(parts.texts.strings(int(starts[row]), int(starts[row + 1])), whole, tokenizer)
            is_same = np.array_equal(whole[: found[0]], prompt)
        counts.boundary_mismatches += not is_same
        replaced[row] = whole, found
    for row in np.flatnonzero(np.diff(starts) % 2).tolist():
        spans[starts[row + 1] - 1] += 1  # a last prompt also covers the end-of-text
        if row in replaced:
            replaced[row][1][-1] += 1
    rows = Rows(encoded.ids, encoded.offsets[starts], spans, starts, parts.rows)
    return _with_replaced(rows, replaced) if replaced else rows


def _with_whole(parts: Parts, joined: Sequence[int]) -> Texts:
    """The texts; in place of the first two of some rows the row's whole text and its first prompt, then nothing."""
    strings, starts = parts.texts.strings(), parts.starts.tolist()
    for row in joined:
        pieces = strings[starts[row] : starts[row + 1]]
        strings[starts[row] : starts[row + 1]] = ["".join(pieces), pieces[0], *[""] * (len(pieces) - 2)]
    return Texts(strings)


def _rows_that_join(texts: Texts, starts: npt.NDArray[np.int64], tokenizer: Tokenizer) -> list[int]:
    """Rows of which not all neighbouring parts provably tokenize apart."""
    if np.all(np.diff(starts) == 2):
        return tokenizer.pairs_that_join(texts)
    joined = []
    for row, (start, stop) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        pieces = texts.strings(start, stop)
        if "" in pieces[1:-1] or not all(map(tokenizer.parts_at, pieces, pieces[1:])):
            joined.append(row)
    return joined


def _exact_spans(pieces: list[str], ids: npt.NDArray[Any], tokenizer: Tokenizer) -> list[int]:
    """The spans of a row's whole text: a token that holds a response character belongs to the response."""
    places = np.cumsum([len(piece) for piece in pieces])[:-1].tolist()
    bounds = [0, *tokenizer.response_bounds("".join(pieces), ids, places), len(ids)]
    spans: list[int] = np.diff(np.maximum.accumulate(bounds)).tolist()
    return spans


def _with_replaced(rows: Rows, replaced: Mapping[int, tuple[npt.NDArray[Any], list[int]] | None]) -> Rows:
    """`rows` with some of them, in order, exchanged or (`None`) left out."""
    ids, spans, row = [], [], 0
    lengths, num_spans, kept = np.diff(rows.offsets), np.diff(rows.span_offsets), np.ones(len(rows.source_row), bool)
    for index, new in replaced.items():
        ids.append(rows.ids[rows.offsets[row] : rows.offsets[index]])
        spans.append(rows.spans[rows.span_offsets[row] : rows.span_offsets[index]])
        if new is not None:
            ids.append(new[0].astype(rows.ids.dtype))
            spans.append(np.array(new[1], np.uint32))
            lengths[index], num_spans[index] = len(new[0]), len(new[1])
        kept[index] = new is not None
        row = index + 1
    ids.append(rows.ids[rows.offsets[row] :])
    spans.append(rows.spans[rows.span_offsets[row] :])
    starts, span_starts = starts_of(lengths[kept]), starts_of(num_spans[kept])
    return Rows(np.concatenate(ids), starts, np.concatenate(spans), span_starts, rows.source_row[kept])


def limit_prompts(rows: Rows, options: PrepareOptions, counts: Counts, bad: list[BadRecord], *, end: str) -> Rows:
    """Apply the policy for rows whose first prompt leaves no column within the limit; lost ones go to `bad`."""
    if options.max_length is None or not len(rows.source_row):
        return rows
    prompts = _first_spans(rows)
    long = np.flatnonzero(prompts - 1 >= options.max_length)
    if not len(long):
        return rows
    if options.long_prompt == "reject":
        for row in long.tolist():
            reason = (
                f"its prompt of {prompts[row]} tokens leaves none to train within {options.max_length}; "
                "raise the limit, or use --long-prompt keep or cut"
            )
            bad.append(BadRecord(int(rows.source_row[row]), 0, reason))
        return _with_replaced(rows, dict.fromkeys(long.tolist()))
    counts.long_prompts += len(long)
    room = options.max_length + (end == "in_row")  # the last id of such a row is a target only
    return _cut_left(rows, long.tolist(), room) if options.long_prompt == "cut" else rows


def _first_spans(rows: Rows) -> npt.NDArray[np.int64]:
    """Each row's first prompt in tokens."""
    num_spans = np.diff(rows.span_offsets)
    padded = np.append(rows.spans, 0).astype(np.int64)
    return np.where(num_spans > 0, padded[rows.span_offsets[:-1]], 0)


def _cut_left(rows: Rows, long: list[int], limit: int) -> Rows:
    """Cut prompts from the left until the row's ids fit the limit; one prompt token stays."""
    replaced = {}
    for row in long:
        ids = rows.ids[rows.offsets[row] : rows.offsets[row + 1]]
        spans = rows.spans[rows.span_offsets[row] : rows.span_offsets[row + 1]].tolist()
        cut = min(spans[0], len(ids)) - 1
        cut = min(cut, max(len(ids) - limit, 0))
        replaced[row] = (ids[cut:], [spans[0] - cut, *spans[1:]])
    return _with_replaced(rows, replaced)


def count(rows: Rows, tokenizer: Tokenizer, options: PrepareOptions, counts: Counts, *, end: str) -> None:
    """Note rows, tokens, and the rows that need a second look."""
    lengths = np.diff(rows.offsets)
    counts.num_rows, counts.num_tokens = len(lengths), int(lengths.sum())
    if not len(lengths):
        return
    counts.untrained_rows = int(np.count_nonzero(~_trains_any(rows, options.max_length, end)))
    if end == "in_row":
        return  # no corners
    corner = _first_spans(rows) == 0
    for place in np.flatnonzero(rows.ids == tokenizer.pad_token_id).tolist():
        corner[np.searchsorted(rows.offsets, place, side="right") - 1] = True
    counts.corner_rows = int(np.count_nonzero(corner))


def _trains_any(rows: Rows, max_length: int | None, end: str) -> npt.NDArray[np.bool_]:
    """Whether each row has a target that is trained: one behind its first id, and within the limit."""
    lengths, num_spans = np.diff(rows.offsets), np.diff(rows.span_offsets)
    ends = starts_of(rows.spans)
    starts = ends[rows.span_offsets[:-1]]
    covered = ends[rows.span_offsets[1:]] - starts
    # an appended end goes with the last response, or with a row that is one prompt, unless that covers it
    trained: npt.NDArray[np.bool_] = (num_spans % 2 == 0) | (num_spans == 1) & (covered <= lengths)
    trained &= (end == "append") & (lengths <= (np.inf if max_length is None else max_length))
    owner = np.repeat(np.arange(len(lengths)), num_spans)
    is_response = (np.arange(len(owner)) - rows.span_offsets[owner]) % 2 == 1
    owner, first, stop = owner[is_response], ends[:-1][is_response], ends[1:][is_response]
    last = stop - starts[owner] if max_length is None else np.minimum(stop - starts[owner], max_length + 1)
    trained[owner[np.maximum(first - starts[owner], 1) < last]] = True
    return trained
