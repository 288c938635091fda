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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from fastcollate.errors import InputError
from fastcollate.ingest.lock import JobLock, discard, is_ours
from fastcollate.ingest.spec import LostRecord, UnitResult, differences
from fastcollate.sources import Source
from fastcollate.store import files, shards
from fastcollate.store import manifest as manifests

_JOURNAL = ".journal"
_OLD_JOURNAL = ".journal.jsonl"  # of releases that wrote format 1


@dataclass(frozen=True, slots=True)
class MergedShard:
    """A finished shard: its number, first and last unit, a hash over what those are, its file (where it has rows)."""

    number: int
    first: int
    last: int
    sha256: str
    info: shards.ShardInfo | None


def merged_shard(number: int, units: Sequence[UnitResult], info: shards.ShardInfo | None) -> MergedShard:
    """What is noted of a shard of these units."""
    return MergedShard(number, units[0].index, units[-1].index, _digest(units), info)


def skipped_of(units: Mapping[int, UnitResult], num_units: int) -> Iterator[LostRecord]:
    """The bad records of the first units, in order."""
    return (bad for index in range(num_units) for bad in units[index].bad)


class Journal(contextlib.AbstractContextManager["Journal"]):
    """The journal of the job in a store's folder whose lock is held, which is of this identity, besides its sources.

    Opening it removes what dead jobs have left behind, and nothing that is finished; an unfinished job of another
    identity is refused. `anew` says for `begin_anew` that the job began with nothing of an earlier store or job.

    Attributes:
        token: names the parts that this job's workers write.
        units: what is noted of units whose rows are still there, by number.
        shards: what is noted of finished shards whose files are still there, by number.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any], *, anew: bool = False) -> None:
        if manifests.MANIFEST in os.listdir(root):  # as a network's cache might not have told a moment ago
            raise InputError(f"{root}: holds a finished store by now; run the same command again")
        self._root = root
        self._path = root / _JOURNAL
        self.token = secrets.token_hex(4)
        self.units: dict[int, UnitResult] = {}
        self.shards: dict[int, MergedShard] = {}
        header = self._load()
        if header is not None and (different := differences(header, identity)):
            raise InputError(
                f"{root}: holds an unfinished job that differs in {'; '.join(different)}; choose another directory, "
                "or begin anew with --overwrite (overwrite=True)"
            )
        if header is None:
            discard(self._path)
        noted = [*(unit.part for unit in self.units.values()), *(shard.info for shard in self.shards.values())]
        _remove_all_but(root, (info for info in noted if info is not None))  # others were being written at a death
        self._file = open(self._path, "ab")  # noqa: SIM115 (closed by __exit__)
        if self._file.tell():
            self._file.write(b"\n")  # ends a line that a crash cut off
        else:
            self._write("job", {**identity, "anew": anew})
        host = socket.gethostname()
        self._write("run", {"token": self.token, "pid": os.getpid(), "host": host, "started": int(time.time())})

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def has_part(self, index: int) -> bool:
        """Whether a finished unit's rows are still by themselves, not in a shard that is to be made again."""
        part = self.units[index].part
        return part is None or self._has_size(part)

    @property
    def has_finished(self) -> bool:
        """Whether anything is finished that a call that stops at bad records would use."""
        return any(not unit.bad for unit in self.units.values())

    def add_unit(self, result: UnitResult) -> None:
        """Note a finished unit."""
        self.units[result.index] = result
        self._write("unit", replace(result, tokenize_seconds=0.0))

    def add_shard(self, number: int, units: Sequence[UnitResult], info: shards.ShardInfo | None) -> MergedShard:
        """Note a finished shard; the parts it was made of are no longer needed."""
        shard = merged_shard(number, units, info)
        self.shards[number] = shard
        self._write("shard", shard)
        for unit in units:
            if unit.part is not None:
                discard(self._root / unit.part.name)
        return shard

    def skipped(self, num_units: int) -> Iterator[LostRecord]:
        """The bad records of so many units, in order."""
        return skipped_of(self.units, num_units)

    def finish(self) -> None:
        """Forget the job: its store is finished."""
        self._file.close()
        discard(self._path)

    def _write(self, kind: str, entry: object) -> None:
        line = json.dumps({"line": kind, **msgspec.to_builtins(entry)}).encode()
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
        shards: dict[int, MergedShard] = {}
        for entry in read_lines(self._path):
            kind = entry.pop("line")
            if kind == "job":
                header = entry
            elif kind == "unit":
                units[entry["index"]] = msgspec.convert(entry, UnitResult)
            elif kind == "shard":
                shards[entry["number"]] = msgspec.convert(entry, MergedShard)
        if header is None:
            return None
        for number, shard in shards.items():
            of_shard = [units[index] for index in range(shard.first, shard.last + 1) if index in units]
            if _digest(of_shard) == shard.sha256 and (shard.info is None or self._has_size(shard.info)):
                self.shards[number] = shard
        merged = {i for shard in self.shards.values() for i in range(shard.first, shard.last + 1)}
        self.units = {i: unit for i, unit in units.items() if i in merged or self._is_whole(unit.part)}
        return header

    def _has_size(self, info: shards.ShardInfo) -> bool:
        with contextlib.suppress(OSError):
            return (self._root / info.name).stat().st_size == info.num_bytes
        return False

    def _is_whole(self, part: shards.ShardInfo | None) -> bool:
        """Whether a part is what was written; it was not synced."""
        with contextlib.suppress(OSError):
            return part is None or files.describe(self._root / part.name).sha256 == part.sha256
        return False

    def remove_all_but(self, shards: Iterable[shards.ShardInfo]) -> None:
        """Remove what is not of these shards: they are the store."""
        _remove_all_but(self._root, shards)


def _remove_all_but(root: Path, kept: Iterable[shards.ShardInfo]) -> None:
    names = {_JOURNAL, *(info.name for info in kept)}
    for path in root.iterdir():
        if is_ours(path.name) and path.name not in names:
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
        with contextlib.suppress(ValueError, RecursionError):  # damaged
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


def begin_anew(root: Path, identity: Mapping[str, Any]) -> None:
    """Remove a store and whatever jobs have left in its folder, whose lock is held.

    An unfinished job of the same identity that itself began anew stays: it is gone on with.
    """
    names = sorted(path.name for path in root.iterdir() if is_ours(path.name))
    names.sort(key=lambda name: name != manifests.MANIFEST)  # without its manifest it is no store any more
    header = next((entry for entry in read_lines(root / _JOURNAL) if entry["line"] == "job"), {})
    if header.get("anew") and manifests.MANIFEST not in names and not differences(header, identity):
        return
    for name in names:
        try:
            (root / name).unlink(missing_ok=True)
        except PermissionError as error:
            raise InputError(f"{root / name}: cannot be removed, it is in use ({error.strerror or error})") from error


def place_of(sources: Sequence[Source], bad: LostRecord) -> str:
    """Where a record stands, in words."""
    name = sources[bad.source].name
    return f"{name}, line {bad.line}, record {bad.row}" if bad.line else f"{name}, record {bad.row}"


def report_lines(records: Iterable[LostRecord], sources: Sequence[Source]) -> Iterator[str]:
    """The report of skipped records: file, line, record, reason, separated by tabs."""
    yield "file\tline\trecord\treason"
    for bad in records:
        reason = bad.reason.replace("\t", " ").replace("\n", " ")
        line = f"{sources[bad.source].name}\t{bad.line or '-'}\t{bad.row}\t{reason}"
        yield line.encode("utf-8", "replace").decode()
