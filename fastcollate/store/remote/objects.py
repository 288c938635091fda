"""The objects below a URL of any `fsspec` file system: read, written, listed, removed; each call retried and checked.

Nothing here tells a URL as it was given, which may hold a secret: only its name (see `sources.remote.name_of`).
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem

from fastcollate.errors import InputError, MissingExtraError, SourceReadError
from fastcollate.options import local_path
from fastcollate.sources import remote
from fastcollate.store.files import FileInfo

PART = 16 << 20  # bytes of one request of a larger upload
PARTS_AT_ONCE = 2  # each is a copy in memory
AT_ONCE = 16  # requests for small objects
_IS_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # two letters or more: C:// is a drive
_NO_STORE = (
    "http",
    "https",
    "hf",
    "git",
    "github",
    "data",
    "zip",
    "tar",
)  # where no store can be written or ranged over
_TAGS = ("md5Hash", "ETag", "etag", "md5", "content_md5", "generation", "LastModified", "mtime", "created")
Result = TypeVar("Result")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether this is a URL, as `s3://bucket/store` is, and no path of this machine."""
    return isinstance(path, str) and _IS_URL.match(path) is not None


def folder_of(path: str | os.PathLike[str]) -> Path | Objects:
    """A store's folder: a path of this machine, or the objects below a URL."""
    return Objects(str(path)) if is_url(path) else local_path(path)


def get(folder: Path | Objects, name: str) -> bytes | None:
    """A small file of a store's folder, or `None` where it cannot be read; storage that fails is an error."""
    if isinstance(folder, Objects):
        return folder.get(name)
    with contextlib.suppress(OSError):
        return (folder / name).read_bytes()
    return None


class Found(NamedTuple):
    """What a listing says of an object: its size in bytes, and what tells one content from another, if anything."""

    num_bytes: int
    tag: str


class Objects:
    """The objects below a URL: a folder of a store.

    Each call is tried again, each time later, where what stopped it may pass. Stopped for good it is a
    `SourceReadError` with the object's name, without the URL's user, password and query.

    Example:
        >>> folder = Objects("memory://bucket/store")
        >>> folder.write("a.txt", b"1 2 3"), folder.write("a.txt", b"others", create=True)
        (True, False)
        >>> folder.read("a.txt", 2, 3), sorted(folder.found()), folder.get("b.txt")
        (b'2', ['a.txt'], None)
        >>> f"{folder / 'a.txt'}"
        'memory://bucket/store/a.txt'
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.name = remote.name_of(self.url)
        scheme, _, place = url.partition("://")
        if not is_url(url):
            raise InputError(f"{self.name}: not a URL of object storage; give one, such as s3://bucket/store")
        if scheme in ("s3", "s3a", "gs", "gcs") and "@" in place.split("/")[0]:
            raise InputError(
                f"{self.name}: {scheme} takes no user and password in a URL; give credentials as its own library has "
                "them, such as in its environment variables"
            )
        if re.search(r"\?[^/]*=", url):
            raise InputError(
                f"{self.name}: a store's URL has no query; give credentials as the storage's own library has them"
            )
        if "::" in url or scheme.lower() in _NO_STORE:
            raise InputError(f"{self.name}: no store can lie there; name a place of object storage, such as s3://...")
        if not place.strip("/"):
            raise InputError(f"{self.name}//: name a folder of the storage, such as {scheme}://bucket/store")
        try:
            self._files, self._path = self._attempt("", lambda: fsspec.core.url_to_fs(self.url))
        except ImportError as error:
            raise MissingExtraError(f"{self.name}: {error}") from None

    def __str__(self) -> str:
        return self.name

    def __truediv__(self, name: str) -> str:
        """An object's name for messages."""
        return f"{self.name}/{name}"

    def get(self, name: str) -> bytes | None:
        """All of an object, or `None` where there is none."""

        def action() -> bytes | None:
            try:
                return bytes(self._files.cat_file(self._at(name)))
            except FileNotFoundError:
                return None

        return self._attempt(name, action)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """An object's bytes from `start` to before `stop`; exactly so many, or it is an error."""

        def action() -> bytes:
            data = bytes(self._files.cat_file(self._at(name), start=start, end=stop))
            if stop is not None and len(data) != stop - (start or 0):
                raise ConnectionError("ended early")
            return data

        return self._attempt(name, action)

    def describe(self, name: str) -> FileInfo:
        """An object's size and SHA-256, by reading it."""
        found, digest = self.find(name), hashlib.sha256()
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "is missing", name)
        for start in range(0, found.num_bytes, PART):
            digest.update(self.read(name, start, min(start + PART, found.num_bytes)))
        return FileInfo(name, found.num_bytes, digest.hexdigest())

    def find(self, name: str) -> Found | None:
        """An object's size and tag, asked anew, or `None` where there is none."""

        def action() -> Found | None:
            self._files.invalidate_cache()
            try:
                return _found(self._files.info(self._at(name)))
            except FileNotFoundError:
                return None

        return self._attempt(name, action)

    def found(self, folder: str = "") -> dict[str, Found]:
        """The objects in the folder itself, or in one below it (`.job/`), by their names; not those further below."""

        def action() -> dict[str, Found]:
            self._files.invalidate_cache()
            try:
                listed = self._files.ls(self._at(folder).rstrip("/"), detail=True)
            except FileNotFoundError:
                return {}
            start = len(self._files._strip_protocol(self._path)) + 1
            names = ((self._files._strip_protocol(info["name"])[start:], info) for info in listed)
            return {name: _found(info) for name, info in names if info["type"] == "file" and name.startswith(folder)}

        return self._attempt(folder, action)

    def write(self, name: str, content: bytes, *, create: bool = False) -> bool:
        """Put an object whole, and see that the storage holds it.

        With `create`, only where there is none, and `False` where there is one of another content; where the storage
        knows conditional writes, of several writers at once one succeeds.
        """

        def action() -> bool:
            is_new = self._put(self._at(name), content, create=create)
            if self.holds(name, content):
                return True
            if not is_new:
                return False
            raise ConnectionError("arrived damaged")

        return self._attempt(name, action)

    def upload(self, path: Path, name: str = "", *, create: bool = False) -> bool:
        """Put a file of this machine; see `write`."""
        return self.write(name or path.name, path.read_bytes(), create=create)

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects, several at once; those that are not there are no error."""

        def remove_one(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._at(name))

        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(lambda name: self._attempt(name, lambda: remove_one(name)), names):
                pass

    def abort_uploads(self) -> int:
        """Abort uploads in parts that were begun here and never ended, which storage keeps, and bills, unseen.

        Where that is not allowed, it is said how else they go.
        """
        if not hasattr(self._files, "list_multipart_uploads"):
            return 0
        bucket, _, key = self._files._strip_protocol(self._path).partition("/")

        def action() -> int:
            answer = self._files.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/")
            begun = answer.get("Uploads", [])
            for upload in begun:
                self._files.call_s3(
                    "abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )
            return len(begun)

        try:
            return self._attempt("", action, tries=1)
        except SourceReadError as error:
            warnings.warn(
                f"{error}: uploads that died here stay; let a lifecycle rule of the bucket end them", stacklevel=2
            )
            return 0

    def _at(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"

    def _attempt(self, name: str, action: Callable[[], Result], **options: int) -> Result:
        shown = f"{self.name}/{name}" if name else self.name
        return remote.attempt(shown, f"{self.url}/{name}" if name else self.url, action, **options)

    def _put(self, path: str, content: bytes, *, create: bool) -> bool:
        """Whether it was written; `False` where `create` found another."""
        try:
            if isinstance(self._files, AsyncFileSystem):
                is_s3 = "s3" in self._files.protocol
                options: dict[str, Any] = {"chunksize": PART, "max_concurrency": PARTS_AT_ONCE} if is_s3 else {}
                self._files.pipe_file(path, content, **options, **({"mode": "create"} if create else {}))
            else:
                self._files.makedirs(self._files._parent(path), exist_ok=True)
                with self._files.open(path, "xb" if create else "wb") as file:
                    file.write(content)
            return True
        except FileNotFoundError:
            raise InputError(f"{self.name}: no such bucket or container; make it first, or check the address") from None
        except Exception as error:
            codes = [_code(link) for link in _chain(error)] if create else []
            if create and "NotImplemented" in codes:  # a service that knows no conditional write
                return self._files.exists(path) is False and self._put(path, content, create=False)
            if create and (isinstance(error, FileExistsError) or {"PreconditionFailed", "412"} & {*codes}):
                return False
            raise

    def holds(self, name: str, content: bytes) -> bool:
        """Whether an object is this content: by its size, then by its MD5 where that is its tag, else by reading it."""
        found = self.find(name)
        if found is None or found.num_bytes != len(content):
            return False
        return found.tag in _md5_tags(content) or self.get(name) == content


def _found(info: dict[str, Any]) -> Found:
    tag = next((info[key] for key in _TAGS if info.get(key)), "")
    tag = tag.timestamp() if isinstance(tag, datetime) else tag
    return Found(int(info["size"] or 0), str(tag).strip('"'))


def _md5_tags(content: bytes) -> Iterator[str]:
    """What S3 calls an object of this content that came in parts, if it would, and one that came at once; what Google's
    storage has as its MD5.
    """
    if len(content) >= 2 * PART:
        view = memoryview(content)
        parts = [hashlib.md5(view[at : at + PART], usedforsecurity=False).digest() for at in range(0, len(view), PART)]
        yield f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"
    whole = hashlib.md5(content, usedforsecurity=False)
    yield whole.hexdigest()
    yield base64.b64encode(whole.digest()).decode()


def _code(error: BaseException) -> str:
    """What a service calls an error, or its HTTP status."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code") if isinstance(response, dict) else getattr(error, "code", ""))


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
