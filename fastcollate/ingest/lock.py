"""A store's folder: one job at a time, and which files in it are whose."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import filelock

from fastcollate.errors import InputError
from fastcollate.store import manifest as manifests
from fastcollate.store import remote

LOCK = ".lock"
_LINE_SECONDS = 10.0
_MOST_ATTEMPTS = 1000  # to make a folder that others remove at the same time
_OURS = re.compile(
    r"(manifest|sources|tokenizer|tokenizer_config|special_tokens_map)\.json|chat_template(_\w+)?\.jinja"
    r"|lengths\.npy|skipped\.txt|shard-\d+\.arrow|\.journal(\.jsonl)?|\.part-.*"
    r"|\.+(manifest|sources|tokenizer|special_|chat_template|lengths|skipped|shard-|part-).*\.tmp"
)
_ONLY_IN_STORES = re.compile(r"\.lock|\.journal(\.jsonl)?|shard-\d+\.arrow")
_FROM_THE_SYSTEM = ("thumbs.db", "ehthumbs.db", "desktop.ini", "lost+found", "@eadir", "__macosx", "$recycle.bin")


class JobLock:
    """The right to write in a store's folder; the system takes it from a process that dies.

    Forked children do not share it: what they may still write after their leader's death has a name of its own.

    The folder is made where it is missing; one that holds files that are not of a store is refused. With `wait` a job
    that holds the lock is waited for, with a line on standard error every ten seconds, which says of it what `holder`
    knows; without, that is refused.

    Attributes:
        waited: whether another job held it.
        made: the folders that were made for it, the store's first.
    """

    def __init__(self, root: Path, *, wait: bool, holder: Callable[[], str]) -> None:
        self._root = root
        self._wait = wait
        self._holder = holder
        self._lock = filelock.FileLock(root / LOCK, thread_local=False)
        self.waited = False
        self.made: list[Path] = []

    def __enter__(self) -> JobLock:
        while True:
            self._make_folder(self._root)
            try:
                self._refuse_foreign()
                with _changed(self._root) as changed:
                    self._acquire()
                    if changed():  # the lock's library makes a folder that has just been removed
                        self.made.insert(0, self._root)
                break
            except (FileNotFoundError, FileExistsError):  # a job that failed at once is just removing the folder
                continue
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _make_folder(self, folder: Path) -> None:
        """Make the store's folder and what is missing above it; a job that has just failed may remove them."""
        for attempt in itertools.count():
            try:
                folder.mkdir()
                self.made.insert(0, folder)
                return
            except FileNotFoundError as error:
                if attempt == _MOST_ATTEMPTS:  # where nobody can make one, such as in /proc
                    raise _not_made(folder, error) from error
                self._make_folder(folder.parent)
            except (FileExistsError, NotADirectoryError) as error:
                if folder.is_dir():
                    return
                is_gone = isinstance(error, FileExistsError) and not _is_no_directory(folder)
                if not is_gone:
                    raise InputError(f"{folder}: is not a directory; choose another place for the store") from error
            except OSError as error:
                raise _not_made(folder, error) from error

    def _refuse_foreign(self) -> None:
        """Before anything is made in it: a folder that is no store's may hold files with names like a store's."""
        refuse_foreign(self._root, os.listdir(self._root))

    def _acquire(self) -> None:
        while True:
            try:
                self._lock.acquire(timeout=_LINE_SECONDS if self.waited else 0, poll_interval=0.05)
                return
            except filelock.Timeout as error:
                says = f"{self._root}: another job is writing this store{self._holder()}"
                if not self._wait:
                    raise InputError(f"{says}; wait for it, or stop it first") from error
                print(f"{says}; waiting for it", file=sys.stderr, flush=True)
                self.waited = True
            except (FileNotFoundError, FileExistsError):
                raise
            except (OSError, NotImplementedError) as error:
                reason = getattr(error, "strerror", None) or error
                raise InputError(
                    f"{self._root}: no job can be kept apart from others here ({reason}); "
                    "choose a folder that can be written and locked"
                ) from error

    def remove_folder(self) -> None:
        """Remove the folders that were made for the lock, which is held, with what is a store's; not what is not."""
        if self._root not in self.made:
            return
        for path in self._root.iterdir():
            if is_ours(path.name):
                discard(path)
        if os.name != "posix" or any(path.name != LOCK for path in self._root.iterdir()):
            return  # elsewhere an open file cannot be moved; or somebody else has put something there
        gone = self._root.with_name(f".{self._root.name}.{uuid.uuid4().hex[:12]}.tmp")
        with contextlib.suppress(OSError):
            self._root.rename(gone)  # with the lock in it: whoever waits for it sees that, and makes the folder again
            (gone / LOCK).unlink()
            gone.rmdir()
            for folder in self.made:
                if folder != self._root:
                    folder.rmdir()


def _is_no_directory(path: Path) -> bool:
    """Whether something else lies there; asked once, for a folder may come and go meanwhile."""
    try:
        return not stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _not_made(folder: Path, error: OSError) -> InputError:
    reason = error.strerror or error
    return InputError(f"{folder}: cannot be made ({reason}); choose a place for the store that can be written")


@contextlib.contextmanager
def _changed(folder: Path) -> Iterator[Callable[[], bool]]:
    """Tells whether a folder was removed and made again."""
    if os.name != "posix":  # no folder in use is removed there
        yield lambda: False
        return
    handle = os.open(folder, os.O_RDONLY)  # while it is open, its number is not given to another folder
    try:
        number = os.fstat(handle).st_ino
        yield lambda: folder.stat().st_ino != number
    finally:
        os.close(handle)


def is_ours(name: str) -> bool:
    """Whether a file of this name in a store's folder is the store's or a job's."""
    return _OURS.fullmatch(name) is not None


def refuse_foreign(root: Path | remote.Objects, names: Sequence[str]) -> None:
    """Refuse a folder of files with these names where they are not a store's."""
    foreign = sorted(name for name in names if not name.startswith(".") and name.lower() not in _FROM_THE_SYSTEM)
    if not foreign or any(map(_ONLY_IN_STORES.fullmatch, names)):
        return
    if manifests.FORMAT.encode() not in (remote.get(root, manifests.MANIFEST) or b""):
        raise InputError(
            f"{root}: holds files that are not of a store, such as {foreign[0]}; choose a new or empty directory"
        )


def discard(path: Path) -> None:
    """Remove a file that is of no use; where another process has it open, and the system minds that, it stays."""
    with contextlib.suppress(FileNotFoundError, PermissionError):
        path.unlink()
