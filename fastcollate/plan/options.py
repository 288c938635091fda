"""What a plan may be told: each option is declared, explained and checked here, and nowhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from fastcollate.errors import LARGEST, LARGEST_CAPACITY, InputError, choice, integer, shown
from fastcollate.plan.cost.deal import Cost, cost_name

Int64Array = npt.NDArray[np.int64]

ORDERS = ("rows", "shards")
POLICIES = ("sequential", "shuffled", "bucketed", "packed")
TAILS = ("repeat", "uneven")
LONG_ROWS = ("truncate", "split", "drop")
PACKINGS = ("best_fit", "concatenate", "crop")
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
    balance: bool | None
    accumulation: int
    cost: Cost
    packing: str
    order: str
    nodes: int
    stride: int | None


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
            262,144 rows, which is what packed takes, and whatever is balanced by cost.
        seed: with the epoch it decides every random choice.
        rank: which of `world_size` shares to plan. All ranks get the same number of batches and, in each step, rows
            of similar length, or of similar cost (`balance`). A step's rows depend on `batch_size * world_size` only.
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
        balance: deal by cost, so that the ranks of a step finish together. With the policy packed, each `batch_size *
            world_size * accumulation` packs that cost alike make an optimizer step, however many ranks share it; with
            `max_tokens` (bucketed or shuffled) each `world_size * accumulation` batches. By default where that product
            of ranks and accumulation is more than 1 and no `shares` are given; a loaded state brings its own.
        accumulation: batches of a rank that make an optimizer step, whose costs count together where `balance` is.
        cost: what a row of `n` tokens costs: `cost * n + n * n` for an integer, 6 times the model's width (by default
            6 * 4,096, as in models of 7B; GPT-2's is 4,608), or a function from an int64 array of lengths to costs.
            Packs cost what their rows do, padded batches their rows times the longest's cost.
        packing: how the policy packed fills packs: `"best_fit"` with whole rows; or, as documents are, without padding:
            `"concatenate"` lays a window's rows end to end and cuts where a pack is full, so that no token is lost or
            repeated (the last packs of a window share what is left); `"crop"` begins each pack with the start of a row,
            takes the longest row that fits, and where none does, the head of the shortest, whose rest is left out.
        order: `"rows"`, or `"shards"` for stores in object storage: each shard is read once an epoch. Shards come in a
            random order, and the rows of eight at a time (of as many as have 262,144 rows, if that is more) are mixed.
        nodes: with `order="shards"`, so many parts of the store, a part for the ranks of each node: a node reads the
            same shards in each epoch, and no others. Each step has as many rows of each part. Say it once, also where
            a run goes on with other ranks: those of a part are `world_size / nodes` neighbours.
        stride: with `long_rows="split"`, parts begin so many tokens apart and overlap; what an earlier part has trained
            is context in the next, no target: a sliding window, for evaluation.
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
    balance: bool | None = None
    accumulation: int = 1
    cost: Cost = 6 * 4096
    packing: str = "best_fit"
    order: str = "rows"
    nodes: int = 1
    stride: int | None = None

    @property
    def batches_a_step(self) -> int:
        """Batches of a rank that are planned together: those of an optimizer step where they are balanced, else one."""
        return self.accumulation if self.balance else 1

    @property
    def group(self) -> int:
        """Rows (packs) that every rank's batches of a step together hold, or come in multiples of."""
        if self.batch_size is not None:
            return self.batch_size * self.world_size * self.batches_a_step
        assert self.shares is not None
        return self.shares

    @property
    def part_group(self) -> int:
        """The same of one node's part."""
        return self.group // self.nodes

    @property
    def part_ranks(self) -> int:
        """Ranks that share a node's part."""
        return max(self.world_size // self.nodes, 1)

    @property
    def widest(self) -> int | None:
        """The longest row that a batch of `max_tokens` holds, `None` where nothing bounds it."""
        if self.max_tokens is None:
            return None
        assert self.shares is not None
        widest = self.max_tokens * self.world_size * self.batches_a_step // self.shares
        return widest - widest % (self.pad_to_multiple_of or 1)

    @property
    def row_multiple(self) -> int:
        """What divides the cells of each row of a pack."""
        return 1 if self.cp_size is None else 2 * self.cp_size

    def evened(self, count: int) -> int:
        """So many batches of a row each in a node's part, after the tail policy has made them right for all ranks."""
        if self.drop_last:
            return count - count % self.part_group
        return count + -count % self.part_ranks if self.tail == "repeat" else count

    def too_long(self, row: int, length: int) -> InputError:
        """Why a row stands in no batch of `max_tokens`."""
        shares = f" (of rows in multiples of shares={self.shares})" if self.shares != self.world_size else ""
        multiple = self.pad_to_multiple_of
        padded = f" (padded to a multiple of {multiple})" if multiple else ""
        return InputError(
            f"row {row} has {length} tokens{padded}, more than max_tokens={self.max_tokens} allows a batch"
            f"{'' if self.balance else shares}; raise max_tokens, or give a max_length that cuts such rows"
        )

    def plain(self) -> dict[str, Any]:
        """The checked options as numbers and strings, for a saved state."""
        longest = self.capacity or self.widest or LARGEST
        return {**{name: getattr(self, name) for name in self.__slots__}, "cost": cost_name(self.cost, longest)}

    def checked(self) -> PlanOptions:
        """The same with plain integers, and with what follows from the other options filled in; refuses wrong ones.

        Packs come by number: their `max_tokens` becomes a `batch_size`.
        """
        words = {"policy": POLICIES, "tail": TAILS, "long_rows": LONG_ROWS, "packing": PACKINGS, "order": ORDERS}
        for name, choices in words.items():
            choice(name, getattr(self, name), choices)
        for name in ("drop_last", "longest_first"):
            value = getattr(self, name)
            if not isinstance(value, (bool, np.bool_, int)) or value not in (0, 1):
                raise InputError(f"{name}={shown(value)}: give True or False")
        world_size = integer("world_size", self.world_size, 1, MOST_RANKS)
        accumulation = integer("accumulation", self.accumulation, 1, MOST_RANKS)
        balance = self._balance(world_size * accumulation)
        shares = self.shares
        if shares is None:
            shares = world_size * accumulation if balance and self.policy != "packed" else world_size
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
            balance=balance, accumulation=accumulation, nodes=integer("nodes", self.nodes, 1, MOST_RANKS),
            cost=self.cost if callable(self.cost) else integer("cost", self.cost, 0, 1 << 32),
        )  # fmt: skip
        if self.policy == "packed":
            options = options._with_packs()
        if options.nodes > 1:
            options._check_nodes()
        if self.policy == "packed":
            return options
        usual = {"capacity": None, "long_rows": "truncate", "cp_size": None, "packing": "best_fit", "stride": None}
        asked = {name: getattr(self, name) for name in usual}  # of any type, an array's too
        given = [
            f"{name}={value!r:.80}"
            for name, value in asked.items()
            if not (isinstance(value, type(usual[name])) and value == usual[name])
        ]
        if given:
            raise InputError(f"{', '.join(given)}: for policy='packed' only")
        return options

    def _balance(self, batches: int) -> bool:
        """Whether what is dealt is balanced, of so many batches of all ranks in a step."""
        packed = self.policy == "packed"
        can = packed or (self.max_tokens is not None and self.policy != "sequential")
        if self.balance is None:
            return can and batches > 1 and (packed or self.shares is None)
        if not isinstance(self.balance, (bool, np.bool_, int)) or self.balance not in (0, 1):
            raise InputError(f"balance={shown(self.balance)}: give True or False, or leave it out")
        if self.balance and not can:
            raise InputError(
                f"balance=True with policy={self.policy!r}, max_tokens={self.max_tokens}: packs (policy='packed') or "
                "batches of max_tokens (bucketed or shuffled) are dealt by cost; leave it out"
            )
        if self.balance and not packed and self.shares not in (None, batches):
            raise InputError(
                f"balance=True, shares={self.shares}: batches are dealt one by one, so shares is world_size * "
                f"accumulation, {batches} here; leave it out"
            )
        return bool(self.balance)

    def _check_nodes(self) -> None:
        if self.order != "shards" or self.policy == "sequential":
            raise InputError(
                f"nodes={self.nodes} with order={self.order!r}, policy={self.policy!r}: parts are of shards; give "
                "order='shards' and another policy than sequential, or leave it out"
            )
        if self.tail != "repeat" or self.packing != "best_fit":
            raise InputError(
                f"nodes={self.nodes} with tail={self.tail!r}, packing={self.packing!r}: all parts have as "
                "many batches, for which rows may repeat; leave nodes out, or give tail='repeat' and packing='best_fit'"
            )
        small, large = sorted((self.nodes, self.world_size))
        if large % small or self.group % self.nodes:
            raise InputError(
                f"nodes={self.nodes} with world_size={self.world_size} and {self.group} rows (or packs, or batches) a "
                "step of all ranks: each part takes as many of both; give a number of nodes that divides them"
            )

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
        longest = min(self.max_length or capacity, capacity)
        if self.stride is not None and (
            self.long_rows != "split" or integer("stride", self.stride, 1, LARGEST) > longest
        ):
            raise InputError(
                f"stride={self.stride} with long_rows={self.long_rows!r}: parts of {longest} tokens begin so far "
                f"apart; give long_rows='split', and at most {longest}"
            )
        asked = self.long_rows != "truncate" or self.cp_size is not None
        if self.packing != "best_fit" and (asked or (self.max_length or capacity) < capacity):
            raise InputError(
                f"packing={self.packing!r} with long_rows={self.long_rows!r}, cp_size={self.cp_size}, "
                f"max_length={self.max_length}: rows are cut where a pack of {capacity} cells ends, and nowhere else; "
                "leave these out"
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


def as_lengths(lengths: npt.ArrayLike) -> npt.NDArray[Any]:
    """Lengths as an array; refuses what is not one integer a row."""
    array = np.asarray(lengths)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise InputError(f"lengths are {array.dtype} of shape {array.shape}: give one integer a row")
    return array if array.size else np.zeros(0, np.int64)
