"""JSON files -> pieces cut between records without parsing them: lines, or the elements of an array."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcollate.errors import InputError
from fastcollate.sources.compression import Content
from fastcollate.sources.find import Source

MAX_RECORD_BYTES = 256 << 20
NOT_UTF8 = (
    "a byte that is not UTF-8; if the file is in another encoding, convert it, as by iconv -f WINDOWS-1252 -t UTF-8"
)
_PIECE = 1 << 17  # bytes looked at at once
_MARKS = (  # those of UTF-32 begin or look like those of UTF-16
    (b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"),
)  # fmt: skip
_ZEROS: dict[tuple[bool, ...], str] = {  # where the zeros stand in two or one ASCII characters
    (False, True, False, True): "UTF-16LE", (True, False, True, False): "UTF-16BE",
    (False, True, True, True): "UTF-32LE", (True, True, True, False): "UTF-32BE",
}  # fmt: skip
_BOM = b"\xef\xbb\xbf"
_ARRAY = re.compile(rb"[ \t\r\n]*\[(?P<key>)")
_RECORDS = re.compile(
    rb'[ \t\r\n]*(?:\{[ \t\r\n]*"(?P<key>data|records|rows|examples|train)"[ \t\r\n]*:[ \t\r\n]*)?'
    rb"\[(?=[ \t\r\n]*\{)"
)
_PRETTY = re.compile(rb'[ \t\r\n]*\{[ \t\r]*\n[ \t\r\n]*"[^"\n]*"[ \t]*:')
_BLANK = re.compile(rb"[ \t\r\n]*")
_BLANK_LINE = re.compile(rb"^[ \t\r]*(?:\n|\Z)", re.M)
_QUOTE, _OPEN, _CLOSE, _COMMA = 1, 2, 3, 4
_KIND = np.zeros(256, np.uint8)
for _kind, _bytes in ((_QUOTE, b'"'), (_OPEN, b"[{"), (_CLOSE, b"]}"), (_COMMA, b",")):
    _KIND[list(_bytes)] = _kind


class Piece(NamedTuple):
    """What its source decides of a `Block`, which has the same attributes."""

    kind: str
    num_rows: int
    first_line: int
    num_bytes: int
    source_bytes: int = 0
    fault: str = ""
    data: bytes | None = None
    path: str = ""
    start: int = 0


EMPTY = Piece("lines", 0, 0, 0, fault="the file is empty", data=b"")


def json_pieces(source: Source, file: IO[bytes], targets: Iterator[int]) -> Iterator[Piece]:
    """A file's pieces of about the targets' sizes; refuses a record larger than `MAX_RECORD_BYTES`.

    Of a file that was opened without a buffer they are places in it, which workers can read themselves.
    """
    reader = _Reader(source, file, targets)
    reader.fill()
    if not len(reader):
        yield EMPTY
        return
    if reader.buffer[: len(_BOM)] == _BOM:
        reader.skip(len(_BOM))
    check_encoding(bytes(reader.buffer[:4]), source.name)
    opening = _opening(reader)
    if opening is None and _PRETTY.match(reader.buffer):
        remedy = "write one record a line, or all in an array [ ... ]"
        raise InputError(f"{source.name}: holds an object that takes several lines; {remedy}")
    if opening is None:
        yield from _line_pieces(reader)
        return
    key = opening["key"]
    if key or source.format == "lines":
        inside = f"records inside {key.decode()!r}" if key else "a JSON array, in a file named as lines"
        warnings.warn(f"{source.name}: {inside}; its elements are taken for the records", UserWarning, stacklevel=2)
    reader.skip(opening.end())
    yield from _array_pieces(reader, in_object=bool(key))


def _opening(reader: _Reader) -> re.Match[bytes] | None:
    """What opens an array of records, perhaps inside an object, in a file that does not hold one record a line."""
    found = _RECORDS.match(reader.buffer)
    if found is None:
        return _ARRAY.match(reader.buffer) if reader.is_json else None
    if found["key"] is None and reader.is_json:
        return found
    line, _, rest = bytes(reader.buffer).lstrip().partition(b"\n")
    if not rest.strip():
        return found
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return found
    return None  # the first line is a whole value, and another follows


def check_encoding(head: bytes, name: str) -> None:
    """Refuse a file whose first four bytes are those of UTF-16 or UTF-32, with or without a byte order mark."""
    zeros = tuple(byte == 0 for byte in head)
    found = next((encoding for mark, encoding in _MARKS if head.startswith(mark)), _ZEROS.get(zeros))
    if found is not None:
        raise InputError(f"{name}: is {found}, not UTF-8; convert it: iconv -f {found} -t UTF-8 OLD > NEW")


class _Reader:
    """What is read of a source and not yet cut into blocks.

    The memory is used again for all of a source: to get it from the system anew for each block costs more than
    reading it.
    """

    def __init__(self, source: Source, file: IO[bytes], targets: Iterator[int]) -> None:
        content = getattr(file, "raw", None)
        self._stored = content.stored if isinstance(content, Content) else None
        self._local = source.local if isinstance(file, io.FileIO) else None
        self._name, self._file, self._targets = source.name, file, targets
        self.is_json = source.format == "json"
        self.position, self.line, self.at_end = 0, 1, False
        self._target = next(targets)
        if source.num_bytes and self._stored is None:  # a small file takes little memory
            self._target = min(self._target, source.num_bytes + 1)
        self._memory = bytearray(self._target + self._target // 8)
        self._begin = self._end = 0

    @property
    def buffer(self) -> memoryview:
        """What is read and not yet cut; valid until the next `fill`."""
        return memoryview(self._memory)[self._begin : self._end]

    def __len__(self) -> int:
        return self._end - self._begin

    def whole_lines(self) -> int:
        """How much of the buffer, at the end of the source all of it, is whole lines."""
        return len(self) if self.at_end else self._memory.rfind(b"\n", self._begin, self._end) + 1 - self._begin

    def fill_block(self) -> None:
        """Read until the buffer holds a whole block, or the source's end is reached."""
        while not self.at_end and len(self) < self._target:
            self.fill()

    def fill(self) -> None:
        """Read another block behind the buffer."""
        if self._end + self._target > len(self._memory):
            self._make_room()
        room = memoryview(self._memory)[self._end : self._end + self._target]
        while room and (count := self._file.readinto(room)):  # type: ignore[attr-defined]
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

    def take(self, size: int, kind: str, num_rows: int, fault: str = "", *, num_breaks: int | None = None) -> Piece:
        """Cut a piece of `size` bytes off the front."""
        read = self.position + size if self._stored is None else self._stored.tell()
        place = (None, self._local, self.position) if self._local else (bytes(self.buffer[:size]), "", 0)
        piece = Piece(kind, num_rows, self.line, size, read, fault, *place)
        self.skip(size, num_breaks)
        self._target = next(self._targets)
        return piece

    def skip(self, size: int, num_breaks: int | None = None) -> None:
        """Drop bytes off the front."""
        stop = min(self._begin + size, self._end)
        self.line += self._memory.count(b"\n", self._begin, stop) if num_breaks is None else num_breaks
        self.position += size
        self._begin = stop


def _is_blank(data: memoryview) -> bool:
    return _BLANK.fullmatch(data) is not None


def _line_pieces(reader: _Reader) -> Iterator[Piece]:
    reader.fill_block()
    while not (reader.at_end and not len(reader)):
        if (size := reader.whole_lines()) <= 0:
            reader.fill()
            continue
        num_rows, num_breaks = _count_lines(reader.buffer, size)
        if num_rows:
            yield reader.take(size, "lines", num_rows, num_breaks=num_breaks)
        else:
            reader.skip(size)
        reader.fill_block()


def _count_lines(data: memoryview, size: int) -> tuple[int, int]:
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


def _array_pieces(reader: _Reader, *, in_object: bool) -> Iterator[Piece]:
    """Runs of elements, from behind the opening bracket on."""
    is_first = True
    while True:
        reader.fill_block()
        commas, end = scan_array(reader.buffer)
        if end is not None or reader.at_end:
            break
        if commas:
            yield reader.take(commas[-1], "array", len(commas))
            reader.skip(1)
            is_first = False
        else:
            reader.fill()
    size, num_rows = len(reader) if end is None else end, len(commas) + 1
    if end is None and commas and _is_blank(reader.buffer[commas[-1] + 1 :]):  # cut off behind a comma
        size, num_rows = commas[-1], len(commas)
    if end is not None and is_first and _is_blank(reader.buffer[:end]):
        reader.skip(end)
    else:
        yield reader.take(size, "array", num_rows)
    fault = "the file ends inside its JSON array: cut off, or a stray quotation mark or bracket"
    if fault := fault if end is None else _fault_at_end(reader, in_object):
        yield reader.take(0, "array", 0, fault)


def _fault_at_end(reader: _Reader, in_object: bool) -> str:
    """What is wrong with the end of an array, from its closing bracket on."""
    if reader.buffer[0] != ord("]"):
        return "the JSON array is closed by a curly bracket"
    for bracket in b"]}" if in_object else b"]":
        if not len(reader) or reader.buffer[0] != bracket:
            break
        reader.skip(1)
        while (blanks := _blanks(reader.buffer)) == len(reader) and not reader.at_end:
            reader.skip(blanks)
            reader.fill()
        reader.skip(blanks)
    else:
        return "something follows the end of the JSON array" if len(reader) else ""
    more = "ends" if not len(reader) else "holds more than its records"
    return f"the object around the records {more}; write them alone, one a line, or in an array [ ... ]"


def _blanks(data: memoryview) -> int:
    """How many blank bytes stand at the beginning."""
    found = _BLANK.match(data)
    assert found is not None
    return found.end()


def scan_array(data: bytes | memoryview) -> tuple[list[int], int | None]:
    """The commas between an array's elements in a piece of it, and its closing bracket if it is there.

    The piece begins inside the array and outside every element. Strings, escapes and nesting are followed exactly;
    nothing else of the grammar is checked.
    """
    values = np.frombuffer(data, np.uint8)
    kinds = _KIND[values]
    places = np.flatnonzero(kinds)
    kinds = kinds[places]
    escaped = _escaped_quotes(values, places[kinds == _QUOTE])
    if len(escaped):
        keep = ~np.isin(places, escaped, assume_unique=True)
        places, kinds = places[keep], kinds[keep]
    outside = np.cumsum(kinds == _QUOTE, dtype=np.int32) % 2 == 0
    places, kinds = places[outside], kinds[outside]  # closing quotes stay, and count for nothing
    depth = 1 + np.cumsum((kinds == _OPEN).astype(np.int32) - (kinds == _CLOSE))
    ends = np.flatnonzero(depth == 0)
    last = ends[0] if len(ends) else len(places)
    commas = places[:last][(kinds[:last] == _COMMA) & (depth[:last] == 1)].tolist()
    return commas, int(places[last]) if len(ends) else None


def _escaped_quotes(values: npt.NDArray[np.uint8], quotes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The quotes that stand behind an odd number of backslashes."""
    behind: npt.NDArray[Any] = quotes[(quotes > 0) & (values[np.maximum(quotes - 1, 0)] == ord("\\"))]
    if not len(behind):
        return behind
    slashes = np.flatnonzero(values == ord("\\"))
    is_start = np.ones(len(slashes), bool)
    is_start[1:] = np.diff(slashes) != 1
    run_start = np.maximum.accumulate(np.where(is_start, np.arange(len(slashes)), 0))
    last = np.searchsorted(slashes, behind - 1)
    escaped: npt.NDArray[Any] = behind[(last - run_start[last] + 1) % 2 == 1]
    return escaped
