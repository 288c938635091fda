"""A remote store's shards as rows are read from them: there while they are held, absent to every kernel else."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fastcollate.errors import InputError
from fastcollate.options import local_path
from fastcollate.store import layout
from fastcollate.store.files import FileInfo
from fastcollate.store.manifest import LENGTHS, read_manifest
from fastcollate.store.remote.cache import Cache, bytes_of, default_folder
from fastcollate.store.remote.objects import Objects
from fastcollate.store.shards import MAX_MAPS, ShardColumns, ShardInfo, open_shard

Int64Array = npt.NDArray[np.int64]
_TOUCH_S = 1.0


class RemoteShards:
    """The shards of one remote store in this process; a fork begins anew.

    Args:
        url: the store's, as it was given.
        manifest: the store's.
        infos: the shards.
        schema: of each.
        cache: the folder for what is fetched, or `None`, see `TokenStore`.
        cache_limit: see `TokenStore`.

    Attributes:
        cache: this process's view of the disk.
        lengths: each row's length, which every shard that arrives is compared with.
    """

    lengths: npt.NDArray[Any]

    def __init__(
        self,
        url: str,
        manifest: Mapping[str, Any],
        infos: Sequence[ShardInfo],
        schema: pa.Schema,
        cache: str | os.PathLike[str] | None,
        cache_limit: int | str | None,
    ) -> None:
        self._url, self._manifest, self._infos, self._schema = url, manifest, infos, schema
        if len(infos) > MAX_MAPS:
            raise InputError(f"{Objects(url)}: {len(infos):,} shards, too many to open; prepare the store again")
        if cache == "":
            raise InputError("cache='': name a folder, or leave it out")
        root = local_path(default_folder() if cache is None else cache)
        self._folder: Path = root.absolute() / manifest["checksum"][:32]  # of its content
        limit = os.environ.get("FASTCOLLATE_CACHE_LIMIT") or None if cache_limit is None else cache_limit
        self._limit = bytes_of(limit)
        self._starts = np.cumsum([0, *(info.num_rows for info in infos)])
        self._tables: list[tuple[weakref.ref[layout.Table], int]] = []  # and the line of the first shard in each
        self._begin()
        (entry,) = (entry for entry in manifest["files"] if entry["name"] == LENGTHS)
        self.cache.fetch(FileInfo(**entry))

    def _begin(self) -> None:
        """What belongs to a process: locks, files, maps, and what it holds."""
        self._lock = threading.RLock()  # the garbage collector may let go of a hold within it
        self._pins = np.zeros(len(self._infos), np.int64)
        self._touched = np.zeros(len(self._infos))
        self._open: dict[int, ShardColumns] = {}
        for number in range(len(self._infos)) if self._tables else ():
            self._tell(number, None)
        self.cache = Cache(Objects(self._url), self._folder, self._infos, self._limit, self._is_current)
        self._process = os.getpid()

    def _is_current(self) -> bool:
        """Whether the storage still has the same manifest, or cannot tell."""
        try:
            found = read_manifest(Objects(self._url))
        except InputError:
            return True
        return found is not None and found["checksum"] == self._manifest["checksum"]

    def fetch_files(self) -> Path:
        """Fetch all files of the store but its shards, such as its tokenizer's; returns their folder."""
        for entry in self._manifest["files"]:
            self.cache.fetch(FileInfo(**entry))
        return self._folder

    def watch(self, table: layout.Table, first: int) -> None:
        """Keep a table's lines from `first` on: each tells of a shard while it is open."""
        with self._lock:
            self._tables = [(ref, line) for ref, line in self._tables if ref() is not None]
            self._tables.append((weakref.ref(table), first))
            for number, columns in self._open.items():
                table.put(first + number, columns)

    def _tell(self, number: int, columns: ShardColumns | None) -> None:
        for ref, first in self._tables:
            if (table := ref()) is not None:
                table.put(first + number, columns)

    def hold(self, numbers: Int64Array, stop: threading.Event | None = None) -> Hold:
        """Have shards open, fetched where they are not on disk, until what this returns is let go.

        Each number stands there once.

        Raises:
            InputError: a shard cannot be had, or is not of this store.
            Stopped: `stop` was set while it waited.
        """
        if os.getpid() != self._process:
            self._begin()
        self.cache.check_limit(numbers)
        with self._lock:
            self._pins[numbers] += 1
            absent = [number for number in numbers.tolist() if number not in self._open]
            self.cache.keep(np.setdiff1d(numbers, absent) if absent else numbers)
        held = Hold(self, numbers)
        if absent:
            self._forget_removed()
            self.cache.bring(absent, stop)
            for number in absent:
                self._open_shard(number)
        if self.cache.limit is not None and len(old := numbers[time.monotonic() - self._touched[numbers] > _TOUCH_S]):
            self._touched[old] = time.monotonic()
            self.cache.touch(old.tolist())
        return held

    def let_go(self, numbers: Int64Array) -> None:
        """Take back one `hold` of these shards."""
        with self._lock:
            self._pins[numbers] -= 1
            self.cache.let_go(numbers[self._pins[numbers] == 0])

    def columns(self, number: int) -> ShardColumns:
        """One shard's columns; its arrays stay valid for whoever keeps them."""
        with self.hold(np.array([number])):
            return self._open[number]

    def _open_shard(self, number: int) -> None:
        info, folder = self._infos[number], self.cache.folder
        try:
            columns = self._checked(number, open_shard(folder, info, self._schema))
        except InputError:  # it was whole when it came: once more, then the storage's own is wrong
            (folder / info.name).unlink(missing_ok=True)
            self.cache.bring([number])
            columns = self._checked(number, open_shard(folder, info, self._schema))
        with self._lock:
            if number not in self._open:
                self._open[number] = columns
                self._tell(number, columns)

    def _checked(self, number: int, columns: ShardColumns) -> ShardColumns:
        first, stop = int(self._starts[number]), int(self._starts[number + 1])
        if not np.array_equal(np.diff(columns.offsets), self.lengths[first:stop]):
            raise InputError(
                f"{self.cache.objects / self._infos[number].name}: its rows have other lengths than "
                f"{self._folder / LENGTHS} says; remove that file and open the store again, else prepare it again"
            )
        return columns

    def _forget_removed(self) -> None:
        """Close shards that were removed from the disk, whose room is free only then."""
        if self.cache.limit is None:
            return
        with self._lock:
            for number in [n for n in self._open if not self._pins[n]]:
                if not (self.cache.folder / self._infos[number].name).exists():
                    self._tell(number, None)
                    del self._open[number]


class Hold:
    """Shards that stay open until this is let go, by `with`, or by the last reference to it."""

    __slots__ = ("_numbers", "_owner")

    def __init__(self, owner: RemoteShards, numbers: Int64Array) -> None:
        self._owner: RemoteShards | None = owner
        self._numbers = numbers

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object, getpid: Any = os.getpid, is_finalizing: Any = sys.is_finalizing) -> None:
        # Defaults, since an interpreter that ends has taken the modules away.
        owner, self._owner = self._owner, None
        if owner is not None and not is_finalizing() and owner._process == getpid():
            owner.let_go(self._numbers)

    __del__ = __exit__


def _fetched(name: str) -> Any:
    """A column of a shard; see `ShardColumns`."""
    return property(lambda shard: getattr(shard.columns, name))


class RemoteShard(layout.AbsentShard):
    """One shard of a remote store; it looks like `ShardColumns`, and reading a column fetches it."""

    def __init__(self, owner: RemoteShards, number: int, num_rows: int, token_dtype: npt.DTypeLike) -> None:
        super().__init__(owner, number, num_rows, np.dtype(token_dtype))
        self._owner = owner

    @property
    def columns(self) -> ShardColumns:
        """All its columns; they stay valid for whoever keeps them."""
        return self._owner.columns(self.number)

    input_ids = _fetched("input_ids")
    offsets = _fetched("offsets")
    spans = _fetched("spans")
    span_offsets = _fetched("span_offsets")
    source_row = _fetched("source_row")
    extra = _fetched("extra")
