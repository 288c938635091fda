"""JSON files -> pieces cut between records without parsing them: lines, or the elements of an array."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from fastcollate.errors import InputError
from fastcollate.sources.scanner import scan_array

MAX_RECORD_BYTES = 256 << 20
_PIECE = 1 << 17  # bytes looked at at once
_BOM = b"\xef\xbb\xbf"
NOT_UTF8 = (
    "a byte that is not UTF-8; if the file is in another encoding, convert it, as by iconv -f WINDOWS-1252 -t UTF-8"
)
_ARRAY = re.compile(rb"[ \t\r\n]*\[")
_PRETTY = re.compile(rb'[ \t\r\n]*\{[ \t\r]*\n[ \t\r\n]*"[^"\n]*"[ \t]*:')
_BLANK = re.compile(rb"[ \t\r\n]*")
_BLANK_LINE = re.compile(rb"^[ \t\r]*(?:\n|\Z)", re.M)


def json_pieces(
    file: IO[bytes],
    targets: Iterator[int],
    *,
    name: str,
    only_lines: bool,
    local: str | None,
    is_compressed: bool,
    num_bytes: int = 0,
) -> Iterator[dict[str, Any]]:
    """A file's blocks, as the keywords of `Block` that the file decides.

    Args:
        file: open at its start, uncompressed on the way.
        targets: about how large each block is.
        name: the file's, for messages.
        only_lines: whether `[` at its start is a record's, and not an array's of records.
        local: its path where workers can read it themselves; the blocks are places in it then.
        is_compressed: whether positions in what is read are not positions in the file.
        num_bytes: how much there is to read, where that is known, so that a small file takes little memory.

    Raises:
        InputError: a record is larger than `MAX_RECORD_BYTES`.
    """
    reader = _Reader(file, targets, name, local, is_compressed, num_bytes)
    reader.fill()
    if reader.buffer[: len(_BOM)] == _BOM:
        reader.skip(len(_BOM))
    check_encoding(bytes(reader.buffer[:4]), name)
    if _PRETTY.match(reader.buffer) is not None:
        raise InputError(
            f"{name}: holds an object that takes several lines; write one record a line, or all in an array [ ... ]"
        )
    is_array = not only_lines and _ARRAY.match(reader.buffer) is not None
    yield from _array_pieces(reader) if is_array else _line_pieces(reader)


def check_encoding(head: bytes, name: str) -> None:
    """Refuse a file whose first bytes are those of UTF-16 or UTF-32."""
    zeros = [byte == 0 for byte in head]
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or zeros in ([True, False] * 2, [False, True] * 2) or sum(zeros) == 3:
        raise InputError(f"{name}: is UTF-16 or UTF-32, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8")


class _Reader:
    """What is read of a source and not yet cut into blocks.

    The memory is used again for all of a source: to get it from the system anew for each block costs more than
    reading it.
    """

    def __init__(
        self,
        file: IO[bytes],
        targets: Iterator[int],
        name: str,
        local: str | None,
        is_compressed: bool,
        num_bytes: int,
    ) -> None:
        self._name = name
        self._local = local
        self._is_compressed = is_compressed
        self.position = 0
        self.line = 1
        self.at_end = False
        self._file = file
        self._targets = targets
        self._target = min(next(targets), num_bytes + 1) if num_bytes else next(targets)
        self._memory = bytearray(self._target + self._target // 8)
        self._begin = self._end = 0

    @property
    def buffer(self) -> memoryview:
        """What is read and not yet cut; valid until the next `fill`."""
        return memoryview(self._memory)[self._begin : self._end]

    def __len__(self) -> int:
        return self._end - self._begin

    def last_break(self, start: int) -> int:
        """The place in the buffer of the last line break that is not before `start`, or -1."""
        return max(self._memory.rfind(b"\n", self._begin + start, self._end) - self._begin, -1)

    def fill_block(self) -> None:
        """Read until the buffer holds a whole block, or the source's end is reached."""
        while not self.at_end and len(self) < self._target:
            self.fill()

    def fill(self) -> None:
        """Read another block behind the buffer."""
        if self._end + self._target > len(self._memory):
            self._make_room()
        room = memoryview(self._memory)[self._end : self._end + self._target]
        while room and (count := _read_into(self._file, room)):
            self._end += count
            room = room[count:]
        self.at_end = bool(room)
        if len(self) > MAX_RECORD_BYTES + 2 * self._target:
            raise InputError(
                f"{self._name}, line {self.line}: a record of more than {MAX_RECORD_BYTES >> 20} MB, or a "
                "quotation mark that is never closed; mend or split it"
            )

    def _make_room(self) -> None:
        """Move the buffer to the front, of more memory if need be."""
        rest = bytes(self.buffer)
        if (wanted := len(rest) + self._target) > len(self._memory):
            self._memory = bytearray(max(wanted + wanted // 8, 2 * len(self._memory)))
        self._memory[: len(rest)] = rest
        self._begin, self._end = 0, len(rest)

    def take(
        self, size: int, kind: str, num_rows: int, fault: str = "", *, num_breaks: int | None = None
    ) -> dict[str, Any]:
        """Cut a block of `size` bytes off the front."""
        piece = {
            "kind": kind,
            "num_rows": num_rows,
            "first_line": self.line,
            "num_bytes": size,
            "source_bytes": self._stored_position(size),
            "fault": fault,
            "data": None if self._local else bytes(self.buffer[:size]),
            "path": self._local or "",
            "start": self.position,
        }
        self.skip(size, num_breaks)
        self._target = next(self._targets)
        return piece

    def skip(self, size: int, num_breaks: int | None = None) -> None:
        """Drop bytes off the front."""
        stop = min(self._begin + size, self._end)
        self.line += self._memory.count(b"\n", self._begin, stop) if num_breaks is None else num_breaks
        self.position += size
        self._begin = stop

    def _stored_position(self, size: int) -> int:
        if not self._is_compressed:
            return self.position + size
        raw = getattr(self._file, "fileobj", None) or getattr(self._file, "_fp", None)
        try:
            return int(raw.tell()) if raw is not None else 0
        except (OSError, ValueError, AttributeError):
            return 0  # only the progress bar asks


def _read_into(file: IO[bytes], room: memoryview) -> int:
    """Read at most so many bytes; 0 at the end."""
    if hasattr(file, "readinto"):
        return int(file.readinto(room) or 0)
    data = file.read(len(room))
    room[: len(data)] = data
    return len(data)


def _is_blank(data: memoryview) -> bool:
    return _BLANK.fullmatch(data) is not None


def _line_pieces(reader: _Reader) -> Iterator[dict[str, Any]]:
    searched = 0
    reader.fill_block()
    while not (reader.at_end and not len(reader)):
        stop = reader.last_break(searched) + 1
        if not stop and not reader.at_end:
            searched = len(reader)
            reader.fill()
            continue
        size = stop if stop and not reader.at_end else len(reader)
        searched = 0
        num_rows, num_breaks = _count_lines(reader.buffer, size)
        if num_rows:
            yield reader.take(size, "lines", num_rows, num_breaks=num_breaks)
        else:
            reader.skip(size)
        reader.fill_block()


def _count_lines(data: bytes | memoryview, size: int) -> tuple[int, int]:
    """The number of lines that are not blank, and of line breaks, in the first `size` bytes."""
    values = np.frombuffer(data, np.uint8, size)
    num_breaks, has_blanks = 0, data[0] in b" \t\r\n"
    for start in range(0, size, _PIECE):  # in pieces that stay in a core's cache
        piece = values[start : start + _PIECE + 1]
        is_break = piece[:_PIECE] == ord("\n")
        num_breaks += int(np.count_nonzero(is_break))
        following = piece[1:]
        has_blanks = has_blanks or bool((is_break[: len(following)] & (following <= ord(" "))).any())
    count = num_breaks + (data[size - 1] != ord("\n"))
    if has_blanks:
        count -= sum(1 for match in _BLANK_LINE.finditer(data, 0, size) if match.start() < size)
    return count, num_breaks


def _array_pieces(reader: _Reader) -> Iterator[dict[str, Any]]:
    reader.skip(bytes(reader.buffer).index(b"[") + 1)
    is_first = True
    while True:
        reader.fill_block()
        scan = scan_array(reader.buffer)
        if scan.end is not None:
            if not _is_blank(reader.buffer[: scan.end]) or not is_first:
                yield reader.take(scan.end, "array", len(scan.commas) + 1)
            else:
                reader.skip(scan.end)
            if reader.buffer[0] != ord("]"):
                yield reader.take(0, "array", 0, "the JSON array is closed by a curly bracket")
                return
            reader.skip(1)
            yield from _after_array(reader)
            return
        if reader.at_end:
            size, num_rows = len(reader), len(scan.commas) + 1
            if scan.commas and _is_blank(reader.buffer[scan.commas[-1] + 1 :]):  # cut off behind a comma
                size, num_rows = scan.commas[-1], len(scan.commas)
            yield reader.take(size, "array", num_rows)
            yield reader.take(
                0, "array", 0, "the file ends inside its JSON array: cut off, or a stray quotation mark or bracket"
            )
            return
        if scan.commas:
            yield reader.take(scan.commas[-1], "array", len(scan.commas))
            reader.skip(1)
            is_first = False
        else:
            reader.fill()


def _after_array(reader: _Reader) -> Iterator[dict[str, Any]]:
    while not reader.at_end and _is_blank(reader.buffer):
        reader.skip(len(reader))
        reader.fill()
    if not _is_blank(reader.buffer):
        yield reader.take(0, "array", 0, "something follows the end of the JSON array")
