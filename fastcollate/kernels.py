"""Numba loops that read rows and fill batches: over caller-owned arrays, and nothing else.

The callers validate, size and allocate; a kernel only loops. `jit.py` says how they are compiled.

A **table** describes the memory that rows are read from: int64 `(num_shards, TABLE_COLUMNS)`, a shard a line, its
columns named below. It holds addresses, so that one call reads from any number of shards; whoever builds it keeps
the arrays alive. Shards may come from files, so every row's offsets are checked before they are followed.

**Settings** are int64 `(NUM_SETTINGS,)`, named below.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastcollate.jit import kernel, prefetch, view

# Columns of a table.
FIRST_ROW, NUM_ROWS, TOKENS, NUM_TOKENS, TOKEN_SIZE, OFFSETS, SPANS, NUM_SPANS, SPAN_SIZE, SPAN_OFFSETS = range(10)
TABLE_COLUMNS = 10

# Settings of a fill.
PAD, IGNORE, LIMIT, MASK, REFERENCE, LEFT, NARROW = range(7)
NUM_SETTINGS = 7
NO_LIMIT = 2**62

# Columns of a group's report, a batch a line.
WIDTH, START, REAL, TRAINED, CORNERS, SEGMENTS = range(6)
REPORT_COLUMNS = 6

MASKED = -100  # what the reference writes over prompts, whatever `ignore_index` is
AHEAD = 8  # rows whose tokens are asked for before they are filled
ALIGNMENT = 8  # int64 cells in a cache line: each batch of a group starts on one


# ------------------------------------------------------------------------------------------------- reading rows


@kernel
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


@kernel
def _bounds(table: Any, shard: int, row: int, offsets: int = OFFSETS, total: int = NUM_TOKENS) -> tuple[int, int]:
    """First token (or span) and number of them in a row; number -1 where the offsets leave what the shard holds."""
    bounds = view(table[shard, offsets] + 8 * (row - table[shard, FIRST_ROW]), 2, np.int64)
    begin, end = bounds[0], bounds[1]
    if begin < 0 or end < begin or end > table[shard, total]:
        return 0, -1
    return begin, end - begin


@kernel
def _prefetch_row(table: Any, shard: int, begin: int, length: int) -> None:
    """Ask for a row's first kilobyte of tokens."""
    address = table[shard, TOKENS] + begin * table[shard, TOKEN_SIZE]
    for line in range(0, min(length * table[shard, TOKEN_SIZE] + 63, 1024), 64):
        prefetch(address + line)


@kernel
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


@kernel
def _fill(destination: Any, value: int) -> None:
    """Write `value` everywhere."""
    for j in range(np.uint64(len(destination))):
        destination[j] = value


@kernel
def _convert(source: Any, pad: int, inputs: Any, targets: Any) -> bool:
    """Copy to two arrays of the source's length at once; returns whether a token is `pad`."""
    found = 0
    for j in range(np.uint64(len(source))):  # an unsigned bound cannot wrap around, so that LLVM vectorizes
        token = np.int64(source[j])
        inputs[j] = token
        targets[j] = token
        found |= token == pad
    return found != 0


@kernel
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


@kernel
def _holds(tokens: Any, pad: int) -> bool:
    """Whether a token is `pad`."""
    found = 0
    for j in range(np.uint64(len(tokens))):
        found |= tokens[j] == pad
    return found != 0


@kernel
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


@kernel
def _ignore_columns(targets: Any, begin: int, end: int, value: int, ignore: int) -> int:
    """Write `value` over targets `begin..end`, cut to what is there; returns how many of them were trained."""
    trained = 0
    for j in range(max(begin, 0), min(end, len(targets))):
        trained += targets[j] != ignore
        targets[j] = value
    return trained


@kernel
def _mask_prompts(spans: Any, length: int, padded: int, start: int, settings: Any, targets: Any, report: Any) -> int:
    """Ignore the prompts' targets; returns how many of them were trained.

    Args:
        spans: alternating counts of prompt and response tokens of a row of `length` tokens.
        padded: the row's width before any cut: the reference's slice counts from its end when it is negative, which
            is counted in the report's `CORNERS`.
        start: the row's column that `targets[0]` is.
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


@kernel
def _spans_fit(spans: Any, length: int) -> bool:
    """Whether spans end within the row and its end-of-text."""
    total = np.int64(0)
    for k in range(len(spans)):
        total += np.int64(spans[k])
        if total > length + 1:
            return False
    return True


@kernel
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
        trained = _copy_tokens(view(address, length, np.uint16), start, settings, inputs, targets, report)
    elif size == 4:
        trained = _copy_tokens(view(address, length, np.uint32), start, settings, inputs, targets, report)
    else:
        trained = _copy_tokens(view(address, length, np.int64), start, settings, inputs, targets, report)
    if settings[MASK] == 0:
        return trained
    first, count = _bounds(table, shard, row, SPAN_OFFSETS, NUM_SPANS)
    if count < 0:
        return -1
    size = table[shard, SPAN_SIZE]
    address = table[shard, SPANS] + first * size
    if size == 4:
        spans = view(address, count, np.uint32)
        if not _spans_fit(spans, length):
            return -1
        return trained - _mask_prompts(spans, length, padded, start, settings, targets, report)
    return trained - _mask_prompts(
        view(address, count, np.int64), length, padded, start, settings, targets, report
    )  # prompt lengths of a drop-in call: any integer is legal


@kernel
def _fill_rows(
    table: Any, settings: Any, rows: Any, padded: int, width: int, inputs: Any, targets: Any, report: Any
) -> int:
    """Fill `(len(rows), width)` inputs and targets, given flat; returns 0, or `-1 - i` where `rows[i]` is broken."""
    shard = 0
    report[REAL:] = 0
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


@kernel
def _width_of(padded: int, limit: int) -> int:
    """The width after a Python slice `[:limit]`."""
    return min(padded, limit) if limit >= 0 else max(padded + limit, 0)


@kernel
def cells_of(num_rows: int, width: int, narrow: int) -> tuple[int, int]:
    """Where the targets start and the batch ends in a buffer, in int64 cells from the inputs' start."""
    inputs = num_rows * width
    if narrow != 0:
        inputs = (inputs + 1) >> 1
    targets = (inputs + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    end = (targets + num_rows * width + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    return targets, end


@kernel
def _fill_next(table: Any, settings: Any, rows: Any, start: int, out: Any, report: Any) -> int:
    """Fill one batch at `out[start:]` if it fits; returns where it ends, or `-1 - i` where `rows[i]` is broken."""
    padded = widest(table, rows)
    if padded < 0:
        return padded
    width = _width_of(padded, settings[LIMIT])
    report[WIDTH], report[START] = width, start
    targets_at, cells = cells_of(len(rows), width, settings[NARROW])
    end = start + cells
    if end > len(out):
        return end
    inputs, targets = out[start : start + targets_at], out[start + targets_at : end]
    if settings[NARROW] != 0:
        status = _fill_rows(table, settings, rows, padded, width, inputs.view(np.int32), targets, report)
    else:
        status = _fill_rows(table, settings, rows, padded, width, inputs, targets, report)
    return status if status < 0 else end


@kernel
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
    end = _fill_next(table, settings, rows, 0, out, report)
    return end if end < 0 else int(report[WIDTH])


@kernel
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
        end = _fill_next(table, settings, rows[bounds[b] : bounds[b + 1]], start, out, report[b])
        if end < 0:
            return int(end - bounds[b])
        if end > len(out):
            return b
        start = end
    return len(bounds) - 1


# ------------------------------------------------------------------------------------------------- filling packs


@kernel
def packed_cells_of(num_packs: int, capacity: int, num_rows: int, limit: int, narrow: int) -> tuple[int, int, int, int]:
    """Where targets, positions and segment bounds start and a packed batch ends, in int64 cells from its start."""
    targets, positions = cells_of(num_packs, capacity, narrow)
    bounds = positions + (positions - targets)
    num_bounds = num_rows + num_packs * ((capacity + limit - 1) // limit) + 1  # int32: two in a cell
    return targets, positions, bounds, bounds + (num_bounds + 2 * ALIGNMENT - 1) // (2 * ALIGNMENT) * ALIGNMENT


@kernel
def _fill_pack(
    table: Any, settings: Any, rows: Any, starts: Any, limit: int, start: int, inputs: Any, targets: Any,
    positions: Any, segments: Any, report: Any,
) -> int:  # fmt: skip
    """Fill one pack, whose first cell is `start`; returns 0, or `-1 - i` where `rows[i]` is broken or does not fit."""
    shard = column = 0
    count = report[SEGMENTS]
    for i in range(len(rows)):
        shard = _shard_of(table, rows[i], shard)
        if shard < 0:
            return -1 - i
        length = _bounds(table, shard, rows[i])[1]
        first = starts[i] if len(starts) > 0 else max(length - limit, 0) * settings[LEFT]
        width = min(length - first, limit)
        if first < 0 or width < 0 or column + width > len(inputs):  # a length of -1 is below any start
            return -1 - i
        if width == 0:
            continue
        a, b = column, column + width
        trained = _fill_row(table, shard, rows[i], first, length, settings, inputs[a:b], targets[a:b], report)
        if trained < 0:
            return -1 - i
        for j in range(np.uint64(width)):
            positions[column + j] = j
        column = b
        count += 1
        segments[count] = start + b
        report[REAL] += width
        report[TRAINED] += trained
    _fill(inputs[column:], settings[PAD])
    _fill(targets[column:], settings[IGNORE])
    while column < len(inputs):
        end = min(column + limit, len(inputs))
        for j in range(np.uint64(end - column)):
            positions[column + j] = j
        column = end
        count += 1
        segments[count] = start + end
    report[SEGMENTS] = count
    return 0


@kernel
def _fill_packs(
    table: Any, settings: Any, rows: Any, starts: Any, packs: Any, inputs: Any, targets: Any, positions: Any,
    segments: Any, report: Any,
) -> int:  # fmt: skip
    """Fill one batch, given flat; returns 0, or `-1 - i` where `rows[i]` is broken or does not fit."""
    capacity = report[WIDTH]
    limit = min(settings[LIMIT], capacity)
    segments[0] = 0
    for p in range(len(packs) - 1):
        a, b, i, j = packs[p], packs[p + 1], p * capacity, (p + 1) * capacity
        status = _fill_pack(
            table,
            settings,
            rows[a:b],
            starts[a:b],
            limit,
            i,
            inputs[i:j],
            targets[i:j],
            positions[i:j],
            segments,
            report,
        )
        if status < 0:
            return int(status - a)
    return 0


@kernel
def fill_packed_group(
    table: Any, settings: Any, rows: Any, starts: Any, packs: Any, batches: Any, capacity: int, out: Any, report: Any
) -> int:
    """Fill as many packed batches as `out` holds, one after another.

    Each row is filled as in a batch of its own; unused cells become segments no longer than a row may be.

    Args:
        table: see `fill_padded`.
        settings: see `fill_padded`.
        rows: int64, row numbers, pack after pack.
        starts: int64, each row's first token here; empty where each row is cut as `LEFT` says.
        packs: int64 `(num_packs + 1,)`: pack `p` is `rows[packs[p]:packs[p + 1]]`.
        batches: int64 `(num_batches + 1,)`: batch `b` is the packs `batches[b]` to `batches[b + 1]`.
        capacity: cells a pack.
        out: int64, any size; a batch is inputs, targets, positions, and segment bounds as int32, at the places that
            `packed_cells_of` says.
        report: see `fill_padded_group`.

    Returns:
        The number of batches filled, or `-1 - i` where `rows[i]` is broken or does not fit its pack.
    """
    at = 0
    for b in range(len(batches) - 1):
        own = packs[batches[b] : batches[b + 1] + 1]
        num_rows = own[len(own) - 1] - own[0]
        limit, narrow = min(settings[LIMIT], capacity), settings[NARROW]
        targets_at, positions_at, segments_at, end = packed_cells_of(len(own) - 1, capacity, num_rows, limit, narrow)
        report[b] = 0
        report[b, WIDTH], report[b, START] = capacity, at
        if at + end > len(out):
            return b
        targets, positions = out[at + targets_at : at + positions_at], out[at + positions_at : at + segments_at]
        segments = out[at + segments_at : at + end].view(np.int32)
        inputs = out[at : at + targets_at]
        if narrow != 0:
            narrowed = inputs.view(np.int32)
            status = _fill_packs(table, settings, rows, starts, own, narrowed, targets, positions, segments, report[b])
        else:
            status = _fill_packs(table, settings, rows, starts, own, inputs, targets, positions, segments, report[b])
        if status < 0:
            return status
        at += end
    return len(batches) - 1
