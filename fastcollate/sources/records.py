"""Blocks -> records; what cannot be parsed is named, never dropped silently.

What a record is, Python's `json` decides. msgspec reads what both read alike, several times as fast: UTF-8, which it
does not check in texts that it passes over, and whole numbers of more digits than `json` takes are looked for first,
and whatever msgspec refuses is read by `json`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, islice
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fastcollate.sources.blocks import Block
from fastcollate.sources.json_blocks import NOT_UTF8, scan_array
from fastcollate.sources.tables import numbers

_MOST_DIGITS = 4300  # of a whole number, for Python's `json`
_BLANK = b" \t\r\n"
_ESCAPE = re.compile(  # in JSON: a pair of surrogates, a lone one, or any other
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<lone>\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\.", re.S
)
_CHUNK_BYTES = 1 << 19  # read at once
_MOST_OTHERS = 64  # fields of records that nobody has asked for
_NO_NUMBERS = np.zeros(0, np.int64)
_OTHER: Any = object()  # stands for what is no list of whole numbers


class Lists(NamedTuple):
    """A field that holds a list of whole numbers in each record: they lie end to end.

    Attributes:
        values: int64 `(num_values,)`, true as 1.
        offsets: int64 `(num_records + 1,)`, where each record's begin.
        is_list: bool `(num_records,)`, whether the record holds such a list; the values of one that does not are
            of no account.
        is_there: bool `(num_records,)`, whether it holds anything but null.
    """

    values: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    is_list: npt.NDArray[np.bool_]
    is_there: npt.NDArray[np.bool_]

    def of(self, good: npt.NDArray[np.bool_]) -> Lists:
        """Those of some of the records, end to end."""
        lengths = np.diff(self.offsets)
        values = self.values if good.all() else self.values[np.repeat(good, lengths)]
        return Lists(values, np.append(0, np.cumsum(lengths[good])), self.is_list[good], self.is_there[good])


def _whole_numbers(value: Any) -> Any:
    return value if value is None or (isinstance(value, list) and {*map(type, value)} <= {int, bool}) else _OTHER


def _lists_of(column: Sequence[Any]) -> Lists:
    """A field of all records: a list of whole numbers, `None`, or `_OTHER`."""
    is_there = np.fromiter((value is not None for value in column), np.bool_, len(column))
    found = [None if value is _OTHER else value for value in column]
    while True:
        offsets = np.append(0, np.cumsum([len(value or ()) for value in found], dtype=np.int64))
        try:
            values = np.fromiter(chain.from_iterable(value or () for value in found), np.int64, int(offsets[-1]))
        except OverflowError:  # a number of more than 64 bits
            found = [None if value and max(map(abs, value)) >= 1 << 63 else value for value in found]
            continue
        is_list = np.fromiter((value is not None for value in found), np.bool_, len(found))
        return Lists(values, offsets, is_list, is_there)


class Columns(NamedTuple):
    """Fields of records.

    Attributes:
        fields: what was asked for, a list for each.
        others: what else the records hold, by name, of numbers only where they are JSON; of a field with several names
            all that are there, where these are more than one.
    """

    fields: list[list[str | None]]
    others: dict[str, list[Any]]


class JsonRecords:
    """Records as JSON, cut apart and parsed when asked for.

    `is_sure` says that msgspec's checks are enough; `is_table`, that a text says what was wrong with a table's row.
    """

    def __init__(self, pieces: list[bytes], *, is_sure: bool, is_table: bool) -> None:
        self._pieces = pieces
        self._decode = _decode if is_sure else parse_record
        self._is_sure = is_sure
        self._is_table = is_table

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, number: int) -> Any:
        """A record; one that cannot be parsed is a `ValueError` that says why."""
        piece = self._pieces[number]
        try:
            record = self._decode(piece)
        except (msgspec.DecodeError, RecursionError):
            record = parse_record(piece)  # they differ, or it says why not
        if self._is_table and isinstance(record, str):
            raise ValueError(record)
        return record

    def columns(self, fields: Sequence[Sequence[str]]) -> Columns:
        """Some fields of all records, each under the first of its names that holds anything, and the other fields.

        All fields are `None` in a record that needs a look: one that cannot be parsed, holds something that is not
        text under one of the names, or has very many fields.
        """
        wanted = frozenset(chain.from_iterable(fields))
        names: tuple[str, ...] = ()
        rows: Iterator[Sequence[Any]] = iter(())
        found: list[Sequence[Any]] = []
        while len(found) < len(self):
            more = self._with_names(names, len(found), wanted)
            if more == names:
                found.append(())
            else:
                names, rows = more, self._rows(more, wanted, len(found))
            with contextlib.suppress(msgspec.DecodeError, ValueError, RecursionError):
                found.extend(rows)  # up to one that is refused, or has a field more
        if {*map(len, found)} - {len(names)}:
            found = [(*row, *[None] * (len(names) - len(row))) for row in found]
        values = list(chain.from_iterable(found))
        return _columns(fields, {name: values[i :: len(names)] for i, name in enumerate(names)}, len(self))

    def _rows(self, names: tuple[str, ...], wanted: frozenset[str], start: int) -> Iterator[Sequence[Any]]:
        """The fields of records, which are refused as `columns` says, or where they have others."""
        decode = _decoder(names, wanted) if self._is_sure else None
        if decode is not None:
            return map(msgspec.structs.astuple, map(decode, islice(self._pieces, start, None)))

        def values(number: int) -> Sequence[Any]:
            record = self[number]
            if not isinstance(record, dict) or not record.keys() <= {*names}:
                raise ValueError
            if any(type(record.get(name)) not in (str, type(None)) for name in wanted):
                raise ValueError
            return [record.get(name) for name in names]

        return map(values, range(start, len(self)))

    def _with_names(self, names: tuple[str, ...], number: int, wanted: frozenset[str]) -> tuple[str, ...]:
        """The names and those of a record's fields, of which only so many that are not wanted are taken."""
        with contextlib.suppress(ValueError):
            if isinstance(record := self[number], dict):
                found = dict.fromkeys([*names, *record])
                others = [name for name in found if name not in wanted][:_MOST_OTHERS]
                return tuple(name for name in found if name in wanted or name in others)
        return names

    def lists(self, names: Sequence[str]) -> dict[str, Lists]:
        """Some fields of all records as lists of whole numbers; a record that cannot be parsed holds none."""
        decode = _decoder(tuple(names), frozenset(names), list[int | bool]) if self._is_sure else None
        found: list[Sequence[Any]] = []
        for number, piece in enumerate(self._pieces):
            try:
                if decode is None:
                    raise msgspec.DecodeError
                found.append(msgspec.structs.astuple(decode(piece)))
            except (msgspec.DecodeError, RecursionError):
                found.append([_whole_numbers(value) for value in self._all(number, names)])
        columns = zip(*found, strict=True) if found else [()] * len(names)
        return {name: _lists_of(column) for name, column in zip(names, columns, strict=True)}

    def _all(self, number: int, names: Sequence[str]) -> Sequence[Any]:
        """Some fields of a record, whatever they hold; `None` where it is none."""
        try:
            record = self[number]
            return [record.get(name) for name in names]
        except (ValueError, AttributeError):
            return [None] * len(names)


class Unreadable(NamedTuple):
    """What stands for a value that Python cannot hold, such as a time that is out of range."""

    reason: str


class TableRecords:
    """Rows of an Arrow table; a column is touched when it is read."""

    def __init__(self, table: pa.Table) -> None:
        self._columns = dict(zip(table.column_names, table.columns, strict=True))
        self._num_rows = int(table.num_rows)
        self._features = _json_features(table.schema)

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, number: int) -> Any:
        """A record."""
        return {name: self._values(name, number, number + 1)[0] for name in self._columns}

    def columns(self, fields: Sequence[Sequence[str]]) -> Columns:
        """As of JSON records; of the other columns those that may hold no number alone."""
        wanted = {*chain.from_iterable(fields)}
        names = [n for n, c in self._columns.items() if n in wanted or re.search("string|binary|bool", str(c.type))]
        columns = _columns(fields, {name: self._values(name, 0, len(self)) for name in names}, len(self))
        odd = {i for c in columns.fields for i, value in enumerate(c) if not (value is None or type(value) is str)}
        for column in columns.fields:
            for i in odd:
                column[i] = None
        return columns

    def lists(self, names: Sequence[str]) -> dict[str, Lists]:
        """As of JSON records."""
        return {name: self._list(name) for name in names}

    def _list(self, name: str) -> Lists:
        if name not in self._columns:
            return _lists_of([None] * len(self))
        column = pa.concat_arrays(self._columns[name].chunks)
        is_there = numbers(column.is_valid()).astype(np.bool_)
        kind = getattr(column.type, "value_type", pa.null())
        if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)) or pa.types.is_dictionary(column.type):
            return Lists(_NO_NUMBERS, np.zeros(len(self) + 1, np.int64), np.zeros(len(self), np.bool_), is_there)
        offsets = np.append(0, np.cumsum(numbers(pc.fill_null(pc.list_value_length(column), 0)), dtype=np.int64))
        values, is_list = column.flatten().cast(pa.int64(), safe=False), is_there
        if values.null_count:
            null = np.flatnonzero(numbers(values.is_null()))
            is_list = is_there.copy()
            is_list[np.searchsorted(offsets, null, side="right") - 1] = False
            values = pc.fill_null(values, 0)
        return Lists(numbers(values), offsets, is_list, is_there)

    def _values(self, name: str, start: int, stop: int) -> list[Any]:
        if name not in self._columns:
            return [None] * (stop - start)
        column = self._columns[name].slice(start, stop - start)
        try:
            values = column.to_pylist()
        except Exception as error:  # whatever the conversion of some type raises
            if stop - start == 1:
                return [Unreadable(f"{type(error).__name__}: {error}")]
            return [self._values(name, i, i + 1)[0] for i in range(start, stop)]
        feature = self._features.get(name)
        return values if feature is None else [_from_json(value, feature) for value in values]


def _json_features(schema: pa.Schema) -> dict[str, Any]:
    """The columns in which `datasets` keeps values as JSON, each with its feature."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature for name, feature in features.items() if '"Json"' in json.dumps(feature)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # not of `datasets`


def _from_json(value: Any, feature: Any) -> Any:
    """A value as it was before `datasets` stored it."""
    if isinstance(feature, dict) and feature.get("_type") == "Json":
        return parse_record(value.encode()) if isinstance(value, str) else value
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else feature.get("feature")
        return [_from_json(item, inner) for item in value]
    if isinstance(value, dict) and isinstance(feature, dict):
        return {key: _from_json(item, feature.get(key)) for key, item in value.items()}
    return value


def _columns(fields: Sequence[Sequence[str]], found: Mapping[str, list[Any]], num_records: int) -> Columns:
    """What each record holds of each field, under the first of its names under which it holds anything; the others."""
    others = {name: column for name, column in found.items() if name not in {*chain.from_iterable(fields)}}
    first = []
    for names in fields:
        there = [name for name in names if name in found]
        column = found[there[0]] if there else [None] * num_records
        for name in there[1:]:
            others |= {there[0]: found[there[0]], name: found[name]}  # only one of them is taken
            if not all(column) and type(None) in set(map(type, column)):  # `None in column` would compare the texts
                column = [other if value is None else value for value, other in zip(column, found[name], strict=True)]
        first.append(column)
    return Columns(first, others)


Records = JsonRecords | TableRecords


def read_records(block: Block, data: bytes) -> Iterator[Records]:
    """The records of a block, whose bytes are `data`; some at a time, so that what is made of them stays in a cache."""
    if block.kind == "arrow":
        with pa.ipc.open_stream(data) as reader:
            table = reader.read_all()
        rows = max(table.num_rows * _CHUNK_BYTES // max(len(data), 1), 1)
        for start in range(0, table.num_rows, rows):
            yield TableRecords(table.slice(start, rows))
        return
    for chunk, pieces in _array_chunks(data) if block.kind == "array" else _line_chunks(data, block.num_rows):
        yield JsonRecords(pieces, is_sure=_is_plain(chunk), is_table=block.kind == "rows")


def _line_chunks(data: bytes, num_rows: int) -> Iterator[tuple[bytes, list[bytes]]]:
    """Runs of lines, and those lines in them that are not blank."""
    has_blanks = data.count(b"\n") + (data[-1:] != b"\n") != num_rows
    start = 0
    while start < len(data):
        middle = start + _CHUNK_BYTES
        stop = 0 if middle < len(data) else len(data)
        stop = stop or data.rfind(b"\n", start, middle) + 1 or data.find(b"\n", middle) + 1 or len(data)
        chunk = data[start:stop]
        lines = chunk.split(b"\n")
        if not lines[-1]:
            lines.pop()
        start = stop
        if lines := [line for line in lines if line.strip(_BLANK)] if has_blanks else lines:
            yield chunk, lines


def _array_chunks(data: bytes) -> Iterator[tuple[bytes, list[bytes]]]:
    """Runs of a JSON array's elements."""
    pieces: list[bytes] = []
    start = first = 0
    for stop in [*scan_array(data)[0], len(data)] if data else ():
        pieces.append(data[start:stop])
        start = stop + 1
        if stop - first >= _CHUNK_BYTES or stop == len(data):
            yield data[first:stop], pieces
            pieces, first = [], start


_decode = msgspec.json.Decoder().decode


@lru_cache(maxsize=256)
def _decoder(names: tuple[str, ...], wanted: frozenset[str], kind: Any = str) -> Callable[[bytes], Any] | None:
    """What reads the fields of an object, wanted ones of this kind; `None` for names that msgspec cannot take.

    Where it reads texts, an object that has others is refused.
    """
    fields = {f"field{index}": name for index, name in enumerate(names)}
    kinds = [(field, kind | None if name in wanted else Any, None) for field, name in fields.items()]
    try:
        record = msgspec.defstruct("Record", kinds, rename=fields, gc=False, forbid_unknown_fields=kind is str)
    except ValueError:
        return None
    return msgspec.json.Decoder(record).decode


def _is_plain(data: bytes) -> bool:
    """Whether it is UTF-8, without more digits in a row than `json` takes: such a row has a byte of each so many."""
    try:
        data.isascii() or data.decode()
    except UnicodeDecodeError:
        return False
    half = _MOST_DIGITS // 2
    return not any(data[place : place + half].isdigit() for place in range(0, len(data), half))


def parse_record(piece: bytes) -> Any:
    """What Python's `json` reads, lone surrogates as U+FFFD; what is not JSON is a `ValueError` that says why."""
    try:
        text = piece.decode().strip(" \t\r\n")
        if "\\u" in text:
            text = _ESCAPE.sub(lambda match: r"\ufffd" if match["lone"] else match[0], text)
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{NOT_UTF8} (byte {error.start} of the record)") from None
    except json.JSONDecodeError as error:
        where = f" (column {error.colno})" if error.lineno == 1 else ""
        raise ValueError(f"not valid JSON: {error.msg}{where}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    except ValueError:
        raise ValueError(f"not valid JSON: a number of more than {_MOST_DIGITS} digits") from None


def lines_of(block: Block, data: bytes, rows: Collection[int]) -> Mapping[int, int]:
    """The lines on which some records begin, counted from 1; empty where the source has no lines."""
    if not block.first_line or not rows:
        return {}
    lines, line, counted, start, row = {}, block.first_line, 0, 0, block.first_row
    is_array = block.kind == "array"
    for piece in chain.from_iterable(p for _, p in _array_chunks(data)) if is_array else data.split(b"\n"):
        if is_array or piece.strip(_BLANK):
            if row in rows:
                first = start + len(piece) - len(piece.lstrip(_BLANK))
                line += data.count(b"\n", counted, first)
                lines[row], counted = line, first
            row += 1
        start += len(piece) + 1
    return lines
