"""A remote store's files on this machine's disk: fetched once for all its processes, checked, and kept within a limit.

A file has its name once it is whole and its checksum is right: what a process that was killed leaves behind is
`NAME.part`, which the next one goes on with. Under `.users` each process says which shards it holds, a byte each; the
system takes its lock there when it dies. A file is removed, never changed: who has it mapped reads what was there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import filelock
import numpy as np
import numpy.typing as npt

from fastcollate.errors import InputError, SourceReadError, shown
from fastcollate.store.files import FileInfo
from fastcollate.store.remote.objects import Objects
from fastcollate.store.shards import ShardInfo

CHUNK = 8 << 20  # bytes of one request
FETCHES, MOST_FETCHES = 8, 32  # at once: as many small files as the larger number, if they are no more bytes than that
TRIES = 3  # of a whole file, where what arrives is not what the manifest says
MOST_WAIT_S = 60.0  # for others to let go of shards
MOST_SILENCE_S = 600.0  # of another process that is fetching: longer than all tries of one request
_TICK_S = 0.02
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stopped(Exception):
    """Nobody waits for these shards any more."""


def bytes_of(size: int | str | None) -> int | None:
    """A size in bytes, such as `20GB` (10**9 each) or `20GiB` (2**30 each); `None` is no limit.

    Example:
        >>> bytes_of("1.5GB"), bytes_of("2 MiB"), bytes_of(1000)
        (1500000000, 2097152, 1000)
    """
    if size is None or (isinstance(size, int) and not isinstance(size, bool) and size > 0):
        return size
    if not isinstance(size, str) or not (found := _SIZE.fullmatch(size)) or not float(found[1]):
        raise InputError(f"cache_limit={shown(size)}: give bytes, or a size such as '20GB' or '500 MiB'")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2].lower() or " "))


def default_folder() -> Path:
    """Where stores are kept if nobody says it: `FASTCOLLATE_CACHE`, else the user's cache folder."""
    own = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("FASTCOLLATE_CACHE") or f"{own}/fastcollate/stores").expanduser()


class Cache:
    """One process's view of a store's files on disk.

    Args:
        objects: the store.
        folder: where its files go; of this store alone.
        infos: its shards.
        limit: bytes of shards at most; those that were used longest ago go first, never one that a process holds.
        is_current: whether the storage's manifest is still the one that all this is checked by.
    """

    def __init__(
        self,
        objects: Objects,
        folder: Path,
        infos: Sequence[ShardInfo],
        limit: int | None,
        is_current: Callable[[], bool],
    ) -> None:
        self._is_current = is_current
        self.objects, self.folder, self.infos, self.limit = objects, folder, infos, limit
        self._sizes = np.array([info.num_bytes for info in infos], np.int64)
        self._numbers = {info.name: number for number, info in enumerate(infos)}
        self._lock = threading.Lock()
        with self._naming(folder):
            for part in (".users", ".locks"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            own = folder / ".users" / uuid.uuid4().hex
            self._alive = filelock.FileLock(f"{own}.lock", thread_local=False)
            with self._alone():  # others take what is not yet locked for a dead process's
                self._alive.acquire()
            own.write_bytes(bytes(max(len(infos), 1)))
            with open(own, "r+b") as file:
                self._held = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
        self._own = own.name
        mean = int(self._sizes.mean()) if len(infos) else CHUNK
        fetches = min(max(FETCHES * CHUNK // max(mean, 1), FETCHES), MOST_FETCHES)
        self._pool = ThreadPoolExecutor(fetches, thread_name_prefix="fastcollate-fetch")

    def let_go(self, numbers: npt.NDArray[np.int64]) -> None:
        """Say that this process does not hold these shards any more."""
        self._held[numbers] = 0

    def keep(self, numbers: npt.NDArray[np.int64]) -> None:
        """Say that this process holds these shards, which it has open."""
        self._held[numbers] = 1

    def bring(self, numbers: Sequence[int], stop: threading.Event | None = None) -> None:
        """Have these shards on disk, and held; waits until they are there.

        Raises:
            InputError: they cannot be had, or do not fit the limit; it says why, and what helps.
            Stopped: `stop` was set.
        """
        stop = stop or threading.Event()
        self._reserve(np.asarray(numbers, np.int64), stop)
        self.fetch_all([self.infos[number] for number in numbers], stop)

    def fetch_all(self, infos: Sequence[FileInfo | ShardInfo], stop: threading.Event | None = None) -> None:
        """Have files on disk; see `bring`."""
        stop, given_up = stop or threading.Event(), threading.Event()
        missing = [info for info in infos if not (self.folder / info.name).exists()]
        if len(missing) == 1:
            self._fetch(missing[0], stop)
            return
        fetches = [self._pool.submit(self._fetch, info, stop, given_up) for info in missing]
        try:
            wait(fetches, return_when=FIRST_EXCEPTION)
            for fetch in fetches:
                if fetch.done():
                    fetch.result()
        finally:
            given_up.set()
            for fetch in fetches:
                fetch.cancel()
            wait(fetches)

    def fetch(self, info: FileInfo) -> Path:
        """Have a further file of the store on disk; returns its path."""
        path = self.folder / info.name
        if path.exists() and path.stat().st_size != info.num_bytes:  # it was whole when it came
            path.unlink(missing_ok=True)
        if not path.exists():
            self._fetch(info, threading.Event())
        return path

    # ------------------------------------------------------------------------------------------------- the limit

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """The only thread of the only process that decides what is removed."""
        with self._lock, _locked(self.folder / ".lock", (), None):
            yield

    def check_limit(self, numbers: npt.NDArray[np.int64]) -> None:
        """Refuse shards that are needed at once, there already or not, and can never fit."""
        needed = int(self._sizes[numbers].sum())
        if self.limit is not None and needed > self.limit:
            raise InputError(
                f"{self.objects}: the rows that are needed at once lie in {len(numbers):,} shards of {needed:,} bytes, "
                f"more than cache_limit={self.limit:,}: raise it, or read few shards at a time, by order='shards' or "
                "a smaller window"
            )

    def _reserve(self, numbers: npt.NDArray[np.int64], stop: threading.Event) -> None:
        """Hold shards that are to be fetched, as soon as there is room for them."""
        if self.limit is None:
            self._held[numbers] = 1
            return
        needed = int(self._sizes[numbers].sum())
        deadline = time.monotonic() + MOST_WAIT_S
        while True:
            with self._alone():
                if self._make_room(numbers):
                    self._held[numbers] = 1
                    return
            if stop.wait(_TICK_S):
                raise Stopped
            if time.monotonic() > deadline:
                raise InputError(
                    f"{self.folder}: for {MOST_WAIT_S:.0f} s there was no room for {needed:,} bytes beside the shards "
                    f"in use, within cache_limit={self.limit:,}: raise it to twice of what a window needs"
                )

    def _make_room(self, numbers: npt.NDArray[np.int64]) -> bool:
        """Remove what nobody holds, least used first, until these shards fit; returns whether they do."""
        assert self.limit is not None
        kept = self._held_by_all()
        kept[numbers] = True
        used = self._used()
        total = int(self._sizes[kept].sum()) + sum(int(self._sizes[n]) for n in used if not kept[n])
        for number in sorted(used, key=lambda number: used[number]):
            if total <= self.limit:
                break
            if not kept[number]:
                for name in (self.infos[number].name, f"{self.infos[number].name}.part"):
                    (self.folder / name).unlink(missing_ok=True)
                total -= int(self._sizes[number])
        return total <= self.limit

    def _held_by_all(self) -> npt.NDArray[np.bool_]:
        """Which shards some process holds; what dead ones have left behind is removed."""
        held: npt.NDArray[np.bool_] = self._held != 0
        for lock in (self.folder / ".users").glob("*.lock"):
            own = lock.with_suffix("")
            if own.name == self._own:
                continue
            try:
                with filelock.FileLock(lock, timeout=0):
                    own.unlink(missing_ok=True)
                    lock.unlink(missing_ok=True)
            except filelock.Timeout:
                with contextlib.suppress(FileNotFoundError):  # it is just beginning
                    theirs = np.frombuffer(own.read_bytes(), np.uint8)
                    if len(theirs) == len(held):
                        held |= theirs != 0
        return held

    def _used(self) -> dict[int, int]:
        """When each shard that is on disk, whole or not, was used last."""
        used: dict[int, int] = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if (number := self._numbers.get(entry.name.removesuffix(".part"))) is not None:
                    with contextlib.suppress(FileNotFoundError):  # it has just arrived whole: it is held
                        used[number] = entry.stat().st_mtime_ns
        return used

    def touch(self, numbers: Iterable[int]) -> None:
        """Note that shards are used now."""
        for number in numbers:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.folder / self.infos[number].name)

    # ----------------------------------------------------------------------------------------------- one file

    def _fetch(self, info: FileInfo | ShardInfo, *stops: threading.Event) -> None:
        """Fetch a file, unless another process is just doing so: then wait for that."""
        path, part = self.folder / info.name, self.folder / f"{info.name}.part"
        with self._naming(path), _locked(self.folder / ".locks" / info.name, stops, part):
            for _ in range(TRIES + part.exists()):  # what was there may be another process's, or of a full disk
                if path.exists():
                    return
                try:
                    part, digest = self._download(info, stops)
                except SourceReadError:
                    if self._is_current():
                        raise
                    break
                if digest == info.sha256:
                    os.replace(part, path)
                    return
                part.unlink()
        name = self.objects / info.name
        if not self._is_current():
            raise InputError(f"{name}: the store was changed there while it was read; open it again")
        raise InputError(
            f"{name}: its SHA-256 is not the one that the manifest says, in any of {TRIES} tries: it is damaged "
            "there, or on its way; try again, and if this stays, prepare the store again"
        )

    def _download(self, info: FileInfo | ShardInfo, stops: Sequence[threading.Event]) -> tuple[Path, str]:
        """All of a file, from where an earlier download of it ended, and its SHA-256."""
        part, digest = self.folder / f"{info.name}.part", hashlib.sha256()
        with open(part, "a+b") as file:
            if file.tell() > info.num_bytes:
                file.truncate(0)
            file.seek(0)
            while data := file.read(CHUNK):
                digest.update(data)
            for start in range(file.tell(), info.num_bytes, CHUNK):
                if any(stop.is_set() for stop in stops):
                    raise Stopped
                data = self.objects.read(info.name, start, min(start + CHUNK, info.num_bytes))
                digest.update(data)
                file.write(data)
            file.flush()
            os.fdatasync(file.fileno())
        return part, digest.hexdigest()

    @contextlib.contextmanager
    def _naming(self, path: Path) -> Iterator[None]:
        """What the disk refuses is an `InputError` with its remedy."""
        try:
            yield
        except OSError as error:
            full = error.errno in _DISK_IS_FULL
            remedy = "free some space, or give a cache_limit" if full else "give another folder: cache=..."
            raise InputError(
                f"{path}: cannot be written ({error.strerror or error}) for {self.objects}; {remedy}"
            ) from error


@contextlib.contextmanager
def _locked(path: Path, stops: Sequence[threading.Event], part: Path | None) -> Iterator[None]:
    """A lock, of this thread of this process alone.

    Waiting for it ends where one says stop, and where `part`, which its owner writes, has not grown for too long.
    """
    lock, size, since = filelock.FileLock(path), -1, 0.0
    while True:
        try:
            lock.acquire(timeout=_TICK_S, poll_interval=_TICK_S / 2)
            break
        except filelock.Timeout:
            if any(stop.is_set() for stop in stops):
                raise Stopped from None
            now = part.stat().st_size if part is not None and part.exists() else 0
            if now != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > MOST_SILENCE_S:
                raise InputError(
                    f"{path}: another process has kept this lock for {MOST_SILENCE_S:.0f} s and done nothing, as one "
                    "that is stopped does; end it, or give another folder: cache=..."
                ) from None
    try:
        yield
    finally:
        lock.release()
