"""What an unfinished job has finished so far, a line each: units of work, and shards that they were put into.

A line is its checksum and a JSON object; lines that a crash damaged are passed over, and what they told of is done
again. The journal is not synced: after a power cut, what is missing in it is only done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from fastcollate.errors import InputError
from fastcollate.ingest.lock import JobLock, discard, is_ours
from fastcollate.ingest.spec import Counts, LostRecord, UnitResult, differences
from fastcollate.store import ShardInfo, files
from fastcollate.store import manifest as manifests

_JOURNAL = ".journal"
_OLD_JOURNAL = ".journal.jsonl"  # of releases that wrote format 1


class MergedShard(NamedTuple):
    """A finished shard.

    Attributes:
        number: its number.
        first: the first unit whose rows it holds.
        last: the last one.
        sha256: over what those units are.
        info: the file, or `None` where it has no row.
    """

    number: int
    first: int
    last: int
    sha256: str
    info: ShardInfo | None


class Journal:
    """The journal of the job in a folder whose lock is held.

    Opening it removes what dead jobs have left behind, and nothing that is finished.

    Args:
        root: the store's folder.
        identity: what the job is, besides its sources.

    Attributes:
        token: names the parts that this job's workers write.

    Raises:
        InputError: an unfinished job of another identity lies here.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any]) -> None:
        if manifests.MANIFEST in os.listdir(root):  # as a network's cache might not have told a moment ago
            raise InputError(f"{root}: holds a finished store by now; run the same command again")
        self._root = root
        self._path = root / _JOURNAL
        self.token = secrets.token_hex(4)
        self._units: dict[int, UnitResult] = {}
        self._shards: dict[int, MergedShard] = {}
        header = self._load()
        if header is not None and (different := differences(header, identity)):
            raise InputError(
                f"{root}: holds an unfinished job that differs in {'; '.join(different)}; choose another directory, "
                "or begin anew with --overwrite (overwrite=True)"
            )
        if header is None:
            self._units, self._shards = {}, {}
            discard(self._path)
        self._remove_leftovers()
        self._file = open(self._path, "ab")  # noqa: SIM115 (closed by __exit__)
        if self._file.tell():
            self._file.write(b"\n")  # ends a line that a crash cut off
        else:
            self._write("job", dict(identity))
        host = socket.gethostname()
        self._write("run", {"token": self.token, "pid": os.getpid(), "host": host, "started": int(time.time())})

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def has_finished(self) -> bool:
        """Whether anything is finished that a call that stops at bad records would use."""
        return any(not unit.bad for unit in self._units.values())

    def unit(self, index: int) -> UnitResult | None:
        """What is noted of a unit, if its rows are still there."""
        return self._units.get(index)

    def shard(self, number: int) -> MergedShard | None:
        """What is noted of a finished shard, if its file is still there."""
        return self._shards.get(number)

    def add_unit(self, result: UnitResult) -> None:
        """Note a finished unit."""
        self._units[result.index] = result
        self._write("unit", {**asdict(result), "tokenize_seconds": 0.0, "bad": [list(record) for record in result.bad]})

    def add_shard(self, number: int, units: Sequence[UnitResult], info: ShardInfo | None) -> MergedShard:
        """Note a finished shard; the parts it was made of are no longer needed."""
        shard = MergedShard(number, units[0].index, units[-1].index, _digest(units), info)
        self._shards[number] = shard
        self._write("shard", {**shard._asdict(), "info": None if info is None else asdict(info)})
        for unit in units:
            if unit.part is not None:
                discard(self._root / unit.part.name)
        return shard

    def holds(self, number: int, first: int, last: int) -> bool:
        """Whether a finished shard holds just these units."""
        shard = self._shards.get(number)
        return shard is not None and (shard.first, shard.last) == (first, last)

    def forget(self, number: int) -> None:
        """Make a finished shard again: not all of its units are any more what they were."""
        del self._shards[number]

    def skipped(self, num_units: int) -> Iterator[LostRecord]:
        """The bad records of so many units, in order."""
        for index in range(num_units):
            yield from self._units[index].bad

    def finish(self) -> None:
        """Forget the job: its store is finished."""
        self._file.close()
        discard(self._path)

    def _write(self, kind: str, entry: Mapping[str, Any]) -> None:
        line = json.dumps({"line": kind, **entry}).encode()
        self._file.write(b"%08x %b\n" % (zlib.crc32(line), line))
        self._file.flush()

    def _load(self) -> dict[str, Any] | None:
        """The header; what is noted, as far as it is whole and its files are there."""
        if (self._root / _OLD_JOURNAL).exists():
            raise InputError(
                f"{self._root}: holds an unfinished job of an older release; finish it with that, choose another "
                "directory, or begin anew with --overwrite (overwrite=True)"
            )
        header = None
        units: dict[int, UnitResult] = {}
        for entry in read_lines(self._path):
            kind = entry.pop("line")
            if kind == "job":
                header = entry
            elif kind == "unit":
                unit = _unit(entry)
                units[unit.index] = unit
            elif kind == "shard":
                info = None if entry["info"] is None else ShardInfo(**entry["info"])
                shard = MergedShard(**{**entry, "info": info})
                self._shards[shard.number] = shard
        for shard in list(self._shards.values()):
            of_shard = [units[index] for index in range(shard.first, shard.last + 1) if index in units]
            if _digest(of_shard) != shard.sha256 or (shard.info is not None and not self._has_size(shard.info)):
                del self._shards[shard.number]
        merged = {i for shard in self._shards.values() for i in range(shard.first, shard.last + 1)}
        self._units = {i: unit for i, unit in units.items() if i in merged or self._is_whole(unit.part)}
        return header

    def _has_size(self, info: ShardInfo) -> bool:
        with contextlib.suppress(OSError):
            return (self._root / info.name).stat().st_size == info.num_bytes
        return False

    def _is_whole(self, part: ShardInfo | None) -> bool:
        """Whether a part is what was written; it was not synced."""
        if part is None:
            return True
        with contextlib.suppress(OSError):
            return self._has_size(part) and files.describe(self._root / part.name).sha256 == part.sha256
        return False

    def remove_all_but(self, shards: Iterable[ShardInfo]) -> None:
        """Remove what is not of these shards: they are the store."""
        self._remove_all_but({shard.name for shard in shards})

    def _remove_leftovers(self) -> None:
        """Remove what no line speaks of: it was being written when a job died."""
        noted = [*(unit.part for unit in self._units.values()), *(shard.info for shard in self._shards.values())]
        self._remove_all_but({info.name for info in noted if info is not None})

    def _remove_all_but(self, names: Set[str]) -> None:
        for path in self._root.iterdir():
            if is_ours(path.name) and path.name not in names and path.name != _JOURNAL:
                discard(path)


def _digest(units: Sequence[UnitResult]) -> str:
    return hashlib.sha256(" ".join(unit.sha256 for unit in units).encode()).hexdigest()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """A journal's whole lines."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for line in lines:
        with contextlib.suppress(ValueError):  # damaged
            if line and int(line[:8], 16) == zlib.crc32(line[9:]):
                yield json.loads(line[9:])


def holder(root: Path) -> str:
    """Who is at work in a folder, for a message; empty where that is not known."""
    with contextlib.suppress(OSError):
        runs = [entry for entry in read_lines(root / _JOURNAL) if entry["line"] == "run"]
        if runs:
            seconds = max(0, int(time.time()) - runs[-1]["started"])
            return f" (process {runs[-1]['pid']} on {runs[-1]['host']}, for {seconds} s)"
    return ""


def tidy(root: Path) -> None:
    """Remove what a job that was killed behind its last step has left beside its finished store."""
    if not (root / _JOURNAL).exists():
        return
    with contextlib.suppress(InputError, OSError), JobLock(root, wait=False, holder=str):
        if (root / manifests.MANIFEST).exists():
            for path in root.iterdir():
                if path.name.startswith((_JOURNAL, ".part-")) or (is_ours(path.name) and path.suffix == ".tmp"):
                    discard(path)


def begin_anew(root: Path) -> None:
    """Remove a store and whatever jobs have left in its folder, whose lock is held.

    Raises:
        InputError: a file of it is in use, and the system does not let it go.
    """
    names = sorted(path.name for path in root.iterdir() if is_ours(path.name))
    names.sort(key=lambda name: name != manifests.MANIFEST)  # without its manifest it is no store any more
    for name in names:
        try:
            (root / name).unlink(missing_ok=True)
        except PermissionError as error:
            raise InputError(f"{root / name}: cannot be removed, it is in use ({error.strerror or error})") from error


def _unit(entry: Mapping[str, Any]) -> UnitResult:
    part = None if entry["part"] is None else ShardInfo(**entry["part"])
    bad = [LostRecord(*values) for values in entry["bad"]]
    return UnitResult(**{**entry, "part": part, "bad": bad, "counts": Counts(**entry["counts"])})
