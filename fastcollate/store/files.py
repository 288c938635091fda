"""Files that are there whole or not at all: the one atomic writer, and checksums."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fastcollate.errors import InputError
from fastcollate.options import local_path

_HASH_CHUNK = 1 << 20
_REMEDIES = {
    errno.EMFILE: "raise the limit on open files: ulimit -n 4096",
    errno.ENFILE: "too many files are open on this machine: close some",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EACCES: "ask its owner for the right to read it",
    errno.ENOMEM: "too little memory, or too many memory maps: open fewer stores at once",
}


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A finished file of a store: its name, its size in bytes, its SHA-256."""

    name: str
    num_bytes: int
    sha256: str


class HashedFile:
    """A file being written, and the hash of what has been written. Arrow may write to it and close it."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: Any) -> None:
        """Write bytes, or anything that has a buffer of them."""
        self.digest.update(data)
        self.num_bytes += memoryview(data).nbytes
        self._file.write(data)

    def flush(self) -> None:
        """Left to `replacing`, and so is closing."""

    close = flush


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """A file to write; it takes the place of `path` when the block ends, and is removed where the block fails.

    It is written beside `path` under a name of this call's own, synced, renamed, and the rename is synced: a crash
    leaves the old file or the new one, never a part, and several processes may write one `path`. What a link leads to
    is replaced, not the link; what is there and no file, such as a pipe, is written straight. Not synced, a file is
    whole after a crash of the process alone, not of the machine.

    Example:
        >>> with replacing(Path("numbers.txt")) as file:
        ...     file.write(b"1 2 3")
        5
    """
    path = Path(os.path.realpath(local_path(path)))
    if path.exists() and not path.is_file():
        with open(path, "wb") as file:
            yield file
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if sync:
        sync_directory(path.parent)


def write_file(
    path: Path, content: bytes | Iterable[str] | Callable[[HashedFile], object], *, sync: bool = True
) -> FileInfo:
    """Write a file atomically, as `replacing` does; what it holds is hashed on the way.

    `content` is bytes, lines of text without their ends, or a function that writes to the file it is given.
    """
    with replacing(path, sync=sync) as file:
        hashed = HashedFile(file)
        if callable(content):
            content(hashed)
        elif isinstance(content, bytes):
            hashed.write(content)
        else:
            for line in content:
                hashed.write(line.encode() + b"\n")
    return FileInfo(path.name, hashed.num_bytes, hashed.digest.hexdigest())


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """What the system refuses of a file is an `InputError` with its own remedy; a file that is there may be whole."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path}: {error.strerror or 'is missing'}; prepare the store again") from error
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "is the disk in order?")
        raise InputError(f"{path}: cannot be opened ({error.strerror or error}); {remedy}") from error


def sync_directory(directory: Path) -> None:
    """Have the names in a directory on disk, where the system can do that."""
    if os.name != "posix":
        return  # elsewhere a directory cannot be opened; the rename is as durable as the system makes it
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe(path: Path) -> FileInfo:
    """A file's size and SHA-256, by reading it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
        return FileInfo(path.name, file.tell(), digest.hexdigest())
