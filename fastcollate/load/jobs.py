"""One window's batches, to be filled group by group."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fastcollate.collate import Batch, Collator, PackedBatch
from fastcollate.collate import fill as kernels
from fastcollate.errors import InputError
from fastcollate.plan import Packs

Int64Array = npt.NDArray[np.int64]
Fill = Callable[[Int64Array, Int64Array, Int64Array], int]  # bounds, buffer, report -> batches filled


class Job(Protocol):
    """One window's batches.

    Attributes:
        ends: int64 `(num_batches,)`: where each batch would end, in int64 cells, if all lay in one buffer. Behind a
            damaged row that is not known: the batches there take none, and are refused when they are filled.
    """

    ends: Int64Array

    def fill(self, first: int, stop: int, out: Int64Array) -> Int64Array:
        """Fill batches `first` to `stop` into a buffer that holds them; returns the kernel's report, a line a batch.

        Raises:
            InputError: a row does not exist, its shard is damaged, or it does not fit its pack.
        """

    def batches(self, out: Int64Array, report: Int64Array) -> Sequence[Batch | PackedBatch]:
        """The filled batches, as views of the buffer."""


class PaddedJob:
    """Padded batches; see `Job`.

    Args:
        collator: how.
        rows: int64, row numbers of the store, batch after batch.
        bounds: int64 `(num_batches + 1,)`: batch `b` is `rows[bounds[b]:bounds[b + 1]]`.
    """

    def __init__(self, collator: Collator, rows: Int64Array, bounds: Int64Array) -> None:
        self._collator = collator
        self._rows, self._bounds = np.ascontiguousarray(rows, np.int64), np.ascontiguousarray(bounds, np.int64)
        self.ends = _ends(self._fill, self._bounds)

    def _fill(self, bounds: Int64Array, out: Int64Array, report: Int64Array) -> int:
        return self._collator.fill_group(self._rows, bounds, out, report)

    def fill(self, first: int, stop: int, out: Int64Array) -> Int64Array:
        """See `Job`."""
        return _filled(self._fill, self._bounds[first : stop + 1], out)

    def batches(self, out: Int64Array, report: Int64Array) -> list[Batch]:
        """See `Job`."""
        return self._collator.batches(out, report.tolist())


class PackedJob:
    """Packed batches; see `Job`.

    Args:
        collator: how.
        packs: the rows of the store, pack after pack.
        bounds: int64 `(num_batches + 1,)`: batch `b` is the packs `bounds[b]` to `bounds[b + 1]`.
        capacity: cells a pack.
    """

    def __init__(self, collator: Collator, packs: Packs, bounds: Int64Array, capacity: int) -> None:
        self._collator = collator
        self._packs = Packs(*(np.ascontiguousarray(part, np.int64) for part in packs))
        self._bounds, self._capacity = np.ascontiguousarray(bounds, np.int64), capacity
        self.ends = _ends(self._fill, self._bounds)

    def _fill(self, bounds: Int64Array, out: Int64Array, report: Int64Array) -> int:
        packs = self._packs
        return self._collator.fill_packed_group(
            packs.rows, packs.starts, packs.bounds, bounds, self._capacity, out, report
        )

    def fill(self, first: int, stop: int, out: Int64Array) -> Int64Array:
        """See `Job`."""
        return _filled(self._fill, self._bounds[first : stop + 1], out)

    def batches(self, out: Int64Array, report: Int64Array) -> list[PackedBatch]:
        """See `Job`."""
        return self._collator.packed_batches(out, report.tolist())


def _ends(fill: Fill, bounds: Int64Array) -> Int64Array:
    """See `Job`: a kernel that is given no room measures."""
    report = np.zeros((len(bounds) - 1, kernels.REPORT_COLUMNS), np.int64)
    with contextlib.suppress(InputError):  # a damaged row is told when its turn comes
        fill(bounds, np.empty(0, np.int64), report)
    return np.maximum.accumulate(report[:, kernels.END])


def _filled(fill: Fill, bounds: Int64Array, out: Int64Array) -> Int64Array:
    report = np.empty((len(bounds) - 1, kernels.REPORT_COLUMNS), np.int64)
    if fill(bounds, out, report) < len(report):
        raise InputError("the store's shards changed while they were read; prepare the store again")
    return report
