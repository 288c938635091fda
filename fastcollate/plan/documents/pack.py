"""Packs of documents, a window at a time; see `PlanOptions.packing`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastcollate.errors import InputError
from fastcollate.plan import kernels as plan_kernels
from fastcollate.plan.documents import kernels
from fastcollate.plan.options import Int64Array, PlanOptions
from fastcollate.plan.packing import MOST_PARTS, Packs, pack_rows


def packs_of_window(
    rows: Int64Array, lengths: npt.NDArray[Any], options: PlanOptions, limit: int, *, is_last: bool
) -> Packs:
    """A window's rows, of at most `limit` tokens each where they are packed whole, as packs."""
    assert options.capacity is not None
    if options.packing == "best_fit":
        return pack_rows(
            rows, lengths, options.capacity, limit, options.long_rows, options.row_multiple, options.stride
        )
    if options.packing == "crop":
        return _cropped(rows, lengths, options.capacity)
    unit = options.part_group if not is_last else options.part_ranks if options.tail == "repeat" else 1
    return _concatenated(rows, lengths, options.capacity, unit)


def _concatenated(rows: Int64Array, lengths: npt.NDArray[Any], capacity: int, unit: int) -> Packs:
    """Rows end to end, in this order, in packs whose number is a multiple of `unit`."""
    num_tokens = int(lengths.sum(dtype=np.int64))
    most = len(rows) + -(-num_tokens // (capacity * unit)) * unit
    if most > MOST_PARTS:
        raise InputError(
            f"{len(rows)} documents in packs of {capacity} tokens are {most:,} parts, more than {MOST_PARTS:,} in one "
            "window: raise the capacity, or give a smaller window"
        )
    sizes = _sizes(num_tokens, capacity, unit)
    items, slices, bounds = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(len(sizes) + 1, np.int64)
    count = kernels.cut_stream(lengths, sizes, items, slices, bounds)
    return Packs(rows[items[:count]], slices[:count], bounds)


def _sizes(num_tokens: int, capacity: int, unit: int) -> Int64Array:
    """Tokens of each pack: full ones, and at the end `unit` of them that share the rest evenly."""
    num_packs = -(-num_tokens // (capacity * unit)) * unit
    full = max(num_packs - unit, 0)
    each, more = divmod(num_tokens - full * capacity, unit)
    last = each + (np.arange(num_packs - full) < more)
    return np.append(np.full(full, capacity), last).astype(np.int64)


def _cropped(rows: Int64Array, lengths: npt.NDArray[Any], capacity: int) -> Packs:
    is_there = lengths > 0
    rows, cells = rows[is_there], np.minimum(lengths[is_there], capacity + 1).astype(np.int32)
    order = np.empty(len(rows), np.int64)
    plan_kernels.sort_by_length(np.arange(len(rows)), cells, capacity + 1, order, cells[:0])
    ends = np.cumsum(np.bincount(cells, minlength=capacity + 2))
    items, slices, bounds = (np.empty(len(rows) + more, np.int64) for more in (0, 0, 1))
    _, num_packs = kernels.crop_best_fit(order, ends, capacity, items, slices, bounds)
    return Packs(rows[items], slices, bounds[: num_packs + 1].copy())
