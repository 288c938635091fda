"""Numba loops that fill packed batches: rows end to end, over caller-owned arrays; see `fill.py` for the terms."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastcollate.collate.fill import (
    AHEAD,
    ALIGNMENT,
    AT,
    CELLS,
    CORNERS,
    CUT_ROWS,
    CUT_TOKENS,
    END,
    LENGTH,
    LONGEST,
    PLACE_COLUMNS,
    RANKS,
    REAL,
    ROWS,
    SEGMENTS,
    SHARD,
    START,
    TARGETS,
    TRAINED,
    UNTRAINED,
    WIDTH,
    cells_of,
    fill_row,
    fill_unused,
    locate,
    prefetch_places,
    rounded_up,
)
from fastcollate.collate.masks import ignore_columns, mask_row
from fastcollate.collate.settings import ACROSS, CP_SIZE, IGNORE, LEFT, LIMIT, MAX_SEGMENTS, STRIDE
from fastcollate.jit import address_of, borrow, kernel, part, view
from fastcollate.store import layout


@part
def _row_multiple(settings: Any) -> int:
    """What divides the cells of each segment: a row is dealt to context-parallel ranks in two chunks each."""
    return int(max(2 * settings[CP_SIZE], 1))


@kernel
def packed_cells_of(
    settings: Any, num_packs: int, capacity: int, num_rows: int, cell_size: int
) -> tuple[int, int, int, int]:
    """Where targets, positions and segment bounds start, and where these end, in int64 cells from a batch's start.

    The bounds are int32, two in a cell. Where rows are split over context-parallel ranks, the counts of real cells up
    to each bound follow, in as many cells.
    """
    targets, positions = cells_of(num_packs, capacity, cell_size)
    bounds = positions + (positions - targets)
    longest = rounded_up(min(settings[LIMIT], capacity), _row_multiple(settings))
    most = max(num_rows + num_packs * ((capacity + longest - 1) // longest), settings[MAX_SEGMENTS]) + 1
    cells = rounded_up(most, 2 * ALIGNMENT) // 2
    return targets, positions, bounds, bounds + (2 * cells if settings[CP_SIZE] > 0 else cells)


@part
def _add_segment(
    column: int, end: int, real: int, start: int, positions: Any, segments: Any, reals: Any, report: Any
) -> None:
    """Positions 0, 1, 2, ... of a pack's columns from `column` to `end`, the bound behind them, and the real cells."""
    own = positions[column:end]
    for j in range(np.uint64(len(own))):
        own[j] = j
    number = report[SEGMENTS]
    segments[number + 1] = start + end
    if len(reals) > 0:
        reals[number + 1] = reals[number] + real
    report[SEGMENTS] = number + 1
    report[LONGEST] = max(report[LONGEST], end - column)


@part
def _fill_pack(
    table: Any, settings: Any, rows: Any, starts: Any, places: Any, begin: int, end: int, limit: int, start: int,
    inputs: Any, targets: Any, positions: Any, segments: Any, reals: Any, report: Any, token: Any, span: Any,
) -> int:  # fmt: skip
    """Fill a pack with rows `begin` to `end`, from cell `start` on; returns 0, or `-1 - i` if a row does not fit."""
    capacity, column, multiple = len(positions), 0, _row_multiple(settings)
    for i in range(begin, end):
        if i % AHEAD == 0:
            prefetch_places(table, places, i + AHEAD, i + 2 * AHEAD)
        length = places[i, LENGTH]
        first = max(length - limit, 0) * settings[LEFT] if len(starts) == 0 else starts[i] & layout.FIRST_TOKEN
        width = min(length - first, limit)
        lost = len(starts) == 0
        if not lost and starts[i] > layout.FIRST_TOKEN:
            width = min(width, starts[i] >> layout.COUNT_AT & layout.MOST_TOKENS)
            lost = starts[i] & layout.LOST != 0
        if (len(starts) > 0 and starts[i] < 0) or width < 0 or column + rounded_up(width, multiple) > capacity:
            return -1 - i
        if lost and length - first * (len(starts) > 0) > width:  # a part of a row that was split is no cut
            report[CUT_ROWS] += 1
            report[CUT_TOKENS] += length - width
        if width == 0:
            report[UNTRAINED] += 1
            continue
        stop = column + width
        tokens = view(places[i, AT], length + table[places[i, SHARD], layout.HOLDS_END], token)
        own = targets[column:stop]
        trained, corners = fill_row(tokens, length, first, inputs[column:stop], own, settings)
        if span is not None:
            masked, more = mask_row(table, places[i, SHARD], rows[i], length, first, length, settings, own, span)
            if masked < 0:
                return -1 - i
            trained -= masked
            corners += more
        if settings[STRIDE] > 0 and first > 0 and len(starts) > 0:  # the part before has trained these
            trained -= ignore_columns(own, 0, limit - settings[STRIDE], settings[IGNORE], settings[IGNORE])
        padded = column + rounded_up(width, multiple)
        fill_unused(inputs, targets, stop, padded, settings)
        if settings[ACROSS] == 0:
            _add_segment(column, padded, width, start, positions, segments, reals, report)
        column = padded
        report[REAL] += width
        report[TRAINED] += trained
        report[CORNERS] += corners
        report[UNTRAINED] += trained == 0
    if settings[ACROSS] != 0 and column > 0:
        _add_segment(0, column, column, start, positions, segments, reals, report)
    fill_unused(inputs, targets, column, capacity, settings)
    while column < capacity:  # the unused cells are segments of their own
        stop = min(column + rounded_up(limit, multiple), capacity)
        _add_segment(column, stop, 0, start, positions, segments, reals, report)
        column = stop
    return 0


@part
def _fill_packs(
    table: Any, settings: Any, rows: Any, starts: Any, packs: Any, at: int, report: Any, token: Any, cell: Any,
    span: Any,
) -> int:  # fmt: skip
    """Fill one batch at an address; returns 0, or `-1 - i` where `rows[i]` is broken or does not fit."""
    num_packs, capacity, first = len(packs) - 1, report[WIDTH], report[START]
    size = num_packs * capacity
    limit = min(settings[LIMIT], capacity)
    places = np.empty((len(rows), PLACE_COLUMNS), np.int64)
    status = locate(table, rows, places)
    if status < 0:
        return int(status)
    targets_at, positions_at, bounds_at, _ = packed_cells_of(
        settings, num_packs, capacity, len(rows), view(0, 0, cell).itemsize
    )
    inputs, targets = view(at, size, cell), view(at + 8 * targets_at, size, np.int64)
    positions = view(at + 8 * positions_at, size, np.int64)
    segments = view(at + 8 * bounds_at, 2 * (report[END] - first - bounds_at), np.int32)
    reals = segments[:0]
    if settings[CP_SIZE] > 0:
        segments, reals = segments[: len(segments) // 2], segments[len(segments) // 2 :]
        reals[0] = 0
    segments[0] = 0
    prefetch_places(table, places, np.int64(0), np.int64(AHEAD))
    for p in range(num_packs):
        begin, end, start, stop = packs[p] - packs[0], packs[p + 1] - packs[0], p * capacity, (p + 1) * capacity
        status = _fill_pack(
            table, settings, rows, starts, places, begin, end, limit, start, inputs[start:stop], targets[start:stop],
            positions[start:stop], segments, reals, report, token, span,
        )  # fmt: skip
        if status < 0:
            return int(status)
    for array in (segments, reals):
        if len(array) > 0:  # empty segments, up to a number that stands still
            array[report[SEGMENTS] + 1 : settings[MAX_SEGMENTS] + 1] = array[report[SEGMENTS]]
    return 0


@kernel
def fill_packed_group(
    table: Any, settings: Any, rows: Any, starts: Any, packs: Any, batches: Any, capacity: int, out: Any, report: Any,
    token: Any, cell: Any, span: Any,
) -> int:  # fmt: skip
    """Fill as many packed batches as `out` holds, one after another; an empty `out` only measures them all.

    Each row is filled as in a batch of its own; unused cells become segments no longer than a row may be.

    What is not said here is as in `fill.fill_padded_group`.

    Args:
        starts: int64, each row's part here, as `layout` says; empty where each row is cut as `LEFT` says.
        packs: int64 `(num_packs + 1,)`: pack `p` is `rows[packs[p]:packs[p + 1]]`.
        batches: int64 `(num_batches + 1,)`: batch `b` is the packs `batches[b]` to `batches[b + 1]`.
        out: int64, any size; a batch is inputs, targets, positions, and segment bounds as int32, at the places that
            `packed_cells_of` says.
    """
    table, settings, rows, starts, out = borrow(table), borrow(settings), borrow(rows), borrow(starts), borrow(out)
    at = 0
    for b in range(len(batches) - 1):
        own, line = packs[batches[b] : batches[b + 1] + 1], report[b]
        num_rows, num_packs = own[len(own) - 1] - own[0], len(own) - 1
        part, part_starts = rows[own[0] : own[0] + num_rows], starts[own[0] : own[0] + num_rows]
        targets, _, _, end = packed_cells_of(settings, num_packs, capacity, num_rows, view(0, 0, cell).itemsize)
        line[:] = 0
        line[ROWS], line[CELLS], line[WIDTH] = num_rows, num_packs * capacity, capacity
        line[RANKS], line[START], line[TARGETS], line[END] = settings[CP_SIZE], at, at + targets, at + end
        if at + end > len(out) > 0:
            return b
        if len(out) > 0:
            first = address_of(out) + 8 * at
            status = _fill_packs(table, settings, part, part_starts, own, first, line, token, cell, span)
            if status < 0:
                return int(status - own[0])
        at += end
    return len(batches) - 1
