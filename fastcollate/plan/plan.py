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
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import numpy.typing as npt

from fastcollate.errors import InputError
from fastcollate.plan import kernels as plan_kernels
from fastcollate.plan.packing import LONG_ROWS, Packs, check_capacity, pack_rows
from fastcollate.store.pages import ask_for_items, expect_single_pages

Int64Array = npt.NDArray[np.int64]

POLICIES = ("sequential", "shuffled", "bucketed", "packed")
TAILS = ("repeat", "uneven")
BLOCK = 64
BLOCK_FROM = 1 << 22
WINDOW_BATCHES = 1024
MIN_WINDOW, MAX_WINDOW = 1 << 14, 1 << 18
LARGEST, MOST_RANKS = (1 << 40) - 1, 1 << 20  # of any size, and of ranks: products of two fit 64 bits
_ROWS_KEY, _MIX_KEY, _ORDER_KEY, _ROTATION_KEY = range(4)


class Window(NamedTuple):
    """One rank's batches of one window.

    Attributes:
        rows: int64, row numbers, batch after batch.
        bounds: int64 `(num_batches + 1,)`: batch `b` is `rows[bounds[b]:bounds[b + 1]]`.
    """

    rows: Int64Array
    bounds: Int64Array

    @property
    def num_batches(self) -> int:
        """Batches in this window."""
        return len(self.bounds) - 1


class PackWindow(NamedTuple):
    """One rank's packed batches of one window.

    Attributes:
        packs: rows pack after pack.
        bounds: int64 `(num_batches + 1,)`: batch `b` is the packs `bounds[b]` to `bounds[b + 1]`.
    """

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


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """One rank's batches of one epoch; see `plan_epoch`. Iterates over int64 row numbers, a batch each."""

    lengths: npt.NDArray[Any] = field(repr=False)
    batch_size: int | None
    max_tokens: int | None
    policy: str
    window_rows: int
    block: int
    seed: int
    epoch: int
    rank: int
    world_size: int
    shares: int
    max_length: int | None
    drop_last: bool
    tail: str
    capacity: int | None = None
    long_rows: str = "truncate"

    @property
    def num_rows(self) -> int:
        """Rows in the data set."""
        return len(self.lengths)

    @property
    def num_windows(self) -> int:
        """Windows in the epoch."""
        return -(-self.num_rows // self.window_rows)

    @property
    def _group(self) -> int:
        """Rows that every rank's batch together hold, or come in multiples of."""
        return self.shares if self.batch_size is None else self.batch_size * self.world_size

    def __len__(self) -> int:
        """The exact number of batches; with `max_tokens`, and packed, this plans the whole epoch once."""
        if self.policy == "packed":
            return sum(self.packs(index).num_batches for index in range(self.num_windows))
        if self.batch_size is None:
            return sum(self.window(index).num_batches for index in range(self.num_windows))
        last = self.num_rows - (self.num_windows - 1) * self.window_rows
        return (self.num_windows - 1) * (self.window_rows // self._group) + self._last_batches(last)

    def _last_batches(self, num_rows: int) -> int:
        full, rest = divmod(num_rows, self._group)
        if rest == 0 or self.drop_last:
            return full
        return full + 1 if self.tail == "repeat" or rest > self.rank else full

    def __iter__(self) -> Iterator[Int64Array]:
        return itertools.chain.from_iterable(map(self._batches, range(self.num_windows)))

    def _batches(self, index: int) -> Iterable[Int64Array]:
        """A window's batches, an array each."""
        rows, bounds = self.window(index)
        size = self.batch_size
        whole = 0 if size is None or self.policy == "packed" else len(rows) // size
        if whole and whole == len(bounds) - 1:
            return rows.reshape(whole, -1)  # iterated over in half the time of slices
        return [rows[start:stop] for start, stop in itertools.pairwise(bounds.tolist())]

    def locate(self, step: int) -> tuple[int, int]:
        """The window and the batch within it that the epoch's batch number `step` is.

        Needs `batch_size`, and another policy than packed, whose windows differ in batches.
        """
        assert self.batch_size is not None
        assert self.policy != "packed"
        return divmod(step, self.window_rows // self._group)

    def window(self, index: int) -> Window:
        """Plan one window; costs the same wherever it lies.

        With the policy packed a batch is the rows of all its packs; `packs` tells them apart.

        Raises:
            InputError: a row is longer than `max_tokens`, or its length is negative.
        """
        if self.policy == "packed":
            packs, batches = self.packs(index)
            return Window(packs.rows, packs.bounds[batches])
        self._check_window(index)
        with np.errstate(over="ignore"):  # uint64 arithmetic wraps, and plain Python mode would warn of it
            rows = self._rows(index)
            lengths = np.empty(0, np.int32)
            if self.policy == "bucketed":
                rows, lengths = self._sorted(rows)
            elif self.batch_size is None:
                lengths, _ = self._lengths(rows, self.max_length)
            bounds = self._cut(rows, lengths)
            return self._deal(index, rows, bounds)

    def packs(self, index: int) -> PackWindow:
        """Plan one window of packed batches; costs the same wherever it lies."""
        assert self.batch_size is not None
        assert self.capacity is not None
        self._check_window(index)
        limit = self.capacity if self.max_length is None else min(self.max_length, self.capacity)
        with np.errstate(over="ignore"):
            rows = self._rows(index)
            lengths, _ = self._lengths(rows, None)
            packs = pack_rows(rows, lengths, self.capacity, limit, self.long_rows)
            is_last = index == self.num_windows - 1
            missing = -packs.num_packs % self._group
            if missing and not is_last:
                packs = packs.filled_up(packs.num_packs + missing, repeat=self.tail == "repeat")
            order = np.arange(packs.num_packs)
            plan_kernels.shuffle(order, self._key(_ORDER_KEY, index))
        packs = self._last_packs(packs, order) if is_last and missing else packs.take(order)
        own = packs.take(np.arange(self.rank, packs.num_packs, self.world_size))
        return PackWindow(own, np.append(np.arange(0, own.num_packs, self.batch_size), own.num_packs))

    def _last_packs(self, packs: Packs, order: Int64Array) -> Packs:
        """The epoch's last packs, of a number that the tail policy makes right."""
        whole = len(order) - len(order) % self._group
        if self.drop_last:
            return packs.take(order[:whole])
        rest = packs.take(order[whole:])
        missing = -rest.num_packs % self.world_size
        if missing and self.tail == "repeat":
            rest = rest.filled_up(rest.num_packs + missing, repeat=True)
        return packs.take(order[:whole]).followed_by(rest)

    def _check_window(self, index: int) -> None:
        if not 0 <= index < self.num_windows:
            raise IndexError(f"window {index} of a plan with {self.num_windows}")

    def _key(self, purpose: int, index: int = 0) -> np.uint64:
        key: np.uint64 = np.uint64(self.seed & 0xFFFFFFFFFFFFFFFF)
        for part in (self.epoch, purpose, index):
            key = np.uint64(plan_kernels.mix(key, np.uint64(part)))
        return key

    def _rows(self, index: int) -> npt.NDArray[Any]:
        """The window's rows in the policy's order, of a number that the tail policy makes right."""
        first = index * self.window_rows
        count = min(self.window_rows, self.num_rows - first)
        packed = self.policy == "packed"
        if self.drop_last and not packed:
            count -= count % self._group
        is_permuted = self.policy != "sequential" and self.num_windows > 1
        dtype = np.uint32 if self.num_rows < 1 << 31 and not packed else np.int64  # half the memory to go through
        rows: npt.NDArray[Any] = (
            np.empty(count, dtype) if is_permuted else np.arange(first, first + count).astype(dtype)
        )
        if self.policy != "sequential":
            if is_permuted:
                rotation = int(self._key(_ROTATION_KEY)) % self.num_rows
                plan_kernels.permuted_rows(first, self.num_rows, self.block, self._key(_ROWS_KEY), rotation, rows)
            if self.num_windows == 1 or self.block > 1:
                plan_kernels.shuffle(rows, self._key(_MIX_KEY, index))
        missing = -count % (self.shares if self.batch_size is None else self.world_size)
        if missing and self.tail == "repeat" and not packed:
            rows = np.concatenate([rows, np.resize(rows, missing)])
        return rows

    def _lengths(self, rows: npt.NDArray[Any], limit: int | None) -> tuple[npt.NDArray[np.int32], int]:
        """The rows' lengths, and the longest of them."""
        lengths = np.empty(len(rows), np.int32)
        if self.block > 1:
            ask_for_items(self.lengths, rows)
        limit = 2**31 - 1 if limit is None else min(limit, 2**31 - 1)
        plan_kernels.gather_lengths(self.lengths, rows, limit, lengths)
        longest = int(lengths.view(np.uint32).max(initial=0))
        if longest >= 1 << 31:  # a negative one: the kernels count by length, and would write before their memory
            row = int(rows[np.argmin(lengths)])
            raise InputError(f"row {row} has a length of {self.lengths[row]}; lengths are from 0 to 2**63 - 1")
        return lengths, longest

    def _sorted(self, rows: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        lengths, longest = self._lengths(rows, self.max_length)
        if longest > 16 * len(rows):  # a counting sort would count mostly zeros
            order = np.argsort(lengths, kind="stable")
            return rows[order], lengths[order]
        # Lengths in order are needed by `max_tokens` only.
        result = np.empty_like(rows), lengths[:0] if self.max_tokens is None else np.empty_like(lengths)
        plan_kernels.sort_by_length(rows, lengths, longest, *result)
        return result

    def _cut(self, rows: npt.NDArray[Any], lengths: npt.NDArray[np.int32]) -> Int64Array:
        if self.max_tokens is None:
            return np.append(np.arange(0, len(rows), self._group), len(rows)) if len(rows) else np.zeros(1, np.int64)
        bounds = np.empty(len(rows) // self.shares + 2, np.int64)
        count = plan_kernels.cut_by_tokens(lengths, self.max_tokens * self.world_size, self.shares, bounds)
        if count < 0:
            row, length = int(rows[-1 - count]), int(lengths[-1 - count])
            raise InputError(
                f"row {row} has {length} tokens, more than max_tokens={self.max_tokens} allows a batch; "
                "raise max_tokens, or give a max_length that cuts such rows"
            )
        return bounds[: count + 1]

    def _deal(self, index: int, rows: npt.NDArray[Any], bounds: Int64Array) -> Window:
        order = np.arange(len(bounds) - 1)
        if self.policy == "bucketed":
            whole = order
            if len(rows) % self._group:
                whole = order[:-1]  # what cannot be dealt evenly comes last: a rank may get nothing of it
            plan_kernels.shuffle(whole, self._key(_ORDER_KEY, index))
        out = np.empty(len(rows) // self.world_size + len(order), np.int64)
        out_bounds = np.empty(len(bounds), np.int64)
        plan_kernels.deal(rows, bounds, order, self.rank, self.world_size, out, out_bounds)
        if len(order) and out_bounds[-1] == out_bounds[-2]:
            out_bounds = out_bounds[:-1]  # an uneven tail of fewer rows than ranks leaves this one without
        return Window(out[: out_bounds[-1]], out_bounds)


def plan_epoch(
    lengths: npt.ArrayLike,
    *,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    policy: str = "bucketed",
    window: int | None = None,
    seed: int = 0,
    epoch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    max_length: int | None = None,
    drop_last: bool = False,
    tail: str = "repeat",
    shares: int | None = None,
    block: int | None = None,
    capacity: int | None = None,
    long_rows: str = "truncate",
) -> EpochPlan:
    """Plan one epoch: which rows make which batch, as a pure function of these arguments.

    The order is computed, not stored: by Fisher-Yates (Durstenfeld, 1964) within a window, and across windows by a
    keyed Feistel network with cycle walking (Black and Rogaway, 2002). Random numbers are splitmix64's (Steele, Lea
    and Flood, 2014), packs are made by best fit decreasing (Johnson, 1973).

    Args:
        lengths: each row's length in tokens, integers of at least 0 `(num_rows,)`; read, and checked, a window at a
            time, where the policy needs them at all.
        batch_size: rows (packs, with the policy packed) a batch on each rank; or
        max_tokens: cells a batch on each rank at most, padding included.
        policy: `"sequential"`, `"shuffled"`, `"bucketed"` (rows are shuffled, sorted by length inside a window,
            cut into batches, and the batches shuffled), or `"packed"` (rows are shuffled, packed by best fit
            inside a window, and the packs shuffled).
        window: rows a window, rounded up to whole steps; by default 1,024 steps, at least 16,384 and at most
            262,144 rows, which is what packed takes.
        seed: with `epoch` it decides every random choice.
        epoch: see `seed`.
        rank: which of `world_size` shares to plan. All ranks get the same number of batches and, in each step, rows
            of similar length. A step's rows depend on `batch_size * world_size` only.
        world_size: number of ranks.
        max_length: rows count as no longer than this; with the policy packed, `long_rows` says what becomes of longer
            ones.
        drop_last: leave out the rows that do not fill a step on every rank; others in each epoch.
        tail: what happens to those rows otherwise: `"repeat"` repeats some rows so that every rank gets as many rows
            as the others, `"uneven"` gives each row once and some ranks fewer rows, or one batch fewer. Packs are
            halved before a row is repeated.
        shares: with `max_tokens`, a step's rows are a multiple of this (by default `world_size`); a plan continues at
            any world size that divides it, with the same `max_tokens * world_size`.
        block: rows that the permutation moves together where the data set has more than one window; by default 1, and
            64 from 4,194,304 rows on.
        capacity: with the policy packed, cells a pack; by default `max_length`, else `max_tokens`.
        long_rows: with the policy packed, what becomes of rows longer than `max_length` (the capacity, where that is
            less): `"truncate"`, `"split"` into parts that are packed as rows of their own, or `"drop"`.

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
    array = _as_lengths(lengths)
    shares = world_size if shares is None else shares
    _check_choices(policy, tail, long_rows)
    _check_ranks(rank, world_size, shares)
    if (batch_size is None) == (max_tokens is None):
        raise InputError("give either batch_size (rows) or max_tokens (cells, padding included), not both or none")
    _check_positive(batch_size=batch_size, max_tokens=max_tokens, window=window, block=block)
    if max_length is not None and max_length < 1:  # any large number stands for no limit
        raise InputError(f"max_length={max_length}: give at least 1")
    if not isinstance(seed, SupportsIndex) or not 0 <= epoch <= LARGEST:
        raise InputError(f"seed={seed!r}, epoch={epoch}: give an integer, and an epoch of 0 to {LARGEST:,}")
    if policy == "packed":
        batch_size, max_tokens, capacity = _sizes_of_packs(batch_size, max_tokens, max_length, capacity)
    elif capacity is not None or long_rows != "truncate":
        raise InputError(f"capacity={capacity}, long_rows={long_rows!r}: these are for policy='packed'")
    group = shares if batch_size is None else batch_size * world_size
    if window is None:
        window = MAX_WINDOW if policy == "packed" else min(max(WINDOW_BATCHES * group, MIN_WINDOW), MAX_WINDOW)
    if block is None:
        block = BLOCK if len(array) >= BLOCK_FROM else 1
    if block > 1:
        expect_single_pages(array)
    return EpochPlan(
        lengths=array,
        batch_size=batch_size,
        max_tokens=max_tokens,
        policy=policy,
        window_rows=math.ceil(window / group) * group,
        block=block,
        seed=seed,
        epoch=epoch,
        rank=rank,
        world_size=world_size,
        shares=shares,
        max_length=max_length,
        drop_last=drop_last,
        tail=tail,
        capacity=capacity,
        long_rows=long_rows,
    )


def _as_lengths(lengths: npt.ArrayLike) -> npt.NDArray[Any]:
    array = np.asarray(lengths)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise InputError(f"lengths are {array.dtype} of shape {array.shape}: give one integer a row")
    return array if array.size else np.zeros(0, np.int64)


def _check_choices(policy: str, tail: str, long_rows: str) -> None:
    for name, value, choices in (
        ("policy", policy, POLICIES), ("tail", tail, TAILS), ("long_rows", long_rows, LONG_ROWS),
    ):  # fmt: skip
        if value not in choices:
            raise InputError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}")


def _check_ranks(rank: int, world_size: int, shares: int) -> None:
    if not 0 <= rank < world_size <= MOST_RANKS:
        raise InputError(
            f"rank={rank} of world_size={world_size}: ranks count from 0 to world_size - 1, of {MOST_RANKS:,} at most"
        )
    if not 1 <= shares <= MOST_RANKS or shares % world_size:
        raise InputError(f"shares={shares}: give a multiple of world_size={world_size}, {MOST_RANKS:,} at most")


def _check_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and not 1 <= value <= LARGEST:
            raise InputError(f"{name}={value}: give 1 to {LARGEST:,}")


def _sizes_of_packs(
    batch_size: int | None, max_tokens: int | None, max_length: int | None, capacity: int | None
) -> tuple[int | None, int | None, int]:
    """Packs a batch, `max_tokens` made of it, and the capacity."""
    if capacity is None:
        capacity = max_tokens if max_length is None else max_length
    if capacity is None:
        raise InputError("policy='packed': give capacity (cells a pack), or a max_length to take for it")
    check_capacity(capacity)
    if max_tokens is None:
        return batch_size, None, capacity
    if max_tokens < capacity:
        raise InputError(
            f"max_tokens={max_tokens} holds no pack of {capacity} cells: raise it, or lower capacity (or max_length)"
        )
    return max_tokens // capacity, None, capacity
