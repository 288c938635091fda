"""Records that hold ids already -> rows, by one rule wherever they come from.

A token is trained where `labels` are not -100 and no mask is 0; labels stand at the place of their own token. What
`attention_mask` leaves out at a row's ends is padding, and cut off. `seq_lengths`, or `position_ids` that begin anew,
say that a record is several rows. A column that says what is trained is honoured or refused, never passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastcollate.errors import shown
from fastcollate.ingest.ids.columns import COUNTS, KNOWN, MASKS
from fastcollate.ingest.spans import BadRecord, Rows, read_blocks
from fastcollate.sources import Block, Unit, records
from fastcollate.text import starts_of

IGNORE = -100
_Truth = npt.NDArray[np.bool_]


class IdRows(NamedTuple):
    """Rows, with the number of its record as each one's `source_row`; why other records give none, by number."""

    rows: Rows
    bad: dict[int, str]


def rows_of_ids(chunk: records.Records, columns: Mapping[str, str], vocab_size: int) -> IdRows:
    """The rows of some records; every record must hold the columns that `columns_of_ids` found, and no other such."""
    lists = chunk.lists(list(dict.fromkeys((*columns.values(), *KNOWN))))
    found = _Found(len(chunk))
    for name, column in lists.items():
        if name in columns.values():
            found.refuse(~column.is_list, partial(_why_no_list, chunk, name))
        else:
            found.refuse(column.is_there, f"holds {name!r}, which the first record does not")
    of = {key: lists[name] for key, name in columns.items()}
    _check_lengths(of, columns, found)
    of = {key: column.of(found.good) for key, column in of.items()}
    return IdRows(_rows(of, columns, found, vocab_size), found.bad)


def read_rows(
    unit: Unit,
    columns: Mapping[str, str],
    vocab_size: int,
    note: Callable[[Block, bytes, Sequence[BadRecord]], object],
) -> tuple[Rows, list[bytes]]:
    """The rows of a unit of work and each block's digest; what is wrong with a block's records goes to `note`."""
    found, digests = [_NO_ROWS], list[bytes]()
    for block, data, bad in read_blocks(unit, digests, note):
        row = block.first_row
        for chunk in records.read_records(block, data):
            rows, reasons = rows_of_ids(chunk, columns, vocab_size)
            found.append(rows._replace(source_row=rows.source_row + np.uint64(row)))
            bad += [BadRecord(row + number, 0, reason) for number, reason in reasons.items()]
            row += len(chunk)
    return joined_rows(found), digests


def joined_rows(found: Sequence[Rows]) -> Rows:
    """Rows end to end."""
    ids, offsets, spans, span_offsets, source_row = zip(*found, strict=True)
    starts, span_starts = (starts_of(np.concatenate([*map(np.diff, part)])) for part in (offsets, span_offsets))
    return Rows(np.concatenate(ids), starts, np.concatenate(spans), span_starts, np.concatenate(source_row))


_NO_ROWS = Rows(np.zeros(0, np.uint32), starts_of([]), np.zeros(0, np.uint32), starts_of([]), np.zeros(0, np.uint64))


class _Found:
    """Which records are good so far, and why others are not: the first reason counts."""

    def __init__(self, num_records: int) -> None:
        self.good = np.ones(num_records, np.bool_)
        self.bad: dict[int, str] = {}

    def refuse(self, these: _Truth, why: str | Callable[[int], str]) -> None:
        """Refuse those of the records that are good; `why` says what is wrong, perhaps of a record's number."""
        for number in np.flatnonzero(these & self.good).tolist():
            self.bad[number] = why if isinstance(why, str) else why(number)
        self.good &= ~these

    def refuse_cells(self, wrong: _Truth, record: npt.NDArray[np.int64], why: Callable[[int], str]) -> None:
        """Refuse the records of these cells; `why` says it of a record's first such cell."""
        cells = np.flatnonzero(wrong)
        numbers, first = np.unique(record[cells], return_index=True)
        these = np.zeros(len(self.good), np.bool_)
        these[numbers] = True
        where = dict(zip(numbers.tolist(), cells[first].tolist(), strict=True))
        self.refuse(these, lambda number: why(where[number]))


def _why_no_list(chunk: records.Records, name: str, number: int) -> str:
    """Why a record has no list of whole numbers under a name."""
    try:
        record = chunk[number]
    except ValueError as error:
        return str(error)
    if not isinstance(record, dict):
        return "not an object that holds ids"
    value = record.get(name)
    if value is None:
        return f"no {name!r}, which the first record has"
    odd = next((item for item in value if type(item) not in (int, bool)), value) if isinstance(value, list) else value
    return f"{name!r} holds {shown(odd)}, and is no list of whole numbers"


def _check_lengths(lists: Mapping[str, records.Lists], names: Mapping[str, str], found: _Found) -> None:
    """A value for each id, or counts that sum up to their number."""
    num_ids = np.diff(lists["input_ids"].offsets)
    found.refuse(num_ids == 0, f"{names['input_ids']!r} is empty")
    for key, column in lists.items():
        told, what = np.diff(column.offsets), f"values in {names[key]!r}"
        if key in COUNTS:
            below = np.diff(starts_of(column.values < 0)[column.offsets]) > 0
            found.refuse(below, f"{names[key]!r} holds a number below 0")
            told, what = np.diff(starts_of(column.values)[column.offsets]), f"are counted by {names[key]!r}"

        def why(number: int, told: npt.NDArray[np.int64] = told, what: str = what) -> str:
            return f"{num_ids[number]} ids, but {told[number]} {what}"

        found.refuse(told != num_ids, why)


def _rows(of: Mapping[str, records.Lists], names: Mapping[str, str], found: _Found, vocab_size: int) -> Rows:
    """Rows of records whose lists have the right lengths, if their values are right too."""
    numbers, ids = np.flatnonzero(found.good), of["input_ids"].values
    record = np.repeat(numbers, np.diff(of["input_ids"].offsets))
    is_first = np.diff(record, prepend=-1) > 0
    kept = of["attention_mask"].values != 0 if "attention_mask" in of else np.ones(len(ids), np.bool_)
    goes_on = kept & ~is_first & np.append(False, kept[:-1])  # behind another kept id of its record
    begins = kept & ~goes_on
    found.refuse_cells(
        (ids < 0) | (ids >= vocab_size),
        record,
        lambda cell: f"id {ids[cell]} is beyond the tokenizer's {vocab_size:,}: another one has made it",
    )
    runs = np.bincount(record[begins], minlength=len(found.good))
    if "attention_mask" in of:
        found.refuse(runs == 0, f"{names['attention_mask']!r} leaves out every id")
        found.refuse(runs > 1, f"{names['attention_mask']!r} leaves out ids between others")
    trained = _trained(of, kept, names, record, found)
    if "seq_lengths" in of:
        counts = of["seq_lengths"].values
        places = starts_of(counts)[:-1][counts > 0]
        begins[places] = kept[places]
    if "position_ids" in of:
        at = of["position_ids"].values
        wrong = kept & (at != 0) & (begins | (at != np.append(-1, at[:-1]) + 1))
        found.refuse_cells(
            wrong, record, lambda cell: f"{names['position_ids']!r} come to {at[cell]} without counting up"
        )
        begins |= kept & (at == 0)
    kept &= found.good[record]
    return _cut(ids[kept], begins[kept], trained[kept], record[kept])


def _trained(
    of: Mapping[str, records.Lists],
    kept: _Truth,
    names: Mapping[str, str],
    record: npt.NDArray[np.int64],
    found: _Found,
) -> _Truth:
    """Which ids are trained by all that their records say."""
    ids, trained = of["input_ids"].values, np.ones(len(kept), np.bool_)
    for key in MASKS:
        if key in of:
            trained &= of[key].values != 0
    if "spans" in of:
        counts, offsets = of["spans"].values, of["spans"].offsets
        place = np.arange(len(counts)) - np.repeat(offsets[:-1], np.diff(offsets))
        trained &= np.repeat(place % 2 == 1, counts)
    if "labels" in of:
        labels = of["labels"].values
        wrong = kept & (labels != IGNORE) & (labels != ids)

        def why(cell: int) -> str:
            is_next = bool(labels[cell] == ids[(cell + 1) % len(ids)])
            remedy = f"{'shifted by one already? ' * is_next}give each label at its own token, or {IGNORE}"
            return f"{names['labels']!r} is {labels[cell]} where the id is {ids[cell]}: {remedy}"

        found.refuse_cells(wrong, record, why)
        trained &= labels != IGNORE
    return trained


def _cut(ids: npt.NDArray[np.int64], begins: _Truth, trained: _Truth, record: npt.NDArray[np.int64]) -> Rows:
    """Rows from the cells at which they begin; spans change where training does."""
    starts, size = np.flatnonzero(begins), len(ids)
    changes = np.flatnonzero(trained != np.append(False, trained[:-1]) & ~begins)
    bounds = np.sort(np.concatenate([starts, changes]))  # a row that begins trained has a first span of 0
    return Rows(
        ids.astype(np.uint32),
        np.append(starts, size),
        np.diff(bounds, append=size).astype(np.uint32),
        np.append(np.searchsorted(bounds, starts), len(bounds)),
        record[starts].astype(np.uint64),
    )


def with_end_appended(rows: Rows, end: int) -> Rows:
    """Rows as the collate closes them by an end-of-text: one that closes a row already is taken off.

    It is trained as the row says where it has one, else as the row's last id is.
    """
    last = rows.offsets[1:] - 1
    is_closed = rows.ids[last] == end
    ends_trained = np.diff(rows.span_offsets) % 2 == 0
    spans = rows.spans.astype(np.int64)
    spans[rows.span_offsets[1:] - 1] += np.where(ends_trained, -1 * is_closed, ~is_closed)
    offsets = starts_of(np.diff(rows.offsets) - is_closed)
    return rows._replace(ids=np.delete(rows.ids, last[is_closed]), offsets=offsets, spans=spans.astype(np.uint32))


def with_begin(rows: Rows, begin: int) -> Rows:
    """Rows of one text each with an id before it, which is no target of its own row."""
    starts, spans = rows.offsets[:-1], rows.spans.copy()
    spans[rows.span_offsets[1:] - 1] += 1
    offsets = rows.offsets + np.arange(len(rows.offsets))
    return rows._replace(ids=np.insert(rows.ids, starts, begin), offsets=offsets, spans=spans)
