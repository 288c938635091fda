"""What an unfinished job has done so far, and the lock that keeps a second job away."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from fastcollate.errors import InputError
from fastcollate.ingest.encode import BlockResult, Counts
from fastcollate.sources.records import BadRecord
from fastcollate.store.store import ShardInfo

_JOURNAL = ".journal.jsonl"
_LOCK = ".lock"


class JobLock:
    """An exclusive lock on a store's directory, which the system lifts when its holder dies.

    Raises:
        InputError: another job holds it, or the directory cannot be made or holds other files.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.descriptor = -1

    def __enter__(self) -> JobLock:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{self._root}: is not a directory; choose another place for the store") from error
        foreign = [p.name for p in self._root.iterdir() if not _is_ours(p.name)]
        if foreign:
            raise InputError(
                f"{self._root}: holds files that are not of a store, such as {sorted(foreign)[0]}; "
                "choose a new or empty directory"
            )
        path = self._root / _LOCK
        while True:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            if not _try_lock(self.descriptor):
                os.close(self.descriptor)
                raise InputError(f"{self._root}: another job is writing this store; wait for it, or stop it first")
            with contextlib.suppress(FileNotFoundError):  # its last holder has just removed it: take a new one
                if os.fstat(self.descriptor).st_ino == path.stat().st_ino:
                    return self
            os.close(self.descriptor)

    def __exit__(self, *_: object) -> None:
        (self._root / _LOCK).unlink(missing_ok=True)
        os.close(self.descriptor)


def _is_ours(name: str) -> bool:
    return name in (_JOURNAL, _LOCK, "manifest.json", "lengths.npy", "skipped.txt", "sources.json") or (
        name.startswith(("shard-", ".shard-", ".manifest", ".lengths", ".skipped"))
        and name.endswith((".arrow", ".tmp"))
    )


def _try_lock(descriptor: int) -> bool:
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
    except OSError:
        return False
    return True


class Journal:
    """Finished blocks in order, a line each, behind a line with the job's identity.

    Raises:
        InputError: an unfinished job of another identity lies here.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any], differences: Callable[[Any, Any], list[str]]) -> None:
        self._root = root
        self._path = root / _JOURNAL
        for leftover in root.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        header, self._lines = self._load()
        if header is not None and (different := differences(header, identity)):
            raise InputError(
                f"{root}: holds an unfinished job that differs in {'; '.join(different)}; "
                "choose another directory, or delete this one"
            )
        self._file = open(self._path, "ab")  # noqa: SIM115 (closed by __exit__)
        if header is None:
            self._write(identity)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @staticmethod
    def remove(root: Path) -> None:
        """Forget the job: its store is finished."""
        (root / _JOURNAL).unlink(missing_ok=True)

    def _load(self) -> tuple[Any, int]:
        """Header and number of whole lines; a line that a crash cut off is cut off the file."""
        try:
            raw = self._path.read_bytes()
        except FileNotFoundError:
            return None, 0
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) != len(raw):
            os.truncate(self._path, len(whole))
        lines = whole.splitlines()
        self._finished = [json.loads(line) for line in lines[1:]]
        return (json.loads(lines[0]), len(lines) - 1) if lines else (None, 0)

    _finished: list[dict[str, Any]] = []  # noqa: RUF012

    def finished(self, index: int) -> BlockResult | None:
        """What an earlier run noted of a block, if its shard is still there."""
        if index >= self._lines:
            return None
        entry = self._finished[index]
        shard = None if entry["shard"] is None else ShardInfo(**entry["shard"])
        if shard is not None:
            with contextlib.suppress(OSError):
                if (self._root / shard.name).stat().st_size == shard.num_bytes:
                    return _result(entry, shard)
            self._lines = index  # it and all that follow are done again
            self._cut(index)
            return None
        return _result(entry, None)

    def _cut(self, num_blocks: int) -> None:
        lines = self._path.read_bytes().splitlines(keepends=True)
        os.truncate(self._path, sum(map(len, lines[: num_blocks + 1])))

    def add(self, result: BlockResult) -> None:
        """Note a finished block; blocks come in order."""
        self._write({**asdict(result), "tokenize_seconds": 0.0, "bad": [list(bad) for bad in result.bad]})

    def _write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()  # not synced: after a power cut, what is missing here is only done again

    def skipped(self) -> Iterator[tuple[int, BadRecord]]:
        """All bad records in order, with the index of their source."""
        with open(self._path, "rb") as file:
            next(file)
            for line in file:
                entry = json.loads(line)
                for bad in entry["bad"]:
                    yield entry["source"], BadRecord(*bad)


def _result(entry: Mapping[str, Any], shard: ShardInfo | None) -> BlockResult:
    bad = [BadRecord(*values) for values in entry["bad"]]
    return BlockResult(entry["index"], entry["source"], entry["sha256"], shard, Counts(**entry["counts"]), bad, 0.0)
