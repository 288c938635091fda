"""One window's packed batches, to be filled ahead."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastcollate.collate import Collator, PackedBatch
from fastcollate.packing import Packs

Int64Array = npt.NDArray[np.int64]


class PackedJob:
    """Packed batches; see `prefetch.Job`.

    Args:
        collator: how.
        packs: the rows of the store, pack after pack.
        bounds: int64 `(num_batches + 1,)`: batch `b` is the packs `bounds[b]` to `bounds[b + 1]`.
        capacity: cells a pack.
    """

    def __init__(self, collator: Collator, packs: Packs, bounds: Int64Array, capacity: int) -> None:
        self._collator = collator
        self._packs = packs
        self._bounds = bounds
        self._capacity = capacity

    @property
    def num_batches(self) -> int:
        """Batches in the window."""
        return len(self._bounds) - 1

    def fill(self, first: int, stop: int, out: Int64Array, report: Int64Array) -> int:
        """See `prefetch.Job`."""
        packs, bounds = self._packs, self._bounds[first : stop + 1]
        return self._collator.fill_packed_group(
            packs.rows, packs.starts, packs.bounds, bounds, self._capacity, out, report
        )

    def batches(self, out: Int64Array, lines: Sequence[Sequence[int]]) -> list[PackedBatch]:
        """See `prefetch.Job`."""
        return self._collator.packed_batches(out, lines)
