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
    PLACE_COLUMNS,
    READABLE,
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
    locate,
    mask_row,
    prefetch_places,
)
from fastcollate.collate.settings import IGNORE, LEFT, LIMIT, MASK, NARROW, PAD, REFERENCE
from fastcollate.collate.vectors import fill_cells
from fastcollate.jit import kernel, view
from fastcollate.store.rows import TOKEN_SIZE


@kernel
def packed_cells_of(num_packs: int, capacity: int, num_rows: int, limit: int, narrow: int) -> tuple[int, int, int, int]:
    """Where targets, positions and segment bounds start and a packed batch ends, in int64 cells from its start."""
    targets, positions = cells_of(num_packs, capacity, narrow)
    bounds = positions + (positions - targets)
    num_bounds = num_rows + num_packs * ((capacity + limit - 1) // limit) + 1  # int32: two in a cell
    return targets, positions, bounds, bounds + (num_bounds + 2 * ALIGNMENT - 1) // (2 * ALIGNMENT) * ALIGNMENT


@kernel
def _count_up(positions: Any) -> None:
    """0, 1, 2, ..."""
    for j in range(np.uint64(len(positions))):
        positions[j] = j


@kernel
def _end_pack(limit: int, column: int, start: int, positions: Any, segments: Any, report: Any) -> None:
    """Make a pack's unused cells, from `column` on, segments of their own."""
    while column < len(positions):
        end = min(column + limit, len(positions))
        _count_up(positions[column:end])
        column = end
        report[SEGMENTS] += 1
        segments[report[SEGMENTS]] = start + end


@kernel
def _fill_pack(
    table: Any, settings: Any, rows: Any, starts: Any, places: Any, begin: int, end: int, limit: int, start: int,
    inputs_at: int, targets_at: int, positions: Any, segments: Any, report: Any,
) -> int:  # fmt: skip
    """Fill a pack with rows `begin` to `end`, from cell `start` on; returns 0, or `-1 - i` if a row does not fit."""
    pad, ignore, reference, mask = settings[PAD], settings[IGNORE], settings[REFERENCE], settings[MASK]
    left, capacity, column = settings[LEFT], len(positions), 0
    cell_size = np.int64(4 if settings[NARROW] != 0 else 8)
    for i in range(begin, end):
        if i % AHEAD == 0:
            prefetch_places(table, places, i + AHEAD)
        shard, length = places[i, SHARD], places[i, LENGTH]
        first = starts[i] if len(starts) > 0 else max(length - limit, 0) * left
        width = min(length - first, limit)
        if first < 0 or width < 0 or column + width > capacity:
            return -1 - i
        if len(starts) == 0 and length > width:  # a part of a row that was split is no cut
            report[CUT_ROWS] += 1
            report[CUT_TOKENS] += length - width
        if width == 0:
            report[UNTRAINED] += 1
            continue
        own = targets_at + 8 * column
        trained, corners = fill_row(
            table[shard, TOKEN_SIZE], cell_size, places[i, AT], length, places[i, READABLE], first, width,
            inputs_at + cell_size * column, own, capacity - column, pad, ignore, reference,
        )  # fmt: skip
        if mask != 0:
            masked = mask_row(
                table, shard, rows[i], length, first, length, settings, view(own, width, np.int64), report
            )
            if masked < 0:
                return -1 - i
            trained -= masked
        _count_up(positions[column : column + width])
        column += width
        report[REAL] += width
        report[TRAINED] += trained
        report[UNTRAINED] += trained == 0
        report[CORNERS] += corners
        report[SEGMENTS] += 1
        segments[report[SEGMENTS]] = start + column
    fill_cells(inputs_at + cell_size * column, capacity - column, cell_size, pad)
    fill_cells(targets_at + 8 * column, capacity - column, 8, ignore)
    _end_pack(limit, column, start, positions, segments, report)
    return 0


@kernel
def _fill_packs(
    table: Any, settings: Any, rows: Any, starts: Any, packs: Any, inputs_at: int, targets_at: int,
    positions: Any, segments: Any, report: Any,
) -> int:  # fmt: skip
    """Fill one batch; returns 0, or `-1 - i` where `rows[i]` is broken or does not fit."""
    capacity, cell_size = report[WIDTH], 4 if settings[NARROW] != 0 else 8
    limit = min(settings[LIMIT], capacity)
    places = np.empty((len(rows), PLACE_COLUMNS), np.int64)
    status = locate(table, rows, places)
    if status < 0:
        return int(status)
    segments[0] = 0
    for p in range(len(packs) - 1):
        begin, end, start = packs[p] - packs[0], packs[p + 1] - packs[0], p * capacity
        status = _fill_pack(
            table, settings, rows, starts, places, begin, end, limit, start, inputs_at + cell_size * start,
            targets_at + 8 * start, positions[start : start + capacity], segments, report,
        )  # fmt: skip
        if status < 0:
            return int(status)
    return 0


@kernel
def fill_packed_group(
    table: Any, settings: Any, rows: Any, starts: Any, packs: Any, batches: Any, capacity: int, out: Any, report: Any
) -> int:
    """Fill as many packed batches as `out` holds, one after another.

    Each row is filled as in a batch of its own; unused cells become segments no longer than a row may be.

    Args:
        table: see `fill.fill_padded`.
        settings: see `fill.fill_padded`.
        rows: int64, row numbers, pack after pack.
        starts: int64, each row's first token here; empty where each row is cut as `LEFT` says.
        packs: int64 `(num_packs + 1,)`: pack `p` is `rows[packs[p]:packs[p + 1]]`.
        batches: int64 `(num_batches + 1,)`: batch `b` is the packs `batches[b]` to `batches[b + 1]`.
        capacity: cells a pack.
        out: int64, any size; a batch is inputs, targets, positions, and segment bounds as int32, at the places that
            `packed_cells_of` says.
        report: see `fill.fill_padded_group`.

    Returns:
        The number of batches filled, or `-1 - i` where `rows[i]` is broken or does not fit its pack.
    """
    at = 0
    for b in range(len(batches) - 1):
        own = packs[batches[b] : batches[b + 1] + 1]
        num_rows = own[len(own) - 1] - own[0]
        part, part_starts = rows[own[0] : own[0] + num_rows], starts[own[0] : own[0] + num_rows]
        limit, narrow = min(settings[LIMIT], capacity), settings[NARROW]
        targets, positions, bounds, end = packed_cells_of(len(own) - 1, capacity, num_rows, limit, narrow)
        report[b] = 0
        report[b, CELLS], report[b, ROWS], report[b, WIDTH] = (len(own) - 1) * capacity, num_rows, capacity
        report[b, START], report[b, TARGETS], report[b, END] = at, at + targets, at + end
        if at + end > len(out):
            return b
        places, segments = out[at + positions : at + bounds], out[at + bounds : at + end].view(np.int32)
        first = out.ctypes.data + 8 * at
        second = first + 8 * targets
        status = _fill_packs(table, settings, part, part_starts, own, first, second, places, segments, report[b])
        if status < 0:
            return int(status - own[0])
        at += end
    return len(batches) - 1
