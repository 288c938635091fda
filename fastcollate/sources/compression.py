"""Compressed files, read to their end or not at all.

The libraries' own files differ in what they pass over in silence: an end inside a frame, further frames, damage to the
first bytes of a further one. Here every compression is read frame by frame, and an end is one only between two.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any

from fastcollate.errors import SourceReadError, import_extra

COMPRESSIONS = {
    ".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz",
}  # fmt: skip
_FEED = 1 << 12  # compressed bytes at once: even what is made to grow takes some megabytes
_ZERO_PADDED = ("gzip", "xz")  # behind a frame


def open_compressed(file: IO[bytes], compression: str, name: str) -> IO[bytes]:
    """What a compressed file holds.

    Args:
        file: open at its start.
        compression: `gzip`, `zstd`, `bz2` or `xz`.
        name: the file's, for messages.

    Raises:
        SourceReadError: when it is read: it ends inside a frame, or is damaged.
    """
    return io.BufferedReader(_Frames(file, compression, name), 1 << 16)


def _starter(compression: str) -> Callable[[], Any]:
    """What begins a frame: an object with `decompress`, `eof` and `unused_data`."""
    if compression == "zstd":
        zstandard = import_extra("zstandard", "zstd")
        return lambda: zstandard.ZstdDecompressor().decompressobj()
    if compression == "gzip":
        return lambda: zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    return bz2.BZ2Decompressor if compression == "bz2" else lzma.LZMADecompressor


class _Frames(io.RawIOBase):
    """The content of frames, one behind the other."""

    def __init__(self, file: IO[bytes], compression: str, name: str) -> None:
        self.fileobj = file
        self._compression = compression
        self._start = _starter(compression)
        self._frame: Any = None
        self._name = name
        self._position = 0  # bytes taken from the file
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, room: Any) -> int:
        """Fill `room`, or as much of it as is at hand; 0 at the end."""
        while not self._ready:
            data = self._next_input()
            if data is None:
                return 0
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except Exception as error:  # each library has its own
                raise SourceReadError(
                    f"{self._name}: its compressed data is damaged before byte {self._position} ({error}); "
                    "get the file anew"
                ) from error
        count = min(len(room), len(self._ready))
        room[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _next_input(self) -> bytes | None:
        """Bytes for the frame that is read, or for one that begins; `None` at the end of the last."""
        is_between = self._frame is None or self._frame.eof
        data: bytes = self._frame.unused_data if self._frame is not None and is_between else b""
        data = self._stripped(data) or self._read()
        while is_between and data and not (data := self._stripped(data)):
            data = self._read()
        if is_between and data:
            self._frame = self._start()
        elif not data and not is_between:
            raise SourceReadError(
                f"{self._name}: ends at byte {self._position} inside its compressed data: it was cut off; "
                "get the file anew"
            )
        return data or None

    def _stripped(self, data: bytes) -> bytes:
        return data.lstrip(b"\0") if self._frame is not None and self._compression in _ZERO_PADDED else data

    def _read(self) -> bytes:
        data = self.fileobj.read(_FEED)
        self._position += len(data)
        return data

    def close(self) -> None:
        """Close the file."""
        self.fileobj.close()
        super().close()
