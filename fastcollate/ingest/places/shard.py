"""What one worker does for a store in object storage: a whole shard, from its units to the object and its note."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import msgspec

from fastcollate.errors import SourceReadError
from fastcollate.ingest.encode import Encoded, encode_unit
from fastcollate.ingest.journal import MergedShard, merged_shard
from fastcollate.ingest.places.lock import JOB, holds_lock
from fastcollate.ingest.spec import JobSpec, UnitResult
from fastcollate.sources import Unit
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


def store_shard(units: Sequence[Unit], spec: JobSpec, url: str, owner: Owner) -> Stored:
    """Encode a shard's units in a temporary folder, upload the shard, then the note that it is finished.

    It can be done again, also at the same time by another worker: the bytes are the same.

    Raises:
        SourceReadError: the source cannot be read any more, the storage failed, or the job has lost the store.
    """
    folder, number = remote.Objects(url), units[0].shard
    with tempfile.TemporaryDirectory(prefix="fastcollate-") as name:
        room = Path(name)
        encoded = [encode_unit(unit, spec, name, owner.token) for unit in units]
        results = [one.result for one in encoded]
        info, tag, lengths = None, "", b""
        if parts := [result.part for result in results if result.part is not None]:
            info = shards.merge_shards(room, parts, room, shards.shard_name(number), sync=False)
            lengths = shards.shard_lengths(room, info).astype("<u4").tobytes()
            tag = _uploaded(folder, room / info.name, owner)
    results = [replace(result, part=None, tokenize_seconds=0.0) for result in results]
    note = Note(merged_shard(number, results, info), results, tag, lengths)
    folder.write(note_name(number, owner.job), note.encoded())
    seconds = [one.result.tokenize_seconds for one in encoded]
    timed = [replace(result, tokenize_seconds=took) for result, took in zip(results, seconds, strict=True)]
    return Stored(replace(note, units=timed), [one.digests for one in encoded])


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
