"""Numba loops over JSON bytes: find the text fields of flat records; nothing else.

`fields.py` validates and allocates; see `jit.py` for how they are compiled. A record is **regular** when it is a JSON
object of strings, short plain numbers, `true`, `false` and `null`, valid to the last byte, whose fields are texts. Of
everything else only the place is noted: a full parser looks at it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastcollate.jit import borrow, kernel, load_byte, load_word, trailing_zeros, view

INSTRUCTION, INPUT, OUTPUT = range(3)  # fields; the input may be missing or null
NUM_FIELDS = 3
NUM_SCRATCH = NUM_FIELDS + 8
_NO_NAME = 1 << 30
_MAX_DIGITS = 18  # every parser reads these alike

_QUOTE, BACKSLASH, _OPEN, _CLOSE, _COLON, _COMMA, _NEWLINE, _MINUS, _POINT = (ord(c) for c in '"\\{}:,\n-.')
_N, _T, _F, UNICODE = (ord(c) for c in "ntfu")
_OPEN_LIST, _CLOSE_LIST = ord("["), ord("]")

_SPECIAL = np.zeros(256, np.uint8)  # bytes that do not stand for themselves in a string
_SPECIAL[:32] = 1
_SPECIAL[[_QUOTE, BACKSLASH]] = 1
_SPECIAL[128:] = 1
_SPACE = np.zeros(256, np.bool_)  # white space within a line
_SPACE[[ord(c) for c in " \t\r"]] = True
ESCAPED = np.zeros(256, np.uint8)  # what a one-letter escape means
for _letter, _meaning in zip('"\\/bfnrt', '"\\/\b\f\n\r\t', strict=True):
    ESCAPED[ord(_letter)] = ord(_meaning)
_HEX = np.full(256, -1, np.int64)
for _digit in "0123456789abcdefABCDEF":
    _HEX[ord(_digit)] = int(_digit, 16)


@kernel
def _skip_space(read: int, end: int, with_newlines: bool) -> int:
    """The first address from `read` on that holds no white space, or `end`."""
    while read < end:
        byte = load_byte(read)
        if byte > 32 or not (_SPACE[byte] or (with_newlines and byte == _NEWLINE)):
            return read
        read += 1
    return end


@kernel
def hex4(data: Any, i: int) -> int:
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
    if data[i + 1] != UNICODE:
        return i + 2 if ESCAPED[data[i + 1]] else -1
    code = hex4(data, i + 2)
    if code < 0 or 0xDC00 <= code < 0xE000:
        return -1
    if code < 0xD800 or code >= 0xE000:
        return i + 6
    if i + 12 > len(data) or data[i + 6] != BACKSLASH or data[i + 7] != UNICODE:
        return -1
    return i + 12 if 0xDC00 <= hex4(data, i + 8) < 0xE000 else -1


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


_EVERY = 0x0101010101010101  # a byte's value times this is a word of eight such bytes
TOP, LOW7 = np.uint64(0x80 * _EVERY), np.uint64(0x7F * _EVERY)
_TO_SPACE = np.uint64(0x60 * _EVERY)  # carries a character from the first printing one on into the top bit
_QUOTES, BACKSLASHES = np.uint64(_QUOTE * _EVERY), np.uint64(BACKSLASH * _EVERY)


@kernel
def _special_bytes(word: Any) -> Any:
    """The top bit of each of eight bytes that `_SPECIAL` holds; no sum carries from byte to byte."""
    low = word & LOW7
    plain = (low + _TO_SPACE) & ((low ^ _QUOTES) + LOW7) & ((low ^ BACKSLASHES) + LOW7)
    return ((plain & TOP) ^ TOP) | (word & TOP)


@kernel
def _next_special(read: int, readable: int) -> int:
    """The first address from `read` on of a byte that does not stand for itself, or the end of what can be read."""
    while read + 8 <= readable:
        special = _special_bytes(load_word(read))
        if special != 0:
            return read + (trailing_zeros(special) >> 3)
        read += 8
    rest = view(read, readable - read, np.uint8)
    for k in range(len(rest)):
        if _SPECIAL[rest[k]]:
            return read + k
    return readable


@kernel
def _string_end(data: Any, i: int) -> tuple[int, bool]:
    """The place of the quote that closes the string whose content begins at `i`, and whether it holds an escape.

    -1 where it is not valid.
    """
    has_escape, first = False, np.int64(data.ctypes.data)
    while True:
        i = _next_special(first + i, first + len(data)) - first
        if i >= len(data):
            return -1, has_escape
        if data[i] == _QUOTE:
            return i, has_escape
        if data[i] == BACKSLASH:
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
def _is_name(read: int, readable: int, names: Any, begin: int, size: int) -> bool:
    """Whether a name and a quote stand at an address."""
    if read + size >= readable or load_byte(read + size) != _QUOTE:
        return False
    name = np.int64(names.ctypes.data) + begin
    k = 0
    if begin + ((size + 7) & -8) <= len(names) and read + ((size + 7) & -8) <= readable:
        while k + 8 <= size:
            if load_word(read + k) != load_word(name + k):
                return False
            k += 8
        if k < size:
            different = load_word(read + k) ^ load_word(name + k)
            return different == 0 or (trailing_zeros(different) >> 3) >= size - k
        return True
    while k < size:
        if load_byte(read + k) != load_byte(name + k):
            return False
        k += 1
    return True


@kernel
def _find_name(read: int, readable: int, size: int, names: Any, ends: Any) -> int:
    """Which name the key at an address is, or -1."""
    begin = 0
    for name in range(len(ends)):
        if ends[name] - begin == size and _is_name(read, readable, names, begin, size):
            return name
        begin = ends[name]
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
        elif byte == BACKSLASH:
            if i + 1 < len(data) and (data[i + 1] == _QUOTE or data[i + 1] == BACKSLASH):
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
def _quote_after(data: Any, i: int) -> tuple[int, bool]:
    """Like `_string_end`; most strings have nothing special before the quote that ends them."""
    first = np.int64(data.ctypes.data)
    end = first + len(data)
    found = _next_special(first + i, end)
    if found < end and load_byte(found) == _QUOTE:
        return found - first, False
    return _string_end(data, i)


@kernel
def _scan_record(
    data: Any, i: int, in_array: bool, names: Any, ends: Any, name_field: Any, span: Any, best: Any, order: Any
) -> int:
    """The place behind the regular record at `i`, or -1; its fields' places go to `span`.

    `order` keeps the names of the last record's keys: the next record has mostly the same.
    """
    for field in range(NUM_FIELDS):
        span[field, 0], span[field, 1], best[field] = -1, -1, _NO_NAME
    seen, number, first, size = 0, -1, np.int64(data.ctypes.data), len(data)
    stop_at = first + size
    if i >= size or data[i] != _OPEN:
        return -1
    while True:
        i = _skip_space(first + i + 1, stop_at, in_array) - first
        if i >= size or data[i] != _QUOTE:
            return -1
        key, number = i + 1, min(number + 1, len(order) - 1)
        name = order[number]
        begin = ends[name - 1] if name > 0 else 0
        if name >= 0 and _is_name(first + key, stop_at, names, begin, ends[name] - begin):
            stop = key + ends[name] - begin
        else:
            stop, has_escape = _quote_after(data, key)
            if stop < 0 or has_escape:
                return -1
            name = _find_name(first + key, stop_at, stop - key, names, ends)
            order[number] = name
        i = _skip_space(first + stop + 1, stop_at, in_array) - first
        if i >= size or data[i] != _COLON:
            return -1
        i = _skip_space(first + i + 1, stop_at, in_array) - first
        if i >= size or (name >= 0 and (seen >> name) & 1):
            return -1  # cut off, or a name for the second time
        is_text = data[i] == _QUOTE
        if is_text:
            stop, has_escape = _quote_after(data, i + 1)
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
        i = _skip_space(first + (stop + 1 if is_text else stop), stop_at, in_array) - first
        if i < size and data[i] == _CLOSE:
            return i + 1 if _is_whole(span) else -1
        if i >= size or data[i] != _COMMA:
            return -1


@kernel
def scan_records(
    data: Any, in_array: bool, names: Any, ends: Any, name_field: Any, spans: Any, bounds: Any, regular: Any,
    scratch: Any,
) -> int:  # fmt: skip
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
        scratch: int64 `(NUM_SCRATCH,)`, from the caller since what is allocated here cannot be borrowed.

    Returns:
        The number of records, or -1 where there are more than there is room for.
    """
    data, names, ends, name_field, spans = borrow(data), borrow(names), borrow(ends), borrow(name_field), borrow(spans)
    scratch[:], first = -1, np.int64(data.ctypes.data)
    best, order = borrow(scratch)[:NUM_FIELDS], borrow(scratch)[NUM_FIELDS:]
    separator = _COMMA if in_array else _NEWLINE
    i = row = 0
    while True:
        i = _skip_space(first + i, first + len(data), True) - first
        if i >= len(data) and not (in_array and 0 < row < len(regular)):  # behind a last comma lies an empty element
            return row
        if row == len(regular):
            return -1
        stop = _scan_record(data, i, in_array, names, ends, name_field, spans[row], best, order)
        if stop >= 0:
            stop = _skip_space(first + stop, first + len(data), in_array) - first
        regular[row] = stop >= 0 and (stop >= len(data) or data[stop] == separator)
        if not regular[row]:
            stop = _record_end(data, i, in_array)
        bounds[row, 0], bounds[row, 1] = i, stop
        row += 1
        if stop >= len(data):
            return row
        i = stop + 1
