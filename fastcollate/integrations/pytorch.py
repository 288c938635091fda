"""PyTorch's own `DataLoader` (and torchdata's `StatefulDataLoader`) over a store: a batch sampler and a data set."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, Sampler
from typing_extensions import Unpack

from fastcollate.collate import AnyBatch, Collator
from fastcollate.errors import InputError, shown
from fastcollate.load import CollateKeywords, collator_of, open_store, trained_rows
from fastcollate.plan import MixedStore, Order, OrderKeywords, position
from fastcollate.store import Example, TokenStore

Int64Array = npt.NDArray[np.int64]


class PackedRows(list[int]):
    """Row numbers of a packed batch, pack after pack: what `BucketBatchSampler(policy="packed")` gives.

    Attributes:
        bounds: pack `p` is the rows `bounds[p]` to `bounds[p + 1]`.
        starts: each row's first token here, where rows are split; else empty.
        capacity: cells a pack.
        limit: cells that a row may take, without its padding.
        cp_size: see `PlanOptions`.
        stride: the same.

    Example:
        >>> from fastcollate import BucketBatchSampler
        >>> packs = next(iter(BucketBatchSampler([5, 4, 3, 2, 2], policy="packed", batch_size=2, capacity=8)))
        >>> list(packs), list(packs.bounds)  # rows of 5 + 3 and of 4 + 2 + 2 tokens
        ([0, 2, 1, 3, 4], [0, 2, 5])
    """

    def __init__(
        self, rows: Sequence[int], bounds: Sequence[int], starts: Sequence[int], capacity: int, limit: int,
        cp_size: int | None = None, stride: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(rows)
        self.bounds, self.starts, self.capacity, self.limit = bounds, starts, capacity, limit
        self.cp_size, self.stride = cp_size, stride

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedRows, (list(self), self.bounds, self.starts, self.capacity, self.limit, self.cp_size, self.stride)


class BucketBatchSampler(position.Epochs, Sampler[list[int]]):
    """Batches of row numbers for `DataLoader(batch_sampler=...)`, planned by `plan_epoch`.

    With `policy="packed"` they are `PackedRows`, of which `StoreDataset.collate` makes a `PackedBatch`, and Hugging
    Face's flattened collators one long row.

    Row numbers count within `source`. The end of an iteration advances the epoch by one; `set_epoch` chooses it.
    `state_dict` counts the batches that were handed to the `DataLoader`, which with workers is ahead of your loop:
    torchdata's `StatefulDataLoader` keeps track of that by itself, otherwise count steps and `set_position`.

    Args:
        source: a store or its directory, a `StoreDataset`, a `MixedStore`, or each row's length.
        rows: the row numbers to use, such as one of `split_rows`; by default all, or those that a `MixedStore` draws.
        rank: see `BatchLoader`.
        world_size: see `BatchLoader`.
        shuffle: not an option: `policy` says it.
        options: how rows make batches, see `PlanOptions`; `batch_size` or `max_tokens` is needed.
            `pad_to_multiple_of`, and with the policy packed `max_length`, `cp_size` and `stride`, are by default those
            of a `StoreDataset`.

    Raises:
        InputError: an option is wrong, or the options leave no batch.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from fastcollate import BucketBatchSampler, StoreDataset
        >>> dataset = StoreDataset("store", mask_prompt=True)
        >>> sampler = BucketBatchSampler(dataset, batch_size=8, seed=123)
        >>> loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate)
        >>> for epoch in range(2):
        ...     sampler.set_epoch(epoch)
        ...     for inputs, targets in loader:
        ...         pass  # your step

        Over lengths alone, for a data set of your own:

        >>> list(BucketBatchSampler([9, 1, 8, 2], batch_size=2, seed=1))
        [[1, 3], [2, 0]]
    """

    _kind = "sampler"
    _repeats = True

    def __init__(
        self,
        source: Any,
        *,
        rows: npt.ArrayLike | range | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        shuffle: bool | None = None,
        **options: Unpack[OrderKeywords],
    ) -> None:
        if shuffle is not None:
            raise InputError(
                f"shuffle={shuffle}: a batch sampler decides the order by itself; leave the flag out here and in "
                f"DataLoader, and choose policy={'bucketed' if shuffle else 'sequential'!r}"
            )
        if isinstance(source, StoreDataset):
            of_packs = ("max_length", "cp_size", "stride") if options.get("policy") == "packed" else ()
            own = {name: source.options.get(name) for name in ("pad_to_multiple_of", *of_packs)}
            options = {**own, **{name: value for name, value in options.items() if value is not None}}  # type: ignore[typeddict-item]
        source = open_store(source)
        if isinstance(source, Sampler):
            raise InputError(
                f"a {type(source).__name__} where a store or lengths belong: Lightning and Fabric make a batch sampler "
                "anew around a sampler of theirs. Give use_distributed_sampler=False to lightning.pytorch.Trainer or "
                "to fabric.setup_dataloaders: a BucketBatchSampler takes its rank's share by itself"
            )
        super().__init__(Order(getattr(source, "store", source), rows), options, rank, world_size)
        self.drop_last = self._plan_options.drop_last  # for those who look at a sampler

    @property
    def batch_size(self) -> int | None:
        """Rows of each batch, `None` where not all have as many: `accelerate` leaves out those that have fewer."""
        own = self._plan_options
        is_full = own.capacity is None and (own.drop_last or self._order.num_rows % own.group == 0)
        return own.batch_size if is_full else None

    def __len__(self) -> int:
        """Batches in the current epoch, exactly; with `max_tokens`, and packed, this plans the epoch once."""
        return super().__len__() * self._times()

    @property
    def sampler(self) -> BucketBatchSampler:
        """Itself: Lightning and others look for `batch_sampler.sampler` to tell it the epoch."""
        return self

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of the current epoch; from a loaded position on, once. The end advances the epoch by one."""
        iteration, times = self._begin(), self._times()
        _, first_window, first = iteration.first
        for window in range(first_window, iteration.planned.plan.num_windows):
            for number, rows in enumerate(_batches(iteration, window, first), first + 1):
                iteration.hand_over(window, number)
                for _ in range(times):
                    yield rows
            first = 0
        iteration.end()


def _batches(iteration: position.Iteration, index: int, first: int) -> Iterator[list[int]]:
    """The batches of one window from `first` on."""
    planned, options = iteration.planned, iteration.planned.plan.options
    if options.capacity is None:
        numbers, bounds = planned.window(index)
        for number in range(first, len(bounds) - 1):
            yield numbers[bounds[number] : bounds[number + 1]].tolist()
        return
    limit = options.capacity if options.max_length is None else min(options.max_length, options.capacity)
    window = planned.packs(index)
    for number in range(first, window.num_batches):
        packs = window.batch(number)
        bounds, starts = packs.bounds.tolist(), packs.starts.tolist()
        yield PackedRows(packs.rows.tolist(), bounds, starts, options.capacity, limit, options.cp_size, options.stride)


class StoreRow:
    """One row of a `StoreDataset`; its tokens are read when asked for.

    Attributes:
        dataset: the data set.
        number: the row's number in it.

    Example:
        >>> from fastcollate import StoreDataset
        >>> row = StoreDataset("store")[3]
        >>> row.number, len(row.example.input_ids)
        (3, 56)
    """

    __slots__ = ("dataset", "number")

    def __init__(self, dataset: StoreDataset, number: int) -> None:
        self.dataset = dataset
        self.number = number

    @property
    def example(self) -> Example:
        """The row's tokens and spans."""
        return self.dataset.store[self.number]

    def __len__(self) -> int:
        return int(self.dataset.lengths[self.number])

    def __repr__(self) -> str:
        return f"row {self.number} of {self.dataset.store!r}"


class StoreRows(Sequence[StoreRow]):
    """The rows of a batch by number: what `StoreDataset` hands to a `collate_fn`.

    Example:
        >>> from fastcollate import StoreDataset
        >>> dataset = StoreDataset("store")
        >>> rows = dataset.__getitems__([3, 5])  # a `DataLoader` asks for a batch's rows like this
        >>> rows.numbers, rows[0].number
        ([3, 5], 3)
    """

    __slots__ = ("dataset", "numbers")

    def __init__(self, dataset: StoreDataset, numbers: Sequence[int]) -> None:
        self.dataset = dataset
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> StoreRow: ...
    @overload
    def __getitem__(self, index: slice) -> StoreRows: ...
    def __getitem__(self, index: int | slice) -> StoreRow | StoreRows:
        if isinstance(index, slice):
            return StoreRows(self.dataset, self.numbers[index])
        return StoreRow(self.dataset, self.numbers[index])


class StoreDataset(Dataset[StoreRow]):
    """A map-style data set over a store. Its rows stay numbers until `collate`, so a batch is one kernel call.

    Use it as `DataLoader(dataset, batch_sampler=BucketBatchSampler(dataset, ...), collate_fn=dataset.collate)`. It may
    be forked and pickled: each worker process opens the store's memory map for itself.

    Args:
        store: a `TokenStore`, a `MixedStore`, or a store's directory.
        options: how rows are collated, see `Collator`.

    Raises:
        InputError: there is no store, or an option is wrong.

    Example:
        >>> from fastcollate import StoreDataset
        >>> dataset = StoreDataset("store", mask_prompt=True, max_length=64)
        >>> len(dataset)
        600
        >>> inputs, targets = dataset.collate([dataset[3], dataset[5]])
        >>> inputs.shape, inputs.dtype
        (torch.Size([2, 64]), torch.int64)
    """

    def __init__(
        self, store: TokenStore | MixedStore | str | os.PathLike[str], **options: Unpack[CollateKeywords]
    ) -> None:
        self.store: TokenStore | MixedStore = open_store(store)
        self.options: dict[str, Any] = {
            "max_length": None, "mask_prompt": False, "truncation": "right", "ignore_index": -100, **options
        }  # fmt: skip
        self._collators: dict[tuple[int | None, bool], Collator] = {}
        self.collator()

    @property
    def lengths(self) -> npt.NDArray[Any]:
        """Each row's length in tokens."""
        return self.store.lengths

    def appended(self, rows: npt.ArrayLike) -> Int64Array:
        """Of some rows, by number: 1 where an end-of-text is appended, 0 where the row holds its end."""
        rows = np.asarray(rows, np.int64)
        if isinstance(self.store, MixedStore):
            return np.array([store.end == "append" for store in self.store.stores], np.int64)[
                self.store.source_of(rows)
            ]
        return np.full(len(rows), getattr(self.store, "end", "append") == "append", np.int64)

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> StoreRow:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a data set with {len(self)} rows")
        return StoreRow(self, int(index) % len(self))

    def __getitems__(self, indices: Sequence[int]) -> StoreRows:
        if len(indices) and not isinstance(indices[0], (int, np.integer)):
            raise InputError(
                f"the sampler gave {shown(indices[0])} where a row number belongs: a BucketBatchSampler gives batches, "
                "so pass it as DataLoader(batch_sampler=...), not as sampler=..., and leave out batch_size and shuffle"
            )
        return StoreRows(self, indices)

    def collator(self, max_length: int | None = None, *, whole: bool = False) -> Collator:
        """The kernel's front with this data set's options; `max_length` overrides theirs.

        `whole` gives inputs that are all ids of a row, also where rows hold their end, and ignores with -100.
        """
        limit = self.options["max_length"] if max_length is None else max_length
        key = limit, whole
        if key not in self._collators:
            own = {"end": "append", "ignore_index": -100, "pad_to_multiple_of": None} if whole else {}
            self._collators[key] = collator_of(self.store, {**self.options, **own, "max_length": limit})
        return self._collators[key]

    def trained_rows(self) -> Int64Array:
        """The rows that have a trained target, for `rows=`; the others cost time and teach nothing. Reads all once."""
        return trained_rows(self.collator(), np.arange(len(self)))

    def collate(self, batch: Sequence[StoreRow]) -> AnyBatch:
        """Collate rows of this data set in one kernel call; the `collate_fn` of a `DataLoader`.

        Returns:
            inputs and targets (shifted by one), int64 `(rows, width)`; of `PackedRows` a `PackedBatch`, or a
            `ContextParallelBatch` with `cp_size`.
        """
        packs = packs_of(batch)
        if packs is None:
            return self.collator()(row_numbers(batch)[1])
        collator = self.collator(self.limit_of(packs))
        return collator.pack(packs, packs.bounds, capacity=packs.capacity, starts=packs.starts)

    def limit_of(self, packs: PackedRows) -> int:
        """Columns that a row of a packed batch may take: those that the sampler counted, or fewer by `max_length`."""
        own = self.options["max_length"]
        for name in ("cp_size", "stride"):
            if getattr(packs, name) != self.options.get(name):
                raise InputError(
                    f"the sampler plans for {name}={getattr(packs, name)}, and the data set has "
                    f"{self.options.get(name)}: give both the same"
                )
        if own is not None and own < packs.limit and packs.starts:
            raise InputError(
                f"the sampler splits rows into parts of {packs.limit} tokens, and the data set cuts them to "
                f"max_length={own}: give both the same max_length"
            )
        return packs.limit if own is None else min(own, packs.limit)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_collators": {}}  # they hold addresses of this process


def packs_of(batch: Sequence[Any]) -> PackedRows | None:
    """How a batch of a `StoreDataset`'s rows is packed; `None` where it is not."""
    numbers = batch.numbers if isinstance(batch, StoreRows) else None
    return numbers if isinstance(numbers, PackedRows) else None


def row_numbers(batch: Sequence[Any]) -> tuple[StoreDataset, Int64Array]:
    """The data set and the row numbers of a batch of its rows; refuses one that is not of one `StoreDataset`."""
    if isinstance(batch, StoreRows):
        return batch.dataset, np.array(batch.numbers, np.int64)
    if not len(batch) or not all(isinstance(row, StoreRow) for row in batch):
        what = type(batch[0]).__name__ if len(batch) else "nothing"
        raise InputError(
            f"the batch holds {what}, not rows of a StoreDataset; for other data use fastcollate.collate_fn"
        )
    if any(row.dataset is not batch[0].dataset for row in batch):
        raise InputError(
            "the rows are of several data sets: mix stores with MixedStore and make one StoreDataset of it"
        )
    return batch[0].dataset, np.array([row.number for row in batch], np.int64)
