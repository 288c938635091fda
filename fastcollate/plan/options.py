"""What a plan may be told: each option is declared, explained and checked here, and nowhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from fastcollate.errors import LARGEST, LARGEST_CAPACITY, InputError, choice, integer, shown

Int64Array = npt.NDArray[np.int64]

POLICIES = ("sequential", "shuffled", "bucketed", "packed")
TAILS = ("repeat", "uneven")
LONG_ROWS = ("truncate", "split", "drop")
MOST_RANKS = 1 << 20


class OrderKeywords(TypedDict, total=False):
    """The keyword arguments that decide an order of batches; `PlanOptions` explains them."""

    batch_size: int | None
    max_tokens: int | None
    policy: str
    window: int | None
    seed: int
    max_length: int | None
    drop_last: bool
    tail: str
    shares: int | None
    block: int | None
    capacity: int | None
    long_rows: str
    longest_first: bool
    pad_to_multiple_of: int | None
    cp_size: int | None


class PlanKeywords(OrderKeywords, total=False):
    """The keyword arguments of a plan; `PlanOptions` explains them."""

    rank: int
    world_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """Which rows make which batch. Integers may be NumPy's.

    Attributes:
        batch_size: rows (packs, with the policy packed) a batch on each rank; or
        max_tokens: cells a batch on each rank at most, padding included.
        policy: `"sequential"`, `"shuffled"`, `"bucketed"` (rows are shuffled, sorted by length inside a window,
            cut into batches, and the batches shuffled), or `"packed"` (rows are shuffled, packed by best fit
            inside a window, and the packs shuffled).
        window: rows a window, rounded up to whole steps; by default 1,024 steps, at least 16,384 and at most
            262,144 rows, which is what packed takes.
        seed: with the epoch it decides every random choice.
        rank: which of `world_size` shares to plan. All ranks get the same number of batches and, in each step, rows
            of similar length. A step's rows depend on `batch_size * world_size` only.
        world_size: number of ranks.
        max_length: rows count as no longer than this; with the policy packed, `long_rows` says what becomes of longer
            ones.
        drop_last: leave out the rows that do not fill a step on every rank; others in each epoch, but for the policy
            sequential.
        tail: what happens to those rows otherwise: `"repeat"` repeats some rows so that every rank gets as many rows
            as the others, `"uneven"` gives each row once and some ranks fewer rows, or one batch fewer. Packs are
            halved before a row is repeated.
        shares: with `max_tokens`, a step's rows are a multiple of this (by default `world_size`); a run continues at
            any world size that divides it, with the same `max_tokens * world_size`.
        block: rows that the permutation moves together where the data set has more than one window; by default 1, and
            64 from 4,194,304 rows on.
        capacity: with the policy packed, cells a pack; by default `max_length`, else `max_tokens`.
        long_rows: with the policy packed, what becomes of rows longer than `max_length` (the capacity, where that is
            less): `"truncate"`, `"split"` into parts that are packed as rows of their own, or `"drop"`.
        longest_first: the epoch's largest step, padding included, changes places with its first, so that what memory
            does not hold is told at once; plans the whole epoch for it. Packs are all of one size.
        pad_to_multiple_of: the width of each batch is a multiple of this, which `max_tokens` counts; the capacity of
            packs must be one too.
        cp_size: with the policy packed, ranks of a context-parallel group, which share `rank`: each row is padded to a
            multiple of `2 * cp_size` cells of its pack.
    """

    batch_size: int | None = None
    max_tokens: int | None = None
    policy: str = "bucketed"
    window: int | None = None
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    max_length: int | None = None
    drop_last: bool = False
    tail: str = "repeat"
    shares: int | None = None
    block: int | None = None
    capacity: int | None = None
    long_rows: str = "truncate"
    longest_first: bool = False
    pad_to_multiple_of: int | None = None
    cp_size: int | None = None

    @property
    def group(self) -> int:
        """Rows (packs) that every rank's batch together hold, or come in multiples of."""
        if self.batch_size is not None:
            return self.batch_size * self.world_size
        assert self.shares is not None
        return self.shares

    @property
    def widest(self) -> int | None:
        """The longest row that a batch of `max_tokens` holds, `None` where nothing bounds it."""
        if self.max_tokens is None:
            return None
        assert self.shares is not None
        widest = self.max_tokens * self.world_size // self.shares
        return widest - widest % (self.pad_to_multiple_of or 1)

    @property
    def row_multiple(self) -> int:
        """What divides the cells of each row of a pack."""
        return 1 if self.cp_size is None else 2 * self.cp_size

    def checked(self) -> PlanOptions:
        """The same with plain integers, and with what follows from the other options filled in; refuses wrong ones.

        Packs come by number: their `max_tokens` becomes a `batch_size`.
        """
        for name, choices in (("policy", POLICIES), ("tail", TAILS), ("long_rows", LONG_ROWS)):
            choice(name, getattr(self, name), choices)
        for name in ("drop_last", "longest_first"):
            value = getattr(self, name)
            if not isinstance(value, (bool, np.bool_, int)) or value not in (0, 1):
                raise InputError(f"{name}={shown(value)}: give True or False")
        world_size = integer("world_size", self.world_size, 1, MOST_RANKS)
        shares = world_size if self.shares is None else self.shares
        shares = integer("shares", shares, -LARGEST, LARGEST)
        if not 1 <= shares <= MOST_RANKS or shares % world_size:
            raise InputError(f"shares={shares}: give a multiple of world_size={world_size}, {MOST_RANKS:,} at most")
        rank = integer("rank", self.rank, -LARGEST, LARGEST)
        if not 0 <= rank < world_size:
            raise InputError(f"rank={rank} of world_size={world_size}: ranks count from 0 to world_size - 1")
        if (self.batch_size is None) == (self.max_tokens is None):
            raise InputError("give either batch_size (rows) or max_tokens (cells, padding included), not both or none")
        sizes: dict[str, Any] = {
            name: None if getattr(self, name) is None else integer(name, getattr(self, name), 1, LARGEST)
            for name in ("batch_size", "max_tokens", "window", "block")
        }
        for name in ("pad_to_multiple_of", "cp_size"):
            value = getattr(self, name)
            sizes[name] = None if value is None else integer(name, value, 1, LARGEST_CAPACITY)
        max_length = None if self.max_length is None else integer("max_length", self.max_length, 1)
        options = replace(
            self, **sizes, max_length=max_length, shares=shares, rank=rank, world_size=world_size,
            seed=integer("seed", self.seed), drop_last=bool(self.drop_last), longest_first=bool(self.longest_first),
        )  # fmt: skip
        if self.policy == "packed":
            return options._with_packs()
        if self.capacity is not None or self.long_rows != "truncate" or self.cp_size is not None:
            raise InputError(
                f"capacity={self.capacity}, long_rows={self.long_rows!r}, cp_size={self.cp_size}: these are for "
                "policy='packed'"
            )
        return options

    def _with_packs(self) -> PlanOptions:
        if self.longest_first:
            raise InputError("longest_first=True with policy='packed': packs are all of one size; leave it out")
        capacity, multiple = self.capacity, math.lcm(self.pad_to_multiple_of or 1, self.row_multiple)
        if capacity is None:
            capacity = self.max_tokens if self.max_length is None else self.max_length
        if capacity is None:
            raise InputError("policy='packed': give capacity (cells a pack), or a max_length to take for it")
        capacity = integer("capacity", capacity, 1, LARGEST_CAPACITY)
        if capacity % multiple:
            raise InputError(
                f"capacity={capacity} is no multiple of {multiple}, which pad_to_multiple_of={self.pad_to_multiple_of} "
                f"and cp_size={self.cp_size} ask for: give capacity={-(-capacity // multiple) * multiple}"
            )
        if self.max_tokens is None:
            return replace(self, capacity=capacity)
        if self.max_tokens < capacity:
            raise InputError(
                f"max_tokens={self.max_tokens} holds no pack of {capacity} cells: raise it, or lower capacity "
                "(or max_length)"
            )
        return replace(self, capacity=capacity, batch_size=self.max_tokens // capacity, max_tokens=None)


def row_numbers(rows: npt.ArrayLike | range, num_rows: int, name: str = "rows") -> range | Int64Array:
    """Row numbers of a store, a range where they are neighbours in order; refuses others than the store has."""
    numbers = np.arange(rows.start, rows.stop, rows.step) if isinstance(rows, range) else np.asarray(rows)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise InputError(f"{name} are {numbers.dtype} of shape {numbers.shape}: give row numbers")
    if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < num_rows:
        raise InputError(
            f"{name} are {numbers.min()} to {numbers.max()}: give row numbers from 0 to {num_rows - 1}, which the "
            "store has"
        )
    numbers = numbers.astype(np.int64)
    if numbers.size and numbers[-1] - numbers[0] == len(numbers) - 1 and bool((np.diff(numbers) == 1).all()):
        return range(int(numbers[0]), int(numbers[-1]) + 1)
    return numbers
