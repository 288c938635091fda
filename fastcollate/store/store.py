"""The token store: Arrow IPC shards and a manifest in one directory, written atomically and read by memory map.

A shard is one Arrow IPC file of one uncompressed record batch, which `pyarrow`, `datasets`, `polars` and `duckdb` open
unaided. `manifest.json` is the commit point: a directory without it is an unfinished job, never a store.
"""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fastcollate.errors import InputError
from fastcollate.store.manifest import FORMAT, FORMAT_VERSION, MANIFEST, canonical, pretty
from fastcollate.store.manifest import FileInfo as FileInfo
from fastcollate.store.manifest import ShardInfo as ShardInfo
from fastcollate.store.manifest import StoreIdentity as StoreIdentity
from fastcollate.store.manifest import read_manifest as read_manifest

LENGTHS = "lengths.npy"
_COLUMNS = ("input_ids", "spans", "source_row")
_HASH_CHUNK = 1 << 20


class ShardColumns(NamedTuple):
    """One shard's columns as flat arrays; those of an open store are read-only views of the mapped file.

    Attributes:
        input_ids: uint16 or uint32 `(num_tokens,)`, all rows' tokens end to end, no end-of-text stored.
        offsets: int64 `(num_rows + 1,)`, where each row starts in `input_ids`.
        spans: uint32 `(num_spans,)`, alternating counts of prompt and response tokens, prompt first.
        span_offsets: int64 `(num_rows + 1,)`, where each row starts in `spans`.
        source_row: uint64 `(num_rows,)`, the record's position in the sources.
    """

    input_ids: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]
    spans: npt.NDArray[np.uint32]
    span_offsets: npt.NDArray[np.int64]
    source_row: npt.NDArray[np.uint64]


class Example(NamedTuple):
    """One row of a store.

    Attributes:
        input_ids: uint16 or uint32 `(length,)`.
        spans: uint32, alternating counts of prompt and response tokens, prompt first; they sum to `length`, or to
            `length + 1` where a last prompt span also covers the end-of-text that the collate appends.
        source_row: the record's position in the sources.
    """

    input_ids: npt.NDArray[Any]
    spans: npt.NDArray[np.uint32]
    source_row: int


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The narrowest dtype of a store that holds every id below `vocab_size`."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def shard_name(index: int) -> str:
    """The file name of the shard with this number."""
    return f"shard-{index:05d}.arrow"


def write_shard(directory: Path, name: str, columns: ShardColumns) -> ShardInfo:
    """Write one shard: to a temporary name, synced, then renamed.

    Args:
        directory: an existing directory.
        name: the file's name in it; see `shard_name`.
        columns: the rows; the arrays are not changed.

    Raises:
        OSError: the disk is full or the directory cannot be written; no file of that name is left behind.
    """
    schema, batch = _record_batch(columns)

    def fill(file: _HashedFile) -> None:
        with pa.PythonFile(file, "w") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(batch)

    written = _write_atomically(directory / name, fill)
    lengths = np.diff(columns.offsets)
    return ShardInfo(
        **asdict(written),
        num_rows=len(lengths),
        num_tokens=len(columns.input_ids),
        num_spans=len(columns.spans),
        max_length=int(lengths.max(initial=0)),
    )


def write_manifest(
    directory: Path,
    identity: StoreIdentity,
    shards: Sequence[ShardInfo],
    *,
    files: Sequence[FileInfo] = (),
    summary: Mapping[str, Any] | None = None,
) -> None:
    """Commit a store: write `lengths.npy` from the shards, then the manifest.

    Args:
        directory: where the shards lie.
        identity: what the store was made from.
        shards: the finished shards in row order; those without rows are left out.
        files: other files to put under checksums, such as the report of skipped records.
        summary: counts to keep; nothing in it may depend on time, machine or the number of workers.

    Raises:
        InputError: there is no row.
    """
    shards = [shard for shard in shards if shard.num_rows]
    if not shards:
        raise InputError(f"{directory}: no row to store; the sources hold no usable record")
    lengths = _write_lengths(directory, shards)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint": identity.fingerprint,
        **asdict(identity),
        "num_rows": sum(shard.num_rows for shard in shards),
        "num_tokens": sum(shard.num_tokens for shard in shards),
        "max_length": max(shard.max_length for shard in shards),
        "summary": dict(summary or {}),
        "files": [asdict(file) for file in (lengths, *files)],
        "shards": [asdict(shard) for shard in shards],
    }
    manifest["checksum"] = hashlib.sha256(canonical(manifest)).hexdigest()
    _sync_directory(directory)  # every shard's new name is on disk before the manifest speaks of it
    _write_atomically(directory / MANIFEST, lambda file: file.write(pretty(manifest)))
    _sync_directory(directory)


def write_file(path: Path, lines: Iterable[str]) -> FileInfo:
    """Write a text file of the store atomically, a line each."""

    def fill(file: _HashedFile) -> None:
        for line in lines:
            file.write(line.encode() + b"\n")

    return _write_atomically(path, fill)


class TokenStore:
    """A finished store, memory-mapped: opening it reads no token, and processes that open it share its pages.

    Args:
        path: the store's directory.

    Raises:
        InputError: there is no finished store, it is of another format version, or a file's size or layout does not
            agree with the manifest. Flipped bytes are found by `verify_checksums`.

    Example:
        >>> from fastcollate import TokenStore
        >>> store = TokenStore("store")
        >>> len(store), store.tokenizer_name, store.vocab_size
        (600, 'gpt2', 50257)
        >>> row = store[3]
        >>> row.input_ids[:4], row.spans  # 36 tokens of prompt, 53 of response
        (array([21106,   318,   281, 12064], dtype=uint16), array([36, 53], dtype=uint32))
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        if manifest is None:
            raise InputError(
                f"{self.path}: no finished token store here (no {MANIFEST}); "
                f"make one with: fastcollate prepare SOURCE {self.path}"
            )
        self.manifest = manifest
        dtype = token_dtype(self.vocab_size)
        self.shards = tuple(_open_shard(self.path, ShardInfo(**entry), dtype) for entry in manifest["shards"])
        self.lengths = _open_lengths(self.path, manifest)
        self.shard_starts = np.zeros(len(self.shards) + 1, np.int64)
        np.cumsum([len(shard.source_row) for shard in self.shards], out=self.shard_starts[1:])

    shards: tuple[ShardColumns, ...]
    """Each shard's columns, zero-copy."""
    lengths: npt.NDArray[Any]
    """Each row's length in tokens, uint16 or uint32 `(num_rows,)`, memory-mapped, without the end-of-text."""
    shard_starts: npt.NDArray[np.int64]
    """The first row of each shard, then the number of rows; `(num_shards + 1,)`."""

    @property
    def fingerprint(self) -> str:
        """What the store was made from (sources, tokenizer, template, options), as one hash."""
        return str(self.manifest["fingerprint"])

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows, without the end-of-text of each."""
        return int(self.manifest["num_tokens"])

    @property
    def max_length(self) -> int:
        """The longest row's length in tokens."""
        return int(self.manifest["max_length"])

    @property
    def vocab_size(self) -> int:
        """The number of token ids; every id of the store is below it."""
        return int(self.manifest["tokenizer"]["vocab_size"])

    @property
    def tokenizer_name(self) -> str:
        """The encoding's name, such as `gpt2`."""
        return str(self.manifest["tokenizer"]["name"])

    @property
    def pad_token_id(self) -> int:
        """The end-of-text id, which the collate appends to each row and pads with."""
        return int(self.manifest["tokenizer"]["pad_token_id"])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        row = operator.index(index)
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {index} of a store with {len(self)} rows")
        row %= len(self)
        number = int(np.searchsorted(self.shard_starts, row, side="right")) - 1
        shard, row = self.shards[number], row - int(self.shard_starts[number])
        return Example(
            _cell(shard.input_ids, shard.offsets, row, self.path),
            _cell(shard.spans, shard.span_offsets, row, self.path),
            int(shard.source_row[row]),
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"TokenStore({str(self.path)!r}): {len(self):,} rows, {self.num_tokens:,} tokens"

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return TokenStore, (self.path,)  # a worker process opens its own map instead of receiving a copy


def verify_checksums(path: str | os.PathLike[str]) -> list[str]:
    """Read every file of a store and compare it with the manifest's checksums.

    Returns:
        One line per damaged or missing file, each naming the file; empty when the store is whole.

    Raises:
        InputError: there is no finished store, or the manifest itself is damaged.
    """
    root = Path(path)
    manifest = read_manifest(root)
    if manifest is None:
        raise InputError(f"{root}: no finished token store here (no {MANIFEST})")
    problems = []
    for entry in [*manifest["files"], *manifest["shards"]]:
        file = root / entry["name"]
        try:
            found = _describe(file)
        except OSError as error:
            problems.append(f"{file}: {error.strerror or error}")
            continue
        if found.num_bytes != entry["num_bytes"]:
            problems.append(f"{file}: {found.num_bytes} bytes, but {entry['num_bytes']} were written")
        elif found.sha256 != entry["sha256"]:
            problems.append(f"{file}: damaged, its SHA-256 is {found.sha256}, but {entry['sha256']} was written")
    return problems


def _cell(values: npt.NDArray[Any], offsets: npt.NDArray[np.int64], row: int, path: Path) -> npt.NDArray[Any]:
    start, stop = int(offsets[row]), int(offsets[row + 1])
    if not 0 <= start <= stop <= len(values):
        raise InputError(f"{path}: damaged offsets at row {row} of a shard; run: fastcollate verify --checksums {path}")
    return values[start:stop]


def _record_batch(columns: ShardColumns) -> tuple[pa.Schema, pa.RecordBatch]:
    schema = _schema(columns.input_ids.dtype)
    ids, offsets, spans, span_offsets, source_row = map(_arrow, columns)
    arrays = [
        pa.LargeListArray.from_arrays(offsets, ids, schema.field(0).type),
        pa.LargeListArray.from_arrays(span_offsets, spans, schema.field(1).type),
        source_row,
    ]
    return schema, pa.record_batch(arrays, schema=schema)


def _arrow(values: npt.NDArray[Any]) -> pa.Array:
    """Without copying, and without `pa.array`, which imports pandas: a second that no job needs to wait."""
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def _schema(dtype: npt.DTypeLike) -> pa.Schema:
    types = [
        pa.large_list(pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)),
        pa.large_list(pa.field("item", pa.uint32(), nullable=False)),
        pa.uint64(),
    ]
    return pa.schema([pa.field(name, type_, nullable=False) for name, type_ in zip(_COLUMNS, types, strict=True)])


def _open_shard(root: Path, info: ShardInfo, dtype: type[np.uint16] | type[np.uint32]) -> ShardColumns:
    """Map a shard and check its layout against the manifest, so that no view reaches past a buffer's end."""
    path = root / info.name
    try:
        if path.stat().st_size != info.num_bytes:
            raise InputError(
                f"{path}: {path.stat().st_size} bytes, but the manifest says {info.num_bytes}; prepare the store again"
            )
        with pa.memory_map(str(path)) as source:  # the views keep the map alive, the descriptor is closed
            reader = pa.ipc.open_file(source)
            if reader.num_record_batches != 1 or not reader.schema.equals(_schema(dtype)):
                raise InputError(f"{path}: not a shard of a token store; prepare the store again")
            batch = reader.get_batch(0)
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror or error}); prepare the store again") from error
    except pa.ArrowException as error:
        raise InputError(f"{path}: damaged ({error}); prepare the store again") from error
    ids, spans, source_row = batch.columns
    columns = ShardColumns(
        _view(ids.values.buffers()[1], dtype, info.num_tokens, path),
        _view(ids.buffers()[1], np.int64, info.num_rows + 1, path),
        _view(spans.values.buffers()[1], np.uint32, info.num_spans, path),
        _view(spans.buffers()[1], np.int64, info.num_rows + 1, path),
        _view(source_row.buffers()[1], np.uint64, info.num_rows, path),
    )
    for offsets, num_values in ((columns.offsets, info.num_tokens), (columns.span_offsets, info.num_spans)):
        if int(offsets[0]) != 0 or int(offsets[-1]) != num_values:
            raise InputError(f"{path}: damaged offsets; prepare the store again")
    return columns


def _view(buffer: pa.Buffer | None, dtype: Any, count: int, path: Path) -> npt.NDArray[Any]:
    if not count:
        return np.empty(0, dtype)
    size = 0 if buffer is None else buffer.size
    if buffer is None or size < count * np.dtype(dtype).itemsize:
        raise InputError(f"{path}: a column holds {size} bytes, too few for {count} values; prepare the store again")
    view: npt.NDArray[Any] = np.frombuffer(buffer, dtype, count)
    return view


def _write_lengths(directory: Path, shards: Sequence[ShardInfo]) -> FileInfo:
    num_rows = sum(shard.num_rows for shard in shards)
    dtype = np.dtype("<u2" if max(shard.max_length for shard in shards) < 1 << 16 else "<u4")
    header = {"descr": dtype.str, "fortran_order": False, "shape": (num_rows,)}

    def fill(file: _HashedFile) -> None:
        np.lib.format.write_array_header_1_0(file, header)
        for shard in shards:
            file.write(shard_lengths(directory, shard).astype(dtype).tobytes())

    return _write_atomically(directory / LENGTHS, fill)


def shard_lengths(directory: Path, shard: ShardInfo) -> npt.NDArray[np.int64]:
    """Each row's length in tokens in a finished shard, int64 `(num_rows,)`."""
    lengths: npt.NDArray[np.int64] = np.diff(_open_shard(directory, shard, _id_dtype(directory / shard.name)).offsets)
    return lengths


def _id_dtype(path: Path) -> type[np.uint16] | type[np.uint32]:
    with pa.memory_map(str(path)) as source:
        wide = pa.ipc.open_file(source).schema.field("input_ids").type.value_type == pa.uint32()
    return np.uint32 if wide else np.uint16


def _open_lengths(root: Path, manifest: Mapping[str, Any]) -> npt.NDArray[Any]:
    path = root / LENGTHS
    try:
        lengths: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be opened ({error}); prepare the store again") from error
    if lengths.shape != (manifest["num_rows"],) or lengths.dtype not in (np.uint16, np.uint32):
        raise InputError(f"{path}: {lengths.dtype} {lengths.shape} does not fit the manifest; prepare the store again")
    return lengths


class _HashedFile:
    """A file being written, and the hash of what has been written. Arrow may write to it and close it."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes | pa.Buffer) -> None:
        self.digest.update(data)
        self.num_bytes += memoryview(data).nbytes
        self._file.write(data)

    def flush(self) -> None:
        """Left to `_write_atomically`, and so is closing."""

    close = flush


def _write_atomically(path: Path, fill: Callable[[_HashedFile], object]) -> FileInfo:
    """Fill a temporary file beside `path`, sync it, rename it; a crash leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            hashed = _HashedFile(file)
            fill(hashed)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return FileInfo(path.name, hashed.num_bytes, hashed.digest.hexdigest())


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":
        return  # elsewhere a directory cannot be opened; the rename is as durable as the system makes it
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe(path: Path) -> FileInfo:
    with open(path, "rb") as file:
        digest = _digest(file)
        return FileInfo(path.name, file.tell(), digest)


def _digest(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_HASH_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
