"""Store, plan, collate and transfer put together: an iterator of batches."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fastcollate.collate import fill as kernels
from fastcollate.collate.batch import Batch, PackedBatch
from fastcollate.collate.collator import Collator
from fastcollate.collate.settings import MASK
from fastcollate.errors import InputError
from fastcollate.load.jobs import Job, PackedJob, PaddedJob
from fastcollate.load.prefetch import Filler, Group, fill_groups
from fastcollate.load.transfer import Transfer, make_transfer
from fastcollate.plan.plan import EpochPlan, plan_epoch
from fastcollate.store.pages import ask_for_rows
from fastcollate.store.table import Columns

STATE_VERSION = 2


class Store(Protocol):
    """What a loader needs of a store; `TokenStore` is one."""

    @property
    def shards(self) -> Sequence[Columns]:
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
        wait_s: seconds that the consumer has waited for batches; those of a group come together.
        h2d_bytes: bytes of the batches that were copied to a device.
    """

    batches: int = 0
    rows: int = 0
    real_cells: int = 0
    padded_cells: int = 0
    trained_tokens: int = 0
    corner_rows: int = 0
    wait_s: float = 0.0
    h2d_bytes: int = 0

    def count(self, num_batches: int, totals: Sequence[int]) -> None:
        """Add some batches, by their lines of the kernel's report, or the sums of these."""
        rows, cells, real, trained, corners = totals[:5]
        self.batches += num_batches
        self.rows += rows
        self.real_cells += real
        self.padded_cells += cells - real
        self.trained_tokens += trained
        self.corner_rows += corners


class BatchLoader:
    """Batches of a store, epoch after epoch.

    Threads fill groups of batches ahead, about four megabytes each. They end with the iteration, also when it is left
    early. A batch that is kept is never overwritten, but keeps its group's memory. On a CUDA device the copies run on a
    stream of their own, and a batch is ready for work on the stream that is current when it is handed over.

    A loader can be pickled, with its position, where its store can. In a forked process make a new iterator: one from
    before the fork refuses to go on there.

    Args:
        store: a `TokenStore`.
        policy: see `plan_epoch`.
        batch_size: see `plan_epoch`.
        max_tokens: see `plan_epoch`.
        max_length: columns kept of a row.
        mask_prompt: train the responses only.
        mode: `"reference"` or `"positional"`, see `Collator`.
        seed: see `plan_epoch`.
        rank: see `plan_epoch`.
        world_size: see `plan_epoch`.
        device: where the batches go.
        window: see `plan_epoch`.
        drop_last: see `plan_epoch`.
        tail: see `plan_epoch`.
        rows: the store's rows to use, such as `range(0, 935)`; all of them by default.
        truncation: `"right"` or `"left"`, see `Collator`.
        pad_token_id: see `Collator`; by default the store's.
        ignore_index: see `Collator`.
        inputs_dtype: see `Collator`.
        capacity: see `plan_epoch`: with `policy="packed"`, cells a pack, and the batches are `PackedBatch`es.
        long_rows: see `plan_epoch`.
        shares: see `plan_epoch`: with `max_tokens`, a common multiple of the world sizes that a run may resume at.
        prefetch: groups of batches filled ahead; 0 fills without threads, when a batch is asked for.
        num_threads: threads that fill; another one plans.

    Raises:
        InputError: an option is wrong, or the options leave no batch.

    Example:
        >>> from fastcollate import BatchLoader, TokenStore
        >>> loader = BatchLoader(TokenStore("store"), batch_size=8, mask_prompt=True, seed=123)
        >>> for inputs, targets in loader:  # int64 (8, width) each
        ...     pass  # your step
        >>> state = loader.state_dict()  # `load_state_dict` goes on there, also in the middle of an epoch
        >>> loader.set_epoch(1)
    """

    def __init__(
        self,
        store: Store,
        *,
        policy: str = "bucketed",
        batch_size: int | None = None,
        max_tokens: int | None = None,
        max_length: int | None = None,
        mask_prompt: bool = False,
        mode: str = "reference",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        window: int | None = None,
        drop_last: bool = False,
        tail: str = "repeat",
        rows: range | None = None,
        truncation: str = "right",
        pad_token_id: int | None = None,
        ignore_index: int = -100,
        inputs_dtype: torch.dtype = torch.int64,
        capacity: int | None = None,
        long_rows: str = "truncate",
        shares: int | None = None,
        prefetch: int = 3,
        num_threads: int = 1,
    ) -> None:
        self._options = {name: value for name, value in locals().items() if name not in ("self", "store")}
        if prefetch < 0 or num_threads < 1:
            raise InputError(f"prefetch={prefetch}, num_threads={num_threads}: give at least 0 and at least 1")
        self._store = store
        self._prefetch = prefetch and max(prefetch, num_threads)
        self._num_threads = num_threads
        lengths = store.lengths
        self._first_row = 0
        if rows is not None:
            if rows.step != 1 or not 0 <= rows.start <= rows.stop <= len(lengths):
                raise InputError(f"rows={rows}: give a range of step 1 within the store's {len(lengths)} rows")
            lengths = lengths[rows.start : rows.stop]
            self._first_row = rows.start
        self._plan_options = {
            "policy": policy,
            "batch_size": batch_size,
            "max_tokens": max_tokens,
            "window": window,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "max_length": max_length,
            "drop_last": drop_last,
            "tail": tail,
            "shares": world_size if shares is None else shares,
            "capacity": capacity,
            "long_rows": long_rows,
        }
        self._lengths = lengths
        self._mode = mode
        self._fingerprint = str(getattr(store, "fingerprint", ""))
        self.device = torch.device(device)
        self._collator = Collator(
            store.shards,
            pad_token_id=getattr(store, "pad_token_id", 50256) if pad_token_id is None else pad_token_id,
            ignore_index=ignore_index,
            max_length=max_length,
            mask_prompt=mask_prompt,
            mode=mode,
            truncation=truncation,
            inputs_dtype=inputs_dtype,
            name=str(getattr(store, "path", "the store")),
        )
        self._stats = Stats()  # without the batches of the current group
        self._group: Group | None = None
        self.epoch = 0
        self._position = (0, 0)  # window, batch within it: the next to hand over
        self._resume = False
        self._transfer: tuple[int, Transfer] | None = None  # the process it belongs to
        if len(lengths) == 0:
            raise InputError("no rows to load: the store, or the range of rows, is empty")
        plan = self._plan()
        if policy == "packed":  # what a step holds depends on the number of packs only
            self._plan_options |= {"batch_size": plan.batch_size, "max_tokens": None, "capacity": plan.capacity}

    def _plan(self) -> EpochPlan:
        return plan_epoch(self._lengths, epoch=self.epoch, **self._plan_options)  # type: ignore[arg-type]

    def __len__(self) -> int:
        """Batches in the current epoch, exactly; with `max_tokens` this plans the epoch once."""
        return len(self._plan())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration runs; setting the current one keeps a loaded position."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._position = (0, 0)
            self._resume = False

    def __iter__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> Iterator[Batch | PackedBatch]:
        """Batches of the current epoch; from a loaded position on, once. The end advances the epoch by one."""
        if not self._resume:
            self._position = (0, 0)
        self._resume = False
        start = time.perf_counter()
        plan = self._plan()
        groups = fill_groups(
            lambda window: self._job(plan, window),
            plan.num_windows,
            self._position,
            Filler(
                self._collator,
                self._own_transfer(),
                packed=plan.capacity is not None,
                ahead=self._prefetch > 0,
            ),
            prefetch=self._prefetch,
            num_threads=self._num_threads,
        )
        with contextlib.closing(groups):
            for group in groups:
                self._stats.wait_s += time.perf_counter() - start
                if group.totals[kernels.CORNERS]:
                    self._warn_of_corners()
                window, arrival, handed = group.window, group.arrival, group.first
                self._group = group
                try:
                    for number, batch in enumerate(group.batches, group.first + 1):
                        if arrival is not None:
                            batch = batch.with_tensors(arrival.receive(batch))
                            self._stats.h2d_bytes += sum(tensor.nbytes for tensor in batch)
                        self._position = (window, number)
                        handed = number
                        yield batch
                finally:
                    if not is_finalizing():  # an interpreter that ends has taken the modules away
                        self._group = None
                        self._count(self._stats, group, handed)
                del group, batch, arrival  # before the next is waited for, so that the buffer is used again
                start = time.perf_counter()
        self.epoch += 1
        self._position = (0, 0)

    @property
    def stats(self) -> Stats:
        """What has been handed over until now; a copy, which does not change."""
        stats, group, (window, number) = replace(self._stats), self._group, self._position
        if group is not None and group.window == window and number > group.first:
            self._count(stats, group, number)
        return stats

    @staticmethod
    def _count(stats: Stats, group: Group, stop: int) -> None:
        """Add a group's batches up to number `stop` of their window."""
        count = stop - group.first
        if count == len(group.batches):
            stats.count(count, group.totals)
        else:
            for line in group.lines[:count]:
                stats.count(1, line)

    def _job(self, plan: EpochPlan, window: int) -> Job:
        """One window's batches, to be filled."""
        if plan.capacity is not None:
            packs, bounds = plan.packs(window)
            packs = packs._replace(rows=self._ready(plan, packs.rows))
            return PackedJob(self._collator, packs, bounds, plan.capacity)
        planned = plan.window(window)
        return PaddedJob(self._collator, self._ready(plan, planned.rows), planned.bounds)

    def _ready(self, plan: EpochPlan, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """A window's rows as the store counts them, asked for."""
        if self._first_row:
            rows = rows + self._first_row
        if plan.policy != "sequential":  # there the system reads ahead by itself
            ask_for_rows(self._collator.table.array, rows, with_spans=bool(self._collator.settings[MASK]))
        return rows

    def _own_transfer(self) -> Transfer:
        """This process's buffers: a fork's copies of them may be in the midst of a change."""
        if self._transfer is None or self._transfer[0] != os.getpid():
            # Those filled ahead, what the consumer holds, and some for batches that one of them does not hold.
            num_buffers = self._prefetch + 3
            self._transfer = os.getpid(), make_transfer(self.device, num_buffers)
        return self._transfer[1]

    def _warn_of_corners(self) -> None:
        if not self._stats.corner_rows and self._mode == "reference":
            warnings.warn(
                "a row on which mode='reference' gives other targets than mode='positional' (an end-of-text inside the "
                "text, an empty row, or a prompt of length 0); this is said once, loader.stats.corner_rows counts on",
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch is, in plain numbers and strings; exact to the batch, the same on every rank."""
        window, batch = self._position
        return {
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "next_window": window,
            "next_batch": batch,
            "num_rows": len(self._lengths),
            "first_row": self._first_row,
            "store": self._fingerprint,
            **{name: value for name, value in self._plan_options.items() if name != "rank"},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position: the next iteration starts there.

        The world size may be another one, with the same `batch_size * world_size`; or the same `max_tokens *
        world_size` and `shares`. All ranks together then give exactly the rows that were not yet given.

        Raises:
            InputError: the state is of another version, store or order of rows.
        """
        own = self.state_dict()
        for name in own.keys() - {"epoch", "next_window", "next_batch", *_SIZES}:
            if name not in state or state[name] != own[name]:
                raise InputError(
                    f"the saved loader state has {name}={state.get(name)!r}, this loader {own[name]!r}; "
                    "make the loader with the saved value, or start afresh"
                )
        _check_sizes(state, own)
        self.epoch = state["epoch"]
        self._position = (state["next_window"], state["next_batch"])
        self._resume = True

    def __reduce__(self) -> tuple[Any, ...]:
        return _loader_at, (self._store, self._options, self.state_dict(), self._resume, self.stats)

    def stats_dict(self) -> dict[str, Any]:
        """The statistics as plain numbers."""
        return asdict(self.stats)


_SIZES = ("batch_size", "max_tokens", "world_size", "shares")


def _check_sizes(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise where a step of all ranks together would hold other rows."""

    def of_all_ranks(part: Mapping[str, Any]) -> tuple[Any, ...]:
        rows, cells = part.get("batch_size"), part.get("max_tokens")
        if rows is not None:
            return rows * part["world_size"], None, None
        return None, None if cells is None else cells * part["world_size"], part.get("shares")

    saved = of_all_ranks(state)
    if saved == of_all_ranks(own):
        return
    rows, cells, shares = saved
    remedy = (
        f"batch_size * world_size = {rows}"
        if rows is not None
        else f"max_tokens * world_size = {cells} and shares={shares} (which world_size must divide)"
    )
    raise InputError(
        f"the saved loader state has {', '.join(f'{name}={state.get(name)!r}' for name in _SIZES)}, this loader "
        f"{', '.join(f'{name}={own[name]!r}' for name in _SIZES)}: then a step holds other rows; make the loader with "
        f"{remedy}, or start afresh"
    )


def _loader_at(store: Store, options: dict[str, Any], state: dict[str, Any], resume: bool, stats: Stats) -> BatchLoader:
    """A loader as it was when it was pickled."""
    loader = BatchLoader(store, **options)
    loader.load_state_dict(state)
    loader._resume = resume
    loader._stats = stats
    return loader
