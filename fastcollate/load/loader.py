"""Store, plan, collate and transfer put together: an iterator of batches."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import get_worker_info
from typing_extensions import Unpack

from fastcollate.collate import AnyBatch, settings
from fastcollate.collate import fill as kernels
from fastcollate.errors import InputError, integer
from fastcollate.jit import clock
from fastcollate.load.jobs import Job, Places, packed_job, padded_job
from fastcollate.load.options import (
    LoaderKeywords,
    collate_keywords,
    collator_of,
    open_store,
    order_keywords,
    trained_rows,
    verdicts_of,
)
from fastcollate.load.prefetch import Group, fill_groups
from fastcollate.load.sources import BatchSources
from fastcollate.load.transfer import Transfer, make_transfer
from fastcollate.plan import MixedStore, Order, PlanOptions, position
from fastcollate.store import layout, pages

_KINDS = ("rows", "pairs", "answers", "documents")  # of stores


class Store(Protocol):
    """What a loader needs of a store; `TokenStore` is one."""

    @property
    def shards(self) -> Sequence[layout.Columns]:
        """The shards' columns, in row order."""

    @property
    def lengths(self) -> npt.NDArray[Any]:
        """Each row's length in tokens."""


@dataclass(slots=True)
class Stats:
    """What the consumer of a loader has received so far.

    Attributes:
        batches: batches.
        rows: rows.
        real_cells: input cells that hold a row's token.
        padded_cells: input cells that hold padding.
        trained_tokens: targets that are not ignored.
        corner_rows: rows on which `mode="reference"` differs from `mode="positional"`.
        untrained_rows: rows none of whose targets is trained, such as those whose prompt fills `max_length`.
        cut_rows: rows that were cut to `max_length`, or to a pack's capacity.
        cut_tokens: tokens that this left out.
        wait_s: seconds that the consumer has waited for batches; those of a group come together. Compiling the
            kernels, once, is not counted.
        h2d_bytes: bytes of the batches that were copied to a device.
        mean_cost: what the optimizer steps that were begun cost, by `PlanOptions.cost`, on the mean of all ranks; of
            packs, and of `max_tokens` where `balance` is.
        slowest_cost: what they cost the slowest rank of each.
        step_imbalance: the slowest over the mean in the last of these steps.
        worst_imbalance: in the worst.
        trained_by_source: of a `MixedStore`, the trained tokens of each source, by name.
    """

    batches: int = 0
    rows: int = 0
    real_cells: int = 0
    padded_cells: int = 0
    trained_tokens: int = 0
    corner_rows: int = 0
    untrained_rows: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    wait_s: float = 0.0
    h2d_bytes: int = 0
    mean_cost: float = 0.0
    slowest_cost: float = 0.0
    step_imbalance: float = 1.0
    worst_imbalance: float = 1.0
    trained_by_source: dict[str, int] = field(default_factory=dict)

    @property
    def imbalance(self) -> float:
        """How many times as long as with ranks that all finish together the steps took, by what they cost."""
        return self.slowest_cost / self.mean_cost if self.mean_cost else 1.0

    def count_steps(self, slowest: npt.NDArray[np.float64], mean: npt.NDArray[np.float64]) -> None:
        """Add some optimizer steps, by what they cost the slowest rank and the mean of all."""
        for most, even in zip(slowest.tolist(), mean.tolist(), strict=True):
            self.mean_cost += even
            self.slowest_cost += most
            self.step_imbalance = most / even if even else 1.0
            self.worst_imbalance = max(self.worst_imbalance, self.step_imbalance)

    def count_sources(self, names: Sequence[str], trained: npt.NDArray[np.int64]) -> None:
        """Add what a batch trains of each source."""
        for name, count in zip(names, trained.tolist(), strict=True):
            self.trained_by_source[name] = self.trained_by_source.get(name, 0) + count

    def count(self, num_batches: int, totals: Sequence[int]) -> None:
        """Add some batches, by the sums of their lines of the kernel's report."""
        rows, cells, real, trained, corners, untrained, cut_rows, cut_tokens = totals[: kernels.CUT_TOKENS + 1]
        self.batches += num_batches
        self.rows += rows
        self.real_cells += real
        self.padded_cells += cells - real
        self.trained_tokens += trained
        self.corner_rows += corners
        self.untrained_rows += untrained
        self.cut_rows += cut_rows
        self.cut_tokens += cut_tokens


@dataclass(slots=True, eq=False)
class _Handed:
    """How many batches of a group were handed over, and how many of these are counted."""

    group: Group
    costs: Any  # of the steps of its window, or `None`
    batches: int = 0
    counted: int = 0


class BatchLoader(position.Epochs):
    """Batches of a store, epoch after epoch.

    Threads fill groups of batches ahead, about four megabytes each. They end with the iteration, also when it is left
    early. A batch that is kept is never overwritten, but keeps its group's memory. On a CUDA device the copies run on a
    stream of their own, and a batch is ready for work on the stream that is current when it is handed over.

    A loader can be pickled, with its position, where its store can. In a forked process make a new iterator: one from
    before the fork refuses to go on there.

    Args:
        store: a `TokenStore`, its directory, or a `MixedStore`, of which each epoch draws its rows.
        rows: row numbers of the store, such as one of `split_rows` or `range(0, 935)`; by default all, or those that
            a `MixedStore` draws.
        rank: which share of each step this process takes; by default its rank in the process group of
            `torch.distributed`, as that is when an iteration starts, and 0 without one.
        world_size: number of shares; by default that of the process group, and 1 without one.
        device: where the batches go.
        drop_untrained: leave out rows without a trained target, such as those whose prompt fills `max_length`; reads
            the store once.
        prefetch: groups of batches filled ahead; 0 fills without threads, when a batch is asked for.
        num_threads: threads that fill; another one plans.
        options: how rows make batches, see `PlanOptions` (`batch_size` or `max_tokens` is needed), and how these are
            collated, see `Collator`. With `policy="packed"` the batches are `PackedBatch`es, and
            with `cp_size` `ContextParallelBatch`es.

    Raises:
        InputError: an option is wrong, or the options leave no batch.

    Example:
        >>> from fastcollate import BatchLoader
        >>> loader = BatchLoader("store", batch_size=8, mask_prompt=True, seed=123)
        >>> for epoch in range(2):
        ...     loader.set_epoch(epoch)
        ...     for inputs, targets in loader:  # int64 (8, width) each
        ...         pass  # your step
        >>> state = loader.state_dict()  # `load_state_dict` goes on there, also in the middle of an epoch
    """

    def __init__(
        self,
        store: Store | str | os.PathLike[str],
        *,
        rows: npt.ArrayLike | range | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        device: torch.device | str = "cpu",
        drop_untrained: bool = False,
        prefetch: int = 3,
        num_threads: int = 1,
        **options: Unpack[LoaderKeywords],
    ) -> None:
        self._store = open_store(store)
        self._options = {
            "rows": rows, "rank": rank, "world_size": world_size, "device": device, "prefetch": prefetch,
            "num_threads": num_threads, "drop_untrained": drop_untrained, **options,
        }  # fmt: skip
        self._num_threads = integer("num_threads", num_threads, 1)
        self._prefetch = integer("prefetch", prefetch, 0)
        if self._prefetch:
            self._prefetch = max(self._prefetch, self._num_threads)
        plan_options = PlanOptions(**order_keywords(options)).checked()
        if options.get("max_segments") is not None and options.get("policy") != "packed":
            raise InputError(
                f"max_segments={options['max_segments']}: for policy='packed', whose batches have segments"
            )
        self._collator = collator_of(self._store, collate_keywords(options), _KINDS)
        self._verdicts = verdicts_of(self._store)
        order = Order(self._store, rows)
        if drop_untrained:
            order = self._trained(order, plan_options, collate_keywords(options))
        super().__init__(order, order_keywords(options), rank, world_size)
        self.device = torch.device(device)
        self._stats = Stats()  # without the batches that are not yet counted
        self._has_warned = False  # of rows without a trained target
        self._handed: list[_Handed] = []  # the group of each iteration that runs
        self._transfer: tuple[int, Transfer] | None = None  # the process it belongs to

    def _trained(self, order: Order, options: PlanOptions, collate_options: dict[str, Any]) -> Order:
        """The same rows without those that train nothing."""
        if order.mix:
            raise InputError(
                "drop_untrained with a MixedStore: give it the rows that train something, such as "
                "MixedStore(stores, rows={name: StoreDataset(store, ...).trained_rows() for name, store in ...})"
            )
        if options.capacity is not None:  # rows are cut to their pack, or split and not cut
            limits = [limit for limit in (options.capacity, options.max_length) if limit is not None]
            collate_options["max_length"] = None if options.long_rows == "split" else min(limits)
        collator = collator_of(self._store, collate_options, _KINDS)
        rows = np.asarray(order.rows, np.int64)
        if order.has_pairs:
            firsts = np.intersect1d(trained_rows(collator, rows), trained_rows(collator, rows + 1) - 1)
            return Order(self._store, (firsts[:, None] + np.arange(2)).reshape(-1))
        return Order(self._store, trained_rows(collator, rows))

    def __iter__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> Iterator[AnyBatch]:
        """Batches of the current epoch; from a loaded position on, once. The end advances the epoch by one."""
        start = clock()
        self._check_worker()
        iteration = self._begin()
        self._times()
        costs: dict[int, Any] = {}  # by window
        places: dict[int, Places] = {}  # the same, of pairs and answers
        mix = self._store if isinstance(self._store, MixedStore) else None
        mix = None if self._collator.settings[settings.ACROSS] else mix
        sources = None if mix is None else BatchSources(mix, self._collator)
        groups = fill_groups(
            lambda window: self._job(iteration, window, costs, sources, places),
            iteration.planned.plan.num_windows,
            iteration.first[1:],
            self._own_transfer(),
            prefetch=self._prefetch,
            num_threads=self._num_threads,
        )
        with contextlib.closing(groups), contextlib.ExitStack() as at_end:
            at_end.callback(iteration.has_ended.set)  # nobody waits for a window any more
            for group in groups:
                self._stats.wait_s += max(0.0, clock() - start)
                if group.totals[kernels.CORNERS]:
                    self._warn_of_corners()
                if group.totals[kernels.UNTRAINED]:
                    self._warn_of_untrained(group.totals)
                costs.pop(group.window - 1, None)
                places.pop(group.window - 1, None)
                handed = _Handed(group, costs.get(group.window))
                self._handed.append(handed)
                try:
                    for number, batch in enumerate(group.batches, 1):
                        iteration.hand_over(group.window, group.first + number)
                        if sources is not None and mix is not None:
                            trained = sources.note(batch, group.window, group.first + number - 1)
                            self._stats.count_sources(mix.names, trained)
                        host = batch
                        if group.arrival is not None:
                            batch = batch.with_tensors(group.arrival.receive(batch))
                            self._stats.h2d_bytes += sum(tensor.nbytes for tensor in batch)
                        if group.window in places:
                            batch = places[group.window].name(group.first + number - 1, batch, host)
                        handed.batches = number
                        yield batch
                finally:
                    if not is_finalizing():  # an interpreter that ends has taken the modules away
                        self._handed.remove(handed)
                        self._count(handed)
                del group, batch, host, handed  # before the next is waited for, so that the buffer is used again
                start = clock()
        iteration.end()

    def _check_worker(self) -> None:
        worker = get_worker_info()
        if (
            worker is not None
            and worker.num_workers > 1
            and None in (self._options["rank"], self._options["world_size"])
        ):
            raise InputError(
                f"a BatchLoader in a DataLoader of num_workers={worker.num_workers}: each worker gives all rows. "
                "Iterate over the loader itself, whose threads work ahead; or num_workers=0; or rank and world_size"
            )

    @property
    def stats(self) -> Stats:
        """What has been handed over until now; a copy, which does not change."""
        for handed in self._handed:
            self._count(handed)
        found = Stats(*map(self._stats.__getattribute__, Stats.__slots__))  # `copy.copy` takes four times as long
        found.trained_by_source = dict(found.trained_by_source)
        return found

    def _count(self, handed: _Handed) -> None:
        """Add the batches that were handed over since the last count."""
        group, count = handed.group, handed.batches - handed.counted
        if count:
            lines = group.report[handed.counted : handed.batches]
            self._stats.count(count, group.totals if count == len(group.report) else lines.sum(0).tolist())
            if handed.costs is not None:  # a step's with its first batch
                size = self._plan_options.batches_a_step
                begin, end = (-(-(group.first + number) // size) for number in (handed.counted, handed.batches))
                self._stats.count_steps(handed.costs.slowest[begin:end], handed.costs.mean[begin:end])
            handed.counted = handed.batches

    def _job(
        self, iteration: position.Iteration, index: int, costs: dict[int, Any], sources: BatchSources | None,
        places: dict[int, Places],
    ) -> Job:  # fmt: skip
        """One window's batches, to be filled, what its steps cost, and where the rows of its pairs lie."""
        planned, capacity = iteration.planned, self._plan_options.capacity
        if capacity is not None:
            packs, bounds = planned.packs(index)
            costs[index] = planned.plan.last_step_costs()
            if self._verdicts is not None:
                limit = min(self._plan_options.max_length or capacity, capacity)
                cells = np.minimum(self._order.lengths[packs.rows], limit).astype(np.int64)
                places[index] = Places(self._verdicts, packs.rows, bounds, packs.bounds, cells)
            held = self._held(packs.rows, iteration)
            if sources is not None:
                sources.expect_packs(index, packs, bounds)
            return packed_job(self._collator, packs, bounds, capacity, held)
        window = planned.window(index)
        costs[index] = planned.plan.last_step_costs()
        if self._verdicts is not None:
            places[index] = Places(self._verdicts, *window)
        held = self._held(window.rows, iteration)
        if sources is not None:
            sources.expect(index, window.rows, window.bounds)
        return padded_job(self._collator, window.rows, window.bounds, held)

    def _held(self, rows: npt.NDArray[np.int64], iteration: position.Iteration) -> object:
        """Have a window's rows there as long as what this returns, and ask the system for them."""
        held = self._collator.table.hold(rows, iteration.has_ended)
        if self._plan_options.policy != "sequential":  # there the system reads ahead by itself
            collator = self._collator
            pages.ask_for_rows(collator.table.array, rows, with_spans=bool(collator.settings[settings.MASK]))
        return held

    def _own_transfer(self) -> Transfer:
        """This process's buffers: a fork's copies of them may be in the midst of a change."""
        if self._transfer is None or self._transfer[0] != os.getpid():
            # Those filled ahead, what the consumer holds, and some for batches that one of them does not hold.
            num_buffers = self._prefetch + 3
            self._transfer = os.getpid(), make_transfer(self.device, num_buffers)
        return self._transfer[1]

    def _warn_of_corners(self) -> None:
        if not self._stats.corner_rows and self._collator.settings[settings.REFERENCE]:
            warnings.warn(
                "a row on which mode='reference' gives other targets than mode='positional' (an end-of-text inside the "
                "text, an empty row, or a prompt of length 0); this is said once, loader.stats.corner_rows counts on",
                stacklevel=3,
            )

    def _warn_of_untrained(self, totals: Sequence[int]) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{totals[kernels.UNTRAINED]} of {totals[kernels.ROWS]} rows have no trained target: their prompts "
                "fill max_length, or nothing in them is trained. drop_untrained=True leaves such rows out; this is "
                "said once, loader.stats.untrained_rows counts on",
                stacklevel=3,
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return _loader_at, (self._store, self._options, self.state_dict(), self._starts_here, self.stats)

    def stats_dict(self) -> dict[str, Any]:
        """The statistics as plain numbers."""
        return asdict(self.stats)


def _loader_at(store: Store, options: dict[str, Any], state: dict[str, Any], resume: bool, stats: Stats) -> BatchLoader:
    """A loader as it was when it was pickled."""
    loader = BatchLoader(store, **options)
    loader.load_state_dict(state)
    loader._starts_here = resume
    loader._stats = stats
    return loader
