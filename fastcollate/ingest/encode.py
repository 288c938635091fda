"""One block -> one shard: parse, apply the template, tokenize, mark spans, count. What a worker does, and all it does.

The prompt's length is what tokenizing the prompt by itself gives, as in the reference. Where prompt and response
provably tokenize apart they are encoded once, end to end; elsewhere the whole text and the prompt are encoded both.
"""

from __future__ import annotations

import gc
import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcollate.sources.blocks import Block
from fastcollate.sources.records import BadRecord, Records, lines_of, read_records
from fastcollate.store.store import ShardColumns, ShardInfo, shard_name, token_dtype, write_shard
from fastcollate.text.backends import Texts
from fastcollate.text.templates import BadRecordError, Template, load_template
from fastcollate.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What decides the rows of a job, besides its sources; picklable.

    `backend` decides only how fast they come.
    """

    template: str
    tokenizer: str
    backend: str
    fields: Mapping[str, str] = field(default_factory=dict)
    boundary: str = "reference"
    max_length: int | None = None
    long_prompt: str = "reject"
    special_text: str = "reject"

    def options(self) -> dict[str, Any]:
        """The options that a store records; what changes no row is not among them."""
        return {
            "boundary": self.boundary,
            "max_length": self.max_length,
            "long_prompt": self.long_prompt,
            "special_text": self.special_text,
        }


@dataclass(slots=True)
class Counts:
    """Sums over rows, for the report; the same whatever the number of workers.

    Attributes:
        num_rows: rows stored.
        num_tokens: tokens in them.
        boundary_mismatches: rows whose prompt's tokens are not a prefix of the row's.
        untrained_rows: rows without a trained token within the limit.
        corner_rows: rows on which reference and positional mode differ.
        long_prompts: rows whose prompt fills the limit, kept or cut.
    """

    num_rows: int = 0
    num_tokens: int = 0
    boundary_mismatches: int = 0
    untrained_rows: int = 0
    corner_rows: int = 0
    long_prompts: int = 0

    def add(self, other: Counts) -> None:
        """Add another block's counts."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True, slots=True)
class BlockResult:
    """What is left of a block: its shard (or none), counts, and the records that were no good."""

    index: int
    source: int
    sha256: str
    shard: ShardInfo | None
    counts: Counts
    bad: list[BadRecord]
    tokenize_seconds: float


class _Rows(NamedTuple):
    ids: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]
    spans: npt.NDArray[np.uint32]
    span_offsets: npt.NDArray[np.int64]
    source_row: npt.NDArray[np.uint64]


class _Parts(NamedTuple):
    """All rows' texts end to end; `starts` `(num_rows + 1,)` says where each row's begin; `rows` are their places."""

    texts: Texts
    starts: npt.NDArray[np.int64]
    rows: npt.NDArray[np.uint64]


def encode_block(block: Block, spec: JobSpec, directory: str) -> BlockResult:
    """Turn a block into a shard of the store in `directory`.

    Raises:
        SourceReadError: the source cannot be read any more.
        OSError: the shard cannot be written.
        RuntimeError: the backend's ids differ from tiktoken's.
    """
    collects = gc.isenabled()
    gc.disable()  # a block makes a hundred thousand objects and no cycle
    try:
        result = _encode_block(block, spec, directory)
    finally:
        if collects:
            gc.enable()
    load_tokenizer(spec.tokenizer, spec.backend).trim()  # now that the block's own memory is free
    return result


def warm_up(spec: JobSpec) -> None:
    """Load what blocks need, so that forked workers share it."""
    load_tokenizer(spec.tokenizer, spec.backend)
    load_template(spec.template, spec.fields)


def _encode_block(block: Block, spec: JobSpec, directory: str) -> BlockResult:
    tokenizer = load_tokenizer(spec.tokenizer, spec.backend)
    template = load_template(spec.template, spec.fields)
    data = block.read()
    digest = hashlib.sha256(data).hexdigest()
    bad = [BadRecord(block.first_row, block.first_line, block.fault)] if block.fault else []
    special_texts = tokenizer.special_texts if spec.special_text == "reject" else ()
    parts = _texts(block, data, template, special_texts, bad)
    del data  # eight megabytes, and the tokenizer's memory is still to come
    counts = Counts()
    started = time.thread_time()
    encoded = tokenizer.encode_batch(parts.texts)
    seconds = time.thread_time() - started
    tokenizer.check(parts.texts, encoded, seed=block.index)
    rows = _mark(parts, encoded.ids, encoded.offsets, tokenizer, template, spec, counts)
    rows = _limit_prompts(rows, spec, counts, bad)
    _count(rows, tokenizer, spec, counts)
    shard = None
    if len(rows.source_row):
        columns = ShardColumns(rows.ids.astype(token_dtype(tokenizer.vocab_size), copy=False), *rows[1:])
        shard = write_shard(Path(directory), shard_name(block.index), columns)
    unplaced = {record.row for record in bad if not record.line}
    lines = lines_of(block, block.read(), unplaced) if unplaced else {}
    bad = sorted(record._replace(line=lines.get(record.row, record.line)) for record in bad)
    return BlockResult(block.index, block.source, digest, shard, counts, bad, seconds)


def _texts(block: Block, data: bytes, template: Template, special_texts: Sequence[str], bad: list[BadRecord]) -> _Parts:
    """The rows' texts; records that give none go to `bad`."""
    special, names, row = _SpecialTexts(special_texts), template.names(), block.first_row
    found: list[_Parts] = []
    for records in read_records(block, data):
        parts_of = _PartsOf(records, row, template, special, bad)
        found.append(_single_texts(parts_of) if names is None else _column_texts(parts_of, names))
        row += len(records)
    return _joined(found)


class _PartsOf(NamedTuple):
    """The texts of records one by one."""

    records: Records
    first_row: int
    template: Template
    special: _SpecialTexts
    bad: list[BadRecord]

    def __call__(self, number: int) -> list[str] | None:
        """A record's texts, or `None` where it has none, which is noted in `bad`."""
        try:
            parts = self.template.parts(self.records[number])
            if (found := self.special.find(parts)) is not None:
                raise BadRecordError(
                    f"holds the special token {found!r} as text; store it as ordinary text with --special-text encode"
                )
        except (BadRecordError, ValueError) as error:
            self.bad.append(BadRecord(self.first_row + number, 0, str(error)))
            return None
        return parts


def _single_texts(parts_of: _PartsOf) -> _Parts:
    """Texts record by record."""
    found = [(number, parts) for number in range(len(parts_of.records)) if (parts := parts_of(number)) is not None]
    starts = _starts(np.array([len(parts) for _, parts in found], np.int64))
    rows = np.array([number + parts_of.first_row for number, _ in found], np.uint64)
    return _Parts(Texts([text for _, parts in found for text in parts]), starts, rows)


def _column_texts(parts_of: _PartsOf, names: Sequence[Sequence[str]]) -> _Parts:
    """Texts made of whole columns, two a record; those of irregular records one by one."""
    count = len(parts_of.records)
    text, sizes, irregular = parts_of.template.columns(parts_of.records.columns(names))
    texts = Texts(data=text.encode(), offsets=_starts(sizes.reshape(-1)))
    special = np.searchsorted(texts.offsets[::2], parts_of.special.places(texts.data), side="right") - 1
    rows = np.arange(count)
    if irregular := sorted({*irregular, *special.tolist()}):
        pairs: list[list[str] | None] = [[*pair] for pair in zip(*[iter(texts.strings())] * 2, strict=True)]
        for number in irregular:
            pairs[number] = parts_of(number)
        rows = np.flatnonzero([pair is not None for pair in pairs])
        texts = Texts([text for pair in pairs if pair is not None for text in pair])
    return _Parts(texts, np.arange(len(rows) + 1) * 2, (rows + parts_of.first_row).astype(np.uint64))


_NONE = np.zeros(0, np.int64)


def _joined(found: Sequence[_Parts]) -> _Parts:
    """The texts of some records and of those that follow them."""
    texts = Texts(
        data=b"".join([parts.texts.data for parts in found]),
        offsets=_starts(np.concatenate([_NONE, *(np.diff(parts.texts.offsets) for parts in found)])),
    )
    starts = _starts(np.concatenate([_NONE, *(np.diff(parts.starts) for parts in found)]))
    return _Parts(texts, starts, np.concatenate([_NONE.astype(np.uint64), *(parts.rows for parts in found)]))


class _SpecialTexts:
    """Looks for texts like `<|endoftext|>`."""

    def __init__(self, texts: Sequence[str]) -> None:
        pattern = "|".join(map(re.escape, texts))
        self._texts = re.compile(pattern) if texts else None
        self._bytes = re.compile(pattern.encode())
        self._firsts = {text.encode()[0] for text in texts}

    def find(self, texts: Sequence[str]) -> str | None:
        """The first one in texts that are put end to end."""
        found = self._texts.search("".join(texts)) if self._texts is not None else None
        return found.group() if found is not None else None

    def places(self, data: bytes) -> list[int]:
        """Where those in UTF-8 text begin; to look for their first bytes alone is much faster."""
        if not any(first in data for first in self._firsts):
            return []
        return [match.start() for match in self._bytes.finditer(data)]


def _mark(
    parts: _Parts,
    ids: npt.NDArray[Any],
    offsets: npt.NDArray[np.int64],
    tokenizer: Tokenizer,
    template: Template,
    spec: JobSpec,
    counts: Counts,
) -> _Rows:
    """Rows and spans: the parts' own tokens where the parts provably part, else those of the whole text."""
    texts, starts = parts.texts, parts.starts
    spans = np.diff(offsets).astype(np.uint32)
    row_offsets = offsets[starts]
    replaced: dict[int, tuple[npt.NDArray[Any], list[int]]] = {}
    for row in _rows_that_join(texts, starts, tokenizer):
        pieces = texts[int(starts[row]) : int(starts[row + 1])]
        if template.single_turn and spec.boundary == "reference":
            replaced[row] = _reference_row(pieces, tokenizer, counts)
        else:
            replaced[row] = _exact_row(pieces, tokenizer, counts)
    num_parts = np.diff(starts)
    for row in np.flatnonzero(num_parts % 2).tolist():
        spans[starts[row + 1] - 1] += 1  # a last prompt also covers the end-of-text
    rows = _Rows(ids, row_offsets, spans, starts, parts.rows)
    return _with_replaced(rows, replaced) if replaced else rows


def _rows_that_join(texts: Texts, starts: npt.NDArray[np.int64], tokenizer: Tokenizer) -> list[int]:
    """Rows of which not all neighbouring parts provably tokenize apart."""
    if np.all(np.diff(starts) == 2):
        return tokenizer.pairs_that_join(texts)
    joined = []
    for row, (start, stop) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        pieces = texts[start:stop]
        if tokenizer.joins(pieces[:-1], pieces[1:]) or "" in pieces[1:-1]:
            joined.append(row)
    return joined


def _reference_row(pieces: list[str], tokenizer: Tokenizer, counts: Counts) -> tuple[npt.NDArray[Any], list[int]]:
    """The whole text's ids; the prompt's length is that of the prompt tokenized by itself."""
    ids = tokenizer.encode("".join(pieces))
    prompt = tokenizer.encode(pieces[0])
    counts.boundary_mismatches += ids[: len(prompt)] != prompt
    spans = [len(prompt), len(ids) - len(prompt)] if len(prompt) <= len(ids) else [len(ids) + 1]
    return np.array(ids, np.uint32), spans


def _exact_row(pieces: list[str], tokenizer: Tokenizer, counts: Counts) -> tuple[npt.NDArray[Any], list[int]]:
    """The whole text's ids; a token that holds a response character belongs to the response."""
    text = "".join(pieces)
    ids = np.array(tokenizer.encode(text), np.uint32)
    places = np.cumsum([len(piece) for piece in pieces])[:-1].tolist()
    before = tokenizer.count_before(text, ids, places)
    begun = tokenizer.count_begun(text, ids, places)
    bounds = [before[i] if i % 2 == 0 else begun[i] for i in range(len(places))]
    bounds = np.maximum.accumulate([0, *bounds, len(ids)]).tolist()
    counts.boundary_mismatches += ids[: bounds[1]].tolist() != tokenizer.encode(pieces[0])
    spans = np.diff(bounds).tolist()
    if len(pieces) % 2:
        spans[-1] += 1
    return ids, spans


def _with_replaced(rows: _Rows, replaced: dict[int, tuple[npt.NDArray[Any], list[int]]]) -> _Rows:
    """`rows` with some of them exchanged."""
    ids, spans, row, kept = [], [], 0, rows
    lengths, num_spans = np.diff(rows.offsets), np.diff(rows.span_offsets)
    for index, (new_ids, new_spans) in replaced.items():
        ids += [kept.ids[kept.offsets[row] : kept.offsets[index]], new_ids.astype(kept.ids.dtype)]
        spans += [kept.spans[kept.span_offsets[row] : kept.span_offsets[index]], np.array(new_spans, np.uint32)]
        lengths[index], num_spans[index] = len(new_ids), len(new_spans)
        row = index + 1
    ids.append(kept.ids[kept.offsets[row] :])
    spans.append(kept.spans[kept.span_offsets[row] :])
    return _Rows(np.concatenate(ids), _starts(lengths), np.concatenate(spans), _starts(num_spans), rows.source_row)


def _starts(lengths: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def _limit_prompts(rows: _Rows, spec: JobSpec, counts: Counts, bad: list[BadRecord]) -> _Rows:
    """Apply the policy for rows whose first prompt leaves no column within the limit."""
    if spec.max_length is None or not len(rows.source_row):
        return rows
    prompts = _first_spans(rows)
    long = np.flatnonzero(prompts - 1 >= spec.max_length)
    if not len(long):
        return rows
    if spec.long_prompt == "reject":
        for row in long.tolist():
            reason = (
                f"its prompt of {prompts[row]} tokens leaves none to train within {spec.max_length}; "
                "raise the limit, or use --long-prompt keep or cut"
            )
            bad.append(BadRecord(int(rows.source_row[row]), 0, reason))
        keep = np.ones(len(prompts), bool)
        keep[long] = False
        return _select(rows, keep)
    counts.long_prompts += len(long)
    return _cut_left(rows, long.tolist(), spec.max_length) if spec.long_prompt == "cut" else rows


def _first_spans(rows: _Rows) -> npt.NDArray[np.int64]:
    """Each row's first prompt in tokens."""
    num_spans = np.diff(rows.span_offsets)
    padded = np.append(rows.spans, 0).astype(np.int64)
    return np.where(num_spans > 0, padded[rows.span_offsets[:-1]], 0)


def _select(rows: _Rows, keep: npt.NDArray[np.bool_]) -> _Rows:
    lengths, num_spans = np.diff(rows.offsets), np.diff(rows.span_offsets)
    return _Rows(
        rows.ids[np.repeat(keep, lengths)],
        _starts(lengths[keep]),
        rows.spans[np.repeat(keep, num_spans)],
        _starts(num_spans[keep]),
        rows.source_row[keep],
    )


def _cut_left(rows: _Rows, long: list[int], limit: int) -> _Rows:
    """Cut prompts from the left until the row and its end-of-text fit the limit; one prompt token stays."""
    replaced = {}
    for row in long:
        ids = rows.ids[rows.offsets[row] : rows.offsets[row + 1]]
        spans = rows.spans[rows.span_offsets[row] : rows.span_offsets[row + 1]].tolist()
        cut = min(spans[0], len(ids)) - 1
        cut = min(cut, max(len(ids) - limit, 0))
        replaced[row] = (ids[cut:], [spans[0] - cut, *spans[1:]])
    return _with_replaced(rows, replaced)


def _count(rows: _Rows, tokenizer: Tokenizer, spec: JobSpec, counts: Counts) -> None:
    lengths = np.diff(rows.offsets)
    counts.num_rows, counts.num_tokens = len(lengths), int(lengths.sum())
    if not len(lengths):
        return
    prompts = _first_spans(rows)
    limit = lengths if spec.max_length is None else np.minimum(lengths, spec.max_length)
    counts.untrained_rows = int(np.count_nonzero(prompts - 1 >= limit))
    corner = prompts == 0
    for place in np.flatnonzero(rows.ids == tokenizer.pad_token_id).tolist():
        corner[np.searchsorted(rows.offsets, place, side="right") - 1] = True
    counts.corner_rows = int(np.count_nonzero(corner))
