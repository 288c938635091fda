"""Text, CSV, Parquet, Arrow and data sets -> pieces cut between rows; what a table's content is, however stored."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import IO, Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fastcollate.errors import InputError, import_extra
from fastcollate.sources.find import Source
from fastcollate.sources.json_blocks import EMPTY, MAX_RECORD_BYTES, NOT_UTF8, Piece, check_encoding

_ROWS = 256  # rows of a table that are looked at together
_TEXTS = {
    kind().id for kind in (pa.string, pa.large_string, pa.string_view, pa.binary, pa.large_binary, pa.binary_view)
}
_LISTS = {pa.list_(pa.null()).id, pa.large_list(pa.null()).id, pa.list_(pa.null(), 1).id}


def text_pieces(source: Source, file: IO[bytes], targets: Iterator[int]) -> Iterator[Piece]:
    """Lines as JSON objects with the field `text`."""
    lines = enumerate(_decoded(source, file, None), 1)
    rows = (_json_row({"text": line.removesuffix("\n")}, number) for number, line in lines)
    pieces = _row_pieces(rows, targets, first_line=1)
    return chain([next(pieces, EMPTY)], pieces)


def csv_pieces(source: Source, file: IO[bytes], targets: Iterator[int]) -> Iterator[Piece]:
    """Rows as JSON objects by the header's names, a line each; cells stay text."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    lines = _decoded(source, file, "")
    first = lines.readline()
    delimiter = "\t" if source.format == "tsv" else ","
    if delimiter not in first and (other := next((mark for mark in ";\t" if mark in first), "")):
        name = "tabs" if other == "\t" else "semicolons"
        warnings.warn(f"{source.name}: its header is parted by {name}, and so is the rest", UserWarning, stacklevel=2)
        delimiter = other
    reader = csv.reader(chain([first] * bool(first), lines), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return iter([EMPTY])
        if not header:
            raise InputError(f"{source.name}, line 1: no header; the first row names the columns")
    except csv.Error as error:
        raise InputError(f"{source.name}, line 1: not valid CSV ({error})") from error
    return _row_pieces(_csv_rows(reader, header), targets)


def _decoded(source: Source, file: IO[bytes], newline: str | None) -> io.TextIOWrapper:
    buffered = io.BufferedReader(file)  # type: ignore[type-var]
    check_encoding(buffered.peek(4)[:4], source.name)
    return io.TextIOWrapper(buffered, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _csv_rows(reader: Any, header: Sequence[str]) -> Iterator[bytes]:
    """Rows that are not blank as JSON objects; for a bad one, the reason as a JSON text."""
    while True:
        cells: list[str] = []
        try:
            while not cells:
                first = reader.line_num + 1
                cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = f"line {first}: not valid CSV ({error})"
            if swallowed := reader.line_num - first:
                reason += f"; a quotation mark that opens there takes in the {swallowed} lines that follow"
            yield msgspec.json.encode(reason)
            continue
        if len(cells) > len(header):
            reason = f"line {reader.line_num}: {len(cells)} cells, but the header names {len(header)} columns"
            yield msgspec.json.encode(reason)
        else:
            yield _json_row(dict(zip(header, cells, strict=False)), reader.line_num)


def _json_row(record: dict[str, str], line: int) -> bytes:
    try:
        return msgspec.json.encode(record)
    except UnicodeEncodeError:  # a lone surrogate stands for a byte that is not UTF-8
        return msgspec.json.encode(f"line {line}: {NOT_UTF8}")


def _row_pieces(rows: Iterable[bytes], targets: Iterator[int], first_line: int = 0) -> Iterator[Piece]:
    """Rows in JSON, one a line; `first_line` is 0 where they are not the source's lines."""
    held: list[bytes] = []
    size, target = 0, next(targets)
    for row in rows:
        held.append(row)
        size += len(row)
        if size >= target:
            yield _piece("rows", len(held), b"\n".join(held), first_line)
            first_line += len(held) if first_line else 0
            held, size, target = [], 0, next(targets)
    if held:
        yield _piece("rows", len(held), b"\n".join(held), first_line)


def arrow_pieces(batches: Iterator[Any], targets: Iterator[int]) -> Iterator[Piece]:
    """Tables of about the target's size; how the batches were cut does not matter."""
    pending: list[pa.Table] = []
    size, target = 0, next(targets)
    for table in _even_tables(batches):
        for part in _halves(table, target):
            pending.append(part)
            size += table_size(part)
            if size >= target:
                yield _arrow_piece(pending)
                pending, size, target = [], 0, next(targets)
    if pending:
        yield _arrow_piece(pending)


def columns_in_memory(source: Source) -> Iterator[Any]:
    """The tables or record batches of what lies in memory, in the order of its rows; nothing is copied."""
    data = source.dataset
    return data.with_format("arrow").iter(batch_size=4096) if source.format == "dataset" else iter(data.to_batches())


def open_columns(source: Source, file: IO[bytes]) -> Iterator[pa.RecordBatch]:
    """The record batches of a Parquet or Arrow file."""
    if source.format == "parquet":
        parquet = import_extra("pyarrow.parquet", "parquet")
        yield from parquet.ParquetFile(file, pre_buffer=False).iter_batches(batch_size=4096, use_threads=False)
        return
    try:
        reader = pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(0)
        yield from pa.ipc.open_stream(file)
        return
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def _even_tables(batches: Iterator[Any]) -> Iterator[pa.Table]:
    """All rows, `_ROWS` a table."""
    rest: list[pa.Table] = []
    num_rows = 0
    for batch in batches:
        rest.append(pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch)
        num_rows += rest[-1].num_rows
        if num_rows >= _ROWS:
            table = pa.concat_tables(rest)
            whole = num_rows - num_rows % _ROWS
            yield from (table.slice(start, _ROWS) for start in range(0, whole, _ROWS))
            rest, num_rows = [table.slice(whole)], num_rows - whole
    if num_rows:
        yield pa.concat_tables(rest)


def _halves(table: pa.Table, target: int) -> Iterator[pa.Table]:
    """A table, halved until each part is no larger than the target, or one row."""
    if table.num_rows < 2 or table_size(table) <= target:
        yield table
        return
    middle = table.num_rows // 2
    yield from _halves(table.slice(0, middle), target)
    yield from _halves(table.slice(middle), target)


def _arrow_piece(tables: list[pa.Table]) -> Piece:
    table = pa.concat_tables(tables).combine_chunks()
    if len(names := table.column_names) > len(set(names)):
        raise pa.ArrowInvalid(f"two columns are named {max(names, key=names.count)!r}")
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return _piece("arrow", table.num_rows, sink.getvalue().to_pybytes())


def _piece(kind: str, num_rows: int, data: bytes, first_line: int = 0) -> Piece:
    return Piece(kind, num_rows, first_line, len(data), data=data)


def table_size(table: pa.Table) -> int:
    """The bytes of a table's content, as `feed_content` gives them."""
    sizes: list[int] = []
    feed_content(table, lambda data: sizes.append(memoryview(data).nbytes))
    return sum(sizes)


def feed_content(table: pa.Table, sink: Callable[[Any], object]) -> None:
    """Give a table's content to `sink`, piece by piece: names, types and values, whatever the layout in memory.

    Chunks, slices, dictionaries, the widths of offsets and what lies under nulls play no part.
    """
    for name, column in zip(table.column_names, table.columns, strict=True):
        sink(f"{name}\0".encode("utf-8", "surrogatepass"))
        _feed(pa.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0), sink)


def _feed(values: pa.Array, sink: Callable[[Any], object]) -> None:
    values = _plain(values)
    kind = values.type
    is_text, is_list = kind.id in _TEXTS, kind.id in _LISTS
    label = "text" if is_text else "list" if is_list else "struct" if pa.types.is_struct(kind) else str(kind)
    sink(f"{label} {len(values)} {values.null_count}\0".encode())
    if values.null_count:
        sink(np.packbits(numbers(values.is_valid())))
        values = values.drop_null()
    if is_text:
        sink(numbers(pc.binary_length(values)).astype("<i8"))
        start = values.offset
        offsets = np.frombuffer(values.buffers()[1], np.int64)[start : start + len(values) + 1]
        if len(values) and offsets[-1] > offsets[0]:
            sink(memoryview(values.buffers()[2])[int(offsets[0]) : int(offsets[-1])])
    elif is_list:
        sink(numbers(pc.list_value_length(values)).astype("<i8"))
        _feed(values.flatten(), sink)
    elif pa.types.is_struct(kind):
        for field, child in zip(kind, values.flatten(), strict=True):
            sink(f"{field.name}\0".encode("utf-8", "surrogatepass"))
            _feed(child, sink)
    elif pa.types.is_boolean(kind):
        sink(np.packbits(numbers(values)))
    elif not pa.types.is_null(kind):
        _feed_numbers(values, sink)


def numbers(values: pa.Array) -> npt.NDArray[Any]:
    """Numbers without nulls, or truth as 0 and 1; not by `to_numpy`, which imports pandas: that takes a while."""
    values = values.cast(pa.uint8()) if pa.types.is_boolean(values.type) else values
    numbers = np.empty(0, values.type.to_pandas_dtype())
    if len(values):
        numbers = np.frombuffer(values.buffers()[1], numbers.dtype, len(values), values.offset * numbers.itemsize)
    return numbers


def _feed_numbers(values: pa.Array, sink: Callable[[Any], object]) -> None:
    try:
        width = values.type.bit_width // 8
    except ValueError:  # a type of another layout
        sink(repr(values.to_pylist()).encode("utf-8", "surrogatepass"))
        return
    if len(values):
        sink(memoryview(values.buffers()[1])[values.offset * width : (values.offset + len(values)) * width])


def _plain(values: pa.Array) -> pa.Array:
    """Without dictionaries and extensions, texts with offsets of 64 bits."""
    while isinstance(values, pa.ExtensionArray):
        values = values.storage
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if values.type.id in _TEXTS:
        values = values.cast(pa.large_binary())
    return values
