"""Sources -> blocks cut between records without parsing them, and blocks -> units of work and shards.

Cutting is done once, in order, by the process that leads a job. It depends on the content alone: not on names, not on
how a file is compressed, not on workers. A block of a plain local file is only a place in it, which the worker reads
itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import IO

import fsspec
import pyarrow as pa

from fastcollate.errors import InputError, SourceReadError
from fastcollate.sources.compression import open_compressed
from fastcollate.sources.find import Source
from fastcollate.sources.json_blocks import EMPTY, Piece, json_pieces
from fastcollate.sources.remote import open_remote
from fastcollate.sources.tables import (
    arrow_pieces,
    columns_in_memory,
    csv_pieces,
    feed_content,
    open_columns,
    text_pieces,
)

_SMALL = 1 << 16  # bytes of a file that goes to a worker with its content
_MOST_BLOCKS = 4096  # in a unit of work: more small files would take the leader's time instead of the workers'


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of the largest block and unit of work, and of the sources that share a shard."""

    block: int = 4 << 20
    shard: int = 64 << 20

    def target(self, number: int) -> int:
        """Bytes of a source's block or a job's unit, by its number: small at first, so that all workers soon work."""
        return max(1, min(self.block, (self.block >> 4) << min(number // 4, 4)))


SIZES = Sizes()


@dataclass(frozen=True, slots=True)
class Block:
    """A run of records of one source.

    Attributes:
        index: number of the block in the job.
        source: index of its source; `name` is that one's, for messages.
        kind: `lines`, `array` (the inside of a JSON array), `rows` (lines made from a table: objects, or a text that
            says what was wrong with a row) or `arrow` (an Arrow IPC stream).
        first_row: position of its first record in all sources.
        num_rows: records in it, good or bad.
        first_line: line of its first byte in the source; 0 where there are no lines.
        num_bytes: its size, uncompressed.
        source_bytes: how far the source has been read at its end, as stored.
        fault: what is wrong with the source behind the block, such as an array that is not closed.
        data: its bytes, or `None` for those from `start` on of the file `path`.
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
        """Its bytes; a file that cannot be read, or has become shorter, is a `SourceReadError`."""
        if self.data is not None:
            return self.data
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.start)
                data = file.read(self.num_bytes)
        except OSError as error:
            raise SourceReadError(f"{self.name}: cannot be read ({error.strerror or error})") from error
        if len(data) != self.num_bytes:
            raise SourceReadError(f"{self.name}: became shorter while it was read; start again when it is at rest")
        return data

    def digest(self, data: bytes) -> bytes:
        """SHA-256 of what its records are, and where; `data` is what `read` gave."""
        digest = hashlib.sha256(f"{self.kind} {self.first_line} {self.num_rows} {self.fault}\n".encode())
        if self.kind == "arrow":
            with pa.ipc.open_stream(data) as reader:
                feed_content(reader.read_all(), digest.update)
        else:
            digest.update(data)
        return digest.digest()


@dataclass(frozen=True, slots=True)
class Unit:
    """Blocks in order that a worker does together, of one source or several; its rows go to shard number `shard`."""

    index: int
    shard: int
    blocks: tuple[Block, ...]

    @property
    def num_bytes(self) -> int:
        """Its size, uncompressed."""
        return sum(block.num_bytes for block in self.blocks)


def read_blocks(sources: Sequence[Source], *, sizes: Sizes | None = None) -> Iterator[Block]:
    """All blocks of all sources, in order; a source's blocks depend on its content alone.

    A source that cannot be read to its end is refused, and so is a record larger than `MAX_RECORD_BYTES`.
    """
    sizes, index, first_row = sizes or SIZES, 0, 0
    for number, source in enumerate(sources):
        for piece in _pieces(source, map(sizes.target, count())):
            yield Block(index, number, source.name, piece.kind, first_row, *piece[1:])
            index += 1
            first_row += piece.num_rows


def read_units(sources: Sequence[Source], *, sizes: Sizes | None = None) -> Iterator[Unit]:
    """All units of work, in order, as `read_blocks`; units and shards depend on the sources' content alone."""
    sizes, shard, shard_bytes = sizes or SIZES, 0, 0
    for index, blocks in enumerate(_groups(read_blocks(sources, sizes=sizes), sizes)):
        num_bytes = sum(block.num_bytes for block in blocks)
        if shard_bytes and shard_bytes + num_bytes > sizes.shard:
            shard, shard_bytes = shard + 1, 0
        shard_bytes += num_bytes
        yield Unit(index, shard, tuple(blocks))


def _groups(blocks: Iterator[Block], sizes: Sizes) -> Iterator[list[Block]]:
    """Neighbouring blocks, together no larger than a unit should be."""
    group: list[Block] = []
    index = num_bytes = 0
    for block in blocks:
        if group and (num_bytes + block.num_bytes > sizes.target(index) or len(group) == _MOST_BLOCKS):
            yield group
            group, index, num_bytes = [], index + 1, 0
        group.append(block)
        num_bytes += block.num_bytes
    if group:
        yield group


def _pieces(source: Source, targets: Iterator[int]) -> Iterator[Piece]:
    if source.is_empty:
        yield EMPTY
        return
    try:
        if source.format in ("dataset", "table"):
            yield from arrow_pieces(columns_in_memory(source), targets)
            return
        with _open(source) as file:
            if source.format in ("parquet", "arrow"):
                yield from arrow_pieces(open_columns(source, file), targets)
            else:
                cut = {"csv": csv_pieces, "tsv": csv_pieces, "text": text_pieces}.get(source.format, json_pieces)
                yield from cut(source, file, targets)
    except pa.ArrowException as error:
        raise InputError(f"{source.name}: cannot be read ({error})") from error
    except (OSError, EOFError) as error:
        raise SourceReadError(f"{source.name}: cannot be read to its end ({error})") from error


def _open(source: Source) -> contextlib.AbstractContextManager[IO[bytes]]:
    """A source's bytes, uncompressed on the way; a small file is read at once."""
    is_columnar = source.format in ("parquet", "arrow")  # which are read to and fro
    if source.url:
        return open_remote(source.name, source.url, source.compression, is_columnar=is_columnar)
    if source.compression is not None:
        files, path = fsspec.core.url_to_fs(source.name)
        file = open_compressed(files.open(path, "rb"), source.compression, source.name)
        return io.BytesIO(file.read()) if is_columnar else file
    if source.local is None or source.num_bytes > _SMALL:
        return open(source.local or source.name, "rb", buffering=0 if source.format in ("json", "lines") else -1)
    with open(source.local, "rb", buffering=0) as small:
        return io.BytesIO(small.read())
