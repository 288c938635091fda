"""Batches of pairs, and of answers with verdicts: rows as in any other batch, and which of them is which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fastcollate.collate.batch import AnyBatch, Counts, PackedBatch, counts_of, sources_of
from fastcollate.collate.batch import _with_tensors as with_tensors

Int64Array = npt.NDArray[np.int64]
Verdicts = Mapping[str, npt.NDArray[Any]]  # columns of all rows of a store, `label` or `score`


class PreferenceBatch(NamedTuple):
    """A batch of pairs, padded or packed.

    Padded, `(2 * pairs, width)`: the chosen rows, then the rejected ones in the same order. Packed, `(packs,
    capacity)`: both rows of a pair lie in one pack, the chosen one right before its rejected one.

    Attributes:
        inputs: int64 (or int32 where asked for), of this shape.
        targets: int64, of this shape; prompts are masked unless asked for.
        rows: int64, the store's row of each line, `(2 * pairs,)`; packed of each segment, `(segments,)`, and -1 for
            unused cells. An even number is a chosen one, the next its rejected one.
        position_ids: packed int64 `(packs, capacity)`, restarting at 0 with each row; else `None`.
        cu_seqlens: packed int32 `(segments + 1,)`, as in a `PackedBatch`; else `None`.

    Example:
        >>> from fastcollate import BatchLoader, prepare
        >>> pairs = [{"prompt": "Is it?", "chosen": " Yes, it is.", "rejected": " No."} for _ in range(3)]
        >>> _ = prepare(pairs, "pairs", template="preference")
        >>> batch = next(iter(BatchLoader("pairs", batch_size=3, policy="sequential")))
        >>> batch.inputs.shape, batch.rows
        (torch.Size([6, 8]), tensor([0, 2, 4, 1, 3, 5]))
        >>> batch.by_pair((batch.targets != -100).float())  # trained tokens, end-of-text included
        tensor([[6., 6., 6.],
                [3., 3., 3.]])
        >>> packed = next(iter(BatchLoader("pairs", batch_size=1, policy="packed", capacity=40)))
        >>> packed.cu_seqlens, packed.rows
        (tensor([ 0,  8, 13, 21, 26, 34, 39, 40], dtype=torch.int32), tensor([ 0,  1,  2,  3,  4,  5, -1]))
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    position_ids: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None

    @property
    def pairs(self) -> torch.Tensor:
        """The number of each pair in the store, int64 `(pairs,)`, in the order of `by_pair`."""
        return self.rows[(self.rows >= 0) & (self.rows % 2 == 0)] // 2

    def by_pair(self, values: torch.Tensor) -> torch.Tensor:
        """Sums of a value per cell over each row, `(2, pairs)`: of the chosen rows, and of the rejected ones."""
        if self.cu_seqlens is None:
            return values.sum(1).view(2, -1)
        return _by_segment(values, self.cu_seqlens)[self.rows >= 0].view(-1, 2).T

    @property
    def counts(self) -> Counts | None:
        """What a loader's batch holds; see `Batch.counts`."""
        return counts_of(self)

    @property
    def sources(self) -> torch.Tensor | None:
        """Of a loader of a `MixedStore` the source of each row, or segment; see `Batch.sources`."""
        return sources_of(self)

    def with_tensors(self, tensors: Iterable[torch.Tensor]) -> PreferenceBatch:
        """The same batch as other tensors, such as copies on a device."""
        return with_tensors(self, tensors)  # type: ignore[type-var]


class AnswerBatch(NamedTuple):
    """A batch of answers with verdicts, padded `(rows, width)` or packed `(packs, capacity)`.

    Attributes:
        inputs: int64 (or int32 where asked for), of this shape.
        targets: int64, of this shape; prompts are masked unless asked for.
        rows: int64, the store's row of each line, `(rows,)`; packed of each segment, and -1 for unused cells.
        label: int8, 1 for a good answer and 0 for a bad one, by row as `rows` (-1 for unused cells); `None` where the
            store has scores.
        score: float32, the same of scores (NaN for unused cells); else `None`.
        position_ids: packed int64 `(packs, capacity)`, restarting at 0 with each row; else `None`.
        cu_seqlens: packed int32 `(segments + 1,)`, as in a `PackedBatch`; else `None`.

    Example:
        >>> from fastcollate import BatchLoader, prepare
        >>> verdicts = [{"prompt": "Is it?", "completion": " Yes.", "label": n % 2 == 0} for n in range(4)]
        >>> _ = prepare(verdicts, "verdicts", template="preference")
        >>> batch = next(iter(BatchLoader("verdicts", batch_size=4, policy="sequential")))
        >>> batch.inputs.shape, batch.rows, batch.label
        (torch.Size([4, 5]), tensor([0, 1, 2, 3]), tensor([1, 0, 1, 0], dtype=torch.int8))
        >>> batch.by_row((batch.targets != -100).float())  # trained tokens, end-of-text included
        tensor([3., 3., 3., 3.])
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    label: torch.Tensor | None = None
    score: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None

    def by_row(self, values: torch.Tensor) -> torch.Tensor:
        """Sums of a value per cell over each line or segment, as many as `rows`."""
        if self.cu_seqlens is None:
            return values.sum(1)
        return _by_segment(values, self.cu_seqlens)[: len(self.rows)]

    @property
    def counts(self) -> Counts | None:
        """What a loader's batch holds; see `Batch.counts`."""
        return counts_of(self)

    @property
    def sources(self) -> torch.Tensor | None:
        """Of a loader of a `MixedStore` the source of each row, or segment; see `Batch.sources`."""
        return sources_of(self)

    def with_tensors(self, tensors: Iterable[torch.Tensor]) -> AnswerBatch:
        """The same batch as other tensors, such as copies on a device."""
        return with_tensors(self, tensors)  # type: ignore[type-var]


def padded_pairs(batch: AnyBatch, rows: Int64Array) -> PreferenceBatch:
    """A padded batch with its rows."""
    return PreferenceBatch(batch.inputs, batch.targets, _there(rows, batch.inputs))


def padded_answers(batch: AnyBatch, rows: Int64Array, verdicts: Verdicts) -> AnswerBatch:
    """A padded batch with its rows and their verdicts."""
    found = {name: _there(values[rows], batch.inputs) for name, values in verdicts.items()}
    return AnswerBatch(batch.inputs, batch.targets, _there(rows, batch.inputs), **found)


def packed_pairs(batch: PackedBatch, rows: Int64Array) -> PreferenceBatch:
    """A packed batch with the row of each segment."""
    inputs, targets, position_ids, cu_seqlens = batch
    return PreferenceBatch(inputs, targets, _there(rows, inputs), position_ids, cu_seqlens)


def packed_answers(batch: PackedBatch, rows: Int64Array, verdicts: Verdicts) -> AnswerBatch:
    """A packed batch with the row of each segment, and its verdict."""
    inputs, targets, *places = batch
    found = {}
    for name, values in verdicts.items():
        unused = -1 if np.issubdtype(values.dtype, np.integer) else np.nan
        found[name] = _there(np.where(rows >= 0, values[np.maximum(rows, 0)], values.dtype.type(unused)), inputs)
    return AnswerBatch(inputs, targets, _there(rows, inputs), found.get("label"), found.get("score"), *places)


def rows_of_segments(
    bounds: Int64Array, capacity: int, rows: Int64Array, packs: Int64Array, cells: Int64Array
) -> Int64Array:
    """The row of each segment of a packed batch, int64 `(num_segments,)`, -1 where cells are unused.

    `bounds` are its `cu_seqlens`; `packs` bounds each pack's `rows`, from 0, and `cells` are what each row takes.
    """
    sizes, before = np.diff(packs), np.append(0, np.cumsum(cells))  # cells in all packs before a row
    starts = before[:-1] + np.repeat(capacity * np.arange(len(sizes)) - before[packs[:-1]], sizes)
    found = np.full(len(bounds) - 1, -1, np.int64)
    is_there = cells > 0  # others have no segment
    found[np.searchsorted(bounds[:-1], starts[is_there])] = rows[is_there]
    return found


def _by_segment(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sums over segments; empty ones behind the last cell have none."""
    cells = torch.arange(values.numel(), device=values.device)
    segment = torch.searchsorted(cu_seqlens.long(), cells, right=True) - 1
    return values.new_zeros(len(cu_seqlens) - 1).index_add(0, segment, values.flatten())


def _there(rows: npt.NDArray[Any], inputs: torch.Tensor) -> torch.Tensor:
    """Where the batch is: a copy, since it may change after that."""
    return torch.tensor(rows).to(inputs.device, non_blocking=True)
