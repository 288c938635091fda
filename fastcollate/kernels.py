"""Numba loops over caller-owned arrays; nothing else.

The callers (`collate.py`, `plan.py`) validate, size and allocate; a kernel only loops. Every kernel is `nogil`, cached
on disk, free of `fastmath`, and runs as plain Python too under `NUMBA_DISABLE_JIT=1`.

A **table** describes the memory that rows are read from: int64 `(num_shards, TABLE_COLUMNS)`, a shard a line, its
columns named below. It holds addresses, so that one call reads from any number of shards; whoever builds it keeps
the arrays alive. Shards may come from files, so every row's offsets are checked before they are followed.

**Settings** are int64 `(NUM_SETTINGS,)`, named below.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import carray, njit, types
from numba.core import config
from numba.extending import intrinsic

# Columns of a table.
FIRST_ROW, NUM_ROWS, TOKENS, NUM_TOKENS, TOKEN_SIZE, OFFSETS, SPANS, NUM_SPANS, SPAN_SIZE, SPAN_OFFSETS = range(10)
TABLE_COLUMNS = 10

# Settings of a fill.
PAD, IGNORE, LIMIT, MASK, REFERENCE, LEFT, NARROW = range(7)
NUM_SETTINGS = 7
NO_LIMIT = 2**62

# Columns of a group's report, a batch a line.
WIDTH, START, REAL, TRAINED, CORNERS = range(5)
REPORT_COLUMNS = 5

MASKED = -100  # what the reference writes over prompts, whatever `ignore_index` is
AHEAD = 8  # rows whose tokens are asked for before they are filled
ALIGNMENT = 8  # int64 cells in a cache line: each batch of a group starts on one

F = TypeVar("F", bound=Callable[..., Any])


def _kernel(function: F) -> F:
    """Compile without the GIL and keep the machine code on disk."""
    try:
        return cast("F", njit(cache=True, nogil=True)(function))
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written
        return cast("F", njit(nogil=True)(function))


if config.DISABLE_JIT:

    def _view(address: int, count: int, dtype: Any) -> Any:
        if count <= 0:
            return np.empty(0, dtype)
        raw = (ctypes.c_char * (int(count) * np.dtype(dtype).itemsize)).from_address(int(address))
        return np.frombuffer(raw, dtype)

    def _prefetch(address: int) -> None:
        """Nothing to do: a hint to the processor."""

else:

    @intrinsic  # type: ignore[untyped-decorator]
    def _pointer(_: Any, address: Any, dtype: Any) -> Any:
        """An address as a C pointer to `dtype`."""
        pointer = types.CPointer(dtype.dtype)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(pointer))

        return pointer(types.int64, dtype), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def _prefetch(_: Any, address: Any) -> Any:
        """Ask the processor to fetch the cache line at an address, which need not be valid."""
        from llvmlite import ir  # type: ignore[import-untyped]

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
            function = builder.module.declare_intrinsic(
                "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, word, word, word])
            )
            builder.call(function, [builder.inttoptr(args[0], byte), word(0), word(3), word(1)])
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    @_kernel
    def _view(address: int, count: int, dtype: Any) -> Any:
        return carray(_pointer(address, dtype), (count,), dtype)


# ------------------------------------------------------------------------------------------------- reading rows


@_kernel
def _shard_of(table: Any, row: int, guess: int) -> int:
    """The table's line that holds `row`, or -1; neighbours mostly share a shard, so `guess` is tried first."""
    first = np.int64(table[guess, FIRST_ROW])
    if first <= row < first + table[guess, NUM_ROWS]:
        return guess
    low, high = 0, len(table)
    while high - low > 1:
        middle = (low + high) >> 1
        if table[middle, FIRST_ROW] <= row:
            low = middle
        else:
            high = middle
    if row < table[low, FIRST_ROW] or row >= table[low, FIRST_ROW] + table[low, NUM_ROWS]:
        return -1
    return low


@_kernel
def _bounds(table: Any, shard: int, row: int) -> tuple[int, int]:
    """First token and length of a row; length -1 where the offsets leave the shard's tokens."""
    local = row - table[shard, FIRST_ROW]
    offsets = _view(table[shard, OFFSETS] + 8 * local, 2, np.int64)
    begin, end = offsets[0], offsets[1]
    if begin < 0 or end < begin or end > table[shard, NUM_TOKENS]:
        return 0, -1
    return begin, end - begin


@_kernel
def _span_bounds(table: Any, shard: int, row: int) -> tuple[int, int]:
    """First span and number of spans of a row; number -1 where the offsets leave the shard's spans."""
    local = row - table[shard, FIRST_ROW]
    offsets = _view(table[shard, SPAN_OFFSETS] + 8 * local, 2, np.int64)
    begin, end = offsets[0], offsets[1]
    if begin < 0 or end < begin or end > table[shard, NUM_SPANS]:
        return 0, -1
    return begin, end - begin


@_kernel
def _prefetch_row(table: Any, shard: int, begin: int, length: int) -> None:
    """Ask for a row's first kilobyte of tokens."""
    address = table[shard, TOKENS] + begin * table[shard, TOKEN_SIZE]
    for line in range(0, min(length * table[shard, TOKEN_SIZE] + 63, 1024), 64):
        _prefetch(address + line)


@_kernel
def widest(table: Any, rows: Any) -> int:
    """Length of the longest of `rows`, or `-1 - i` where `rows[i]` does not exist or its offsets are broken.

    Asks for each row's first tokens on the way, so that the fill finds them in the cache.
    """
    longest = 0
    shard = 0
    for i in range(len(rows)):
        shard = _shard_of(table, rows[i], max(shard, 0))
        if shard < 0:
            return -1 - i
        begin, length = _bounds(table, shard, rows[i])
        if length < 0:
            return -1 - i
        if i < AHEAD:
            _prefetch_row(table, shard, begin, length)
        longest = max(longest, length)
    return longest


# ------------------------------------------------------------------------------------------------- filling rows


@_kernel
def _fill(destination: Any, value: int) -> None:
    """Write `value` everywhere."""
    for j in range(np.uint64(len(destination))):
        destination[j] = value


@_kernel
def _convert(source: Any, pad: int, inputs: Any, targets: Any) -> bool:
    """Copy to two arrays of the source's length at once; returns whether a token is `pad`."""
    found = 0
    for j in range(np.uint64(len(source))):  # an unsigned bound cannot wrap around, so that LLVM vectorizes
        token = np.int64(source[j])
        inputs[j] = token
        targets[j] = token
        found |= token == pad
    return found != 0


@_kernel
def _copy_tokens(tokens: Any, start: int, settings: Any, inputs: Any, targets: Any, report: Any) -> int:
    """Columns `start`, `start + 1`, ... of one row's inputs and targets; returns how many targets are trained.

    Column `c` holds token `c` as input and token `c + 1` as target; token `len(tokens)` is the end-of-text, what
    follows is padding.
    """
    pad, ignore = settings[PAD], settings[IGNORE]
    length, width = len(tokens), len(inputs)
    copied = min(max(length - start, 0), width)
    shifted = min(max(length - start - 1, 0), width)
    # Whole rows are overwritten: a loop of a batch's width is predicted, one of each row's own length is not.
    _fill(inputs, pad)
    _fill(targets, ignore)
    found = False
    if copied > 0:
        inputs[0] = tokens[start]
        end = start + copied
        found = _convert(tokens[start + 1 : end], pad, inputs[1:copied], targets[: copied - 1])
        if shifted == copied:
            targets[shifted - 1] = tokens[end]
    trained = shifted
    if shifted < width and start + shifted + 1 == max(length, settings[REFERENCE]):
        targets[shifted] = pad
        trained += 1
        if length == 0:  # the reference trains an empty row's first padding token
            report[CORNERS] += 1
    if settings[REFERENCE] != 0 and length > 1:
        if copied < length:  # cut: what lies beyond the cut, or before it, counts as well
            found = _holds(tokens[1:], pad)
        if found:
            report[CORNERS] += 1
            trained -= _ignore_later_pads(tokens, start, settings, targets)
    return trained


@_kernel
def _holds(tokens: Any, pad: int) -> bool:
    """Whether a token is `pad`."""
    found = 0
    for j in range(np.uint64(len(tokens))):
        found |= tokens[j] == pad
    return found != 0


@_kernel
def _ignore_later_pads(tokens: Any, start: int, settings: Any, targets: Any) -> int:
    """Ignore what the reference takes for padding: each `pad` in the targets after the row's first one."""
    pad, ignore = settings[PAD], settings[IGNORE]
    first = 1
    while tokens[first] != pad:
        first += 1
    ignored = 0
    for token in range(max(first, start) + 1, min(len(tokens), start + len(targets)) + 1):
        if token == len(tokens) or tokens[token] == pad:
            column = token - 1 - start
            if 0 <= column < len(targets):
                targets[column] = ignore
                ignored += 1
    return ignored


@_kernel
def _ignore_columns(targets: Any, begin: int, end: int, value: int, ignore: int) -> int:
    """Write `value` over targets `begin..end`, cut to what is there; returns how many of them were trained."""
    trained = 0
    for j in range(max(begin, 0), min(end, len(targets))):
        trained += targets[j] != ignore
        targets[j] = value
    return trained


@_kernel
def _mask_prompts(spans: Any, length: int, padded: int, start: int, settings: Any, targets: Any, report: Any) -> int:
    """Ignore the prompts' targets; returns how many of them were trained.

    Args:
        spans: alternating counts of prompt and response tokens.
        length: tokens of the row.
        padded: the row's width before any cut: the reference's slice counts from its end when it is negative.
        start: the row's column that `targets[0]` is.
        settings: see the module.
        targets: the row's targets, changed in place.
        report: its `CORNERS` is counted up where the reference takes a prompt length for a negative slice.
    """
    reference, ignore = settings[REFERENCE] != 0, settings[IGNORE]
    value = MASKED if reference else ignore
    if len(spans) <= 2:
        prompt = np.int64(spans[0]) if len(spans) > 0 else np.int64(0)
        stop = prompt - 1
        if reference and stop < 0 and len(spans) > 0:
            stop = max(padded + stop, 0)
            report[CORNERS] += stop > 0
        return _ignore_columns(targets, -start, stop - start, value, ignore)
    masked = 0
    position = np.int64(0)
    for k in range(0, len(spans), 2):
        end = position + np.int64(spans[k])
        if k + 1 == len(spans):
            end = max(end, length + 1)  # no response follows, so nothing trains the end-of-text
        masked += _ignore_columns(targets, position - 1 - start, end - 1 - start, value, ignore)
        position = end + (np.int64(spans[k + 1]) if k + 1 < len(spans) else np.int64(0))
    return masked


@_kernel
def _spans_fit(spans: Any, length: int) -> bool:
    """Whether spans end within the row and its end-of-text."""
    total = np.int64(0)
    for k in range(len(spans)):
        total += np.int64(spans[k])
        if total > length + 1:
            return False
    return True


@_kernel
def _fill_row(
    table: Any, shard: int, row: int, start: int, padded: int, settings: Any, inputs: Any, targets: Any, report: Any
) -> int:
    """Fill one row's columns from `start` on; returns how many targets are trained, or -1 where the row is broken."""
    begin, length = _bounds(table, shard, row)
    if length < 0:
        return -1
    size = table[shard, TOKEN_SIZE]
    address = table[shard, TOKENS] + begin * size
    if size == 2:
        trained = _copy_tokens(_view(address, length, np.uint16), start, settings, inputs, targets, report)
    elif size == 4:
        trained = _copy_tokens(_view(address, length, np.uint32), start, settings, inputs, targets, report)
    else:
        trained = _copy_tokens(_view(address, length, np.int64), start, settings, inputs, targets, report)
    if settings[MASK] == 0:
        return trained
    first, count = _span_bounds(table, shard, row)
    if count < 0:
        return -1
    size = table[shard, SPAN_SIZE]
    address = table[shard, SPANS] + first * size
    if size == 4:
        spans = _view(address, count, np.uint32)
        if not _spans_fit(spans, length):
            return -1
        return trained - _mask_prompts(spans, length, padded, start, settings, targets, report)
    return trained - _mask_prompts(
        _view(address, count, np.int64), length, padded, start, settings, targets, report
    )  # prompt lengths of a drop-in call: any integer is legal


@_kernel
def _fill_rows(
    table: Any, settings: Any, rows: Any, padded: int, width: int, inputs: Any, targets: Any, report: Any
) -> int:
    """Fill `(len(rows), width)` inputs and targets, given flat; returns 0, or `-1 - i` where `rows[i]` is broken."""
    shard = 0
    report[REAL] = 0
    report[TRAINED] = 0
    report[CORNERS] = 0
    for i in range(len(rows)):
        if i + AHEAD < len(rows):
            ahead = _shard_of(table, rows[i + AHEAD], shard)
            begin, length = _bounds(table, ahead, rows[i + AHEAD])
            _prefetch_row(table, ahead, begin, length)
        shard = _shard_of(table, rows[i], shard)
        length = _bounds(table, shard, rows[i])[1]
        start = max(length - width, 0) if settings[LEFT] != 0 else 0
        a, b = i * width, (i + 1) * width
        trained = _fill_row(table, shard, rows[i], start, padded, settings, inputs[a:b], targets[a:b], report)
        if trained < 0:
            return -1 - i
        report[REAL] += min(length, width)
        report[TRAINED] += trained
    return 0


@_kernel
def _width_of(padded: int, limit: int) -> int:
    """The width after a Python slice `[:limit]`."""
    return min(padded, limit) if limit >= 0 else max(padded + limit, 0)


@_kernel
def cells_of(num_rows: int, width: int, narrow: int) -> tuple[int, int]:
    """Where the targets start and the batch ends in a buffer, in int64 cells from the inputs' start."""
    inputs = num_rows * width
    if narrow != 0:
        inputs = (inputs + 1) >> 1
    targets = (inputs + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    end = (targets + num_rows * width + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    return targets, end


@_kernel
def _fill_at(table: Any, settings: Any, rows: Any, padded: int, out: Any, report: Any) -> int:
    """Fill one batch at `out[report[START]:]`; returns 0, or `-1 - i` where `rows[i]` is broken."""
    width, start = report[WIDTH], report[START]
    targets_at, end = cells_of(len(rows), width, settings[NARROW])
    targets = out[start + targets_at : start + end]
    if settings[NARROW] != 0:
        inputs = out[start : start + targets_at].view(np.int32)
        return _fill_rows(table, settings, rows, padded, width, inputs, targets, report)
    return _fill_rows(table, settings, rows, padded, width, out[start : start + targets_at], targets, report)


@_kernel
def fill_padded(table: Any, settings: Any, rows: Any, out: Any, report: Any) -> int:
    """Fill one padded batch at the start of `out`.

    Args:
        table: int64 `(num_shards, TABLE_COLUMNS)`.
        settings: int64 `(NUM_SETTINGS,)`.
        rows: int64 `(num_rows,)`, row numbers.
        out: int64, any size: inputs, then targets at `cells_of(...)[0]`. Left alone where the batch does not fit.
        report: int64 `(REPORT_COLUMNS,)`, written: width, start (0), real cells, trained targets.

    Returns:
        The width, or `-1 - i` where `rows[i]` does not exist or its offsets or spans are broken.
    """
    padded = widest(table, rows)
    if padded < 0:
        return padded
    width = _width_of(padded, settings[LIMIT])
    report[WIDTH] = width
    report[START] = 0
    if cells_of(len(rows), width, settings[NARROW])[1] > len(out):
        return width
    status = _fill_at(table, settings, rows, padded, out, report)
    return width if status == 0 else status


@_kernel
def fill_padded_group(table: Any, settings: Any, rows: Any, bounds: Any, out: Any, report: Any) -> int:
    """Fill as many padded batches as `out` holds, one after another.

    Args:
        table: see `fill_padded`.
        settings: see `fill_padded`.
        rows: int64, row numbers of all batches.
        bounds: int64 `(num_batches + 1,)`: batch `b` is `rows[bounds[b]:bounds[b + 1]]`.
        out: int64, any size.
        report: int64 `(num_batches, REPORT_COLUMNS)`, written a line a filled batch; the first line also where
            not even the first batch fits.

    Returns:
        The number of batches filled, or `-1 - i` where `rows[i]` is broken.
    """
    start = 0
    for b in range(len(bounds) - 1):
        batch = rows[bounds[b] : bounds[b + 1]]
        padded = widest(table, batch)
        if padded < 0:
            return int(padded - bounds[b])
        line = report[b]
        line[WIDTH] = _width_of(padded, settings[LIMIT])
        line[START] = start
        end = start + cells_of(len(batch), line[WIDTH], settings[NARROW])[1]
        if end > len(out):
            return b
        status = _fill_at(table, settings, batch, padded, out, line)
        if status < 0:
            return int(status - bounds[b])
        start = end
    return len(bounds) - 1


# ------------------------------------------------------------------------------------------------- reading lists


@_kernel
def parse_rows(text: Any, pairs: bool, tokens: Any, bounds: Any, prompts: Any) -> bool:
    """Read rows of integers from compact JSON: `[[1,2],[3]]`, or `[[9,[1,2]],[8,[3]]]` with prompt lengths.

    Args:
        text: uint8, the JSON.
        pairs: whether each row is a pair of prompt length and ids.
        tokens: int64, written; at least one cell per two characters.
        bounds: int64 `(num_rows + 1,)`, written: where each row starts in `tokens`.
        prompts: int64 `(num_rows,)`, written where `pairs`.

    Returns:
        Whether the text was of that form, in integers of 64 bits.
    """
    innermost = 3 if pairs else 2
    depth = row = count = digits = num_prompts = 0
    value = np.int64(0)
    negative = False
    bounds[0] = 0
    for i in range(np.uint64(len(text))):
        byte = text[i]
        if 48 <= byte <= 57:
            value = value * 10 + (np.int64(byte) - 48)
            digits += 1
            if digits > 18:
                return False
            continue
        if byte == 45:
            negative = True
            continue
        if digits > 0:
            value = -value if negative else value
            if depth == innermost:
                tokens[count] = value
                count += 1
            elif depth == 2 and num_prompts == row and row < len(prompts):
                prompts[row] = value
                num_prompts += 1
            else:
                return False
            value = np.int64(0)
            digits = 0
            negative = False
        if byte == 91:  # [
            depth += 1
            if depth > innermost:
                return False
        elif byte == 93:  # ]
            if depth == innermost:
                if row >= len(prompts):
                    return False
                row += 1
                bounds[row] = count
            elif depth == 2 and num_prompts != row:
                return False
            depth -= 1
        elif byte != 44:  # a comma; anything else (a float, a string, null) is no row of ids
            return False
    return row == len(prompts)


# ------------------------------------------------------------------------------------------------- plans

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_27, _30, _31, _32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)
_ROUNDS = 6


@_kernel
def mix(key: Any, counter: Any) -> Any:
    """The `counter`-th number of the stream `key` (splitmix64); both uint64, and so is the result."""
    z = key + (counter + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> _30)) * _MIX_1
    z = (z ^ (z >> _27)) * _MIX_2
    return z ^ (z >> _31)


@_kernel
def _below(key: Any, counter: Any, bound: Any) -> Any:
    """A number below `bound` (uint64, at most 2**32) of the stream `key`."""
    return ((mix(key, counter) >> _32) * bound) >> _32


@_kernel
def shuffle(values: Any, key: Any) -> None:
    """Fisher-Yates in place."""
    for i in range(len(values) - 1, 0, -1):
        j = np.int64(_below(key, np.uint64(i), np.uint64(i + 1)))
        kept = values[i]
        values[i] = values[j]
        values[j] = kept


@_kernel
def _permuted(position: Any, size: Any, rows: Any, columns: Any, key: Any) -> Any:
    """Where a keyed bijection on `[0, size)` sends a position.

    A Feistel network over a grid of `rows * columns >= size` cells, walked until it lands below `size`.
    """
    while True:
        left, right = position // columns, position % columns
        for turn in range(_ROUNDS):
            salt = np.uint64(turn) << _32
            if turn & 1:
                right += _below(key, salt | left, columns)
                if right >= columns:
                    right -= columns
            else:
                left += _below(key, salt | right, rows)
                if left >= rows:
                    left -= rows
        position = left * columns + right
        if position < size:
            return position


@_kernel
def permuted_rows(first: int, num_rows: int, block: int, key: Any, rotation: int, out: Any) -> None:
    """The rows at positions `first`, `first + 1`, ... of a permutation that moves blocks of neighbouring rows.

    Args:
        first: the first position.
        num_rows: the size of the data set.
        block: rows a block; a last, shorter block stays last.
        key: uint64.
        rotation: where the first block starts, so that the blocks differ from epoch to epoch.
        out: int64, written, a row number a position.
    """
    num_blocks = np.uint64(num_rows // block)
    columns = np.uint64(np.ceil(np.sqrt(np.float64(num_blocks))))
    rows = (num_blocks + columns - np.uint64(1)) // columns if columns else columns
    whole = np.int64(num_blocks) * block
    i = 0
    while i < len(out):
        position = first + i
        if position < whole:
            moved = np.int64(_permuted(np.uint64(position // block), num_blocks, rows, columns, key))
            row = moved * block + position % block
            count = min(block - position % block, len(out) - i)
        else:
            row, count = position, len(out) - i
        row += rotation
        for j in range(count):
            out[i + j] = row + j if row + j < num_rows else row + j - num_rows
        i += count


@_kernel
def gather_lengths(lengths: Any, rows: Any, limit: int, out: Any) -> None:
    """Each row's length, at most `limit`."""
    for i in range(len(rows)):
        out[i] = min(np.int64(lengths[rows[i]]), limit)


@_kernel
def sort_by_length(rows: Any, lengths: Any, longest: int, sorted_rows: Any, sorted_lengths: Any) -> None:
    """A stable counting sort, shortest first; `lengths` are at most `longest`."""
    starts = np.zeros(longest + 2, np.int64)
    for i in range(len(rows)):
        starts[lengths[i] + 1] += 1
    for length in range(longest + 1):
        starts[length + 1] += starts[length]
    for i in range(len(rows)):
        place = starts[lengths[i]]
        starts[lengths[i]] = place + 1
        sorted_rows[place] = rows[i]
        sorted_lengths[place] = lengths[i]


@_kernel
def cut_by_tokens(lengths: Any, budget: int, shares: int, bounds: Any) -> int:
    """Cut rows into groups of at most `budget` cells, padding included, in multiples of `shares` rows.

    Returns:
        The number of groups, whose bounds are written, or `-1 - i` where the row `i` is too long for the budget.
    """
    num_groups = start = widest_row = 0
    bounds[0] = 0
    for i in range(0, len(lengths), shares):
        end = min(i + shares, len(lengths))
        width = widest_row
        for j in range(i, end):
            width = max(width, max(np.int64(lengths[j]), 1))
        if (i + shares - start) * width > budget:
            if i > start:
                num_groups += 1
                bounds[num_groups] = i
                start = i
            width = 1
            for j in range(i, end):
                width = max(width, np.int64(lengths[j]))
                if shares * width > budget:
                    return -1 - j
        widest_row = width
    if len(lengths) > start:
        num_groups += 1
        bounds[num_groups] = len(lengths)
    return num_groups


@_kernel
def deal(items: Any, bounds: Any, order: Any, rank: int, world_size: int, out: Any, out_bounds: Any) -> None:
    """One rank's share of each group, the groups in the given order: items `rank`, `rank + world_size`, ..."""
    count = 0
    out_bounds[0] = 0
    for g in range(len(order)):
        for i in range(bounds[order[g]] + rank, bounds[order[g] + 1], world_size):
            out[count] = items[i]
            count += 1
        out_bounds[g + 1] = count


@_kernel
def pack_best_fit(order: Any, lengths: Any, capacity: int, bin_of_row: Any) -> int:
    """Best fit decreasing: each row goes to the bin with the least room that still holds it.

    Args:
        order: int64, rows, shortest first; they are packed from the end.
        lengths: int64, each row's length, in `[0, capacity]`.
        capacity: cells a bin.
        bin_of_row: int64, written.

    Returns:
        The number of bins.
    """
    heads = np.full(capacity + 1, -1, np.int64)  # by room left: the last bin put there
    below = np.empty(len(order), np.int64)  # by bin: the one put there before it
    words = np.zeros((capacity >> 5) + 1, np.int64)  # a bit for each room that has a bin
    num_bins = 0
    for i in range(len(order) - 1, -1, -1):
        row = order[i]
        length = lengths[row]
        room = length
        while room <= capacity:
            word = words[room >> 5] >> (room & 31)
            if word == 0:
                room = ((room >> 5) + 1) << 5
                continue
            while word & 1 == 0:
                word >>= 1
                room += 1
            break
        if room > capacity:
            room = capacity
            chosen = num_bins
            num_bins += 1
        else:
            chosen = heads[room]
            heads[room] = below[chosen]
            if heads[room] < 0:
                words[room >> 5] &= ~(1 << (room & 31))
        bin_of_row[row] = chosen
        room -= length
        below[chosen] = heads[room]
        heads[room] = chosen
        words[room >> 5] |= 1 << (room & 31)
    return num_bins
