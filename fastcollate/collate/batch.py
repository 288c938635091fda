"""What a loader hands over: batches as named tuples of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch


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
