"""Numba loops that write the text fields of JSON records into a template; nothing else.

`field_kernels.py` has found them, and knows that they are valid.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastcollate.jit import borrow, kernel, load_word, store_word, trailing_zeros, view
from fastcollate.sources.field_kernels import (
    BACKSLASH,
    BACKSLASHES,
    ESCAPED,
    INPUT,
    LOW7,
    NUM_FIELDS,
    OUTPUT,
    TOP,
    UNICODE,
    hex4,
)


@kernel
def _copy(read: int, size: int, readable: int, write: int, writable: int) -> int:
    """Copy bytes, in words of eight where memory ends late enough: what the last one leaves behind is overwritten.

    Takes addresses only: an array argument costs more than the copy.

    Args:
        read: where from.
        size: how many.
        readable: the end of what can be read.
        write: where to.
        writable: the end of what can be written.

    Returns:
        The address behind the copy.
    """
    end = read + size
    whole = end if read + ((size + 7) & -8) <= readable and write + ((size + 7) & -8) <= writable else end - 7
    at = write
    while read < whole:
        store_word(at, load_word(read))
        read += 8
        at += 8
    if read < end:
        source, target = view(read, end - read, np.uint8), view(at, end - read, np.uint8)
        for k in range(len(source)):
            target[k] = source[k]
    return write + size


@kernel
def _write_utf8(code: int, out: Any, at: int) -> int:
    if code < 0x80:
        out[at] = code
        return at + 1
    if code < 0x800:
        out[at] = 0xC0 | (code >> 6)
    elif code < 0x10000:
        out[at] = 0xE0 | (code >> 12)
        at += 1
        out[at] = 0x80 | ((code >> 6) & 0x3F)
    else:
        out[at] = 0xF0 | (code >> 18)
        out[at + 1] = 0x80 | ((code >> 12) & 0x3F)
        at += 2
        out[at] = 0x80 | ((code >> 6) & 0x3F)
    out[at + 1] = 0x80 | (code & 0x3F)
    return at + 2


@kernel
def _next_backslash(read: int, end: int, readable: int) -> int:
    """The address of the first backslash before `end`, or `end`."""
    while read < end:
        if read + 8 > readable:
            if view(read, 1, np.uint8)[0] == BACKSLASH:
                return read
            read += 1
            continue
        other = load_word(read) ^ BACKSLASHES
        found = ((((other & LOW7) + LOW7) | other) & TOP) ^ TOP
        if found != 0:
            return min(read + (trailing_zeros(found) >> 3), end)
        read += 8
    return end


@kernel
def _unescape(data: Any, i: int, stop: int, out: Any, at: int) -> int:
    """Write the text of a valid string."""
    first, own = np.int64(data.ctypes.data), np.int64(out.ctypes.data)
    readable, writable = first + len(data), own + len(out)
    while i < stop:
        run, i = i, _next_backslash(first + i, first + stop, readable) - first
        at = _copy(first + run, i - run, readable, own + at, writable) - own
        if i == stop:
            return at
        if data[i + 1] != UNICODE:
            out[at] = ESCAPED[data[i + 1]]
            at, i = at + 1, i + 2
        else:
            code = hex4(data, i + 2)
            i += 6
            if 0xD800 <= code < 0xDC00:
                code = 0x10000 + ((code - 0xD800) << 10) + hex4(data, i + 2) - 0xDC00
                i += 6
            at = _write_utf8(code, out, at)
    return at


@kernel
def write_texts(
    data: Any, spans: Any, rows: Any, head: Any, before_input: Any, before_output: Any, out: Any, offsets: Any
) -> int:
    """Write prompt and response of some regular records end to end.

    Args:
        data: as in `scan_records`.
        spans: what it found.
        rows: int64, the records to write.
        head: uint8, begins every prompt.
        before_input: uint8, stands before an input that is not empty.
        before_output: uint8, begins every response.
        out: out, uint8, long enough: no text grows by unescaping.
        offsets: out, int64 `(2 * len(rows) + 1,)`, where each prompt and each response begins.

    Returns:
        The number of bytes written.
    """
    data, spans, rows, out, offsets = borrow(data), borrow(spans), borrow(rows), borrow(out), borrow(offsets)
    first, own = np.int64(data.ctypes.data), np.int64(out.ctypes.data)
    readable, writable = first + len(data), own + len(out)
    pieces = (np.int64(head.ctypes.data), np.int64(before_input.ctypes.data), np.int64(before_output.ctypes.data))
    sizes = (len(head), len(before_input), len(before_output))
    at = 0
    offsets[0] = 0
    for k in range(len(rows)):
        row = rows[k]
        for field in range(NUM_FIELDS):
            begin, end, has_escape = spans[row, field, 0], spans[row, field, 1], spans[row, field, 2]
            if field == OUTPUT:
                offsets[2 * k + 1] = at
            if field != INPUT or end > begin:
                piece, size = pieces[field], sizes[field]
                at = _copy(piece, size, piece + size, own + at, writable) - own
                if has_escape:
                    at = _unescape(data, begin, end, out, at)
                else:
                    at = _copy(first + begin, end - begin, readable, own + at, writable) - own
        offsets[2 * k + 2] = at
    return at
