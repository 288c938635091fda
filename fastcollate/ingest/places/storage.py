"""A store below a URL of object storage: workers upload whole shards, the leader the small files, the manifest last.

Of an unfinished job all lies in the storage: `.job/job.json` tells what it is, a note for each finished shard what is
in that. A job goes on from there, on whatever machine; with its manifest written, these are removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcollate.errors import InputError, SourceReadError
from fastcollate.ingest.encode import Encoded
from fastcollate.ingest.journal import MergedShard, skipped_of
from fastcollate.ingest.lock import is_ours
from fastcollate.ingest.places.lock import JOB, LOCKS, StorageLock
from fastcollate.ingest.places.shard import (
    Note,
    Owner,
    Packed,
    Stream,
    note_name,
    pairs,
    store_shard,
    stream_shard,
    with_blocks,
)
from fastcollate.ingest.spec import LostRecord, UnitResult, differences
from fastcollate.sources import Unit
from fastcollate.store import manifest as manifests
from fastcollate.store import remote, shards

_HEADER = f"{JOB}job.json"
_OTHERWISE = "choose another place, or begin anew with --overwrite (overwrite=True)"


class StoragePlace:
    """Where a store below a URL goes.

    Attributes:
        root: where the store is read from and what messages call it.
        stage: a folder of this machine for the leader's own files, until they are published.
        target: what a worker is told of the place.
        work: what a worker does; `stream`, what makes one that does so one task behind; `ahead`, such a call of a
            process's own.
    """

    work = staticmethod(store_shard)
    stream, ahead = Stream, staticmethod(stream_shard)
    few = 2
    turns = 1  # see `FolderPlace`

    def __init__(self, root: remote.Objects) -> None:
        self.root, self.target = root, root.url
        self._room = tempfile.TemporaryDirectory(prefix="fastcollate-")
        self.stage = Path(self._room.name)
        self._lock: StorageLock | None = None

    def __enter__(self) -> StoragePlace:
        return self

    def __exit__(self, *_: object) -> None:
        self._room.cleanup()

    def lock(self, *, wait: bool) -> StorageLock:
        """The right to write the store."""
        self._lock = StorageLock(self.root, wait=wait)
        return self._lock

    def version(self) -> object:
        """What tells one manifest from another."""
        return self.root.find(manifests.MANIFEST)

    def holds(self, source: str) -> bool:
        """Whether a job would remove this object as an earlier job's."""
        folder, _, name = source.rpartition("/")
        return folder == self.root.name and is_ours(name)

    def tidy(self) -> None:
        """Remove what a job that was killed behind its last step has left beside its finished store."""
        if self.root.found(JOB) or self.root.found(LOCKS):
            with contextlib.suppress(InputError), StorageLock(self.root, wait=False):
                if self.version() is not None:
                    _remove_job(self.root)

    def begin_anew(self, identity: Mapping[str, Any]) -> None:
        """Remove a store and what jobs have left, but for the same job that itself began anew."""
        header = _header(self.root)
        has_manifest = self.version() is not None
        if header is not None and header.pop("anew", False) and not has_manifest and not differences(header, identity):
            return
        self.root.remove([manifests.MANIFEST] * has_manifest)  # without it, it is no store any more
        _remove_job(self.root)
        self.root.remove(filter(is_ours, self.root.found()))

    def journal(self, identity: Mapping[str, Any], *, anew: bool) -> StorageJournal:
        """What is finished of the job."""
        assert self._lock is not None
        return StorageJournal(self.root, self._lock, self.stage, identity, anew=anew)

    def tasks(self, units: Iterator[Unit]) -> Iterator[list[Unit]]:
        """What one worker does at once: a shard."""
        return (list(of_shard) for _, of_shard in itertools.groupby(units, key=lambda unit: unit.shard))

    def packed(self, task: list[Unit]) -> list[Packed]:
        """A task for a worker that cannot read this machine's files."""
        return [*map(Packed.of, task)]

    def bare(self, task: list[Unit]) -> list[Unit]:
        """What is kept of a task that is at work: not its content."""
        return [with_blocks(unit, lambda block: replace(block, data=b"")) for unit in task]

    def taken(self, journal: Any, task: Any, done: Any) -> Iterator[tuple[Unit, Encoded]]:
        """Note what a worker has done."""
        journal.take(done.note)
        return iter(pairs(task, done))

    def lengths(self, info: shards.ShardInfo) -> npt.NDArray[np.integer[Any]]:
        """The lengths of a finished shard's rows."""
        return np.fromfile(self.stage / f".lengths-{info.name}", "<u4")

    def publish(self, journal: Any, infos: Iterable[shards.ShardInfo]) -> None:
        """Upload what was staged; the manifest last, if all is still as it was noted and the store is this job's."""
        assert self._lock is not None
        names = {path.name for path in self.stage.iterdir() if not path.name.startswith(".")} - {manifests.MANIFEST}
        with ThreadPoolExecutor(remote.AT_ONCE) as pool:
            list(pool.map(lambda name: self.root.upload(self.stage / name), names))
        journal.check(infos)
        self._lock.check()
        if not self.root.upload(self.stage / manifests.MANIFEST, create=True):
            raise InputError(f"{self.root}: holds a finished store by now; run the same command again")


class StorageJournal(contextlib.AbstractContextManager["StorageJournal"]):
    """The notes of the job whose lock is held; see `journal.Journal`, which has the same names."""

    def __init__(
        self, root: remote.Objects, lock: StorageLock, stage: Path, identity: Mapping[str, Any], *, anew: bool
    ) -> None:
        self._root, self._lock, self._stage = root, lock, stage
        self.token = Owner(hashlib.sha256(manifests.canonical(identity)).hexdigest()[:16], lock.number, lock.token)
        self.units: dict[int, UnitResult] = {}
        self.shards: dict[int, MergedShard] = {}
        self._tags: dict[str, str] = {}
        self._notes: dict[str, str] = {}
        header, there = _header(root), root.found()
        if manifests.MANIFEST in there:
            raise InputError(f"{root}: holds a finished store by now; run the same command again")
        if header is None:
            root.write(_HEADER, manifests.canonical({**identity, "anew": anew}))
        else:
            header.pop("anew", None)
            if different := differences(header, identity):
                raise InputError(
                    f"{root}: holds an unfinished job that differs in {'; '.join(different)}; {_OTHERWISE}"
                )
            self._load(there)
        root.abort_uploads()  # which died
        noted = {shard.info.name for shard in self.shards.values() if shard.info is not None}
        root.remove(name for name in there if is_ours(name) and name not in noted)

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def _load(self, there: Mapping[str, remote.Found]) -> None:
        mine = [name for name in self._root.found(JOB) if name.endswith(f"-{self.token.job}")]
        with ThreadPoolExecutor(remote.AT_ONCE) as pool:
            for note in map(Note.of, pool.map(self._root.get, mine)):
                info = None if note is None else note.shard.info
                if note is not None and (
                    info is None or there.get(info.name) == remote.Found(info.num_bytes, note.tag)
                ):
                    self.take(note)

    def take(self, note: Note) -> None:
        """Note a finished shard."""
        self.shards[note.shard.number] = note.shard
        self.units |= {unit.index: unit for unit in note.units}
        if note.shard.info is not None:
            self._tags[note.shard.info.name] = note.tag
            self._notes[note.shard.info.name] = note_name(note.shard.number, self.token.job)
            (self._stage / f".lengths-{note.shard.info.name}").write_bytes(note.lengths)

    def has_part(self, index: int) -> bool:
        """No unit is by itself in the storage."""
        return False

    @property
    def has_finished(self) -> bool:
        """Whether anything is finished that a call that stops at bad records would use."""
        return any(not unit.bad for unit in self.units.values())

    def add_shard(self, number: int, units: object, info: object) -> MergedShard:
        """Never needed: a shard comes with its note."""
        raise AssertionError(f"shard {number} has no note")

    def skipped(self, num_units: int) -> Iterator[LostRecord]:
        """The bad records of so many units, in order."""
        return skipped_of(self.units, num_units)

    def remove_all_but(self, infos: Iterable[shards.ShardInfo]) -> None:
        """Remove what is not of these shards: they are the store."""
        self._lock.check()
        kept = {info.name for info in infos}
        self._root.remove(name for name in self._root.found() if is_ours(name) and name not in kept)

    def check(self, infos: Iterable[shards.ShardInfo]) -> None:
        """See that the storage holds each shard as it was noted."""
        there = self._root.found()
        for info in infos:
            if there.get(info.name) != remote.Found(info.num_bytes, self._tags[info.name]):
                self._root.remove([self._notes[info.name]])
                raise SourceReadError(f"{self._root / info.name}: was changed meanwhile; run the same command again")

    def finish(self) -> None:
        """Forget the job: its store is finished."""
        _remove_job(self._root)
        self._root.abort_uploads()


def _header(root: remote.Objects) -> dict[str, Any] | None:
    """What an unfinished job is, or `None` where there is none; a damaged header is of another job."""
    raw = root.get(_HEADER)
    if raw is None:
        return None
    try:
        header = json.loads(raw)
    except ValueError:
        header = {}
    return header if isinstance(header, dict) else {}


def _remove_job(root: remote.Objects) -> None:
    """Remove a job's notes, what it is last."""
    names = {*root.found(JOB)}
    root.remove(names - {_HEADER})
    root.remove(names & {_HEADER})
