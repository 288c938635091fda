"""A store copied from object storage to a folder: each file checked, what is there is left, the manifest last."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from fastcollate.errors import InputError
from fastcollate.options import local_path
from fastcollate.progress import progress_bar
from fastcollate.store.files import FileInfo, describe, write_file
from fastcollate.store.manifest import MANIFEST, read_manifest
from fastcollate.store.remote.cache import FETCHES, Cache
from fastcollate.store.remote.copy import CopyReport
from fastcollate.store.remote.objects import Objects

STAGE = ".part-pull"  # what has not arrived whole; also a job that writes here knows that it may remove it
_SIDE_FILES = ("sources.json", "skipped.txt")


def pull(url: str, directory: str | os.PathLike[str], *, progress: bool = False) -> CopyReport:
    """Copy a store from object storage to a folder; stopped, the same call goes on, also within a file.

    Each file is compared with the manifest's checksum before it takes its place.

    Raises:
        InputError: there is no store, a file of it is damaged there, or something else lies in the folder.

    Example:
        >>> import fsspec
        >>> from fastcollate.store.remote import pull
        >>> fsspec.filesystem("memory").put("store", "/bucket/pulled", recursive=True)
        >>> pull("memory://bucket/pulled", "pulled").num_there
        0
    """
    objects, root = Objects(url), local_path(directory)
    manifest = read_manifest(objects)
    if manifest is None:
        raise InputError(
            f"{objects}: no finished token store here (no {MANIFEST}); check the address, or write one there with: "
            f"fastcollate push STORE {objects}"
        )
    _refuse_others(objects, root, manifest)
    files = [_info(entry) for entry in [*manifest["files"], *manifest["shards"]]]
    cache = Cache(objects, root / STAGE, [], None, lambda: _is_current(objects, manifest))
    missing = [info for info in files if not _is_there(root / info.name, info)]
    there, num_bytes = len(files) - len(missing), sum(info.num_bytes for info in missing)
    with progress_bar(unit="MB", progress=progress) as bar:
        task, done = bar.add_task("pull", total=max((num_bytes + 999_999) // 1_000_000, 1)), 0
        for first in range(0, len(missing), FETCHES):
            part = missing[first : first + FETCHES]
            cache.fetch_all(part)
            for info in part:
                os.replace(cache.folder / info.name, root / info.name)
                done += info.num_bytes
            bar.update(task, completed=done // 1_000_000)
        for name in _SIDE_FILES:
            if (content := objects.get(name)) is not None:
                write_file(root / name, content)
        raw = objects.get(MANIFEST)
        if raw is None or not _is_current(objects, manifest):
            raise InputError(f"{objects}: the store was changed there while it was read; pull it again")
        is_new = not (root / MANIFEST).is_file()
        write_file(root / MANIFEST, raw)
        bar.update(task, completed=bar.tasks[task].total)
    shutil.rmtree(root / STAGE)
    return CopyReport(str(root), len(missing) + is_new, num_bytes + len(raw) * is_new, there + (not is_new))


def _info(entry: dict[str, Any]) -> FileInfo:
    return FileInfo(entry["name"], entry["num_bytes"], entry["sha256"])


def _is_current(objects: Objects, manifest: dict[str, Any]) -> bool:
    found = read_manifest(objects)
    return found is not None and found["checksum"] == manifest["checksum"]


def _is_there(path: Path, info: FileInfo) -> bool:
    return path.is_file() and path.stat().st_size == info.num_bytes and describe(path) == info


def _refuse_others(objects: Objects, root: Path, manifest: dict[str, Any]) -> None:
    """Refuse a folder in which another store, or other files lie."""
    if not root.exists():
        return
    if not root.is_dir():
        raise InputError(f"{root}: is a file; give a folder, which need not exist")
    own = read_manifest(root)
    if own is not None and own["checksum"] != manifest["checksum"]:
        raise InputError(f"{root}: holds another store; choose another folder, or remove that one first")
    known = {entry["name"] for entry in [*manifest["files"], *manifest["shards"]]} | {
        *_SIDE_FILES,
        MANIFEST,
        STAGE,
        ".lock",
    }
    if others := sorted(path.name for path in root.iterdir() if path.name not in known):
        raise InputError(f"{root}: holds files that are not of {objects}, such as {others[0]}; choose another folder")
