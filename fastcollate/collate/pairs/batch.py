"""Batches of pairs: rows as in any other batch, and which of them is which."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fastcollate.collate.batch import AnyBatch, Counts, PackedBatch, counts_of
from fastcollate.collate.batch import _with_tensors as with_tensors

Int64Array = npt.NDArray[np.int64]


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
        cells = torch.arange(values.numel(), device=values.device)
        segment = torch.searchsorted(self.cu_seqlens.long(), cells, right=True) - 1
        sums = values.new_zeros(len(self.rows)).index_add(0, segment, values.flatten())
        return sums[self.rows >= 0].view(-1, 2).T

    @property
    def counts(self) -> Counts | None:
        """What a loader's batch holds; see `Batch.counts`."""
        return counts_of(self)

    def with_tensors(self, tensors: Iterable[torch.Tensor]) -> PreferenceBatch:
        """The same batch as other tensors, such as copies on a device."""
        return with_tensors(self, tensors)  # type: ignore[type-var]


def padded_pairs(batch: AnyBatch, rows: Int64Array) -> PreferenceBatch:
    """A padded batch with its rows."""
    return PreferenceBatch(batch.inputs, batch.targets, _there(rows, batch.inputs))


def packed_pairs(
    batch: PackedBatch, host_bounds: Int64Array, rows: Int64Array, packs: Int64Array, cells: Int64Array
) -> PreferenceBatch:
    """A packed batch with the row of each segment.

    `host_bounds` are its `cu_seqlens`; `packs` bounds each pack's `rows`, from 0, and `cells` are what each row takes.
    """
    sizes, before = np.diff(packs), np.append(0, np.cumsum(cells))  # cells in all packs before a row
    capacity = batch.inputs.shape[1]
    starts = before[:-1] + np.repeat(capacity * np.arange(len(sizes)) - before[packs[:-1]], sizes)
    found = np.full(len(host_bounds) - 1, -1, np.int64)
    found[np.searchsorted(host_bounds[:-1], starts)] = rows
    inputs, targets, position_ids, cu_seqlens = batch
    return PreferenceBatch(inputs, targets, _there(found, inputs), position_ids, cu_seqlens)


def _there(rows: Int64Array, inputs: torch.Tensor) -> torch.Tensor:
    """Where the batch is: a copy, since it may change after that."""
    return torch.tensor(rows).to(inputs.device, non_blocking=True)
