"""What a loader hands over: batches as named tuples of tensors, which know what they hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import torch

from fastcollate.errors import InputError, integer

_COUNTS, _SOURCES = "_fastcollate_counts", "_fastcollate_sources"
_LONGEST, _CP_SIZE = -2, -1  # of a batch's line of the kernel's report
B = TypeVar("B", bound="AnyBatch")


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

    @property
    def sources(self) -> torch.Tensor | None:
        """Of a loader of a `MixedStore` the source of each row: its place in `mix.names`; int64, on the CPU."""
        return sources_of(self)

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
            tokens has no segment. With `max_segments` the last bound is repeated up to that number.

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
        """Cells of the longest segment, as a plain integer; of tensors that no loader gave, a GPU is waited for."""
        return _longest(self.inputs, self.cu_seqlens)

    @property
    def seq_idx(self) -> torch.Tensor:
        """The number of each cell's segment, int32 `(packs, capacity)`: for Mamba, or as document ids."""
        return _segment_of(self.cu_seqlens, self.inputs.numel()).int().view(self.inputs.shape)

    def block_mask(self, block_size: int = 128) -> Any:
        """Causal attention within each segment, as `flex_attention` takes it for queries `(packs, heads, capacity, _)`.

        What `create_block_mask` makes of `seq_idx`, without a mask of all cells by all cells on the way.

        Example:
            >>> from torch.nn.attention.flex_attention import flex_attention
            >>> batch = next(iter(BatchLoader("store", policy="packed", batch_size=2, capacity=512)))
            >>> query = key = value = torch.randn(2, 4, 512, 16)
            >>> flex_attention(query, key, value, block_mask=batch.block_mask()).shape
            torch.Size([2, 4, 512, 16])
        """
        return _block_mask(self.position_ids, self.seq_idx, block_size)

    @property
    def counts(self) -> Counts | None:
        """What a loader's batch holds; `None` for tensors from elsewhere. See `counts_of`."""
        return counts_of(self)

    @property
    def sources(self) -> torch.Tensor | None:
        """Of a loader of a `MixedStore` the source of each segment: its place in `mix.names`, -1 where cells are
        unused; int64, on the CPU. `None` where segments hold several documents (`mask_boundaries=False`)."""
        return sources_of(self)

    def with_tensors(self, tensors: Iterable[torch.Tensor]) -> PackedBatch:
        """The same batch as other tensors, such as copies on a device."""
        return _with_tensors(self, tensors)


class ContextParallelBatch(NamedTuple):
    """A packed batch whose rows split over the ranks of a context-parallel group: each is padded for it.

    All ranks of the group load the same batch, and each trains its `shard`.

    Attributes:
        inputs: int64 (or int32 where asked for) `(packs, capacity)`; `(packs, capacity // cp_size)` in a shard.
        targets: int64, of the same shape; no padding is trained.
        position_ids: int64, of the same shape; each cell's place in its row.
        cu_seqlens: int32, the tokens in the segments up to each bound, from 0, padding left out: Transformer Engine's
            `cu_seqlens`. Unused cells at a pack's end are segments without a token.
        cu_seqlens_padded: int32, the segments' bounds over the flattened whole batch, padding included: Transformer
            Engine's `cu_seqlens_padded`, and what kernels that know one kind only need. In a shard both are the whole
            batch's, as Transformer Engine wants them.

    Example:
        >>> from fastcollate import BatchLoader
        >>> batch = next(iter(BatchLoader("store", policy="packed", batch_size=2, capacity=512, cp_size=2)))
        >>> batch.inputs.shape, batch.shard(0, 2).inputs.shape
        (torch.Size([2, 512]), torch.Size([2, 256]))
        >>> bool((batch.cu_seqlens_padded % 4 == 0).all())
        True
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    cu_seqlens_padded: torch.Tensor

    def shard(self, cp_rank: int, cp_size: int) -> ContextParallelBatch:
        """The cells of one rank: each segment is cut into `2 * cp_size` chunks, and rank `r` takes the chunks `r` and
        `2 * cp_size - 1 - r`, which under causal attention is as much work as any other rank has.

        Raises:
            InputError: the rank is none, this is a shard already, or its rows are not padded for so many ranks.
        """
        integer("cp_size", cp_size, 1)
        integer("cp_rank", cp_rank, 0, cp_size - 1)
        line, num_cells = getattr(self.inputs, _COUNTS, None), self.inputs.numel()
        if line is None:  # of tensors from elsewhere
            fits = not (self.cu_seqlens_padded % (2 * cp_size)).any() and int(self.cu_seqlens_padded[-1]) == num_cells
        else:
            fits = line[_CP_SIZE] % cp_size == 0 and line[Counts._fields.index("cells")] == num_cells
        if not fits:
            raise InputError(
                f"cp_size={cp_size}: the batch's rows are not padded for so many ranks, or it is a shard already; give "
                f"the loader (or sampler, or data set) cp_size={cp_size}, and cut each batch once"
            )
        cells = _head_and_tail(self.cu_seqlens_padded.long(), num_cells, cp_rank, cp_size)
        parts = (tensor.flatten()[cells].view(len(tensor), -1) for tensor in self[:3])
        return self.with_tensors((*parts, *self[3:]))

    @property
    def max_seqlen(self) -> int:
        """Cells of the longest segment, its padding included, as `PackedBatch.max_seqlen`."""
        return _longest(self.inputs, self.cu_seqlens_padded)

    @property
    def counts(self) -> Counts | None:
        """What a loader's whole batch holds, also in a shard; `None` for tensors from elsewhere. See `counts_of`."""
        return counts_of(self)

    @property
    def sources(self) -> torch.Tensor | None:
        """Of a loader of a `MixedStore` the source of each segment: its place in `mix.names`, -1 where cells are
        unused; int64, on the CPU. `None` where segments hold several documents (`mask_boundaries=False`)."""
        return sources_of(self)

    def with_tensors(self, tensors: Iterable[torch.Tensor]) -> ContextParallelBatch:
        """The same batch as other tensors, such as copies on a device."""
        return _with_tensors(self, tensors)


AnyBatch = Batch | PackedBatch | ContextParallelBatch


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


def note_sources(inputs: torch.Tensor, sources: Any) -> None:
    """Let a batch's inputs know where their rows (or segments) are from, an int64 array."""
    setattr(inputs, _SOURCES, sources)


def sources_of(batch: Any) -> torch.Tensor | None:
    """Where a batch's rows (or segments) are from, kept as `counts_of` says."""
    found = getattr(batch[0], _SOURCES, None)
    return None if found is None else torch.from_numpy(found)


def _with_tensors(batch: B, tensors: Iterable[torch.Tensor]) -> B:
    found = type(batch)(*tensors)
    line = getattr(batch[0], _COUNTS, None)
    if line is not None:
        note_counts(found[0], line)
    if hasattr(batch[0], _SOURCES):
        note_sources(found[0], getattr(batch[0], _SOURCES))
    return found


def _longest(inputs: torch.Tensor, bounds: torch.Tensor) -> int:
    line = getattr(inputs, _COUNTS, None)
    return int(bounds.diff().max()) if line is None else int(line[_LONGEST])


def _segment_of(bounds: torch.Tensor, num_cells: int) -> torch.Tensor:
    """The segment that holds each of so many cells."""
    cells = torch.arange(num_cells, device=bounds.device, dtype=bounds.dtype)
    return torch.searchsorted(bounds, cells, right=True) - 1


def _head_and_tail(bounds: torch.Tensor, num_cells: int, rank: int, size: int) -> torch.Tensor:
    """The cells of a rank, segment after segment."""
    segment = _segment_of(bounds // size, num_cells // size)  # as they lie in the shard
    start, chunk = bounds[segment], bounds.diff()[segment] // (2 * size)
    place = torch.arange(len(segment), device=bounds.device) - start // size
    return start + place + torch.where(place < chunk, rank, 2 * size - 2 - rank) * chunk


def _block_mask(position_ids: torch.Tensor, seq_idx: torch.Tensor, block_size: int) -> Any:
    """By whole blocks of keys: those from the start of a block's first segment up to the block itself; from the start
    of its last segment on, nothing is masked in them."""
    from torch.nn.attention.flex_attention import BlockMask

    def causal(pack: Any, head: Any, query: Any, key: Any) -> Any:
        return (seq_idx[pack, query] == seq_idx[pack, key]) & (query >= key)

    capacity = position_ids.shape[1]
    starts = torch.arange(capacity, device=position_ids.device) - position_ids
    last = torch.arange(block_size, capacity + block_size, block_size, device=starts.device).clamp(max=capacity) - 1
    block = torch.arange(len(last), device=starts.device)
    first, whole = starts[:, ::block_size] // block_size, (starts[:, last] + block_size - 1) // block_size
    full = (whole[..., None] <= block) & (block < block[:, None]) & ((last + 1) % block_size == 0)[:, None]
    part = (first[..., None] <= block) & (block <= block[:, None]) & ~full

    def chosen(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = blocks[:, None].int().argsort(dim=-1, descending=True, stable=True)
        return blocks[:, None].sum(-1, dtype=torch.int32), order.int()

    return BlockMask.from_kv_blocks(*chosen(part), *chosen(full), block_size, causal, (capacity, capacity))
