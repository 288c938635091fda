"""Which source each row of a mix's batches is from, and what is trained of each."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastcollate.collate import AnyBatch, Collator, settings
from fastcollate.plan import MixedStore
from fastcollate.store import layout

Int64Array = npt.NDArray[np.int64]


class BatchSources:
    """Of an iteration's batches; windows are expected by the thread that plans, batches noted by the consumer's.

    Args:
        mix: what the rows are of.
        collator: what fills the batches.
    """

    def __init__(self, mix: MixedStore, collator: Collator) -> None:
        self._mix, self._collator = mix, collator
        self._ignored = int(collator.settings[settings.IGNORE]), settings.MASKED
        self._windows: dict[int, tuple[Int64Array, Int64Array, Int64Array | None]] = {}

    def expect(self, window: int, rows: Int64Array, bounds: Int64Array) -> None:
        """Take the padded batches of a window: batch `b` is `rows[bounds[b]:bounds[b + 1]]`."""
        self._windows[window] = self._mix.source_of(rows), bounds, None

    def expect_packs(self, window: int, packs: tuple[Int64Array, Int64Array, Int64Array], bounds: Int64Array) -> None:
        """Take the packed batches of a window: batch `b` is the packs `bounds[b]` to `bounds[b + 1]`."""
        rows, starts, ends = packs
        is_there = self._mix.cells[rows] > (starts & layout.FIRST_TOKEN if len(starts) else 0)  # others: no segment
        ends = np.append(0, np.cumsum(is_there))[ends]
        self._windows[window] = self._mix.source_of(rows[is_there]), bounds, ends

    def note(self, batch: AnyBatch, window: int, number: int) -> Int64Array:
        """Note on a batch, filled on the host, where its rows are from; returns the trained tokens of each source."""
        sources, bounds, ends = self._windows[window]
        self._windows.pop(window - 1, None)
        first, stop = int(bounds[number]), int(bounds[number + 1])
        targets = batch.targets.numpy()
        is_trained = (targets != self._ignored[0]) & (targets != self._ignored[1])
        if ends is None:
            found, trained = sources[first:stop], is_trained.sum(1)
        else:
            starts = batch[-1].numpy()[:-1]
            found = _of_segments(starts, targets.shape[1], sources, ends[first : stop + 1])
            inside = starts[starts < targets.size]  # segments behind the last cell are empty
            trained = np.zeros(len(starts), np.int64)
            trained[: len(inside)] = np.add.reduceat(is_trained.ravel(), inside, dtype=np.int64)
        self._collator.note_sources(batch.inputs, found)
        counts = np.zeros(len(self._mix.names) + 1, np.int64)
        np.add.at(counts, found, trained)
        return counts[:-1]  # what is no row's trains nothing


def _of_segments(starts: npt.NDArray[Any], capacity: int, sources: Int64Array, ends: Int64Array) -> Int64Array:
    """The source of each segment of a batch: a pack's rows come first, its unused cells, -1, behind them."""
    num_packs = len(ends) - 1
    pack = np.minimum(starts // capacity, num_packs - 1)
    first = np.searchsorted(starts, np.arange(num_packs) * capacity)
    place = ends[pack] + np.arange(len(starts)) - first[pack]
    return np.where(place < ends[pack + 1], sources[np.minimum(place, len(sources) - 1)], -1)
