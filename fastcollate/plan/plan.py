"""Which rows make which batch: a pure function of (lengths, policy, sizes, window, seed, epoch, rank, world size).

An epoch is planned window by window. The permutation is computed, not stored (`permuted_rows`), so the plan of
a billion rows takes as long to start as that of a thousand windows' neighbour, and resuming costs one window.

Randomness: where all rows fit one window they are shuffled by Fisher-Yates. Beyond that a keyed bijection spreads the
rows over the windows; from `BLOCK_FROM` rows on it moves blocks of `BLOCK` neighbouring rows, whose rows then always
fall into the same window, though not into the same batch: a window's rows are mixed again.

Packs are made of a window's rows. So that every step but the epoch's last has as many packs as any other, the packs of
most rows are halved until a window's packs fill its last step: on average half a step's packs a window.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from typing_extensions import Unpack

from fastcollate.errors import LARGEST, InputError, integer
from fastcollate.plan import kernels as plan_kernels
from fastcollate.plan.options import Int64Array, PlanKeywords, PlanOptions
from fastcollate.plan.packing import Packs, pack_rows
from fastcollate.store import pages

BLOCK = 64
BLOCK_FROM = 1 << 22
WINDOW_BATCHES = 1024
MIN_WINDOW, MAX_WINDOW = 1 << 14, 1 << 18
_ROWS_KEY, _MIX_KEY, _ORDER_KEY, _ROTATION_KEY = range(4)


class Window(NamedTuple):
    """One rank's batches of one window: batch `b` is the row numbers `rows[bounds[b]:bounds[b + 1]]`."""

    rows: Int64Array
    bounds: Int64Array

    @property
    def num_batches(self) -> int:
        """Batches in this window."""
        return len(self.bounds) - 1

    def split(self) -> list[Int64Array]:
        """The batches, an array each."""
        return np.split(self.rows, self.bounds[1:-1])


class PackWindow(NamedTuple):
    """One rank's packed batches of one window: batch `b` is the packs `bounds[b]` to `bounds[b + 1]`."""

    packs: Packs
    bounds: Int64Array

    @property
    def num_batches(self) -> int:
        """Batches in this window."""
        return len(self.bounds) - 1

    def batch(self, index: int) -> Packs:
        """The packs of one batch, whose bounds start at 0."""
        bounds = self.packs.bounds[self.bounds[index] : self.bounds[index + 1] + 1]
        part = slice(bounds[0], bounds[-1])
        return Packs(self.packs.rows[part], self.packs.starts[part], bounds - bounds[0])


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
    """

    lengths: npt.NDArray[Any] = field(repr=False)
    options: PlanOptions
    epoch: int
    window_rows: int
    block: int

    def __getattr__(self, name: str) -> Any:
        if name in PlanOptions.__slots__:
            return getattr(self.options, name)
        raise AttributeError(f"a plan has no {name!r}")

    @property
    def num_rows(self) -> int:
        """Rows in the data set."""
        return len(self.lengths)

    @property
    def num_windows(self) -> int:
        """Windows in the epoch."""
        return -(-self.num_rows // self.window_rows)

    def __len__(self) -> int:
        """The exact number of batches; with `max_tokens`, and packed, this plans the whole epoch once."""
        if self.has_even_windows and self.num_windows:
            return (self.num_windows - 1) * self.num_batches(0) + self.num_batches(self.num_windows - 1)
        return sum(map(self.num_batches, range(self.num_windows)))

    @property
    def has_even_windows(self) -> bool:
        """Whether each window but the last has as many batches as any other."""
        return self.options.batch_size is not None and self.options.policy != "packed"

    def num_batches(self, index: int) -> int:
        """Batches in a window; with `max_tokens`, and packed, this plans it."""
        if not self.has_even_windows:
            return self.window(index).num_batches
        self._check_window(index)
        full, rest = divmod(min(self.window_rows, self.num_rows - index * self.window_rows), self.options.group)
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
        self._check_window(index)
        window = self._window(index)
        largest, step = self._largest if self.options.longest_first else (0, 0)
        if index not in (0, largest) or (largest, step) == (0, 0):
            return window
        own, other = window.split(), self._window(largest - index).split()
        if index == 0:  # the first step and the largest change places
            own[0], other[step] = other[step], own[0]
        if index == largest:
            own[step] = other[0]
        return Window(np.concatenate(own), np.cumsum([0, *map(len, own)]))

    @cached_property
    def _largest(self) -> tuple[int, int]:
        """Window and step of the most cells, of the steps that all ranks share evenly."""
        most, found = 0, (0, 0)
        for index in range(self.num_windows):
            rows, bounds, order = self._steps(index)
            lengths, _ = self._lengths(rows, self.options.max_length)
            counts = np.diff(bounds)
            if len(counts):
                widths = _rounded_up(np.maximum.reduceat(lengths, bounds[:-1]), self.options.pad_to_multiple_of)
                cells = widths * counts * (counts % self.options.group == 0)
                place = int(cells[order].argmax())
                if cells[order[place]] > most:
                    most, found = int(cells[order[place]]), (index, place)
        return found

    def _window(self, index: int) -> Window:
        """One rank's share of a window's steps, in the order in which they were planned."""
        rows, bounds, order = self._steps(index)
        options = self.options
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
            rows = self._rows(index)
            lengths = np.empty(0, np.int32)
            if options.policy == "bucketed":
                rows, lengths = self._sorted(rows)
            elif options.batch_size is None:
                lengths, _ = self._lengths(rows, options.max_length)
            bounds = self._cut(rows, lengths)
            order = np.arange(len(bounds) - 1)
            if options.policy == "bucketed":
                # What cannot be dealt evenly comes last: a rank may get nothing of it.
                whole = order[:-1] if len(rows) % options.group else order
                plan_kernels.shuffle(whole, self._key(_ORDER_KEY, index))
        return rows, bounds, order

    def packs(self, index: int) -> PackWindow:
        """Plan one window of packed batches; costs the same wherever it lies."""
        options = self.options
        assert options.batch_size is not None
        assert options.capacity is not None
        self._check_window(index)
        limit = options.capacity if options.max_length is None else min(options.max_length, options.capacity)
        with np.errstate(over="ignore"):
            rows = self._rows(index)
            lengths, _ = self._lengths(rows, None)
            packs = pack_rows(rows, lengths, options.capacity, limit, options.long_rows, options.row_multiple)
            is_last = index == self.num_windows - 1
            missing = -packs.num_packs % options.group
            if missing and not is_last:
                packs = packs.filled_up(packs.num_packs + missing, repeat=options.tail == "repeat")
            order = np.arange(packs.num_packs)
            plan_kernels.shuffle(order, self._key(_ORDER_KEY, index))
        if is_last and missing:
            packs = self._last_packs(packs, order)
            order = np.arange(packs.num_packs)
        own = packs.take(order[options.rank :: options.world_size])
        return PackWindow(own, np.append(np.arange(0, own.num_packs, options.batch_size), own.num_packs))

    def _last_packs(self, packs: Packs, order: Int64Array) -> Packs:
        """The epoch's last packs, of a number that the tail policy makes right."""
        whole = len(order) - len(order) % self.options.group
        if self.options.drop_last:
            return packs.take(order[:whole])
        rest = packs.take(order[whole:])
        missing = -rest.num_packs % self.options.world_size
        if missing and self.options.tail == "repeat":
            rest = rest.filled_up(rest.num_packs + missing, repeat=True)
        return packs.take(order[:whole]).followed_by(rest)

    def _check_window(self, index: int) -> None:
        if not 0 <= index < self.num_windows:
            raise IndexError(f"window {index} of a plan with {self.num_windows}")

    def _key(self, purpose: int, index: int = 0) -> np.uint64:
        return key_of(self.options.seed, self.epoch, purpose, index)

    def _rows(self, index: int) -> npt.NDArray[Any]:
        """The window's rows in the policy's order, of a number that the tail policy makes right."""
        options, first = self.options, index * self.window_rows
        count = min(self.window_rows, self.num_rows - first)
        packed, is_shuffled = options.policy == "packed", options.policy != "sequential"
        kept = count - count % options.group if options.drop_last and not packed else count
        dtype = np.uint32 if self.num_rows < 1 << 31 and not packed else np.int64  # half the memory to go through
        if is_shuffled and self.num_windows > 1:
            rows: npt.NDArray[Any] = np.empty(kept, dtype)  # what is left out lies elsewhere in each epoch
            rotation = int(self._key(_ROTATION_KEY)) % self.num_rows
            plan_kernels.permuted_rows(first, self.num_rows, self.block, self._key(_ROWS_KEY), rotation, rows)
        else:
            rows = np.arange(first, first + count).astype(dtype)
        if is_shuffled and (self.num_windows == 1 or self.block > 1):
            plan_kernels.shuffle(rows, self._key(_MIX_KEY, index))
        rows = rows[:kept]
        missing = -kept % (options.group if options.batch_size is None else options.world_size)
        if missing and options.tail == "repeat" and not packed:
            rows = np.concatenate([rows, np.resize(rows, missing)])
        return rows

    def _lengths(self, rows: npt.NDArray[Any], limit: int | None) -> tuple[npt.NDArray[np.int32], int]:
        """The rows' lengths, and the longest of them."""
        lengths = np.empty(len(rows), np.int32)
        if self.block > 1:
            pages.ask_for_items(self.lengths, rows)
        limit = 2**31 - 1 if limit is None else min(limit, 2**31 - 1)
        plan_kernels.gather_lengths(self.lengths, rows, limit, lengths)
        longest = int(lengths.view(np.uint32).max(initial=0))
        if longest >= 1 << 31:  # a negative one: the kernels count by length, and would write before their memory
            row = int(rows[np.argmin(lengths)])
            raise InputError(f"row {row} has a length of {self.lengths[row]}; lengths are from 0 to 2**63 - 1")
        return lengths, longest

    def _sorted(self, rows: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        lengths, longest = self._lengths(rows, self.options.max_length)
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
        widths = _rounded_up(lengths, options.pad_to_multiple_of)
        count = plan_kernels.cut_by_tokens(widths, options.max_tokens * options.world_size, options.group, bounds)
        if count < 0:
            raise too_long(int(rows[-1 - count]), int(lengths[-1 - count]), options)
        return bounds[: count + 1]


def _rounded_up(lengths: npt.NDArray[Any], multiple: int | None) -> npt.NDArray[Any]:
    """The widths of batches whose longest rows these are."""
    return lengths if multiple is None else -(-lengths.astype(np.int64) // multiple) * multiple


def key_of(seed: int, *purpose: int) -> np.uint64:
    """The key of a stream of random numbers, by a seed and what they are for."""
    key: np.uint64 = np.uint64(seed & 0xFFFFFFFFFFFFFFFF)
    for part in purpose:
        key = np.uint64(plan_kernels.mix(key, np.uint64(part)))
    return key


def too_long(row: int, length: int, options: PlanOptions) -> InputError:
    """Why a row stands in no batch of `max_tokens`."""
    shares = f" (of rows in multiples of shares={options.shares})" if options.shares != options.world_size else ""
    multiple = options.pad_to_multiple_of
    padded = f" (padded to a multiple of {multiple})" if multiple else ""
    return InputError(
        f"row {row} has {length} tokens{padded}, more than max_tokens={options.max_tokens} allows a batch{shares}; "
        "raise max_tokens, or give a max_length that cuts such rows"
    )


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


def plan_with(lengths: npt.NDArray[Any], options: PlanOptions, epoch: int) -> EpochPlan:
    """`plan_epoch` by options that are checked already."""
    window, block, group = options.window, options.block, options.group
    if window is None:
        packed = options.policy == "packed"
        window = MAX_WINDOW if packed else min(max(WINDOW_BATCHES * group, MIN_WINDOW), MAX_WINDOW)
    if block is None:
        block = BLOCK if len(lengths) >= BLOCK_FROM else 1
    if block > 1:
        pages.expect_single_pages(lengths)
    return EpochPlan(lengths, options, integer("epoch", epoch, 0, LARGEST), math.ceil(window / group) * group, block)


def as_lengths(lengths: npt.ArrayLike) -> npt.NDArray[Any]:
    """Lengths as an array; refuses what is not one integer a row."""
    array = np.asarray(lengths)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise InputError(f"lengths are {array.dtype} of shape {array.shape}: give one integer a row")
    return array if array.size else np.zeros(0, np.int64)
