"""Blocks -> records, each with its position in the sources; what cannot be parsed is named, never dropped silently."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import orjson
import pyarrow as pa

from fastcollate.sources.blocks import BAD_ROW, Block
from fastcollate.sources.scanner import scan_array


class BadRecord(NamedTuple):
    """A record that cannot be used: its position in all sources, its line (0 where unknown), the reason."""

    row: int
    line: int
    reason: str


class Records(NamedTuple):
    """A parsed block.

    Attributes:
        records: the records that could be parsed.
        rows: their positions in the sources.
        bad: what could not be parsed.
    """

    records: list[Any]
    rows: Sequence[int]
    bad: list[BadRecord]


def parse_block(block: Block, data: bytes) -> Records:
    """The records of a block; `data` is what `block.read()` gave."""
    if block.kind == "arrow":
        with pa.ipc.open_stream(data) as reader:
            records = reader.read_all().to_pylist()
        return Records(records, range(block.first_row, block.first_row + len(records)), [])
    records = _parse_at_once(block, data)
    if records is not None:
        return Records(records, range(block.first_row, block.first_row + len(records)), [])
    pieces = _cut_lines(data) if block.kind == "lines" else _cut_array(data)
    return parse_pieces(block, ((number, piece) for number, (_, piece) in enumerate(pieces)))


def _parse_at_once(block: Block, data: bytes) -> list[Any] | None:
    """All records, or `None` where one of them is bad, or a line blank: then each must be looked at by itself."""
    try:
        if block.kind != "lines":
            records = orjson.loads(b"[%b]" % data)
        else:
            records = list(map(orjson.loads, data.split(b"\n") if data[-1:] != b"\n" else data[:-1].split(b"\n")))
    except ValueError:
        return None
    has_bad_rows = block.kind == "rows" and any(BAD_ROW in record for record in records)
    return None if has_bad_rows or len(records) != block.num_rows else records


def lines_of(block: Block, data: bytes, rows: Collection[int]) -> dict[int, int]:
    """The lines on which some records begin, counted from 1; empty where the source has no lines."""
    if not block.first_line or not rows:
        return {}
    lines, line, counted = {}, block.first_line, 0
    for number, (start, piece) in enumerate(_cut_lines(data) if block.kind == "lines" else _cut_array(data)):
        if block.first_row + number in rows:
            start += len(piece) - len(piece.lstrip())
            line += data.count(b"\n", counted, start)
            counted = start
            lines[block.first_row + number] = line
    return lines


def parse_pieces(block: Block, pieces: Iterable[tuple[int, bytes]]) -> Records:
    """Records by themselves, each with its number in the block, so that one that cannot be parsed spoils no other."""
    records, rows, bad = [], [], []
    for number, piece in pieces:
        row = block.first_row + number
        try:
            record = parse_record(piece.strip(b" \t\r\n"))
        except ValueError as error:
            bad.append(BadRecord(row, 0, str(error)))
            continue
        if block.kind == "rows" and BAD_ROW in record:
            bad.append(BadRecord(row, 0, record[BAD_ROW]))
            continue
        records.append(record)
        rows.append(row)
    return Records(records, rows, bad)


def parse_record(piece: bytes) -> Any:
    """One JSON value; lone surrogates become U+FFFD.

    Raises:
        ValueError: it is not JSON; the message says why.
    """
    try:
        return orjson.loads(piece)
    except orjson.JSONDecodeError as error:
        if "surrogate" not in str(error):
            where = f" (column {error.colno})" if error.lineno == 1 else ""
            raise ValueError(f"not valid JSON: {error.msg}{where}") from None
    try:
        return _mend(json.loads(piece.decode(), parse_constant=_refuse_constant))
    except UnicodeDecodeError as error:
        raise ValueError(f"a byte that is not UTF-8 (byte {error.start} of the record)") from None
    except RecursionError as error:
        raise ValueError(f"not valid JSON: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"not valid JSON: {name}")


def _mend(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_mend(item) for item in value]
    if isinstance(value, dict):
        return {_mend(key): _mend(item) for key, item in value.items()}
    return value


def _cut_lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Start and content of each line that is not blank."""
    start = 0
    while start < len(data):
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        line = data[start:stop]
        if line.strip(b" \t\r"):
            yield start, line
        start = stop + 1


def _cut_array(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Start and content of each element of a JSON array's inside."""
    start = 0
    for comma in [*scan_array(data).commas, len(data)]:
        yield start, data[start:comma]
        start = comma + 1
