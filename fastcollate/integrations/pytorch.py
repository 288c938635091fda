"""PyTorch's own `DataLoader` (and torchdata's `StatefulDataLoader`) over a store: a batch sampler and a data set."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch.utils.data import Dataset, Sampler

from fastcollate.collate.batch import Batch, PackedBatch
from fastcollate.collate.collator import Collator
from fastcollate.errors import InputError
from fastcollate.plan.mixing import MixedStore
from fastcollate.plan.plan import EpochPlan, plan_epoch
from fastcollate.store.store import Example, TokenStore

Int64Array = npt.NDArray[np.int64]
STATE_VERSION = 2


class PackedRows(list[int]):
    """Row numbers of a packed batch, pack after pack: what `BucketBatchSampler(policy="packed")` gives.

    Attributes:
        bounds: pack `p` is the rows `bounds[p]` to `bounds[p + 1]`.
        starts: each row's first token here, where rows are split; else empty.
        capacity: cells a pack.
        limit: cells that a row may take.

    Example:
        >>> from fastcollate import BucketBatchSampler
        >>> packs = next(iter(BucketBatchSampler([5, 4, 3, 2, 2], policy="packed", batch_size=2, capacity=8)))
        >>> list(packs), list(packs.bounds)  # rows of 5 + 3 and of 4 + 2 + 2 tokens
        ([0, 2, 1, 3, 4], [0, 2, 5])
    """

    def __init__(self, rows: Sequence[int], bounds: Sequence[int], starts: Sequence[int], capacity: int, limit: int):
        super().__init__(rows)
        self.bounds, self.starts, self.capacity, self.limit = bounds, starts, capacity, limit

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedRows, (list(self), self.bounds, self.starts, self.capacity, self.limit)


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of row numbers for `DataLoader(batch_sampler=...)`, planned by `plan_epoch`.

    With `policy="packed"` they are `PackedRows`, of which `StoreDataset.collate` makes a `PackedBatch`, and Hugging
    Face's flattened collators one long row.

    Row numbers count within `source`. The end of an iteration advances the epoch by one; `set_epoch` chooses it.
    `state_dict` counts the batches that were handed to the `DataLoader`, which with workers is ahead of your loop:
    torchdata's `StatefulDataLoader` keeps track of that by itself, otherwise count steps and `set_position`.

    Args:
        source: a store, a `StoreDataset`, a `MixedStore`, or each row's length.
        batch_size: rows (packs, with the policy packed) a batch on each rank; or
        max_tokens: cells a batch on each rank at most, padding included.
        policy: `"bucketed"`, `"packed"`, `"shuffled"` or `"sequential"`, see `plan_epoch`.
        rows: the row numbers to use, such as one of `split_rows`; by default all, or those that a `MixedStore` draws.
        window: see `plan_epoch`.
        seed: see `plan_epoch`.
        rank: which share of each step; by default this process's rank in `torch.distributed`, 0 without it.
        world_size: number of shares; by default that of `torch.distributed`, 1 without it.
        max_length: rows count as no longer than this; packed, by default what a `StoreDataset` cuts rows to.
        drop_last: see `plan_epoch`.
        tail: see `plan_epoch`.
        capacity: see `plan_epoch`.
        long_rows: see `plan_epoch`.
        shuffle: not an option: `policy` says it.

    Raises:
        InputError: an option is wrong.

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

    def __init__(
        self,
        source: Any,
        *,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        policy: str = "bucketed",
        rows: npt.ArrayLike | None = None,
        window: int | None = None,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        max_length: int | None = None,
        drop_last: bool = False,
        tail: str = "repeat",
        capacity: int | None = None,
        long_rows: str = "truncate",
        shuffle: bool | None = None,
    ) -> None:
        if shuffle is not None:
            raise InputError(
                f"shuffle={shuffle}: a batch sampler decides the order by itself; leave the flag out here and in "
                f"DataLoader, and choose policy={'bucketed' if shuffle else 'sequential'!r}"
            )
        if policy == "packed" and max_length is None and isinstance(source, StoreDataset):
            max_length = source.options["max_length"]
        store = getattr(source, "store", source)
        self._mix = store if isinstance(store, MixedStore) and rows is None else None
        self._lengths = np.asarray(getattr(store, "lengths", store))
        self._rows = None if rows is None else _row_numbers(rows, len(self._lengths))
        together = dist.is_available() and dist.is_initialized()
        self.batch_size = batch_size
        self.drop_last = drop_last
        self._options = {
            "batch_size": batch_size,
            "max_tokens": max_tokens,
            "policy": policy,
            "window": window,
            "seed": seed,
            "rank": (dist.get_rank() if together else 0) if rank is None else rank,
            "world_size": (dist.get_world_size() if together else 1) if world_size is None else world_size,
            "max_length": max_length,
            "drop_last": drop_last,
            "tail": tail,
            "capacity": capacity,
            "long_rows": long_rows,
        }
        self.epoch = 0
        self._position = (0, 0)  # window, batch within it: the next to hand over
        self._resume = False
        self._source_rows: list[int] = [0] * len(self._mix.names) if self._mix else []
        self._plan()

    def _plan(self) -> tuple[EpochPlan, Int64Array | None]:
        """The epoch's plan, and the row number behind each of the plan's, `None` where they are the same."""
        rows = self._mix.rows_of_epoch(self.epoch) if self._mix else self._rows
        lengths = self._lengths if rows is None else self._lengths[rows]
        return plan_epoch(lengths, epoch=self.epoch, **self._options), rows  # type: ignore[arg-type]

    def __len__(self) -> int:
        """Batches in the current epoch, exactly; with `max_tokens` this plans the epoch once."""
        return len(self._plan()[0])

    @property
    def sampler(self) -> BucketBatchSampler:
        """Itself: Lightning and others look for `batch_sampler.sampler` to tell it the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration runs; setting the current one keeps a loaded position."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._position = (0, 0)
            self._resume = False

    def set_position(self, epoch: int, step: int) -> None:
        """Start the next iteration in this epoch behind its first `step` batches.

        Raises:
            InputError: the epoch has fewer batches.
        """
        self.set_epoch(epoch)
        plan, _ = self._plan()
        rest = step
        for window in range(plan.num_windows):
            num_batches = plan.window(window).num_batches
            if rest < num_batches or (rest == num_batches and window == plan.num_windows - 1):
                self._position, self._resume = (window, rest), True
                return
            rest -= num_batches
        raise InputError(f"step={step}: epoch {epoch} has {step - rest} batches")

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of the current epoch; from a loaded position on, once."""
        if not self._resume:
            self._position = (0, 0)
        self._resume = False
        plan, rows = self._plan()
        first_window, first_batch = self._position
        for window in range(first_window, plan.num_windows):
            for batch, chosen in enumerate(_batches(plan, window, rows, first_batch), first_batch):
                self._position = (window, batch + 1)
                if self._mix:
                    counts = self._mix.count_sources(chosen).tolist()
                    self._source_rows = [a + b for a, b in zip(self._source_rows, counts, strict=True)]
                yield chosen
            first_batch = 0
        self.epoch += 1
        self._position = (0, 0)

    @property
    def source_rows(self) -> dict[str, int]:
        """Rows handed over so far from each source of a `MixedStore`, by name."""
        return dict(zip(self._mix.names, self._source_rows, strict=True)) if self._mix else {}

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch is, in plain numbers and strings; the same on every rank."""
        window, batch = self._position
        return {
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "next_window": window,
            "next_batch": batch,
            "source_rows": list(self._source_rows),
            "num_rows": len(self._lengths) if self._rows is None else len(self._rows),
            **{name: value for name, value in self._options.items() if name != "rank"},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position: the next iteration starts there.

        Raises:
            InputError: the state is of another version, data set or order of rows.
        """
        own = self.state_dict()
        for name in sorted(own.keys() - {"epoch", "next_window", "next_batch", "source_rows"}):
            if name not in state or state[name] != own[name]:
                raise InputError(
                    f"the saved sampler state has {name}={state.get(name)!r}, this sampler {own[name]!r}; "
                    "make the sampler with the saved value, or start afresh"
                )
        self.epoch = state["epoch"]
        self._position = (state["next_window"], state["next_batch"])
        self._source_rows = list(state["source_rows"])
        self._resume = True


def _batches(plan: EpochPlan, index: int, rows: Int64Array | None, first: int) -> Iterator[list[int]]:
    """The batches of one window from `first` on; `rows` are the row numbers behind the plan's."""
    if plan.capacity is None:
        chosen, bounds = plan.window(index)
        numbers = chosen if rows is None else rows[chosen]
        for number in range(first, len(bounds) - 1):
            yield numbers[bounds[number] : bounds[number + 1]].tolist()
        return
    limit = plan.capacity if plan.max_length is None else min(plan.max_length, plan.capacity)
    window = plan.packs(index)
    for number in range(first, window.num_batches):
        packs = window.batch(number)
        numbers = packs.rows if rows is None else rows[packs.rows]
        yield PackedRows(numbers.tolist(), packs.bounds.tolist(), packs.starts.tolist(), plan.capacity, limit)


def _row_numbers(rows: npt.ArrayLike, num_rows: int) -> Int64Array:
    numbers = np.asarray(rows)
    if numbers.ndim != 1 or (
        numbers.size and (numbers.dtype.kind not in "iu" or not 0 <= numbers.min() <= numbers.max() < num_rows)
    ):
        raise InputError(
            f"rows are {numbers.dtype} of shape {numbers.shape}: give row numbers from 0 to {num_rows - 1}"
        )
    return numbers.astype(np.int64)


class StoreRow:
    """One row of a `StoreDataset`; its tokens are read when asked for.

    Attributes:
        dataset: the data set.
        number: the row's number in it.

    Example:
        >>> from fastcollate import StoreDataset
        >>> row = StoreDataset("store")[3]
        >>> row.number, len(row.example.input_ids)
        (3, 89)
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
        max_length: columns kept of a row.
        mask_prompt: train the responses only.
        mode: `"reference"` or `"positional"`, see `Collator`.
        truncation: `"right"` or `"left"`, see `Collator`.
        ignore_index: see `Collator`.

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
        self,
        store: TokenStore | MixedStore | str | os.PathLike[str],
        *,
        max_length: int | None = None,
        mask_prompt: bool = False,
        mode: str = "reference",
        truncation: str = "right",
        ignore_index: int = -100,
    ) -> None:
        self.store: TokenStore | MixedStore = TokenStore(store) if isinstance(store, (str, os.PathLike)) else store
        self.options: dict[str, Any] = {
            "max_length": max_length,
            "mask_prompt": mask_prompt,
            "mode": mode,
            "truncation": truncation,
            "ignore_index": ignore_index,
        }
        self._collators: dict[int | None, Collator] = {}
        self.collator()

    @property
    def lengths(self) -> npt.NDArray[Any]:
        """Each row's length in tokens."""
        return self.store.lengths

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> StoreRow:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a data set with {len(self)} rows")
        return StoreRow(self, int(index) % len(self))

    def __getitems__(self, indices: Sequence[int]) -> StoreRows:
        if len(indices) and not isinstance(indices[0], (int, np.integer)):
            raise InputError(
                f"the sampler gave {indices[0]!r} where a row number belongs: a BucketBatchSampler gives batches, "
                "so pass it as DataLoader(batch_sampler=...), not as sampler=..., and leave out batch_size and shuffle"
            )
        return StoreRows(self, indices)

    def collator(self, max_length: int | None = None) -> Collator:
        """The kernel's front with this data set's options; `max_length` overrides theirs."""
        limit = self.options["max_length"] if max_length is None else max_length
        if limit not in self._collators:
            self._collators[limit] = Collator(
                self.store.shards,
                pad_token_id=self.store.pad_token_id,
                name=str(self.store.path),
                **{**self.options, "max_length": limit},
            )
        return self._collators[limit]

    def collate(self, batch: Sequence[StoreRow]) -> Batch | PackedBatch:
        """Collate rows of this data set in one kernel call; the `collate_fn` of a `DataLoader`.

        Returns:
            inputs and targets (shifted by one), int64 `(rows, width)`; a `PackedBatch` of `PackedRows`.
        """
        packs = packs_of(batch)
        if packs is None:
            return self.collator()(row_numbers(batch)[1])
        collator = self.collator(self.limit_of(packs))
        return collator.pack(packs, packs.bounds, capacity=packs.capacity, starts=packs.starts)

    def limit_of(self, packs: PackedRows) -> int:
        """Columns that a row of a packed batch may take: those that the sampler counted, or fewer by `max_length`."""
        own = self.options["max_length"]
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
    """The data set and the row numbers of a batch of its rows.

    Raises:
        InputError: the batch is empty, or not of rows of one `StoreDataset`.
    """
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
