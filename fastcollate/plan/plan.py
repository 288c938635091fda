"""Which rows make which batch: a pure function of (lengths, policy, sizes, window, seed, epoch, rank, world size).

An epoch is planned window by window. The permutation is computed, not stored (`permuted_rows`), so the plan of
a billion rows takes as long to start as that of a thousand windows' neighbour, and resuming costs one window.

Randomness: where all rows fit one window they are shuffled by Fisher-Yates. Beyond that a keyed bijection spreads the
rows over the windows; from `BLOCK_FROM` rows on it moves blocks of `BLOCK` neighbouring rows, whose rows then always
fall into the same window, though not into the same batch: a window's rows are mixed again.

Packs are made of a window's rows. So that every step but the epoch's last has as many packs as any other, the packs of
most rows are halved until a window's packs fill its last step, half a step's on average; batches are cut smaller.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Unpack

from fastcollate.errors import LARGEST, InputError, integer
from fastcollate.plan import kernels as plan_kernels
from fastcollate.plan.cost import deal as costs
from fastcollate.plan.cost.dealt import Dealt, dealt_batches_of, dealt_packs_of, in_turn
from fastcollate.plan.cost.epoch import step_costs_of
from fastcollate.plan.options import Int64Array, PlanKeywords, PlanOptions, as_lengths
from fastcollate.plan.packing import PackWindow, Window
from fastcollate.plan.sharded.order import NodesOrder, ShardOrder, Shards, order_of
from fastcollate.plan.sharded.order import key_of as key_of
from fastcollate.store import pages

Float64Array = npt.NDArray[np.float64]

BLOCK = 64
BLOCK_FROM = 1 << 22
WINDOW_BATCHES = 1024
MIN_WINDOW, MAX_WINDOW = 1 << 14, 1 << 18
_ROWS_KEY, _MIX_KEY, _ORDER_KEY, _ROTATION_KEY, _RANKS_KEY, _SHARDS_KEY = range(6)


@dataclass(frozen=True)
class EpochPlan:
    """One rank's batches of one epoch; see `plan_epoch`. Iterates over int64 row numbers, a batch each.

    The options are attributes of the plan too, such as `plan.batch_size`.

    Attributes:
        lengths: each row's length in tokens.
        options: what was asked for, checked.
        epoch: the epoch.
        window_rows: rows a window.
        block: rows that the permutation moves together.
        in_order: windows, and steps of the policy shuffled, have their rows as they come, such as a mix's by step.
        shards: the order of rows, where that is by shard.
    """

    lengths: npt.NDArray[Any] = field(repr=False)
    options: PlanOptions
    epoch: int
    window_rows: int
    block: int
    in_order: bool = False
    shards: ShardOrder | NodesOrder | None = None

    def __getattr__(self, name: str) -> Any:
        if name in PlanOptions.__slots__:
            return getattr(self.options, name)
        raise AttributeError(f"a plan has no {name!r}")

    step_costs = step_costs_of  # of one window, on all ranks
    dealt_packs, dealt_batches = dealt_packs_of, dealt_batches_of  # of one window, on all ranks

    @property
    def num_rows(self) -> int:
        """Rows in the data set."""
        return len(self.lengths)

    @property
    def num_places(self) -> int:
        """Rows in the epoch: with several nodes some are repeated, so that each has as many."""
        return self.num_rows if self.shards is None else self.shards.num_places

    @property
    def num_windows(self) -> int:
        """Windows in the epoch."""
        return -(-self.num_places // self.window_rows)

    def __len__(self) -> int:
        """The exact number of batches; with `max_tokens`, and packed, this plans the whole epoch once."""
        if self.has_even_windows and self.num_windows:
            return (self.num_windows - 1) * self.num_batches(0) + self.num_batches(self.num_windows - 1)
        return sum(map(self.num_batches, range(self.num_windows)))

    @property
    def has_even_windows(self) -> bool:
        """Whether each window but the last has as many batches as any other."""
        return self.options.batch_size is not None and self.options.policy != "packed"

    @property
    def _deals_batches(self) -> bool:
        """Whether padded batches are dealt by cost, one by one."""
        return bool(self.options.balance) and self.options.policy != "packed"

    def num_batches(self, index: int) -> int:
        """Batches in a window; with `max_tokens`, and packed, this plans it."""
        if not self.has_even_windows:
            return self.window(index).num_batches
        self.check_window(index)
        full, rest = divmod(min(self.window_rows, self.num_places - index * self.window_rows), self.options.group)
        if rest == 0 or self.options.drop_last:
            return full
        return full + 1 if self.options.tail == "repeat" or rest > self.options.rank else full

    def __iter__(self) -> Iterator[Int64Array]:
        return itertools.chain.from_iterable(map(self._batches, range(self.num_windows)))

    def _batches(self, index: int) -> Iterable[Int64Array]:
        """A window's batches, an array each."""
        rows, bounds = self.window(index)
        size = self.options.batch_size if self.has_even_windows else None
        whole = 0 if size is None else len(rows) // size
        if whole and whole == len(bounds) - 1:
            return rows.reshape(whole, -1)  # iterated over in half the time of slices
        return [rows[start:stop] for start, stop in itertools.pairwise(bounds.tolist())]

    def window(self, index: int) -> Window:
        """Plan one window; costs the same wherever it lies. Refuses a row that is longer than `max_tokens`.

        With the policy packed a batch is the rows of all its packs; `packs` tells them apart.
        """
        if self.options.policy == "packed":
            packs, batches = self.packs(index)
            return Window(packs.rows, packs.bounds[batches])
        self.check_window(index)
        window = self._window(index)
        largest, step = self._largest if self.options.longest_first else (0, 0)
        if index not in (0, largest) or (largest, step) == (0, 0):
            return window
        size = self.options.batches_a_step
        first, place = slice(size), slice(step * size, (step + 1) * size)
        own, other = window.split(), self._window(largest - index).split()
        if index == 0:  # the first step and the largest change places
            own[first], other[place] = other[place], own[first]
        if index == largest:
            own[place] = other[first]
        return Window(np.concatenate(own), np.cumsum([0, *map(len, own)]))

    @cached_property
    def _largest(self) -> tuple[int, int]:
        """Window and step of the most cells, of the steps that all ranks share evenly."""
        most, found = 0, (0, 0)
        for index in range(self.num_windows):
            cells = self._cells(index)
            if len(cells) and cells.max() > most:
                most, found = int(cells.max()), (index, int(cells.argmax()))
        return found

    def _cells(self, index: int) -> Int64Array:
        """Cells of each of a window's steps, or of its largest batch; 0 where not all ranks share it evenly."""
        group = self.options.group
        if self._deals_batches:
            batches, order, _ = self.dealt_batches(index)
            rows, bounds, order = batches.rows, batches.bounds, order[: len(order) // group * group].reshape(-1, group)
        else:
            rows, bounds, order = self._steps(index)
        lengths, _ = self.lengths_of(rows, self.options.max_length)
        counts = np.diff(bounds)
        widths = costs.padded_to(costs.widths(lengths, bounds), self.options.pad_to_multiple_of)
        is_even = self._deals_batches | (counts % group == 0)
        if len(counts) and self._has_short_step(index):
            is_even[-1] = False
        cells: Int64Array = widths * counts * is_even
        return cells[order].max(1) if self._deals_batches else cells[order]

    def _window(self, index: int) -> Window:
        """One rank's share of a window's steps, in the order in which they were planned."""
        options = self.options
        if self._deals_batches:
            batches, dealt, _ = self.dealt_batches(index)
            own = batches.take(dealt[options.rank :: options.world_size])
            return Window(own.rows.astype(np.int64), own.bounds)
        rows, bounds, order = self._steps(index)
        out = np.empty(len(rows) // options.world_size + len(order), np.int64)
        out_bounds = np.empty(len(bounds), np.int64)
        plan_kernels.deal(rows, bounds, order, options.rank, options.world_size, out, out_bounds)
        if len(order) and out_bounds[-1] == out_bounds[-2]:
            out_bounds = out_bounds[:-1]  # an uneven tail of fewer rows than ranks leaves this one without
        return Window(out[: out_bounds[-1]], out_bounds)

    def _steps(self, index: int) -> tuple[npt.NDArray[Any], Int64Array, Int64Array]:
        """The rows of a window's steps, step after step, their bounds, and the order of the steps."""
        options = self.options
        with np.errstate(over="ignore"):  # uint64 arithmetic wraps, and plain Python mode would warn of it
            parts = self.rows_of_parts(index)
            lengths = np.empty(0, np.int32)
            if options.policy == "bucketed":
                ordered = [self.sorted_by_length(part) for part in parts]
                parts = [self._filled_up(part, part[::-1]) for part, _ in ordered]
                lengths = in_turn([each for _, each in ordered], options.part_ranks)
            rows = in_turn(parts, options.part_ranks)
            if options.policy != "bucketed" and options.batch_size is None:
                lengths, _ = self.lengths_of(rows, options.max_length)
            bounds = self._cut(rows, lengths)
            order = np.arange(len(bounds) - 1)
            if options.policy == "bucketed":
                # What cannot be dealt evenly comes last: a rank may get nothing of it.
                whole = order[:-1] if len(rows) % options.group or self._has_short_step(index) else order
                plan_kernels.shuffle(whole, self._key(_ORDER_KEY, index))
        return rows, bounds, order

    def _has_short_step(self, index: int) -> bool:
        """Whether a window's last step, of a fixed number of rows, has fewer, but for those that are repeated."""
        count = min(self.window_rows, self.num_places - index * self.window_rows)
        return self.options.batch_size is not None and not self.options.drop_last and bool(count % self.options.group)

    def packs(self, index: int) -> PackWindow:
        """Plan one window of packed batches; costs the same wherever it lies."""
        options = self.options
        packs, order, _ = self.dealt_packs(index)
        own = packs.take(order[options.rank :: options.world_size])
        return PackWindow(own, np.append(np.arange(0, own.num_packs, options.batch_size), own.num_packs))

    def order_by_cost(self, each: Float64Array, index: int) -> Int64Array:
        """The order of a window's packs or batches, or of those of one node, by what each costs."""
        key = self._key(_ORDER_KEY, index)
        if self.options.balance and self.options.group > 1:
            return costs.steps_of_like_cost(each, self.options.part_group, key)
        order = np.arange(len(each))
        plan_kernels.shuffle(order, key)
        return order

    def deal_by_cost(self, each: Float64Array, order: Int64Array, index: int) -> tuple[Int64Array, Float64Array]:
        """Deal steps in this order to the ranks, and tell what each part of that costs."""
        options, dealt = self.options, each[order]
        if options.balance:
            key = self._key(_RANKS_KEY, index)
            turns = costs.deal(dealt, options.part_group, options.part_ranks, key)
            order, dealt = order[turns], dealt[turns]
        return order, dealt

    def note_costs(self, dealt: Dealt) -> Dealt:
        """Keep what a window's steps cost, for `last_step_costs`."""
        self.__dict__["_dealt"] = dealt.costs
        return dealt

    def last_step_costs(self) -> costs.StepCosts | None:
        """What the steps of the window that was planned last cost; `None` where rows are dealt, no packs or batches."""
        dealt = self.__dict__.get("_dealt")
        return None if dealt is None else costs.step_costs(dealt, self.options.group, self.options.world_size)

    def check_window(self, index: int) -> None:
        """Refuse the number of a window that there is not."""
        if not 0 <= index < self.num_windows:
            raise IndexError(f"window {index} of a plan with {self.num_windows}")

    def _key(self, purpose: int, index: int = 0) -> np.uint64:
        return key_of(self.options.seed, self.epoch, purpose, index)

    def rows_of_parts(self, index: int) -> list[npt.NDArray[Any]]:
        """The window's rows in the policy's order, of a number that the tail policy makes right; each node's."""
        options, first = self.options, index * self.window_rows
        count = min(self.window_rows, self.num_places - first)
        packed, is_shuffled = options.policy == "packed", options.policy != "sequential"
        whole = packed or (self._deals_batches and count >= options.group)
        kept = count - count % options.group if options.drop_last and not whole else count
        dtype = np.uint32 if self.num_rows < 1 << 31 and not packed else np.int64  # half the memory to go through
        if self.shards is not None:
            rows: npt.NDArray[Any] = self.shards.rows(first, kept)
        elif is_shuffled and self.num_windows > 1 and not self.in_order:
            rows = np.empty(kept, dtype)  # what is left out lies elsewhere in each epoch
            rotation = int(self._key(_ROTATION_KEY)) % self.num_rows
            plan_kernels.permuted_rows(first, self.num_rows, self.block, self._key(_ROWS_KEY), rotation, rows)
        else:
            rows = np.arange(first, first + count, dtype=dtype)
        parts = rows.reshape(options.nodes, -1)
        if is_shuffled and (options.policy != "shuffled" if self.in_order else self.num_windows == 1 or self.block > 1):
            for part in parts:
                plan_kernels.shuffle(part, self._key(_MIX_KEY, index))
        parts = parts[:, : kept // options.nodes]
        if packed or self._deals_batches or (options.policy == "bucketed" and options.batch_size is not None):
            return list(parts)  # repeated later: the rows of a step are the same on any number of ranks
        return [self._filled_up(part, part) for part in parts]

    def _filled_up(self, part: npt.NDArray[Any], again: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A node's rows, and as many of those to repeat as its ranks, or `shares`, need to have as many each."""
        options = self.options
        missing = -len(part) % (options.part_group if options.batch_size is None else options.part_ranks)
        return np.concatenate([part, np.resize(again, missing)]) if missing and options.tail == "repeat" else part

    def lengths_of(self, rows: npt.NDArray[Any], limit: int | None) -> tuple[npt.NDArray[np.int32], int]:
        """The rows' lengths, and the longest of them."""
        lengths = np.empty(len(rows), np.int32)
        if self.block > 1:
            pages.ask_for_items(self.lengths, rows)
        limit = plan_kernels.LONGEST if limit is None else min(limit, plan_kernels.LONGEST)
        plan_kernels.gather_lengths(self.lengths, rows, limit, lengths)
        longest = int(lengths.view(np.uint32).max(initial=0))
        if longest >= 1 << 31:  # a negative one: the kernels count by length, and would write before their memory
            row = int(rows[np.argmin(lengths)])
            raise InputError(f"row {row} has a length of {self.lengths[row]}; lengths are from 0 to 2**63 - 1")
        return lengths, longest

    def sorted_by_length(self, rows: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """Rows shortest first, and with `max_tokens` their lengths."""
        lengths, longest = self.lengths_of(rows, self.options.max_length)
        if longest > 16 * len(rows):  # a counting sort would count mostly zeros
            order = np.argsort(lengths, kind="stable")
            return rows[order], lengths[order]
        # Lengths in order are needed by `max_tokens` only.
        result = np.empty_like(rows), lengths[:0] if self.options.max_tokens is None else np.empty_like(lengths)
        plan_kernels.sort_by_length(rows, lengths, longest, *result)
        return result

    def _cut(self, rows: npt.NDArray[Any], lengths: npt.NDArray[np.int32]) -> Int64Array:
        options = self.options
        if options.max_tokens is None:
            return np.append(np.arange(0, len(rows), options.group), len(rows)) if len(rows) else np.zeros(1, np.int64)
        bounds = np.empty(len(rows) // options.group + 2, np.int64)
        widths = costs.padded_to(lengths, options.pad_to_multiple_of)
        count = plan_kernels.cut_by_tokens(widths, options.max_tokens * options.world_size, options.group, bounds)
        if count < 0:
            raise options.too_long(int(rows[-1 - count]), int(lengths[-1 - count]))
        return bounds[: count + 1]


def plan_epoch(lengths: npt.ArrayLike, *, epoch: int = 0, **options: Unpack[PlanKeywords]) -> EpochPlan:
    """Plan one epoch: which rows make which batch, as a pure function of these arguments.

    The order is computed, not stored: by Fisher-Yates (Durstenfeld, 1964) within a window, and across windows by a
    keyed Feistel network with cycle walking (Black and Rogaway, 2002). Random numbers are splitmix64's (Steele, Lea
    and Flood, 2014), packs are made by best fit decreasing (Johnson, 1973).

    Args:
        lengths: each row's length in tokens, integers of at least 0 `(num_rows,)`; read, and checked, a window at a
            time, where the policy needs them at all.
        epoch: with the seed it decides every random choice.
        options: see `PlanOptions`; `batch_size` or `max_tokens` is needed.

    Raises:
        InputError: a value or a combination is wrong.

    Example:
        >>> from fastcollate import plan_epoch
        >>> lengths = [9, 1, 8, 2, 7, 3, 6, 4]
        >>> [rows.tolist() for rows in plan_epoch(lengths, batch_size=2, seed=1)]  # rows of similar length
        [[1, 3], [6, 4], [5, 7], [2, 0]]

        Two ranks share each step, and together have the same rows:

        >>> [rows.tolist() for rows in plan_epoch(lengths, batch_size=2, seed=1, rank=0, world_size=2)]
        [[1, 5], [6, 2]]
        >>> [rows.tolist() for rows in plan_epoch(lengths, batch_size=2, seed=1, rank=1, world_size=2)]
        [[3, 7], [4, 0]]
    """
    return plan_with(as_lengths(lengths), PlanOptions(**options).checked(), epoch)


def plan_with(
    lengths: npt.NDArray[Any], options: PlanOptions, epoch: int, *, in_order: bool = False, shards: Shards | None = None
) -> EpochPlan:
    """`plan_epoch` by options that are checked already."""
    window, block, group = options.window, options.block, options.group
    if window is None:
        least = MAX_WINDOW if options.policy == "packed" or options.balance else MIN_WINDOW
        window = min(max(WINDOW_BATCHES * group, least), MAX_WINDOW)
    if block is None:
        block = BLOCK if len(lengths) >= BLOCK_FROM else 1
    if block > 1:
        pages.expect_single_pages(lengths)
    window, epoch = math.ceil(window / group) * group, integer("epoch", epoch, 0, LARGEST)
    order = order_of(shards, options, key_of(options.seed, epoch, _SHARDS_KEY))
    return EpochPlan(lengths, options, epoch, window, block, in_order or order is not None, order)
