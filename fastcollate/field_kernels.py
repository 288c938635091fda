"""Numba loops over JSON bytes: find the text fields of flat records, and write them into a template; nothing else.

`fields.py` validates and allocates; see `jit.py` for how they are compiled. A record is **regular** when it is a JSON
object of strings, short plain numbers, `true`, `false` and `null`, valid to the last byte, whose fields are texts. Of
everything else only the place is noted: a full parser looks at it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastcollate.jit import kernel

INSTRUCTION, INPUT, OUTPUT = range(3)  # fields; the input may be missing or null
NUM_FIELDS = 3
_NO_NAME = 1 << 30
_MAX_DIGITS = 18  # every parser reads these alike

_QUOTE, _BACKSLASH, _OPEN, _CLOSE, _COLON, _COMMA, _NEWLINE, _MINUS, _POINT = (ord(c) for c in '"\\{}:,\n-.')
_N, _T, _F, _U = (ord(c) for c in "ntfu")
_OPEN_LIST, _CLOSE_LIST = ord("["), ord("]")

_SPECIAL = np.zeros(256, np.uint8)  # bytes that do not stand for themselves in a string
_SPECIAL[:32] = 1
_SPECIAL[[_QUOTE, _BACKSLASH]] = 1
_SPECIAL[128:] = 1
_SPACE = np.zeros(256, np.bool_)  # white space within a line
_SPACE[[ord(c) for c in " \t\r"]] = True
_ESCAPED = np.zeros(256, np.uint8)  # what a one-letter escape means
for _letter, _meaning in zip('"\\/bfnrt', '"\\/\b\f\n\r\t', strict=True):
    _ESCAPED[ord(_letter)] = ord(_meaning)
_HEX = np.full(256, -1, np.int64)
for _digit in "0123456789abcdefABCDEF":
    _HEX[ord(_digit)] = int(_digit, 16)


@kernel
def _skip_space(data: Any, i: int, with_newlines: bool) -> int:
    while i < len(data) and (_SPACE[data[i]] or (with_newlines and data[i] == _NEWLINE)):
        i += 1
    return i


@kernel
def _hex4(data: Any, i: int) -> int:
    """The number that four digits name, or -1."""
    if i + 4 > len(data):
        return -1
    value = 0
    for k in range(4):
        digit = _HEX[data[i + k]]
        if digit < 0:
            return -1
        value = value * 16 + digit
    return value


@kernel
def _escape_end(data: Any, i: int) -> int:
    """The place behind the escape at `i`, or -1 where it is not valid or half a surrogate pair."""
    if i + 1 >= len(data):
        return -1
    if data[i + 1] != _U:
        return i + 2 if _ESCAPED[data[i + 1]] else -1
    code = _hex4(data, i + 2)
    if code < 0 or 0xDC00 <= code < 0xE000:
        return -1
    if code < 0xD800 or code >= 0xE000:
        return i + 6
    if i + 12 > len(data) or data[i + 6] != _BACKSLASH or data[i + 7] != _U:
        return -1
    return i + 12 if 0xDC00 <= _hex4(data, i + 8) < 0xE000 else -1


@kernel
def _utf8_end(data: Any, i: int) -> int:
    """The place behind the character of several bytes at `i`, or -1 where it is not UTF-8."""
    lead = np.int64(data[i])
    low, high = 0x80, 0xBF
    if 0xC2 <= lead <= 0xDF:
        size = 2
    elif 0xE0 <= lead <= 0xEF:
        size = 3
        low, high = (0xA0 if lead == 0xE0 else 0x80), (0x9F if lead == 0xED else 0xBF)
    elif 0xF0 <= lead <= 0xF4:
        size = 4
        low, high = (0x90 if lead == 0xF0 else 0x80), (0x8F if lead == 0xF4 else 0xBF)
    else:
        return -1
    if i + size > len(data) or data[i + 1] < low or data[i + 1] > high:
        return -1
    for k in range(2, size):
        if data[i + k] < 0x80 or data[i + k] > 0xBF:
            return -1
    return i + size


@kernel
def _is_plain8(data: Any, i: int) -> Any:
    """Whether none of eight bytes is special: one branch in place of eight."""
    first = _SPECIAL[data[i]] | _SPECIAL[data[i + 1]] | _SPECIAL[data[i + 2]] | _SPECIAL[data[i + 3]]
    second = _SPECIAL[data[i + 4]] | _SPECIAL[data[i + 5]] | _SPECIAL[data[i + 6]] | _SPECIAL[data[i + 7]]
    return (first | second) == 0


@kernel
def _string_end(data: Any, i: int) -> tuple[int, bool]:
    """The place of the quote that closes the string whose content begins at `i`, and whether it holds an escape.

    -1 where it is not valid.
    """
    has_escape = False
    while True:
        while i + 8 <= len(data) and _is_plain8(data, i):
            i += 8
        while i < len(data) and not _SPECIAL[data[i]]:
            i += 1
        if i >= len(data):
            return -1, has_escape
        if data[i] == _QUOTE:
            return i, has_escape
        if data[i] == _BACKSLASH:
            has_escape = True
            i = _escape_end(data, i)
        elif data[i] >= 0x80:
            i = _utf8_end(data, i)
        else:
            return -1, has_escape
        if i < 0:
            return -1, has_escape


@kernel
def _literal_end(data: Any, i: int, literal: Any) -> int:
    if i + len(literal) > len(data):
        return -1
    for k in range(len(literal)):
        if data[i + k] != literal[k]:
            return -1
    return i + len(literal)


_NULL, _TRUE, _FALSE = (np.frombuffer(word, np.uint8) for word in (b"null", b"true", b"false"))


@kernel
def _digits_end(data: Any, i: int) -> int:
    while i < len(data) and 48 <= data[i] <= 57:
        i += 1
    return i


@kernel
def _scalar_end(data: Any, i: int) -> int:
    """The place behind `null`, `true`, `false` or a short number without an exponent at `i`, or -1."""
    if data[i] == _N:
        return _literal_end(data, i, _NULL)
    if data[i] == _T:
        return _literal_end(data, i, _TRUE)
    if data[i] == _F:
        return _literal_end(data, i, _FALSE)
    begin = i + 1 if data[i] == _MINUS else i
    end = _digits_end(data, begin)
    if end == begin or (data[begin] == 48 and end > begin + 1):
        return -1
    if end < len(data) and data[end] == _POINT:
        fraction = end + 1
        end = _digits_end(data, fraction)
        if end == fraction:
            return -1
    return end if end - begin <= _MAX_DIGITS else -1


@kernel
def _find_name(data: Any, start: int, stop: int, names: Any, ends: Any) -> int:
    """Which name a key is, or -1."""
    first = 0
    for name in range(len(ends)):
        if ends[name] - first == stop - start:
            k = 0
            while k < stop - start and data[start + k] == names[first + k]:
                k += 1
            if k == stop - start:
                return name
        first = ends[name]
    return -1


@kernel
def _record_end(data: Any, i: int, in_array: bool) -> int:
    """Where the record that begins at `i` ends, whatever it holds: its newline, or the comma outside all brackets."""
    depth, in_string = 0, False
    while i < len(data):
        byte = data[i]
        if not in_array:
            if byte == _NEWLINE:
                return i
        elif byte == _BACKSLASH:
            if i + 1 < len(data) and (data[i + 1] == _QUOTE or data[i + 1] == _BACKSLASH):
                i += 1
        elif byte == _QUOTE:
            in_string = not in_string
        elif not in_string:
            if byte == _COMMA and depth == 0:
                return i
            if byte in (_OPEN, _OPEN_LIST):
                depth += 1
            elif byte in (_CLOSE, _CLOSE_LIST):
                depth -= 1
        i += 1
    return len(data)


@kernel
def _is_whole(span: Any) -> bool:
    """Whether instruction and output are there, and not every text is empty."""
    if span[INSTRUCTION, 0] < 0 or span[OUTPUT, 0] < 0:
        return False
    size = 0
    for field in range(NUM_FIELDS):
        size += span[field, 1] - span[field, 0]
    return size > 0


@kernel
def _scan_record(
    data: Any, i: int, in_array: bool, names: Any, ends: Any, name_field: Any, span: Any, best: Any
) -> int:
    """The place behind the regular record at `i`, or -1; its fields' places go to `span`."""
    span[:, :2] = -1
    best[:] = _NO_NAME
    seen = 0
    if i >= len(data) or data[i] != _OPEN:
        return -1
    while True:
        i = _skip_space(data, i + 1, in_array)
        if i >= len(data) or data[i] != _QUOTE:
            return -1
        key = i + 1
        stop, has_escape = _string_end(data, key)
        if stop < 0 or has_escape:
            return -1
        name = _find_name(data, key, stop, names, ends)
        i = _skip_space(data, stop + 1, in_array)
        if i >= len(data) or data[i] != _COLON:
            return -1
        i = _skip_space(data, i + 1, in_array)
        if i >= len(data) or (name >= 0 and (seen >> name) & 1):
            return -1  # cut off, or a name for the second time
        is_text = data[i] == _QUOTE
        if is_text:
            stop, has_escape = _string_end(data, i + 1)
        else:
            stop = _scalar_end(data, i)
        if stop < 0:
            return -1
        if name >= 0:
            field, seen = name_field[name], seen | (1 << name)
            if is_text and name < best[field]:
                best[field], span[field, 0], span[field, 1] = name, i + 1, stop
                span[field, 2] = has_escape
            elif not is_text and (field != INPUT or data[i] != _N):
                return -1
        i = _skip_space(data, stop + 1 if is_text else stop, in_array)
        if i < len(data) and data[i] == _CLOSE:
            return i + 1 if _is_whole(span) else -1
        if i >= len(data) or data[i] != _COMMA:
            return -1


@kernel
def scan_records(
    data: Any, in_array: bool, names: Any, ends: Any, name_field: Any, spans: Any, bounds: Any, regular: Any
) -> int:
    """Find every record's fields.

    Args:
        data: uint8, lines of JSON, or the inside of a JSON array.
        in_array: which of the two.
        names: uint8, the names of all fields end to end, those to be preferred first.
        ends: int64, where each name ends.
        name_field: int64, the field that each name stands for.
        spans: out, int64 `(num_rows, NUM_FIELDS, 3)`, where each text begins and ends in `data`, -1 where it is absent;
            whether it holds escapes.
        bounds: out, int64 `(num_rows, 2)`, where each record begins and ends.
        regular: out, bool `(num_rows,)`; the spans of other records mean nothing.

    Returns:
        The number of records, or -1 where there are more than there is room for.
    """
    best = np.empty(NUM_FIELDS, np.int64)
    separator = _COMMA if in_array else _NEWLINE
    i = row = 0
    while True:
        i = _skip_space(data, i, True)
        if i >= len(data) and not (in_array and 0 < row < len(regular)):  # behind a last comma lies an empty element
            return row
        if row == len(regular):
            return -1
        stop = _scan_record(data, i, in_array, names, ends, name_field, spans[row], best)
        if stop >= 0:
            stop = _skip_space(data, stop, in_array)
        regular[row] = stop >= 0 and (stop >= len(data) or data[stop] == separator)
        if not regular[row]:
            stop = _record_end(data, i, in_array)
        bounds[row, 0], bounds[row, 1] = i, stop
        row += 1
        if stop >= len(data):
            return row
        i = stop + 1


@kernel
def _copy(source: Any, out: Any, at: int) -> int:
    target = out[at : at + len(source)]
    for k in range(len(target)):  # of slices, so that no index could be negative: this loop is vectorized
        target[k] = source[k]
    return at + len(source)


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
def _unescape(data: Any, i: int, stop: int, out: Any, at: int) -> int:
    """Write the text of a valid string."""
    while i < stop:
        run = i
        while i < stop and data[i] != _BACKSLASH:
            i += 1
        at = _copy(data[run:i], out, at)
        if i == stop:
            return at
        if data[i + 1] != _U:
            out[at] = _ESCAPED[data[i + 1]]
            at, i = at + 1, i + 2
        else:
            code = _hex4(data, i + 2)
            i += 6
            if 0xD800 <= code < 0xDC00:
                code = 0x10000 + ((code - 0xD800) << 10) + _hex4(data, i + 2) - 0xDC00
                i += 6
            at = _write_utf8(code, out, at)
    return at


@kernel
def _copy_text(data: Any, span: Any, out: Any, at: Any) -> Any:
    """Write the text of a field."""
    if span[2]:
        return _unescape(data, span[0], span[1], out, at)
    return _copy(data[span[0] : span[1]], out, at)


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
    at = 0
    offsets[0] = 0
    for k in range(len(rows)):
        span = spans[rows[k]]
        at = _copy(head, out, at)
        at = _copy_text(data, span[INSTRUCTION], out, at)
        if span[INPUT, 1] > span[INPUT, 0]:
            at = _copy(before_input, out, at)
            at = _copy_text(data, span[INPUT], out, at)
        offsets[2 * k + 1] = at
        at = _copy(before_output, out, at)
        at = _copy_text(data, span[OUTPUT], out, at)
        offsets[2 * k + 2] = at
    return at
