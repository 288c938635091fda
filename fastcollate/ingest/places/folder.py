"""A store's folder on this machine: workers write parts into it, and the leader puts them together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcollate.ingest.encode import Encoded, encode_unit
from fastcollate.ingest.journal import Journal, begin_anew, holder, tidy
from fastcollate.ingest.lock import JobLock, is_ours
from fastcollate.sources import Unit
from fastcollate.store import manifest as manifests
from fastcollate.store import shards


class FolderPlace:
    """A folder; see `StoragePlace`, which has the same names."""

    work = staticmethod(encode_unit)
    few = 4  # units that one process has done sooner than workers are there: the first are small
    turns = 2  # units for each worker that are at work or wait for those before them

    def __init__(self, root: Path) -> None:
        self.root = self.stage = root
        self.target = os.path.abspath(root)

    def __enter__(self) -> FolderPlace:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def lock(self, *, wait: bool) -> JobLock:
        """The right to write the store."""
        return JobLock(self.root, wait=wait, holder=lambda: holder(self.root))

    def version(self) -> object:
        """What tells one manifest file from another."""
        with contextlib.suppress(OSError):
            stat = (self.root / manifests.MANIFEST).stat()
            return stat.st_ino, stat.st_mtime_ns, stat.st_size
        return None

    def holds(self, source: str) -> bool:
        """Whether a job would remove this file as an earlier job's."""
        places = Path(os.path.abspath(source)), Path(os.path.realpath(source))
        return any(is_ours(place.name) and place.parent.resolve() == self.root.resolve() for place in places)

    def tidy(self) -> None:
        """Remove what a job that was killed behind its last step has left beside its finished store."""
        tidy(self.root)

    def begin_anew(self, identity: Mapping[str, Any]) -> None:
        """Remove a store and what jobs have left, but for the same job that itself began anew."""
        begin_anew(self.root, identity)

    def journal(self, identity: Mapping[str, Any], *, anew: bool) -> Journal:
        """What is finished of the job."""
        return Journal(self.root, identity, anew=anew)

    def tasks(self, units: Iterator[Unit]) -> Iterator[Unit]:
        """What one worker does at once: a unit."""
        return units

    def packed(self, task: Unit) -> Unit:
        """A task for a worker of another machine, which has the same disk."""
        return task

    def bare(self, task: Unit) -> Unit:
        """What is kept of a task that is at work."""
        return task

    def taken(self, journal: Any, task: Any, done: Any) -> Iterator[tuple[Unit, Encoded]]:
        """Note what a worker has done."""
        journal.add_unit(done.result)
        yield task, done

    def lengths(self, info: shards.ShardInfo) -> npt.NDArray[np.integer[Any]]:
        """The lengths of a finished shard's rows."""
        return shards.shard_lengths(self.root, info)

    def publish(self, journal: Any, infos: Iterable[shards.ShardInfo]) -> None:
        """Nothing is left to do: what was staged is in its place."""
