"""A finished store copied to object storage: each file checked against the manifest, what is there already is left."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fastcollate.errors import InputError
from fastcollate.options import local_path
from fastcollate.progress import progress_bar
from fastcollate.store.manifest import MANIFEST, read_manifest
from fastcollate.store.remote.objects import Found, Objects

_SIDE_FILES = ("sources.json", "skipped.txt")  # which no checksum covers, and a store need not have
_AT_ONCE = 4  # files in memory


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What a copy did: to where, how many files and bytes went over, how many files were there already."""

    store: str
    num_files: int
    num_bytes: int
    num_there: int

    def __str__(self) -> str:
        """One line."""
        there = f", {self.num_there:,} were there already" if self.num_there else ""
        return f"{self.store}: {self.num_files:,} files, {self.num_bytes / 1e6:,.1f} MB copied{there}"


def push(directory: str | os.PathLike[str], url: str, *, progress: bool = False) -> CopyReport:
    """Copy a finished store to object storage, the manifest last; stopped, the same call goes on.

    Each file is compared with the manifest's checksum before it is sent, and with the storage's afterwards.

    Raises:
        InputError: there is no store, a file of it is damaged, or something else lies at the URL.

    Example:
        >>> from fastcollate.store.remote import push
        >>> push("store", "memory://bucket/store").num_there
        0
    """
    root, folder = local_path(directory), Objects(url)
    if read_manifest(root) is None:
        raise InputError(
            f"{root}: no finished token store here (no {MANIFEST}); make one with: fastcollate prepare SOURCE {root}"
        )
    wanted = _checksums(root)
    there = folder.found()
    _refuse_others(folder, root, there, wanted)
    with progress_bar(unit="MB", progress=progress) as bar, ThreadPoolExecutor(_AT_ONCE) as pool:
        total = sum((root / name).stat().st_size for name in wanted)
        task = bar.add_task("push", total=(total + 999_999) // 1_000_000)
        done = num_files = num_bytes = 0
        names = [name for name in wanted if name != MANIFEST]
        for size, sent in pool.map(lambda name: _send(root, folder, name, wanted, there), names):
            done, num_files, num_bytes = done + size, num_files + sent, num_bytes + size * sent
            bar.update(task, completed=done // 1_000_000)
        size, sent = _send(root, folder, MANIFEST, wanted, there)
        bar.update(task, completed=bar.tasks[task].total)
    num_files += sent
    return CopyReport(folder.name, num_files, num_bytes + size * sent, len(wanted) - num_files)


def _checksums(root: Path) -> dict[str, str | None]:
    """The SHA-256 of each file to copy, as the manifest tells it."""
    manifest = read_manifest(root)
    assert manifest is not None
    known: dict[str, str | None] = {
        entry["name"]: entry["sha256"] for entry in [*manifest["files"], *manifest["shards"]]
    }
    side = {name: None for name in _SIDE_FILES if name not in known and (root / name).is_file()}
    return {**known, **side, MANIFEST: None}


def _refuse_others(folder: Objects, root: Path, there: dict[str, Found], wanted: dict[str, str | None]) -> None:
    """Refuse a place where another store, a job, or other objects lie."""
    if MANIFEST in there and folder.get(MANIFEST) != (root / MANIFEST).read_bytes():
        raise InputError(f"{folder}: holds another store; choose another place, or remove that one first")
    if folder.found(".job/"):
        raise InputError(f"{folder}: a job is at work here, or was stopped; finish it, or choose another place")
    if others := sorted(there.keys() - wanted.keys()):
        raise InputError(
            f"{folder}: holds objects that are not of this store, such as {others[0]}; choose another place"
        )


def _send(
    root: Path, folder: Objects, name: str, wanted: dict[str, str | None], there: dict[str, Found]
) -> tuple[int, bool]:
    """A file's size, and whether it had to be sent."""
    content = (root / name).read_bytes()
    if wanted[name] not in (None, hashlib.sha256(content).hexdigest()):
        raise InputError(f"{root / name}: damaged, its SHA-256 is not the manifest's; prepare the store again")
    if name in there and folder.holds(name, content):
        return len(content), False
    folder.write(name, content)
    return len(content), True
