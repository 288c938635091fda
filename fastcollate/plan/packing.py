"""Which rows share a pack: best fit decreasing over bounded lengths, in time linear in the rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcollate.errors import LARGEST_CAPACITY, InputError, integer
from fastcollate.plan import kernels as plan_kernels
from fastcollate.plan.options import Int64Array

MOST_PARTS = 1 << 26  # what packs them takes some three gigabytes


class Packing(NamedTuple):
    """Which row lies in which bin.

    Attributes:
        bin_of_row: int64 `(num_rows,)`.
        num_bins: number of bins.
    """

    bin_of_row: Int64Array
    num_bins: int


class Packs(NamedTuple):
    """Rows, or parts of rows, pack after pack.

    Attributes:
        rows: int64, row numbers; a row that is split stands there once a part.
        starts: int64, the first token of each part, and where it ends before its row how many it has, as `store.layout`
            says; empty where no row is split.
        bounds: int64 `(num_packs + 1,)`: pack `p` is `rows[bounds[p]:bounds[p + 1]]`.
    """

    rows: Int64Array
    starts: Int64Array
    bounds: Int64Array

    @property
    def num_packs(self) -> int:
        """Number of packs."""
        return len(self.bounds) - 1

    def take(self, order: Int64Array) -> Packs:
        """Some of the packs, in another order."""
        sizes = self.bounds[order + 1] - self.bounds[order]
        bounds = np.append(0, np.cumsum(sizes))
        places = np.arange(bounds[-1]) + np.repeat(self.bounds[order] - bounds[:-1], sizes)
        return Packs(self.rows[places], self.starts[places] if len(self.starts) else self.starts, bounds)

    def followed_by(self, other: Packs) -> Packs:
        """These packs, then others."""
        bounds = np.append(self.bounds, self.bounds[-1] + other.bounds[1:])
        return Packs(np.append(self.rows, other.rows), np.append(self.starts, other.starts), bounds)

    def filled_up(self, num_packs: int, *, repeat: bool) -> Packs:
        """The same rows in more packs: the packs of most rows are halved.

        Where there are fewer rows than packs, rows are repeated, or the last packs stay empty.
        """
        bounds = self.bounds
        while len(bounds) - 1 < num_packs:
            sizes = np.diff(bounds)
            halved = np.argsort(-sizes, kind="stable")[: num_packs - len(sizes)]
            halved = halved[sizes[halved] > 1]
            if len(halved) == 0:
                return Packs(self.rows, self.starts, bounds)._with_short_packs(num_packs, repeat=repeat)
            bounds = np.sort(np.concatenate([bounds, bounds[halved] + sizes[halved] // 2]))
        return Packs(self.rows, self.starts, bounds)

    def _with_short_packs(self, num_packs: int, *, repeat: bool) -> Packs:
        missing = num_packs - self.num_packs
        if not repeat or len(self.rows) == 0:
            return self._replace(bounds=np.append(self.bounds, np.full(missing, self.bounds[-1])))
        rows = np.append(self.rows, np.resize(self.rows, missing))
        starts = np.append(self.starts, np.resize(self.starts, missing)) if len(self.starts) else self.starts
        return Packs(rows, starts, np.append(self.bounds, self.bounds[-1] + np.arange(1, missing + 1)))


class Window(NamedTuple):
    """One rank's batches of one window: batch `b` is the row numbers `rows[bounds[b]:bounds[b + 1]]`."""

    rows: Int64Array
    bounds: Int64Array

    @property
    def num_batches(self) -> int:
        """Batches in this window."""
        return len(self.bounds) - 1

    def split(self) -> list[Int64Array]:
        """The batches, an array each."""
        return np.split(self.rows, self.bounds[1:-1])


class PackWindow(NamedTuple):
    """One rank's packed batches of one window: batch `b` is the packs `bounds[b]` to `bounds[b + 1]`."""

    packs: Packs
    bounds: Int64Array

    @property
    def num_batches(self) -> int:
        """Batches in this window."""
        return len(self.bounds) - 1

    def batch(self, index: int) -> Packs:
        """The packs of one batch, whose bounds start at 0."""
        bounds = self.packs.bounds[self.bounds[index] : self.bounds[index + 1] + 1]
        part = slice(bounds[0], bounds[-1])
        return Packs(self.packs.rows[part], self.packs.starts[part], bounds - bounds[0])


def pack_rows(
    rows: Int64Array, lengths: npt.NDArray[Any], capacity: int, limit: int, long_rows: str, multiple: int = 1,
    stride: int | None = None,
) -> Packs:  # fmt: skip
    """Pack rows, in the order that breaks ties, into as few packs as best fit decreasing needs.

    A row takes `limit` cells at most, not above the capacity; `long_rows` says what becomes of longer ones. The cells
    that it takes are rounded up to a multiple, as is the capacity. Refuses to split into more than `MOST_PARTS` parts.
    """
    starts = np.empty(0, np.int64)
    if long_rows == "drop":
        kept = lengths <= limit
        rows, lengths = rows[kept], lengths[kept]
    elif long_rows == "split" and len(rows) and lengths.max() > limit:
        rows, starts, lengths = _split(rows, lengths, limit, stride or limit)
    cells = np.minimum(lengths, limit)
    bin_of, num_bins = _pack(cells if multiple == 1 else -(-cells // multiple) * multiple, capacity)
    items = np.empty(len(rows), np.int64)
    plan_kernels.sort_by_length(np.arange(len(rows)), bin_of.astype(np.int32), num_bins, items, items[:0])
    bounds = np.append(0, np.cumsum(np.bincount(bin_of, minlength=num_bins)))
    return Packs(rows[items], starts[items] if len(starts) else starts, bounds)


def _split(
    rows: Int64Array, lengths: npt.NDArray[Any], limit: int, stride: int
) -> tuple[Int64Array, Int64Array, npt.NDArray[Any]]:
    """Rows as parts of `limit` tokens, less at the end, `stride` apart: the row, first token and length of each."""
    counts = 1 + np.maximum(-(-(lengths.astype(np.int64) - limit) // stride), 0)  # an empty row is one part
    num_parts = int(counts.sum())
    if num_parts > MOST_PARTS:
        row, length = int(rows[np.argmax(lengths)]), int(lengths.max())
        raise InputError(
            f"{len(rows)} rows in parts of {limit} tokens are {num_parts:,} parts, more than {MOST_PARTS:,} in one "
            f"window (row {row} alone has {length} tokens): raise the capacity, or give a smaller window"
        )
    starts = stride * (np.arange(num_parts) - np.repeat(np.cumsum(counts) - counts, counts))
    lengths = np.minimum(np.repeat(lengths, counts) - starts, limit).astype(lengths.dtype)
    return np.repeat(rows, counts), starts, lengths


def _pack(lengths: npt.NDArray[Any], capacity: int) -> Packing:
    """Pack lengths that are at most `capacity`."""
    order, ordered = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int32)
    longest = int(lengths.max(initial=0))
    plan_kernels.sort_by_length(np.arange(len(lengths)), lengths, longest, order, ordered)
    bin_of = np.empty(len(lengths), np.int64)
    return Packing(bin_of, int(plan_kernels.pack_best_fit(order, ordered, capacity, bin_of)))


def pack_lengths(lengths: npt.ArrayLike, capacity: int) -> Packing:
    """Pack rows into as few bins as best fit decreasing needs, in time linear in the rows.

    The longest row goes first, each to the fullest bin that still holds it: Johnson, "Near-optimal bin packing
    algorithms", 1973, who shows that it needs at most 11/9 of the fewest bins possible, and 4 more.

    Args:
        lengths: each row's length, integers `(num_rows,)`; longer ones count as `capacity`.
        capacity: cells a bin.

    Raises:
        InputError: the capacity is below 1 or above 16,777,216, or the lengths are not integers of at least 0.

    Example:
        >>> from fastcollate import pack_lengths
        >>> packing = pack_lengths([5, 4, 3, 2, 2], capacity=8)
        >>> packing.bin_of_row, packing.num_bins
        (array([0, 1, 0, 1, 1]), 2)
    """
    capacity = integer("capacity", capacity, 1, LARGEST_CAPACITY)
    array = np.asarray(lengths)
    if array.ndim != 1 or (array.size and (array.dtype.kind not in "iu" or array.min() < 0)):
        raise InputError(f"lengths are {array.dtype} of shape {array.shape}: give one integer of at least 0 a row")
    return _pack(np.minimum(array, capacity).astype(np.int32), capacity)
