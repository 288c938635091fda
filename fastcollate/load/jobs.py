"""One window's batches, to be filled group by group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastcollate.collate.batch import Batch, PackedBatch
from fastcollate.collate.collator import Collator
from fastcollate.errors import InputError
from fastcollate.load import queue_kernels
from fastcollate.plan.packing import Packs

Int64Array = npt.NDArray[np.int64]
Lines = Sequence[list[int]]


class Job(Protocol):
    """One window's batches."""

    @property
    def line(self) -> Int64Array:
        """What `queue_kernels` reads of the job, for as long as the job lives."""

    @property
    def num_batches(self) -> int:
        """Batches in the window."""

    def batches(self, out: Int64Array, lines: Lines) -> Sequence[Batch | PackedBatch]:
        """The filled batches that some lines of the kernel's report tell of, as views of `out`."""

    def explain(self, place: int) -> InputError:
        """Why the kernel refused row `place` of the job."""


class PaddedJob:
    """Padded batches; see `Job`.

    Args:
        collator: how.
        rows: int64, row numbers of the store, batch after batch.
        bounds: int64 `(num_batches + 1,)`: batch `b` is `rows[bounds[b]:bounds[b + 1]]`.
    """

    def __init__(self, collator: Collator, rows: Int64Array, bounds: Int64Array) -> None:
        self._collator = collator
        self.num_batches = len(bounds) - 1
        self._rows, self._bounds = _int64(rows), _int64(bounds)
        self.line = np.zeros(queue_kernels.JOB_COLUMNS, np.int64)
        _write_rows(self.line, self._rows, self._bounds)

    def batches(self, out: Int64Array, lines: Lines) -> list[Batch]:
        """See `Job`."""
        return self._collator.batches(out, lines)

    def explain(self, place: int) -> InputError:
        """See `Job`."""
        return self._collator.table.explain(int(self._rows[place]))


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
        self.num_batches = len(bounds) - 1
        self._packs, self._bounds, self._capacity = Packs(*map(_int64, packs)), _int64(bounds), capacity
        self.line = np.zeros(queue_kernels.JOB_COLUMNS, np.int64)
        _write_rows(self.line, self._packs.rows, self._bounds)
        self.line[queue_kernels.CAPACITY] = capacity
        self.line[queue_kernels.STARTS], self.line[queue_kernels.NUM_STARTS] = _place(self._packs.starts)
        self.line[queue_kernels.PACKS], self.line[queue_kernels.NUM_PACKS] = _place(self._packs.bounds)

    def batches(self, out: Int64Array, lines: Lines) -> list[PackedBatch]:
        """See `Job`."""
        return self._collator.packed_batches(out, lines)

    def explain(self, place: int) -> InputError:
        """See `Job`."""
        packs = self._packs
        return self._collator.explain_pack(packs.rows, packs.starts, packs.bounds, self._capacity, place)


def _write_rows(line: Int64Array, rows: Int64Array, bounds: Int64Array) -> None:
    line[queue_kernels.ROWS], line[queue_kernels.NUM_ROWS] = _place(rows)
    line[queue_kernels.BOUNDS], line[queue_kernels.NUM_BOUNDS] = _place(bounds)


def _int64(array: npt.NDArray[Any]) -> Int64Array:
    """As the kernels read it, who see an address only."""
    return np.ascontiguousarray(array, np.int64)


def _place(array: Int64Array) -> tuple[int, int]:
    return array.ctypes.data, len(array)
