"""What one worker does for a store in object storage: a whole shard, from its units to the object and its note."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import msgspec
import pyarrow as pa

from fastcollate.errors import SourceReadError
from fastcollate.ingest.encode import Encoded, encode_unit
from fastcollate.ingest.journal import MergedShard, merged_shard
from fastcollate.ingest.places.lock import JOB, holds_lock
from fastcollate.ingest.spec import JobSpec, UnitResult
from fastcollate.sources import Block, Unit
from fastcollate.store import remote, shards


@dataclass(frozen=True, slots=True)
class Note:
    """What an unfinished job notes of a finished shard, as an object of its own.

    Attributes:
        units: what is left of its units.
        tag: what the storage called the shard's content; empty where it has no row.
        lengths: its rows' lengths, uint32, little end first.
    """

    shard: MergedShard
    units: list[UnitResult]
    tag: str
    lengths: bytes

    def encoded(self) -> bytes:
        """As bytes, with a checksum."""
        content = msgspec.msgpack.encode(self)
        return hashlib.sha256(content).digest() + content

    @classmethod
    def of(cls, raw: bytes | None) -> Note | None:
        """What `encoded` gave, or `None` where it is not that."""
        try:
            content = (raw or b"")[32:]
            is_whole = hashlib.sha256(content).digest() == (raw or b"")[:32]
            return msgspec.msgpack.decode(content, type=cls) if is_whole else None
        except msgspec.MsgspecError:
            return None


class Owner(NamedTuple):
    """Whose work a worker does: the job's name, which its notes bear, and its lock."""

    job: str
    number: int
    token: str


class Stored(NamedTuple):
    """What a worker gives back."""

    note: Note
    digests: list[list[bytes]]


def note_name(number: int, job: str) -> str:
    """The name of the object that notes a finished shard."""
    return f"{JOB}{number:05}-{job}"


class Packed(NamedTuple):
    """A unit as it travels to a worker of another machine: its bytes before they were compressed, and after."""

    num_bytes: int
    data: bytes

    @classmethod
    def of(cls, unit: Unit) -> Packed:
        """A unit with the content of its blocks."""
        raw = pickle.dumps(with_blocks(unit, lambda block: replace(block, data=block.read(), path="")))
        return cls(len(raw), pa.compress(raw, codec="lz4", asbytes=True))

    def unit(self) -> Unit:
        """The unit."""
        unit = pickle.loads(pa.decompress(self.data, self.num_bytes, codec="lz4", asbytes=True))
        assert isinstance(unit, Unit)
        return unit


def with_blocks(unit: Unit, change: Callable[[Block], Block]) -> Unit:
    """A unit whose blocks are others."""
    return replace(unit, blocks=tuple(map(change, unit.blocks)))


def store_shard(units: Sequence[Packed], spec: JobSpec, url: str, owner: Owner) -> Stored:
    """Encode a shard's units in a temporary folder, upload the shard, then the note that it is finished.

    It can be done again, also at the same time by another worker: the bytes are the same.

    Raises:
        SourceReadError: the source cannot be read any more, the storage failed, or the job has lost the store.
    """
    return _Made(map(Packed.unit, units), spec, owner).sent(url)


class Stream:
    """Shards one after the other: each is encoded while the one before it is on its way.

    A call gives what became of the shard of the call before; `None` at the first. The last call has no units.
    """

    def __init__(self) -> None:
        self._uploads = ThreadPoolExecutor(1)
        self._before: Future[Stored] | None = None

    def __call__(self, units: Sequence[Unit] | None, spec: JobSpec, url: str, owner: Owner) -> Stored | None:
        """Encode a shard, begin to upload it, and give the one before; see `store_shard`."""
        made = None if units is None else _Made(iter(units), spec, owner)
        before, self._before = self._before, None if made is None else self._uploads.submit(made.sent, url)
        return None if before is None else before.result()

    def close(self) -> None:
        """Wait for what is on its way."""
        self._uploads.shutdown()


_stream_of_process = cache(Stream)


def stream_shard(units: Sequence[Unit] | None, spec: JobSpec, url: str, owner: Owner) -> Stored | None:
    """A call of this process's own stream."""
    return _stream_of_process()(units, spec, url, owner)


class _Made:
    """A shard in a temporary folder of this machine."""

    def __init__(self, units: Iterator[Unit], spec: JobSpec, owner: Owner) -> None:
        self._owner, self._info, lengths = owner, None, b""
        with contextlib.ExitStack() as stack:
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastcollate-"))
            self._room = Path(name)
            encoded = []
            for unit in units:
                encoded.append(encode_unit(unit, spec, name, owner.token))
                self._number = unit.shard
            results = [one.result for one in encoded]
            if parts := [result.part for result in results if result.part is not None]:
                self._info = shards.merge_shards(
                    self._room, parts, self._room, shards.shard_name(self._number), sync=False
                )
                lengths = shards.shard_lengths(self._room, self._info).astype("<u4").tobytes()
            self._stack = stack.pop_all()
        self._seconds = [result.tokenize_seconds for result in results]
        self._digests = [one.digests for one in encoded]
        results = [replace(result, part=None, tokenize_seconds=0.0) for result in results]
        self._note = Note(merged_shard(self._number, results, self._info), results, "", lengths)

    def sent(self, url: str) -> Stored:
        """Upload it, and then its note."""
        with self._stack:
            folder = remote.Objects(url)
            tag = "" if self._info is None else _uploaded(folder, self._room / self._info.name, self._owner)
            note = replace(self._note, tag=tag)
            folder.write(note_name(self._number, self._owner.job), note.encoded())
        timed = zip(note.units, self._seconds, strict=True)
        return Stored(
            replace(note, units=[replace(unit, tokenize_seconds=took) for unit, took in timed]), self._digests
        )


def _uploaded(folder: remote.Objects, path: Path, owner: Owner) -> str:
    """Upload a shard, and give its tag. Another content of that name is replaced only by who holds the store."""
    if not folder.upload(path, create=True):
        if not holds_lock(folder, owner.number, owner.token):
            raise SourceReadError(f"{folder}: another job has taken this store over; run the same command again")
        folder.upload(path)
    found = folder.find(path.name)
    return "" if found is None else found.tag


def pairs(units: Sequence[Unit], stored: Stored) -> list[tuple[Unit, Encoded]]:
    """A shard's units, each with what became of it."""
    done = map(Encoded, stored.note.units, stored.digests)
    return list(zip(units, done, strict=True))
