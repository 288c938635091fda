"""One window's batches, to be filled group by group."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcollate.collate import AnyBatch, Collator
from fastcollate.collate import fill as kernels
from fastcollate.errors import InputError

Int64Array = npt.NDArray[np.int64]
Fill = Callable[[Int64Array, Int64Array, Int64Array], int]  # bounds, buffer, report -> batches filled
Batches = Callable[[Int64Array, Iterable[list[int]]], Iterator[AnyBatch]]


class Job:
    """One window's batches, to be filled, by the bounds of their rows or packs.

    `ends`, int64 `(num_batches,)`, says where each batch would end, in int64 cells, if all lay in one buffer. Behind a
    damaged row that is not known: the batches there take none, and are refused when they are filled.
    """

    def __init__(self, fill: Fill, batches: Batches, bounds: Int64Array, held: object = None) -> None:
        self._held = held  # what is read stays there as long as the job
        self._fill, self._batches, self._bounds = fill, batches, np.ascontiguousarray(bounds, np.int64)
        report = np.zeros((len(bounds) - 1, kernels.REPORT_COLUMNS), np.int64)
        with contextlib.suppress(InputError):  # a damaged row is told when its turn comes
            fill(self._bounds, np.empty(0, np.int64), report)  # a kernel that is given no room measures
        self.ends = np.maximum.accumulate(report[:, kernels.END])

    def fill(self, first: int, stop: int, out: Int64Array) -> Int64Array:
        """Fill batches `first` to `stop` into a buffer that holds them; returns the kernel's report, a line a batch."""
        report = np.empty((stop - first, kernels.REPORT_COLUMNS), np.int64)
        if self._fill(self._bounds[first : stop + 1], out, report) < len(report):
            raise InputError("the store's shards changed while they were read; prepare the store again")
        return report

    def batches(self, out: Int64Array, report: Int64Array) -> Iterator[AnyBatch]:
        """The filled batches, as views of the buffer, each made when it is asked for."""
        return self._batches(out, report.tolist())


class Places(NamedTuple):
    """The rows of a window: batch `b` is `rows[bounds[b]:bounds[b + 1]]`, or packed the packs of these numbers.

    Of pairs, or of answers, whose `verdicts` are given. Packed, `packs` bounds each pack's rows, and `cells`, int64
    `(num_rows,)`, are what each row takes of a pack.
    """

    verdicts: Mapping[str, npt.NDArray[Any]]
    rows: Int64Array
    bounds: Int64Array
    packs: Int64Array | None = None
    cells: Int64Array | None = None

    def name(self, index: int, batch: Any, host: Any) -> Any:
        """A batch of the window with its rows; `host` is the same batch where the host reads it at once."""
        start, stop = self.bounds[index : index + 2].tolist()
        verdicts = (self.verdicts,) if self.verdicts else ()
        if self.packs is None or self.cells is None:
            make: Any = Collator.padded_answers if verdicts else Collator.padded_pairs
            return make(batch, self.rows[start:stop], *verdicts)
        packs = self.packs[start : stop + 1]
        part = slice(packs[0], packs[-1])
        rows = Collator.rows_of_segments(
            host[-1].numpy(), host.inputs.shape[1], self.rows[part], packs - packs[0], self.cells[part]
        )
        make = Collator.packed_answers if verdicts else Collator.packed_pairs
        return make(batch, rows, *verdicts)


def padded_job(collator: Collator, rows: Int64Array, bounds: Int64Array, held: object = None) -> Job:
    """Padded batches: batch `b` is `rows[bounds[b]:bounds[b + 1]]`, row numbers of the store."""
    rows = np.ascontiguousarray(rows, np.int64)

    def fill(bounds: Int64Array, out: Int64Array, report: Int64Array) -> int:
        return collator.fill_group(rows, bounds, out, report)

    return Job(fill, collator.batches, bounds, held)


def packed_job(
    collator: Collator,
    packs: tuple[Int64Array, Int64Array, Int64Array],
    bounds: Int64Array,
    capacity: int,
    held: object = None,
) -> Job:
    """Packed batches: batch `b` is the packs `bounds[b]` to `bounds[b + 1]`, of so many cells each."""
    rows, starts, ends = (np.ascontiguousarray(part, np.int64) for part in packs)

    def fill(bounds: Int64Array, out: Int64Array, report: Int64Array) -> int:
        return collator.fill_packed_group(rows, starts, ends, bounds, capacity, out, report)

    return Job(fill, collator.packed_batches, bounds, held)
