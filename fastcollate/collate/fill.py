"""Numba loops that read rows and fill padded batches: over caller-owned arrays, and nothing else.

The callers validate, size and allocate; a kernel only loops. `jit.py` says how they are compiled.

`store/rows.py` says what a **table** is, `settings.py` what the **settings** are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastcollate.collate.settings import IGNORE, LEFT, LIMIT, MASK, NARROW, NO_LIMIT, PAD, REFERENCE
from fastcollate.collate.vectors import STRIDE, copy_and_find, copy_tokens, fill_cells
from fastcollate.jit import borrow, kernel, part_of_kernel, prefetch, view
from fastcollate.store.rows import (
    FIRST_ROW,
    NUM_ROWS,
    NUM_SPANS,
    NUM_TOKENS,
    OFFSETS,
    SPAN_OFFSETS,
    SPAN_SIZE,
    SPANS,
    TOKEN_SIZE,
    TOKENS,
    bounds_of,
    shard_of,
)

# Columns of a group's report, a batch a line: what `batch.Counts` holds and can be summed, then the batch's width and
# its place in the buffer, in int64 cells.
_REPORT = range(13)
ROWS, CELLS, REAL, TRAINED, CORNERS, UNTRAINED, CUT_ROWS, CUT_TOKENS, WIDTH, START, TARGETS, END, SEGMENTS = _REPORT
NUM_TOTALS = WIDTH
REPORT_COLUMNS = len(_REPORT)

MASKED = -100  # what the reference writes over prompts, whatever `ignore_index` is
# Columns of the places of a batch's rows: address of the first token, length, tokens readable from there, shard.
_PLACE = range(4)
AT, LENGTH, READABLE, SHARD = _PLACE
PLACE_COLUMNS = len(_PLACE)

AHEAD = 8  # rows whose tokens are asked for at once, before the rows in front of them are filled
FAR_AHEAD = 16  # rows whose offsets are asked for before they are read
ALIGNMENT = 8  # int64 cells in a cache line: each batch of a group starts on one


# ------------------------------------------------------------------------------------------------- reading rows


@kernel
def _prefetch(address: int, size: int) -> None:
    """Ask for the cache lines of `size` bytes, of a kilobyte at most: the processor finds the rest itself."""
    for line in range(address & -64, address + min(size, 1024), 64):
        prefetch(line)


@kernel
def locate(table: Any, rows: Any, places: Any) -> int:
    """Write where each row lies; its offsets are checked here, once.

    Asks for the first rows' tokens on the way, so that the fill finds them in the cache.

    Returns:
        Length of the longest row, or `-1 - i` where `rows[i]` does not exist or its offsets are broken.
    """
    longest, shard = 0, np.int64(0)  # typed: a literal would have `shard_of` compiled twice
    first_row = num_rows = offsets_at = tokens_at = num_tokens = size = np.int64(0)
    for i in range(len(rows)):
        local = rows[i] - first_row
        if local < 0 or local >= num_rows:
            shard = shard_of(table, rows[i], shard)
            if shard < 0:
                return -1 - i
            first_row, num_rows, offsets_at = table[shard, FIRST_ROW], table[shard, NUM_ROWS], table[shard, OFFSETS]
            tokens_at, num_tokens, size = table[shard, TOKENS], table[shard, NUM_TOKENS], table[shard, TOKEN_SIZE]
            local = rows[i] - first_row
        if i + FAR_AHEAD < len(rows):
            ahead = rows[i + FAR_AHEAD] - first_row
            if 0 <= ahead < num_rows:
                prefetch(offsets_at + 8 * ahead)
        offsets = view(offsets_at + 8 * local, 2, np.int64)
        begin, end = offsets[0], offsets[1]
        if begin < 0 or end < begin or end > num_tokens:
            return -1 - i
        length, at = end - begin, tokens_at + begin * size
        if i < AHEAD:
            _prefetch(at, length * size)
        places[i, AT], places[i, LENGTH], places[i, READABLE], places[i, SHARD] = at, length, num_tokens - begin, shard
        longest = max(longest, length)
    return longest


@kernel
def prefetch_places(table: Any, places: Any, first: int) -> None:
    """Ask for the tokens of the `AHEAD` rows from `first` on.

    At once: each may wait for its page's address, and these waits overlap where no row's stores lie between.
    """
    for i in range(first, min(first + AHEAD, len(places))):
        _prefetch(places[i, AT], places[i, LENGTH] * table[places[i, SHARD], TOKEN_SIZE])


@kernel
def widest(table: Any, rows: Any) -> int:
    """Length of the longest of `rows`, or `-1 - i` where `rows[i]` does not exist or its offsets are broken."""
    return locate(table, rows, np.empty((len(rows), PLACE_COLUMNS), np.int64))


# ------------------------------------------------------------------------------------------------- filling rows


@part_of_kernel
def fill_row(
    token_size: int, cell_size: int, at: int, length: int, readable: int, start: int, width: int, inputs_at: int,
    targets_at: int, writable: int, pad: int, ignore: int, reference: int,
) -> tuple[int, int]:  # fmt: skip
    """Fill one row's columns from `start` on; prompts are masked afterwards, by `mask_row`.

    Column `c` holds token `c` as input and token `c + 1` as target; token `length` is the end-of-text, what follows
    is padding. The usual row is done here, by whole vectors and in few steps, since these cost as much as reading its
    tokens; whatever needs more thought is left to `_fill_row_exactly`.

    Args:
        token_size: bytes a token.
        cell_size: bytes an input.
        at: address of the row's first token.
        length: tokens of the row.
        readable: tokens of the shard from `at` on.
        start: the row's column that is filled first.
        width: columns to fill.
        inputs_at: address of the row's inputs.
        targets_at: address of the row's targets, int64.
        writable: cells from there on that may be written; those beyond `width` are left as they happen to be.
        pad: see the settings; and so `ignore` and `reference`.

    Returns:
        How many targets are trained, and the corners met.
    """
    trained, corners, has_pad = length, np.int64(0), np.int64(1)
    if start == 0 and 0 < length <= width and length + STRIDE <= readable and width + STRIDE <= writable:
        whole, rest = (length + STRIDE - 1) & -STRIDE, (width - length + STRIDE - 1) & -STRIDE
        # All inputs, then all targets: two places written by turns take a tenth longer.
        copy_tokens(at, inputs_at, whole, token_size, cell_size)
        fill_cells(inputs_at + cell_size * length, rest, cell_size, pad)
        has_pad = copy_and_find(at + token_size, targets_at, whole, token_size, pad) & reference
        fill_cells(targets_at + 8 * length, rest, 8, ignore)
        fill_cells(targets_at + 8 * (length - 1), 1, 8, pad)
    if has_pad != 0:
        trained, corners = _fill_row_exactly(
            token_size, cell_size, at, length, start, width, inputs_at, targets_at, pad, ignore, reference
        )
    return trained, corners


@kernel
def _fill_row_exactly(
    token_size: int, cell_size: int, at: int, length: int, start: int, width: int, inputs_at: int, targets_at: int,
    pad: int, ignore: int, reference: int,
) -> tuple[int, int]:  # fmt: skip
    """Like `fill_row`, for any row; reads and writes nothing beyond it."""
    copied, shifted = min(max(length - start, 0), width), min(max(length - start - 1, 0), width)
    first = at + token_size * start
    copy_tokens(first, inputs_at, copied, token_size, cell_size)
    fill_cells(inputs_at + cell_size * copied, width - copied, cell_size, pad)
    has_pad = copy_and_find(first + token_size, targets_at, shifted, token_size, pad)
    fill_cells(targets_at + 8 * shifted, width - shifted, 8, ignore)
    trained, corners = shifted, 0
    if shifted < width and start + shifted + 1 == max(length, reference):
        fill_cells(targets_at + 8 * shifted, 1, 8, pad)
        trained += 1
        corners += length == 0  # the reference trains an empty row's first padding token
    if reference != 0 and length > 1 and (has_pad != 0 or shifted < length - 1):  # what lies beyond a cut counts too
        first_pad = 1 + _find(at + token_size, length - 1, token_size, pad)
        if first_pad < length:
            corners += 1
            trained -= _ignore_pads(view(targets_at, copied, np.int64), first_pad - start, pad, ignore)
    return trained, corners


@kernel
def _find(at: int, count: int, token_size: int, wanted: int) -> int:
    """The place of the first `wanted` among the tokens at an address, or `count`."""
    if token_size == 2:
        return _find_in(view(at, count, np.uint16), wanted)
    if token_size == 4:
        return _find_in(view(at, count, np.uint32), wanted)
    return _find_in(view(at, count, np.int64), wanted)


@kernel
def _find_in(tokens: Any, wanted: int) -> int:
    found = 0
    for j in range(np.uint64(len(tokens))):  # by vectors; mostly there is none
        found |= tokens[j] == wanted
    place = len(tokens)
    if found != 0:
        place = 0
        while tokens[place] != wanted:
            place += 1
    return place


@kernel
def _ignore_pads(targets: Any, first: int, pad: int, ignore: int) -> int:
    """Ignore what the reference takes for padding: each `pad` from column `first` on, be it left of the targets."""
    ignored = 0
    for column in range(max(first, 0), len(targets)):
        if targets[column] == pad:
            targets[column] = ignore
            ignored += 1
    return ignored


@kernel
def _ignore_columns(targets: Any, begin: int, end: int, value: int, ignore: int) -> int:
    """Write `value` over targets `begin..end`, cut to what is there; returns how many of them were trained."""
    first, stop = max(begin, 0), min(end, len(targets))
    part = targets[first : max(first, stop)]
    trained = 0
    for j in range(np.uint64(len(part))):
        trained += part[j] != ignore
        part[j] = value
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
        stop = max(prompt, -NO_LIMIT) - 1  # any integer is legal, also the least
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
def mask_row(
    table: Any, shard: int, row: int, length: int, start: int, padded: int, settings: Any, targets: Any, report: Any
) -> int:
    """Ignore a row's prompts; returns how many of their targets were trained, or -1 where its spans are broken."""
    first, count = bounds_of(table, shard, row, SPAN_OFFSETS, NUM_SPANS)
    if count < 0:
        return -1
    size = table[shard, SPAN_SIZE]
    address = table[shard, SPANS] + first * size
    if size == 4:
        spans = view(address, count, np.uint32)
        if not _spans_fit(spans, length):
            return -1
        return _mask_prompts(spans, length, padded, start, settings, targets, report)
    return _mask_prompts(
        view(address, count, np.int64), length, padded, start, settings, targets, report
    )  # prompt lengths of a drop-in call: any integer is legal


@kernel
def _fill_rows(
    table: Any, settings: Any, rows: Any, places: Any, padded: int, width: int, inputs_at: int, targets_at: int,
    report: Any,
) -> int:  # fmt: skip
    """Fill `(len(rows), width)` inputs and targets; returns 0, or `-1 - i` where `rows[i]` is broken."""
    pad, ignore, reference, mask = settings[PAD], settings[IGNORE], settings[REFERENCE], settings[MASK]
    left, cell_size = settings[LEFT] != 0, np.int64(4 if settings[NARROW] != 0 else 8)
    sum_real = sum_trained = sum_corners = sum_untrained = sum_cut_rows = sum_cut = 0
    for i in range(len(rows)):
        if i % AHEAD == 0:
            prefetch_places(table, places, i + AHEAD)
        shard, length, done = places[i, SHARD], places[i, LENGTH], i * width
        start = max(length - width, 0) if left else 0
        trained, corners = fill_row(
            table[shard, TOKEN_SIZE], cell_size, places[i, AT], length, places[i, READABLE], start, width,
            inputs_at + cell_size * done, targets_at + 8 * done, len(rows) * width - done, pad, ignore, reference,
        )  # fmt: skip
        if mask != 0:
            targets = view(targets_at + 8 * done, width, np.int64)
            masked = mask_row(table, shard, rows[i], length, start, padded, settings, targets, report)
            if masked < 0:
                return -1 - i
            trained -= masked
        real = min(length, width)
        sum_real += real
        sum_trained += trained
        sum_corners += corners
        sum_untrained += trained == 0
        sum_cut_rows += length > real
        sum_cut += length - real
    report[REAL] += sum_real
    report[TRAINED] += sum_trained
    report[CORNERS] += sum_corners
    report[UNTRAINED] += sum_untrained
    report[CUT_ROWS] += sum_cut_rows
    report[CUT_TOKENS] += sum_cut
    return 0


@kernel
def _width_of(padded: int, limit: int) -> int:
    """The width after a Python slice `[:limit]`."""
    return min(padded, limit) if limit >= 0 else max(padded + limit, 0)


def plain_cells_of(num_rows: int, width: int, narrow: int) -> tuple[int, int]:
    """Where the targets start and the batch ends in a buffer, in int64 cells from the inputs' start."""
    inputs = num_rows * width
    if narrow != 0:
        inputs = (inputs + 1) >> 1
    targets = (inputs + ALIGNMENT - 1) & -ALIGNMENT
    return targets, (targets + num_rows * width + ALIGNMENT - 1) & -ALIGNMENT


cells_of = kernel(plain_cells_of)  # for kernels; a compiled function costs plain Python more than this one


@kernel
def _fill_next(table: Any, settings: Any, rows: Any, start: int, out: Any, report: Any) -> int:
    """Fill one batch at `out[start:]` if it fits; returns where it ends, or `-1 - i` where `rows[i]` is broken."""
    places = np.empty((len(rows), PLACE_COLUMNS), np.int64)
    padded = locate(table, rows, places)
    if padded < 0:
        return padded
    width = _width_of(padded, settings[LIMIT])
    targets_at, cells = cells_of(len(rows), width, settings[NARROW])
    end = start + cells
    report[:] = 0
    report[CELLS], report[ROWS], report[WIDTH] = len(rows) * width, len(rows), width
    report[START], report[TARGETS], report[END] = start, start + targets_at, end
    if end > len(out):
        return end
    at = out.ctypes.data + 8 * start
    status = _fill_rows(table, settings, rows, places, padded, width, at, at + 8 * targets_at, report)
    return status if status < 0 else end


@kernel
def fill_padded(table: Any, settings: Any, rows: Any, out: Any) -> tuple[int, int, int]:
    """Fill one padded batch at the start of `out`; takes no report, since each array costs the caller.

    Args:
        table: int64 `(num_shards, TABLE_COLUMNS)`.
        settings: int64 `(NUM_SETTINGS,)`.
        rows: int64 `(num_rows,)`, row numbers.
        out: int64, any size: inputs, then targets. Left alone where the batch does not fit.

    Returns:
        The width, and the cells where the targets start and the batch ends, as `cells_of` has them. In the place of
        the width `-1 - i` where `rows[i]` does not exist or its offsets or spans are broken.
    """
    report = np.empty(REPORT_COLUMNS, np.int64)
    # Borrowed: to count references in each function takes as long as filling a row or two.
    end = _fill_next(borrow(table), borrow(settings), borrow(rows), np.int64(0), borrow(out), borrow(report))
    if end < 0:
        return end, 0, 0
    return report[WIDTH], report[TARGETS], end


@kernel
def fill_padded_group(table: Any, settings: Any, rows: Any, bounds: Any, out: Any, report: Any) -> int:
    """Fill as many padded batches as `out` holds, one after another.

    Args:
        table: see `fill_padded`.
        settings: see `fill_padded`.
        rows: int64, row numbers of all batches.
        bounds: int64 `(num_batches + 1,)`: batch `b` is `rows[bounds[b]:bounds[b + 1]]`.
        out: int64, any size.
        report: int64 `(num_batches, REPORT_COLUMNS)`, written a line a filled batch; where not even the first batch
            fits, its line says how much room it takes.

    Returns:
        The number of batches filled, or `-1 - i` where `rows[i]` is broken.
    """
    start = np.int64(0)  # typed: a literal would have `_fill_next` compiled twice
    table, settings, rows, out, report = borrow(table), borrow(settings), borrow(rows), borrow(out), borrow(report)
    for b in range(len(bounds) - 1):
        end = _fill_next(table, settings, rows[bounds[b] : bounds[b + 1]], start, out, report[b])
        if end < 0:
            return int(end - bounds[b])
        if end > len(out):
            return b
        start = end
    return len(bounds) - 1
