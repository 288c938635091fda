"""URLs: named without what opens them, asked, opened, and read on where a connection broke.

A URL may hold a secret: a password, or a signature in its query. Messages and files get its name alone. Libraries write
URLs into their errors, so none of these is shown, nor left in the chain of ours.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, TypeVar

import fsspec

from fastcollate.errors import InputError, SourceReadError
from fastcollate.sources.compression import open_compressed

_WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before each further try
_MOST_OPENINGS = 100  # of one file: a connection that breaks more often is not worth having
_TICK = 1.1  # seconds: the clock of `Last-Modified` shows whole ones
_READ_TIMEOUT = 60.0  # seconds without a byte
_MOST_SILENCE_S = 120.0  # in one call: a library that has tried again by itself for minutes is not asked again
_SILENT = "no answer in time; try again later"
_CHANGED = "was changed while it was read; start again when it is at rest"
_TAGS = ("ETag", "etag", "generation", "blob_id")  # of one content
_TIMES = ("LastModified", "Last-Modified", "last_modified", "mtime", "modified", "modify", "created")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)([^/?#]*)(.*)", re.DOTALL)
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")
_AT_NAMES_A_PLACE = {"abfs", "abfss", "adl", "az", "git", "github", "hf", "wasb", "wasbs"}
_DENIED = "access denied; sign the URL anew if it is signed and may have expired, else check the credentials"
_NO_HOST = "no such host, or this machine is offline; check the address, or name local files"
_NO_HOST_KINDS = {"gaierror", "ClientConnectorDNSError", "NameResolutionError"}
_KINDS = (  # names of exceptions of many packages, none of which need be installed; what it means; whether it may pass
    ({"OfflineModeIsEnabled"}, "the Hugging Face hub is set offline; unset HF_HUB_OFFLINE, or name local files", False),
    (
        {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "DefaultCredentialsError"},
        "no credentials found; give those of the storage, for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", False,
    ),
    (
        {"SSLCertVerificationError", "ClientConnectorSSLError", "ClientConnectorCertificateError"},
        "the server's certificate is not trusted; check the address and this machine's certificates", False,
    ),
    ({"FileExpired"}, _CHANGED, False),
    ({"FlexibleChecksumError"}, "arrived damaged; try again later", True),
    ({"PermissionError"}, _DENIED, False),
    ({"TimeoutError", "HTTPTimeoutError", "TimeoutException"}, _SILENT, True),
    (
        {"ConnectionRefusedError", "ClientConnectorError", "EndpointConnectionError", "ConnectError", "gaierror"},
        "no connection to the server; check the address, and whether the server is up", True,
    ),
    (
        {"ConnectionError", "ClientConnectionError", "ClientPayloadError", "HTTPClientError", "IncompleteReadError",
         "IncompleteRead", "ResponseStreamingError", "ProtocolError", "TransportError"},
        "the connection broke; try again later", True,
    ),
)  # fmt: skip

Result = TypeVar("Result")


def name_of(url: str) -> str:
    """A URL for messages and files: without user, password, query and fragment.

    Example:
        >>> name_of("https://me:secret@example.org/a.jsonl?signature=secret")
        'https://example.org/a.jsonl'
    """
    return "::".join(map(_name_of_part, re.split(r"::(?![0-9A-Fa-f:.]*\])", url)))  # not within [::1]


def _name_of_part(part: str) -> str:
    if not (match := _URL.fullmatch(part)) or match[1].lower() in ("file", "local"):
        return part
    scheme, slashes, host, rest = match.groups()
    if scheme.lower() not in _AT_NAMES_A_PLACE:
        host = host.rpartition("@")[2]
        if not _HOST.fullmatch(host):  # a password that was not escaped
            return f"{scheme}:{slashes}(not a URL: escape the user and password)"
    # elsewhere a question mark may be a pattern's
    rest = re.sub(r"[?#].*" if scheme.lower() in ("http", "https") else r"\?[^/]*=.*", "", rest, flags=re.DOTALL)
    return f"{scheme}:{slashes}{host}{rest}"


def attempt(
    name: str, url: str, action: Callable[[], Result], *, position: int = 0, tries: int = len(_WAITS) + 1
) -> Result:
    """What `action` gives, which is tried again, each time later, where what stopped it may pass.

    Stopped for good, it is a `SourceReadError` with no other exception in its chain.
    """
    for number in range(1, tries + 1):
        started = time.monotonic()
        try:
            return action()
        except (InputError, ImportError):
            raise
        except Exception as error:  # each package has its own
            reason, may_pass = _cause(error, may_show=name == url)
            may_pass = may_pass and (position > 0 or reason != _NO_HOST)
            may_pass = may_pass and (reason != _SILENT or time.monotonic() - started < _MOST_SILENCE_S)
        if not may_pass or number == tries:
            break
        what, wait = reason.split(";")[0], _WAITS[number - 1]
        place = f" at byte {position}" if position else ""
        warnings.warn(f"{name}: {what}{place}; try {number + 1} of {tries} in {wait} s", RuntimeWarning, stacklevel=2)
        time.sleep(wait)
    raise SourceReadError(f"{name}: {reason}" + (f" (tried {number} times)" if number > 1 else ""))


def _cause(error: BaseException, *, may_show: bool) -> tuple[str, bool]:
    """What failed, with the remedy and without a URL, and whether it may pass."""
    link: BaseException | None = error
    while link is not None:
        if {kind.__name__ for kind in type(link).__mro__} & {
            "gaierror",
            "ClientConnectorDNSError",
            "NameResolutionError",
        }:
            return _NO_HOST, True
        link = link.__cause__ or link.__context__
    link = error
    while link is not None:
        if status := _status(link):
            return _of_status(status)
        kinds = {kind.__name__ for kind in type(link).__mro__}
        for names, reason, may_pass in _KINDS:
            if kinds & names:
                return reason, may_pass
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    if isinstance(error, FileNotFoundError):
        return "no such file; check the address", False
    text = f": {getattr(error, 'strerror', None) or error}" if may_show else ""
    text = re.sub(r"\w[\w+.-]*:/+\S+", "(a URL)", text)
    if isinstance(error, ValueError):
        return f"not a path or URL that can be read (ValueError{text}); check how it begins, such as s3://", False
    return f"cannot be read ({type(error).__name__}{text})", False


def _status(error: BaseException) -> int:
    """The HTTP status that an error of aiohttp, botocore, requests or httpx stands for, or 0."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(response, "status_code", None) or getattr(error, "status", None)
    return status if isinstance(status, int) and status >= 400 else 0


def _of_status(status: int) -> tuple[str, bool]:
    if status in (401, 403):
        return f"HTTP {status}, {_DENIED}", False
    if status in (404, 410):
        return "no such file; check the address", False
    if status == 412:
        return _CHANGED, False
    may_pass = status >= 500 or status in (408, 425, 429)
    remedy = "try again later" if may_pass else "check the address in a browser"
    return f"the server answers HTTP {status}; {remedy}", may_pass


@contextlib.contextmanager
def open_remote(name: str, url: str, compression: str | None, *, is_columnar: bool) -> Iterator[IO[bytes]]:
    """What a URL holds, uncompressed; a columnar file can be read to and fro. Refuses what was changed meanwhile."""
    remote = _Remote(name, url)
    with contextlib.ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(io.BufferedReader(remote, 1 << 16))
        try:
            if compression is not None:
                file = open_compressed(file, compression, name)
            if is_columnar and (compression is not None or remote.is_http):
                copy = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(file, copy, 1 << 20)
                copy.seek(0)
                file = copy
            yield file
        except Exception:
            if remote.is_same(tries=1):
                raise
            raise SourceReadError(f"{name}: {_CHANGED}") from None
        if not remote.is_same():
            raise SourceReadError(f"{name}: {_CHANGED}")


class _Remote(io.RawIOBase):
    """A file behind a URL, which is opened anew where the connection breaks, and read on from there."""

    def __init__(self, name: str, url: str) -> None:
        self._name, self._url = name, url
        self._files, self._path = attempt(name, url, lambda: fsspec.core.url_to_fs(url))
        self.is_http = type(self._files).__name__ == "HTTPFileSystem"
        self._file: Any = None
        self._position = self._openings = 0
        self._version = attempt(name, url, self._ask)
        self._size: int | None = self._version[0]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        """Whether it can be read to and fro."""
        return not self.is_http and self._size is not None

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        if not self.seekable():
            raise io.UnsupportedOperation("seek")
        self._position = offset + (0, self._position, self._size or 0)[whence]
        return self._position

    def readinto(self, room: Any) -> int:
        """Fill `room`, or as much of it as is at hand; 0 at the end."""
        data = attempt(self._name, self._url, lambda: self._read(len(room)), position=self._position)
        room[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read(self, size: int) -> bytes:
        if self._size is not None and self._position >= self._size:
            return b""
        try:
            if self._file is None:
                self._open()
            if self.seekable():
                self._file.seek(self._position)
            data: bytes = self._file.read(size)
            if not data and self._size is not None:
                raise ConnectionError("ended early")
        except BaseException:
            self._drop()
            raise
        return data

    def _open(self) -> None:
        """Open the file at its place."""
        self._openings += 1
        if self._openings > _MOST_OPENINGS:
            raise SourceReadError(f"{self._name}: the connection broke {_MOST_OPENINGS} times; get the file first")
        if self._openings > 1 and not self._is_same():
            raise SourceReadError(f"{self._name}: {_CHANGED}")
        skip = self._position
        if self.is_http:
            self._file = self._stream()
            headers = self._file.r.headers
            if self._file.r.status == 206:
                if not headers.get("Content-Range", "").startswith(f"bytes {skip}-"):
                    raise ConnectionError("another range than was asked for")
                skip = 0
            elif headers.get("Content-Encoding", "identity") != "identity":  # places in it are not those in the content
                self._size = None
        else:
            self._file = self._files.open(self._path, "rb")
            if self.seekable():
                return
        while skip:
            if not (data := self._file.read(min(skip, 1 << 20))):
                raise ConnectionError("ended early")
            skip -= len(data)

    def _stream(self) -> Any:
        """One answer of an HTTP server, from the place on if it can."""
        import aiohttp  # type: ignore[import-not-found,unused-ignore]

        headers = {**self._files.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
        if self._position and self._size is not None:
            headers["Range"] = f"bytes={self._position}-"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_READ_TIMEOUT, sock_read=_READ_TIMEOUT)
        # a size, so that the server is not asked for it once more
        return self._files.open(self._path, "rb", block_size=0, size=1, headers=headers, timeout=timeout)

    def _ask(self) -> tuple[int | None, str, str]:
        """The file's size, and what tells one content of it from another."""
        if self._openings:
            self._files.invalidate_cache()
        info = self._files.info(self._path)
        key = next((key for key in (*_TAGS, *_TIMES) if info.get(key)), "")
        return info.get("size"), key, str(info.get(key))

    def is_same(self, tries: int = len(_WAITS) + 1) -> bool:
        """Whether the file is still the one that was begun, or cannot be asked any more: a signature may expire."""
        try:
            return attempt(self._name, self._url, self._is_same, tries=tries)
        except InputError:
            return True

    def _is_same(self) -> bool:
        now = self._ask()
        if now == self._version or now[0] != self._version[0] or now[1] not in _TIMES:
            return now == self._version
        time.sleep(_TICK)
        return self._ask() != now  # a time that is another at each question tells nothing

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(Exception):  # it is broken
                file.close()

    def close(self) -> None:
        self._drop()
        super().close()
