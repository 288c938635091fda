"""Compressed files, read to their end or not at all.

The libraries' own files differ in what they pass over in silence: an end inside a frame, further frames, damage to the
first bytes of a further one. Here every compression is read frame by frame, and an end is one only between two.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from fastcollate.errors import SourceReadError, import_extra

COMPRESSIONS = {
    ".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz",
}  # fmt: skip
_FEED = 1 << 12  # compressed bytes at once: even what is made to grow takes some megabytes
_ZERO_PADDED = ("gzip", "xz")  # behind a frame


def open_compressed(file: IO[bytes], compression: str, name: str) -> io.BufferedReader:
    """What a file of `gzip`, `zstd`, `bz2` or `xz` holds, which is open at its start; `name` is for messages.

    An end inside a frame, and damage, are a `SourceReadError` when they are read.
    """
    return io.BufferedReader(Content(file, _frames(file, compression, name)), 1 << 16)


def _frames(file: IO[bytes], compression: str, name: str) -> Iterator[bytes]:
    """The content of frames, one behind the other, in pieces."""
    start, padding = _starter(compression), b"\0" if compression in _ZERO_PADDED else b""
    frame, position, rest = None, 0, b""
    while data := rest or file.read(_FEED):
        position += 0 if rest else len(data)
        rest = b""
        if frame is None or frame.eof:
            if frame is not None and not (data := data.lstrip(padding)):
                continue
            frame = start()
        try:
            piece = frame.decompress(data)
        except Exception as error:  # each library has its own
            raise SourceReadError(
                f"{name}: its compressed data is damaged before byte {position} ({error}); get the file anew"
            ) from error
        rest = frame.unused_data if frame.eof else b""
        yield piece
    if frame is not None and not frame.eof:
        raise SourceReadError(
            f"{name}: ends at byte {position} inside its compressed data: it was cut off; get the file anew"
        )


def _starter(compression: str) -> Callable[[], Any]:
    """What begins a frame: an object with `decompress`, `eof` and `unused_data`."""
    if compression == "zstd":
        zstandard = import_extra("zstandard", "zstd")
        return lambda: zstandard.ZstdDecompressor().decompressobj()
    if compression == "gzip":
        return lambda: zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    return bz2.BZ2Decompressor if compression == "bz2" else lzma.LZMADecompressor


class Content(io.RawIOBase):
    """Pieces as a file, made of the bytes of `stored`."""

    def __init__(self, stored: IO[bytes], pieces: Iterator[bytes]) -> None:
        self.stored = stored
        self._pieces = pieces
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, room: Any) -> int:
        """Fill `room`, or as much of it as is at hand; 0 at the end."""
        while not self._ready:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._ready = memoryview(piece)
        count = min(len(room), len(self._ready))
        room[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        """Close the file that is stored."""
        self.stored.close()
        super().close()
