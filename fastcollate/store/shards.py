"""Shards: Arrow IPC files of one uncompressed record batch, written, opened by memory map, put together.

`pyarrow`, `datasets`, `polars` and `duckdb` open a shard unaided.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fastcollate.errors import InputError
from fastcollate.store.files import HashedFile, naming, write_file

_COLUMNS = ("input_ids", "spans", "source_row")
EXTRA_DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64")
MANY_SHARDS = 4096  # more of them are not mapped one by one, where they are small
SMALL_BYTES = 1 << 18  # a shard that is rather read than mapped
MAX_READ_BYTES = 1 << 30  # small shards that are read into memory, at most
MAX_MAPS = 1 << 15  # of one store; Linux gives a process 65,530
_NONE: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What the manifest says of a shard: the file, and counts that its buffers must agree with."""

    name: str
    num_bytes: int
    sha256: str
    num_rows: int
    num_tokens: int
    num_spans: int
    max_length: int


class ShardColumns(NamedTuple):
    """One shard's columns as flat arrays; those of an open store are read-only views of the mapped file.

    Attributes:
        input_ids: uint16 or uint32 `(num_tokens,)`, all rows' tokens end to end.
        offsets: int64 `(num_rows + 1,)`, where each row starts in `input_ids`.
        spans: uint32 `(num_spans,)`, alternating counts of prompt and response tokens, prompt first.
        span_offsets: int64 `(num_rows + 1,)`, where each row starts in `spans`.
        source_row: uint64 `(num_rows,)`, the record's position in the sources.
        extra: further columns of one number a row, by name, such as a label or a score, `(num_rows,)`.
    """

    input_ids: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]
    spans: npt.NDArray[np.uint32]
    span_offsets: npt.NDArray[np.int64]
    source_row: npt.NDArray[np.uint64]
    extra: Mapping[str, npt.NDArray[Any]] = _NONE


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The narrowest dtype of a store that holds every id below `vocab_size`."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def shard_name(index: int) -> str:
    """The file name of the shard with this number."""
    return f"shard-{index:05d}.arrow"


def shard_schema(token_dtype: npt.DTypeLike, extra: Mapping[str, npt.DTypeLike] = _NONE) -> pa.Schema:
    """The Arrow schema of a shard."""
    types = [
        pa.large_list(pa.field("item", pa.from_numpy_dtype(token_dtype), nullable=False)),
        pa.large_list(pa.field("item", pa.uint32(), nullable=False)),
        pa.uint64(),
        *(pa.from_numpy_dtype(extra[name]) for name in sorted(extra)),
    ]
    names = (*_COLUMNS, *sorted(extra))
    return pa.schema([pa.field(name, type_, nullable=False) for name, type_ in zip(names, types, strict=True)])


def record_batch(columns: ShardColumns) -> pa.RecordBatch:
    """A shard's columns as Arrow's, without copying."""
    extra = {name: columns.extra[name] for name in sorted(columns.extra)}
    schema = shard_schema(columns.input_ids.dtype, {name: values.dtype for name, values in extra.items()})
    ids, offsets, spans, span_offsets, source_row = map(_arrow, columns[:5])
    arrays = [
        pa.LargeListArray.from_arrays(offsets, ids, schema.field(0).type),
        pa.LargeListArray.from_arrays(span_offsets, spans, schema.field(1).type),
        source_row,
        *map(_arrow, extra.values()),
    ]
    return pa.record_batch(arrays, schema=schema)


def _arrow(values: npt.NDArray[Any]) -> pa.Array:
    """Without copying, and without `pa.array`, which imports pandas: a second that no job needs to wait."""
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def write_shard(directory: Path, name: str, columns: ShardColumns, *, sync: bool = True) -> ShardInfo:
    """Write one shard, atomically; `sync=False` for a part of one that is only to be merged (see `files.replacing`)."""
    batch = record_batch(columns)

    def fill(file: HashedFile) -> None:
        with pa.PythonFile(file, "w") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)

    written = write_file(directory / name, fill, sync=sync)
    lengths = np.diff(columns.offsets)
    return ShardInfo(
        **asdict(written),
        num_rows=len(lengths),
        num_tokens=len(columns.input_ids),
        num_spans=len(columns.spans),
        max_length=int(lengths.max(initial=0)),
    )


def open_shard(
    root: Path, info: ShardInfo, schema: pa.Schema | None = None, *, in_memory: bool = False
) -> ShardColumns:
    """Map or read a shard; its layout is checked against what is known of it: no view reaches past a buffer's end.

    Its schema must be the given one, or by default any that a shard can have.
    """
    path = root / info.name
    with naming(path):
        opened = pa.BufferReader(path.read_bytes()) if in_memory else pa.memory_map(str(path))
        with opened as source:  # the views keep the map alive, the descriptor is closed
            return _read_shard(source, info, schema, path)


def open_shards(root: Path, infos: Sequence[ShardInfo], schema: pa.Schema) -> tuple[ShardColumns, ...]:
    """Open a store's shards with a bounded number of maps, however many there are.

    Each is mapped by itself; of more than `MANY_SHARDS`, those of at most `SMALL_BYTES` are read into memory where
    they have `MAX_READ_BYTES` or less together, neighbours as one. No file stays open.
    """
    is_small = [len(infos) > MANY_SHARDS and info.num_bytes <= SMALL_BYTES for info in infos]
    if sum(info.num_bytes for info, small in zip(infos, is_small, strict=True) if small) > MAX_READ_BYTES:
        is_small = [False] * len(infos)
    if is_small.count(False) > MAX_MAPS:
        raise InputError(
            f"{root}: {len(infos):,} shards, too many to open; merge them into few with: "
            f"fastcollate convert {root} NEW_DIRECTORY"
        )
    if sum(info.num_bytes <= SMALL_BYTES for info in infos) > MANY_SHARDS:
        warnings.warn(
            f"{root}: {len(infos):,} shards take a while to open; merge them into few with: "
            f"fastcollate convert {root} NEW_DIRECTORY",
            stacklevel=5,
        )
    opened: list[ShardColumns] = []
    for small, run in itertools.groupby(zip(infos, is_small, strict=True), lambda pair: pair[1]):
        part = [info for info, _ in run]
        if small:
            opened.append(join_columns(part, (open_shard(root, info, schema, in_memory=True) for info in part)))
        else:
            opened += [open_shard(root, info, schema) for info in part]
    return tuple(opened)


def _read_shard(source: Any, info: ShardInfo, schema: pa.Schema | None, path: Path) -> ShardColumns:
    if source.size() != info.num_bytes:
        raise InputError(
            f"{path}: {source.size()} bytes, but the manifest says {info.num_bytes}; prepare the store again"
        )
    try:
        reader = pa.ipc.open_file(source)
        wanted = _known_schema(reader.schema) if schema is None else schema
        if reader.num_record_batches != 1 or wanted is None or not reader.schema.equals(wanted):
            raise InputError(f"{path}: not a shard of a token store; prepare the store again")
        batch = reader.get_batch(0)
    except pa.ArrowException as error:
        raise InputError(f"{path}: damaged ({error}); prepare the store again") from error
    ids, spans, source_row, *extra = batch.columns
    columns = ShardColumns(
        _view(ids.values.buffers()[1], ids.type.value_type.to_pandas_dtype(), info.num_tokens, path),
        _view(ids.buffers()[1], np.int64, info.num_rows + 1, path),
        _view(spans.values.buffers()[1], np.uint32, info.num_spans, path),
        _view(spans.buffers()[1], np.int64, info.num_rows + 1, path),
        _view(source_row.buffers()[1], np.uint64, info.num_rows, path),
        {
            name: _view(column.buffers()[1], column.type.to_pandas_dtype(), info.num_rows, path)
            for name, column in zip(wanted.names[3:], extra, strict=True)
        },
    )
    for offsets, num_values in ((columns.offsets, info.num_tokens), (columns.span_offsets, info.num_spans)):
        if int(offsets[0]) != 0 or int(offsets[-1]) != num_values:
            raise InputError(f"{path}: damaged offsets; prepare the store again")
    return columns


def _known_schema(schema: pa.Schema) -> pa.Schema | None:
    """The schema that a file with this one must have to be a shard, or `None` where it cannot be one."""
    if schema.names[:1] != ["input_ids"]:
        return None
    types = {pa.from_numpy_dtype(name): name for name in EXTRA_DTYPES}
    fields = list(schema)[len(_COLUMNS) :]
    wide = schema.field(0).type == shard_schema(np.uint32).field(0).type
    extra = {field.name: types[field.type] for field in fields if field.type in types}
    return shard_schema(np.uint32 if wide else np.uint16, extra) if len(extra) == len(fields) else None


def _view(buffer: pa.Buffer | None, dtype: Any, count: int, path: Path) -> npt.NDArray[Any]:
    if not count:
        return np.empty(0, dtype)
    size = 0 if buffer is None else buffer.size
    if buffer is None or size < count * np.dtype(dtype).itemsize:
        raise InputError(f"{path}: a column holds {size} bytes, too few for {count} values; prepare the store again")
    view: npt.NDArray[Any] = np.frombuffer(buffer, dtype, count)
    return view


def shard_lengths(directory: Path, shard: ShardInfo) -> npt.NDArray[np.int64]:
    """Each row's length in tokens in a finished shard, int64 `(num_rows,)`."""
    lengths: npt.NDArray[np.int64] = np.diff(open_shard(directory, shard).offsets)
    return lengths


def merge_shards(
    directory: Path, parts: Sequence[ShardInfo], target: Path, name: str, *, sync: bool = True
) -> ShardInfo:
    """Put shards of one schema end to end in one; one is open at a time, and in memory is what the new one holds."""
    return write_shard(target, name, join_columns(parts, (open_shard(directory, part) for part in parts)), sync=sync)


def join_columns(parts: Sequence[ShardInfo], opened: Iterable[ShardColumns]) -> ShardColumns:
    """Columns end to end, in memory; each of `opened` is taken when the one before it is copied, and let go then.

    Refuses other than one schema, and damaged offsets of a row, which would reach into another shard.
    """
    num_rows, num_tokens, num_spans = (
        sum(counts) for counts in zip(*((p.num_rows, p.num_tokens, p.num_spans) for p in parts), strict=True)
    )
    joined: ShardColumns | None = None
    row = token = span = 0
    for part, columns in zip(parts, opened, strict=True):
        if joined is None:
            joined = ShardColumns(
                np.empty(num_tokens, columns.input_ids.dtype),
                np.zeros(num_rows + 1, np.int64),
                np.empty(num_spans, np.uint32),
                np.zeros(num_rows + 1, np.int64),
                np.empty(num_rows, np.uint64),
                {name: np.empty(num_rows, values.dtype) for name, values in columns.extra.items()},
            )
        elif _dtypes(joined) != _dtypes(columns):
            raise InputError(f"{part.name}: its columns are {_dtypes(columns)}, those before it {_dtypes(joined)}")
        for offsets in (columns.offsets, columns.span_offsets):
            if (offsets[1:] < offsets[:-1]).any():
                raise InputError(f"{part.name}: damaged offsets; prepare the store again")
        stop = row + part.num_rows
        joined.input_ids[token : token + part.num_tokens] = columns.input_ids
        joined.spans[span : span + part.num_spans] = columns.spans
        joined.offsets[row + 1 : stop + 1] = columns.offsets[1:] + token
        joined.span_offsets[row + 1 : stop + 1] = columns.span_offsets[1:] + span
        joined.source_row[row:stop] = columns.source_row
        for name, values in columns.extra.items():
            joined.extra[name][row:stop] = values
        row, token, span = stop, token + part.num_tokens, span + part.num_spans
    assert joined is not None, "nothing to join"
    return joined


def _dtypes(columns: ShardColumns) -> dict[str, np.dtype[Any]]:
    return {"input_ids": columns.input_ids.dtype, **{name: values.dtype for name, values in columns.extra.items()}}
