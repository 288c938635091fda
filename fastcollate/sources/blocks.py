"""Sources -> blocks of about 8 MB, cut between records without parsing them.

Cutting is done once, in order, by the process that leads a job. A block of a plain local file is only a place in it,
which the worker reads itself.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import fsspec
import msgspec
import pyarrow as pa

from fastcollate.errors import InputError, import_extra
from fastcollate.sources.json_blocks import MAX_RECORD_BYTES, json_pieces

BLOCK_BYTES = 8 << 20
_FORMATS = {
    ".json": "json", ".jsonl": "lines", ".ndjson": "lines", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow",
}  # fmt: skip
_COMPRESSIONS = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_SAVED = ("state.json", "dataset_dict.json")  # what tells a directory that a data set was saved to


class SourceReadError(InputError):
    """The storage failed, not the data: what a job has finished is worth keeping."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file or data set to read.

    Attributes:
        name: as the user named it, or the file that a pattern found.
        format: `json`, `lines`, `csv`, `parquet`, `arrow` or `dataset`.
        compression: `gzip`, `zstd` or `None`.
        num_bytes: its size as stored; 0 where unknown.
        time: when it was last changed, as the file system tells it; empty where it does not.
        local: its path, where it is a plain local file.
        dataset: a `datasets.Dataset`.
    """

    name: str
    format: str
    compression: str | None = None
    num_bytes: int = 0
    time: str = ""
    local: str | None = None
    dataset: Any = field(default=None, compare=False)

    def identity(self) -> dict[str, Any]:
        """Name, size and time, for comparing with what a store was made from."""
        return {"name": self.name, "num_bytes": self.num_bytes, "time": self.time}


@dataclass(frozen=True, slots=True)
class Block:
    """A run of records of one source.

    Attributes:
        index: number of the block in the job.
        source: index of its source.
        name: the source's name, for messages.
        kind: `lines`, `array` (the inside of a JSON array), `rows` (lines made from a table: objects, or a text that
            says what was wrong with a row) or `arrow` (an Arrow IPC stream).
        first_row: position of its first record in all sources.
        num_rows: records in it, good or bad.
        first_line: line of its first byte in the source; 0 where there are no lines.
        num_bytes: its size, uncompressed.
        source_bytes: how far the source has been read at its end, as stored.
        fault: what is wrong with the source behind the block, such as an array that is not closed.
        data: its bytes, or `None` for a place in a file.
        path: the file, where `data` is `None`.
        start: where it begins in the file.
    """

    index: int
    source: int
    name: str
    kind: str
    first_row: int
    num_rows: int
    first_line: int
    num_bytes: int
    source_bytes: int
    fault: str = ""
    data: bytes | None = None
    path: str = ""
    start: int = 0

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            SourceReadError: the file cannot be read, or has become shorter.
        """
        if self.data is not None:
            return self.data
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                data = file.read(self.num_bytes)
        except OSError as error:
            raise SourceReadError(f"{self.name}: cannot be read ({error.strerror or error})") from error
        if len(data) != self.num_bytes:
            raise SourceReadError(f"{self.name}: became shorter while it was read; start again when it is at rest")
        return data


def find_sources(sources: Any) -> list[Source]:
    """The files and data sets that the user's words mean, patterns in alphabetical order.

    Args:
        sources: a path, a URL that fsspec knows, a pattern, a `datasets.Dataset`, or a sequence of these.

    Raises:
        InputError: nothing there, a directory, an empty file, or a format that is not known.
    """
    if isinstance(sources, str | os.PathLike) or hasattr(sources, "column_names"):
        sources = [sources]
    found: list[Source] = []
    for source in sources:
        if hasattr(source, "column_names"):
            fingerprint = str(getattr(source, "_fingerprint", ""))
            found.append(Source("datasets.Dataset", "dataset", None, 0, fingerprint, dataset=source))
        else:
            found += _find_files(os.fspath(source))
    if not found:
        raise InputError("no source given; name at least one file of records")
    return found


def read_blocks(sources: Sequence[Source], *, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """All blocks of all sources, in order; blocks depend on the sources and `block_bytes` alone.

    Raises:
        InputError: a source cannot be read to its end, or a record is larger than `MAX_RECORD_BYTES`.
    """
    index = first_row = 0
    for number, source in enumerate(sources):
        for piece in _pieces(source, block_bytes):
            yield Block(index, number, source.name, first_row=first_row, **piece)
            index += 1
            first_row += piece["num_rows"]


def _find_files(name: str) -> list[Source]:
    if os.path.isdir(name) and any((Path(name) / file).is_file() for file in _SAVED):
        return [_saved_dataset(Path(name))]
    try:
        files, paths = fsspec.core.url_to_fs(name)
        if not any(mark in paths for mark in "*?[") or files.exists(paths):
            return [_describe(files, paths, name)]
        names = sorted(files.glob(paths))
        if not names:
            raise InputError(f"{name}: no file matches this pattern")
        return [_describe(files, path, str(files.unstrip_protocol(path))) for path in names]
    except ImportError as error:
        raise InputError(f"{name}: this kind of URL needs another package ({error})") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}: not a path or URL that can be read ({error})") from error


def _saved_dataset(path: Path) -> Source:
    """What `datasets.Dataset.save_to_disk` wrote."""
    datasets = import_extra("datasets", "hf")
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # the package raises whatever a damaged file makes it stumble over
        raise InputError(f"{path}: cannot be read as a saved data set ({type(error).__name__}: {error})") from error
    if not hasattr(dataset, "column_names") or isinstance(dataset, dict):
        raise InputError(f"{path}: holds several splits; name one, such as {path / sorted(dataset)[0]}")
    num_bytes = sum(file.stat().st_size for file in path.glob("*.arrow"))
    return Source(str(path), "dataset", None, num_bytes, str(dataset._fingerprint), dataset=dataset)


def _describe(files: Any, path: str, name: str) -> Source:
    is_local = "file" in (files.protocol if isinstance(files.protocol, tuple) else (files.protocol,))
    if is_local:
        name = name.removeprefix("file://")
    try:
        info = files.info(path)
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror or error})") from error
    if info["type"] == "directory":
        raise InputError(f"{name}: is a directory; name files in it, such as {name.rstrip('/')}/*.jsonl")
    if info.get("size") == 0:
        raise InputError(f"{name}: is empty")
    suffix = Path(path).suffix.lower()
    compression = _COMPRESSIONS.get(suffix)
    if compression == "zstd":
        import_extra("zstandard", "zstd")
    suffix = Path(Path(path).stem).suffix.lower() if compression else suffix
    kind = _FORMATS.get(suffix)
    if kind is None:
        raise InputError(
            f"{name}: the ending {suffix or '(none)'} is not known; use one of {', '.join(_FORMATS)}, "
            "each also with .gz or .zst"
        )
    time = info.get("mtime", info.get("LastModified", info.get("ETag", "")))
    local = os.path.abspath(path) if is_local and compression is None else None
    return Source(name, kind, compression, int(info.get("size") or 0), str(time), local)


def _pieces(source: Source, block_bytes: int) -> Iterator[dict[str, Any]]:
    """A source's blocks, as the keywords of `Block` that the source decides."""
    if source.format == "dataset":
        yield from _arrow_pieces(source.dataset.with_format("arrow").iter(batch_size=4096), block_bytes)
        return
    try:
        files, path = fsspec.core.url_to_fs(source.name)
        with files.open(path, "rb", compression=source.compression) as file:
            if source.format in ("parquet", "arrow"):
                yield from _arrow_pieces(_open_columns(source, file), block_bytes)
            elif source.format == "csv":
                yield from _csv_pieces(source, file, block_bytes)
            else:
                yield from json_pieces(
                    file,
                    block_bytes,
                    name=source.name,
                    only_lines=source.format == "lines",
                    local=source.local,
                    is_compressed=source.compression is not None,
                )
    except pa.ArrowException as error:
        raise InputError(f"{source.name}: cannot be read ({error})") from error
    except (OSError, EOFError) as error:
        raise SourceReadError(f"{source.name}: cannot be read to its end ({error})") from error
    except Exception as error:
        if type(error).__name__ in ("error", "ZstdError"):  # zlib and zstandard name theirs so
            raise SourceReadError(f"{source.name}: damaged compression ({error})") from error
        raise


def _csv_pieces(source: Source, file: IO[bytes], block_bytes: int) -> Iterator[dict[str, Any]]:
    """Rows as JSON objects by the header's names; cells stay text."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter="\t" if ".tsv" in source.name else ",", strict=True)
    rows: list[bytes] = []
    size = 0
    try:
        header = next(reader, None)
        if not header:
            raise InputError(f"{source.name}, line 1: no header; the first row names the columns")
    except csv.Error as error:
        raise InputError(f"{source.name}, line 1: not valid CSV ({error})") from error
    while (row := _next_csv_row(reader, header)) is not None:
        rows.append(row)
        size += len(row)
        if size >= block_bytes:
            yield _csv_block(rows)
            rows, size = [], 0
    if rows:
        yield _csv_block(rows)


def _next_csv_row(reader: Any, header: Sequence[str]) -> bytes | None:
    """The next row that is not blank as a JSON object, `None` at the end; for a bad one, the reason as a JSON text."""
    try:
        cells = next(reader)
        while not cells:
            cells = next(reader)
    except StopIteration:
        return None
    except csv.Error as error:
        return msgspec.json.encode(f"line {reader.line_num}: not valid CSV ({error})")
    if len(cells) > len(header):
        reason = f"line {reader.line_num}: {len(cells)} cells, but the header names {len(header)} columns"
        return msgspec.json.encode(reason)
    try:
        return msgspec.json.encode(dict(zip(header, cells, strict=False)))
    except UnicodeEncodeError:  # a lone surrogate stands for a byte that is not UTF-8
        return msgspec.json.encode(f"line {reader.line_num}: a byte that is not UTF-8")


def _csv_block(rows: list[bytes]) -> dict[str, Any]:
    data = b"\n".join(rows)
    return {"kind": "rows", "num_rows": len(rows), "first_line": 0, "num_bytes": len(data), "source_bytes": 0,
            "data": data}  # fmt: skip


def _open_columns(source: Source, file: IO[bytes]) -> Iterator[pa.RecordBatch]:
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


def _arrow_pieces(batches: Iterator[Any], block_bytes: int) -> Iterator[dict[str, Any]]:
    pending: list[pa.Table] = []
    size = 0
    for batch in batches:
        table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
        step = max(1, table.num_rows * block_bytes // max(table.nbytes, 1))
        for start in range(0, table.num_rows, step):
            part = table.slice(start, step)
            pending.append(part)
            size += part.nbytes
            if size >= block_bytes:
                yield _arrow_block(pending)
                pending, size = [], 0
    if pending:
        yield _arrow_block(pending)


def _arrow_block(tables: list[pa.Table]) -> dict[str, Any]:
    table = pa.concat_tables(tables).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    return {"kind": "arrow", "num_rows": table.num_rows, "first_line": 0, "num_bytes": len(data), "source_bytes": 0,
            "data": data}  # fmt: skip
