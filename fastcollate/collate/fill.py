"""Numba loops that read rows and fill padded batches: over caller-owned arrays, and nothing else.

The callers validate, size and allocate; a kernel only loops. `store/rows.py` says what a **table** is, `settings.py`
what the **settings** are. Tokens, inputs and spans have the types of the numbers `token`, `cell` and `span` that a
kernel is called with, and `span` is `None` where no prompt is masked: what a call does not need is not compiled.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastcollate.collate.masks import mask_row
from fastcollate.collate.settings import END_ID, IGNORE, LEFT, LIMIT, MULTIPLE, PAD, REFERENCE
from fastcollate.jit import address_of, borrow, kernel, part, prefetch, view
from fastcollate.store import layout

# Columns of a group's report, a batch a line: what `batch.Counts` holds and can be summed, then the batch's width and
# its place in the buffer, in int64 cells; of packs the segments, the cells of the longest, and
# the context-parallel ranks that they split over.
_REPORT = range(15)
ROWS, CELLS, REAL, TRAINED, CORNERS, UNTRAINED, CUT_ROWS, CUT_TOKENS, WIDTH, START, TARGETS, END, *_MORE = _REPORT
SEGMENTS, LONGEST, RANKS = _MORE
REPORT_COLUMNS = len(_REPORT)

# Columns of the places of a batch's rows: address of the first token, length in columns, shard. A row that holds its
# own end has a column less than tokens: its last token is a target only.
AT, LENGTH, SHARD, PLACE_COLUMNS = range(4)

AHEAD = 8  # rows whose tokens are asked for at once, before the rows in front of them are filled
FAR_AHEAD = 16  # rows whose offsets are asked for before they are read
ALIGNMENT = 8  # int64 cells in a cache line: each batch of a group starts on one


# ------------------------------------------------------------------------------------------------- reading rows


@part
def locate(table: Any, rows: Any, places: Any) -> int:
    """Write where each row lies; its offsets are checked here, once.

    Returns:
        Length of the longest row, or `-1 - i` where `rows[i]` does not exist or its offsets are broken.
    """
    longest, shard = 0, np.int64(0)  # typed: a literal would have `shard_of` compiled twice
    first_row = num_rows = np.int64(0)
    for i in range(len(rows)):
        local = rows[i] - first_row
        if local < 0 or local >= num_rows:
            shard = layout.shard_of(table, rows[i], shard)
            if shard < 0:
                return -1 - i
            first_row, num_rows = table[shard, layout.FIRST_ROW], table[shard, layout.NUM_ROWS]
            local = rows[i] - first_row
        if i + FAR_AHEAD < len(rows):
            ahead = rows[i + FAR_AHEAD] - first_row
            if 0 <= ahead < num_rows:
                prefetch(table[shard, layout.OFFSETS] + 8 * ahead)
        offsets = view(table[shard, layout.OFFSETS] + 8 * local, 2, np.int64)
        begin, end = offsets[0], offsets[1]
        if begin < 0 or end < begin or end > table[shard, layout.NUM_TOKENS]:
            return -1 - i
        places[i, AT] = table[shard, layout.TOKENS] + begin * table[shard, layout.TOKEN_SIZE]
        length = max(end - begin - table[shard, layout.HOLDS_END], 0)
        places[i, LENGTH], places[i, SHARD] = length, shard
        longest = max(longest, length)
    return longest


@part
def prefetch_places(table: Any, places: Any, first: int, stop: int) -> None:
    """Ask for the tokens of some rows, of a kilobyte a row at most: the processor finds the rest itself.

    At once: each may wait for its page's address, and these waits overlap where no row's stores lie between.
    """
    for i in range(first, min(stop, len(places))):
        at = places[i, AT]
        for line in range(at & -64, at + min(places[i, LENGTH] * table[0, layout.TOKEN_SIZE], 1024), 64):
            prefetch(line)


@kernel
def widest(table: Any, rows: Any) -> int:
    """Columns of the longest of `rows`, or `-1 - i` where `rows[i]` does not exist or its offsets are broken."""
    return locate(table, rows, np.empty((len(rows), PLACE_COLUMNS), np.int64))


# ------------------------------------------------------------------------------------------------- filling rows


@part
def fill_row(tokens: Any, length: int, start: int, inputs: Any, targets: Any, settings: Any) -> tuple[int, int]:
    """Fill a row of `length` columns, from column `start` on; prompts are masked afterwards, by `mask_row`.

    Column `c` holds token `c` as input and token `c + 1` as target; the last of these is the end-of-text, or in a row
    that holds its own end, its last token. What follows is padding. All inputs, then all targets: two places written
    by turns take a tenth longer.

    Returns:
        How many targets are trained, and the corners met.
    """
    pad, end, ignore, reference = settings[PAD], settings[END_ID], settings[IGNORE], settings[REFERENCE]
    width = len(targets)
    copied, shifted = min(max(length - start, 0), width), min(max(len(tokens) - start - 1, 0), width)
    own, following, least = tokens[start : start + copied], tokens[start + 1 : start + 1 + shifted], np.uint64(1)
    for j in range(np.uint64(copied)):  # unsigned: a number that may be negative would count from the end
        inputs[j] = own[j]
    for j in range(np.uint64(copied), np.uint64(width)):
        inputs[j] = pad
    for j in range(np.uint64(shifted)):
        token = np.int64(following[j])
        least = min(least, np.uint64(token ^ end))
        targets[j] = token
    for j in range(np.uint64(shifted), np.uint64(width)):
        targets[j] = ignore
    trained, corners = shifted, 0
    if shifted < width and start + shifted + 1 == max(length, reference):
        targets[shifted] = end
        trained += 1
        corners += length == 0  # the reference trains an empty row's first padding token
    if reference != 0 and length > 1 and (least == 0 or shifted < length - 1):  # what lies beyond a cut counts too
        first = _first_end(tokens, end)
        if first < length:
            corners += 1
            for column in range(max(first - start, 0), copied):  # what the reference takes for padding
                if targets[column] == end:
                    targets[column] = ignore
                    trained -= 1
    return trained, corners


@part
def fill_unused(inputs: Any, targets: Any, first: int, stop: int, settings: Any) -> None:
    """Padding without targets in some cells that no row takes."""
    if first < stop:
        inputs[first:stop] = settings[PAD]
        targets[first:stop] = settings[IGNORE]


@part
def _first_end(tokens: Any, end: int) -> int:
    """The place of the first `end` among a row's tokens but the first one, or the row's length."""
    found = 0
    for j in range(np.uint64(1), np.uint64(len(tokens))):  # by vectors; mostly there is none
        found |= np.int64(tokens[j]) == end
    place = 1 if found != 0 else len(tokens)
    while place < len(tokens) and np.int64(tokens[place]) != end:
        place += 1
    return place


@part
def _fill_rows(
    table: Any, settings: Any, rows: Any, places: Any, padded: int, kept: int, inputs: Any, targets: Any, report: Any,
    token: Any, span: Any,
) -> int:  # fmt: skip
    """Fill a batch's inputs and targets, `kept` columns with rows; returns 0, or `-1 - i` where `rows[i]` is broken."""
    width, left = report[WIDTH], settings[LEFT] != 0
    sum_real = sum_trained = sum_corners = sum_untrained = sum_cut_rows = sum_cut = 0
    prefetch_places(table, places, np.int64(0), np.int64(AHEAD))
    for i in range(len(rows)):
        if i % AHEAD == 0:
            prefetch_places(table, places, i + AHEAD, i + 2 * AHEAD)
        length = places[i, LENGTH]
        start = max(length - kept, 0) if left else 0
        tokens = view(places[i, AT], length + table[places[i, SHARD], layout.HOLDS_END], token)
        first, stop = i * width, i * width + kept
        own = targets[first:stop]
        trained, corners = fill_row(tokens, length, start, inputs[first:stop], own, settings)
        if span is not None:
            masked, more = mask_row(table, places[i, SHARD], rows[i], length, start, padded, settings, own, span)
            if masked < 0:
                return -1 - i
            trained -= masked
            corners += more
        fill_unused(inputs, targets, stop, (i + 1) * width, settings)
        real = min(length, kept)
        sum_real += real
        sum_trained += trained
        sum_corners += corners
        sum_untrained += trained == 0
        sum_cut_rows += length > real
        sum_cut += length - real
    report[REAL], report[TRAINED], report[CORNERS] = sum_real, sum_trained, sum_corners
    report[UNTRAINED], report[CUT_ROWS], report[CUT_TOKENS] = sum_untrained, sum_cut_rows, sum_cut
    return 0


@part
def rounded_up(cells: int, multiple: int) -> int:
    """The least multiple that is not less."""
    return cells if multiple == 1 else (cells + multiple - 1) // multiple * multiple


def plain_cells_of(num_rows: int, width: int, cell_size: int) -> tuple[int, int]:
    """Where the targets start and the batch ends in a buffer, in int64 cells from the inputs' start."""
    targets = (num_rows * width * cell_size + 8 * ALIGNMENT - 1) // (8 * ALIGNMENT) * ALIGNMENT
    return targets, (targets + num_rows * width + ALIGNMENT - 1) & -ALIGNMENT


cells_of = kernel(plain_cells_of)  # for kernels; a compiled function costs plain Python more than this one


@part
def _fill_next(
    table: Any, settings: Any, rows: Any, start: int, out: Any, report: Any, token: Any, cell: Any, span: Any
) -> int:
    """Fill one batch at `out[start:]` if it fits; returns where it ends, or `-1 - i` where `rows[i]` is broken."""
    places = np.empty((len(rows), PLACE_COLUMNS), np.int64)
    padded = locate(table, rows, places)
    if padded < 0:
        return padded
    limit = settings[LIMIT]
    kept = min(padded, limit) if limit >= 0 else max(padded + limit, 0)  # as a Python slice `[:limit]` cuts
    width = rounded_up(kept, settings[MULTIPLE])
    targets_at, cells = cells_of(len(rows), width, view(0, 0, cell).itemsize)
    end = start + cells
    report[:] = 0
    report[ROWS], report[CELLS], report[WIDTH] = len(rows), len(rows) * width, width
    report[START], report[TARGETS], report[END] = start, start + targets_at, end
    if end > len(out):
        return end
    at, size = address_of(out) + 8 * start, len(rows) * width
    inputs, targets = view(at, size, cell), view(at + 8 * targets_at, size, np.int64)
    status = _fill_rows(table, settings, rows, places, padded, kept, inputs, targets, report, token, span)
    return status if status < 0 else end


@kernel
def fill_padded(
    table: Any, settings: Any, rows: Any, out: Any, token: Any, cell: Any, span: Any
) -> tuple[int, int, int]:
    """Fill one padded batch at the start of `out`; takes no report, since each array costs the caller.

    Args:
        table: int64 `(num_shards, TABLE_COLUMNS)`.
        settings: int64 `(NUM_SETTINGS,)`.
        rows: int64 `(num_rows,)`, row numbers.
        out: int64, any size: inputs, then targets. Left alone where the batch does not fit.
        token: a number of the tokens' type.
        cell: a number of the inputs' type.
        span: a number of the spans' type, or `None` where prompts are trained.

    Returns:
        The width, and the cells where the targets start and the batch ends, as `cells_of` has them. In the place of
        the width `-1 - i` where `rows[i]` does not exist or its offsets or spans are broken.
    """
    report = np.empty(REPORT_COLUMNS, np.int64)
    # Borrowed: to count references in each function takes as long as filling a row or two.
    table, settings, rows, out, own = borrow(table), borrow(settings), borrow(rows), borrow(out), borrow(report)
    end = _fill_next(table, settings, rows, np.int64(0), out, own, token, cell, span)
    if end < 0:
        return end, 0, 0
    return report[WIDTH], report[TARGETS], end


@kernel
def fill_padded_group(
    table: Any, settings: Any, rows: Any, bounds: Any, out: Any, report: Any, token: Any, cell: Any, span: Any
) -> int:
    """Fill as many padded batches as `out` holds, one after another; an empty `out` only measures them all.

    Batch `b` is `rows[bounds[b]:bounds[b + 1]]`; the other arguments are those of `fill_padded`. The report, int64
    `(num_batches, REPORT_COLUMNS)`, is written a line a batch; where it was only measured, with its shape and where it
    would lie, but without counts. Returns the number of batches filled (or measured), or `-1 - i` where `rows[i]` is
    broken.
    """
    start = np.int64(0)  # typed: a literal would have `_fill_next` compiled twice
    table, settings, rows, out, report = borrow(table), borrow(settings), borrow(rows), borrow(out), borrow(report)
    for b in range(len(bounds) - 1):
        end = _fill_next(table, settings, rows[bounds[b] : bounds[b + 1]], start, out, report[b], token, cell, span)
        if end < 0:
            return int(end - bounds[b])
        if end > len(out) > 0:
            return b
        start = end
    return len(bounds) - 1
