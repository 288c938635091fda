"""What a loader hands over: batches as named tuples of tensors, which know what they hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import torch

_COUNTS = "_fastcollate_counts"
B = TypeVar("B", bound="Batch | PackedBatch")


class Counts(NamedTuple):
    """What a batch holds, as its kernel counted it on the way; sums of these over batches mean the same.

    Attributes:
        rows: rows, or parts of rows.
        cells: input cells, padding included.
        real_cells: input cells that hold a row's token.
        trained_tokens: targets that are not ignored.
        corner_rows: rows on which `mode="reference"` differs from `mode="positional"`.
        untrained_rows: rows none of whose targets is trained.
        cut_rows: rows that were cut to `max_length`, or to a pack's capacity.
        cut_tokens: tokens that this left out.
    """

    rows: int
    cells: int
    real_cells: int
    trained_tokens: int
    corner_rows: int
    untrained_rows: int
    cut_rows: int
    cut_tokens: int


class Batch(NamedTuple):
    """A padded batch; unpacks as `inputs, targets = batch`.

    Attributes:
        inputs: int64 (or int32 where asked for) `(rows, width)`.
        targets: int64 `(rows, width)`.

    Example:
        >>> from fastcollate import collate_fn
        >>> batch = collate_fn([[5, 6], [7]])
        >>> batch.inputs
        tensor([[    5,     6],
                [    7, 50256]])
        >>> batch.targets
        tensor([[    6, 50256],
                [50256,  -100]])
        >>> inputs, targets = batch
    """

    inputs: torch.Tensor
    targets: torch.Tensor

    @property
    def counts(self) -> Counts | None:
        """What a loader's batch holds; `None` for tensors from elsewhere. See `counts_of`."""
        return counts_of(self)

    def with_tensors(self, tensors: Iterable[torch.Tensor]) -> Batch:
        """The same batch as other tensors, such as copies on a device."""
        return _with_tensors(self, tensors)


class PackedBatch(NamedTuple):
    """A packed batch: rows end to end, without padding but at a pack's end.

    Attributes:
        inputs: int64 (or int32 where asked for) `(packs, capacity)`.
        targets: int64 `(packs, capacity)`; a row's last target is its end-of-text, never the next row's token.
        position_ids: int64 `(packs, capacity)`, restarting at 0 with each row.
        cu_seqlens: int32, the rows' bounds over the flattened batch, starting at 0; unused cells at a pack's end are
            a segment of their own (several, where they are more than a row may take), without targets. A row without
            tokens has no segment.

    Example:
        >>> from fastcollate import BatchLoader, TokenStore
        >>> batch = next(iter(BatchLoader(TokenStore("store"), policy="packed", batch_size=2, capacity=512)))
        >>> batch.inputs.shape, batch.targets.shape, batch.position_ids.shape
        (torch.Size([2, 512]), torch.Size([2, 512]), torch.Size([2, 512]))
        >>> starts = batch.cu_seqlens[:-1]  # where each row begins in the flattened batch
        >>> bool((batch.position_ids.flatten()[starts] == 0).all())
        True
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor

    @property
    def max_seqlen(self) -> int:
        """Cells of the longest segment; read from `cu_seqlens`, so on a GPU it waits. The capacity bounds it too."""
        return int(self.cu_seqlens.diff().max())

    @property
    def counts(self) -> Counts | None:
        """What a loader's batch holds; `None` for tensors from elsewhere. See `counts_of`."""
        return counts_of(self)

    def with_tensors(self, tensors: Iterable[torch.Tensor]) -> PackedBatch:
        """The same batch as other tensors, such as copies on a device."""
        return _with_tensors(self, tensors)


def note_counts(inputs: torch.Tensor, line: list[int]) -> None:
    """Let a batch's inputs know what they hold: the batch's line of the kernel's report, which begins as `Counts`."""
    setattr(inputs, _COUNTS, line)


def counts_of(batch: Any) -> Counts | None:
    """What a batch holds, at no cost but this call's.

    The counts lie on the tensor `inputs`: a batch stays a plain named tuple, which `type(batch)(*batch)`, pickling and
    PyTorch's tree functions take apart and put together again. Other tensors, such as `inputs.to(device)`, have none;
    `batch.with_tensors(...)` passes them on.
    """
    line = getattr(batch[0], _COUNTS, None)
    return None if line is None else Counts._make(line[: len(Counts._fields)])


def _with_tensors(batch: B, tensors: Iterable[torch.Tensor]) -> B:
    found = type(batch)(*tensors)
    line = getattr(batch[0], _COUNTS, None)
    if line is not None:
        note_counts(found[0], line)
    return found
