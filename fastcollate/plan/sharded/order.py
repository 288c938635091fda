"""An order that reads each shard once an epoch: shards are shuffled, and the rows of several are mixed at a time.

The shards of an epoch come in an order of its own. As many as make `MIXED_SHARDS`, and `MIXED_ROWS` rows (`FIRST_ROWS`
in the first), are a group; a keyed bijection (see `kernels.permute`) spreads a group's rows over its places, and
windows are cut from the groups, one after another. The shards of each source of a mix come evenly over the epoch, so
that each group has its share.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcollate.errors import InputError
from fastcollate.plan import kernels as plan_kernels
from fastcollate.plan.options import Int64Array, PlanOptions

Rows = range | npt.NDArray[np.int64]

MIXED_SHARDS = 8
MIXED_ROWS = 1 << 18
FIRST_ROWS = 1 << 16  # of the first group, so that many small shards keep nobody waiting for the first batch
_NO_EPOCH = (1 << 64) - 1  # what is the same in each


class Stretches(NamedTuple):
    """Neighbouring rows of one shard each, int64 `(num_stretches,)`: the first, how many, and the source of a mix."""

    firsts: Int64Array
    sizes: Int64Array
    sources: Int64Array


class Shards(NamedTuple):
    """Where shards begin among an epoch's rows, which are in the store's order.

    Attributes:
        starts: int64 `(num_shards + 1,)`, the first place of each shard, then the number of rows.
        sources: int64 `(num_shards,)`, the source of a mix that each is of; 0 of one store.
    """

    starts: Int64Array
    sources: Int64Array

    @property
    def firsts(self) -> Int64Array:
        """The first place of each shard."""
        return self.starts[:-1]

    @property
    def sizes(self) -> Int64Array:
        """The rows of each shard."""
        return np.diff(self.starts)

    def of_rows(self, rows: Rows) -> Shards:
        """The same of some rows, in order."""
        if isinstance(rows, range):
            return self._replace(starts=np.clip(self.starts, rows.start, rows.stop) - rows.start)
        return self._replace(starts=np.searchsorted(rows, self.starts).astype(np.int64))


def shards_of(source: Any) -> Shards:
    """The shards of a store or a mix, as its manifest counts them."""
    stores = [part.store for part in getattr(source, "_sources", ())] or [source]
    if not all(hasattr(store, "manifest") for store in stores):
        raise InputError("order='shards' is for rows of a store: lengths alone do not say which shards they lie in")
    sizes = [[entry["num_rows"] for entry in store.manifest["shards"]] for store in stores]
    sources = np.repeat(np.arange(len(sizes)), list(map(len, sizes)))
    return Shards(np.cumsum([0, *(size for part in sizes for size in part)], dtype=np.int64), sources)


def key_of(seed: int, *purpose: int) -> np.uint64:
    """The key of a stream of random numbers, by a seed and what they are for."""
    key: np.uint64 = np.uint64(seed & 0xFFFFFFFFFFFFFFFF)
    with np.errstate(over="ignore"):  # uint64 arithmetic wraps, and plain Python mode would warn of it
        for part in purpose:
            key = np.uint64(plan_kernels.mix(key, np.uint64(part)))
    return key


def by_shard(source: Any, rows: Rows, options: PlanOptions) -> tuple[Rows, Shards | None]:
    """An epoch's rows in the store's order, and its shards among them, where the options ask for an order by these."""
    if options.order == "rows":
        return rows, None
    if getattr(source, "schedule", None) is not None:
        raise InputError("order='shards' with a MixedStore by step_rows, which says each step's rows: leave one out")
    rows = rows if isinstance(rows, range) else np.sort(rows)
    return rows, shards_of(source).of_rows(rows)


class ShardOrder:
    """The rows of an epoch by their place in it.

    Args:
        shards: the shards, in the store's order, or parts of them.
        key: decides the order.

    Example:
        >>> shards = Shards(np.array([0, 3, 5]), np.array([0, 0]))
        >>> ShardOrder(shards, np.uint64(5)).rows(0, 5)
        array([3, 0, 1, 2, 4])
    """

    def __init__(self, shards: Shards | Stretches, key: np.uint64) -> None:
        sizes = shards.sizes
        with np.errstate(over="ignore"):  # uint64 arithmetic wraps, and plain Python mode would warn of it
            order = _spread(sizes, shards.sources, key)
        order = order[sizes[order] > 0]
        self._key = key
        self._ends = np.cumsum(sizes[order])  # of each shard, in the epoch
        self._shifts = shards.firsts[order] - (self._ends - sizes[order])  # from the place to the row
        self._groups = _groups(self._ends)

    @property
    def num_places(self) -> int:
        """Rows in the epoch."""
        return int(self._groups[-1])

    def rows(self, first: int, count: int) -> Int64Array:
        """The rows at the places `first` to `first + count`, int64."""
        rows = np.empty(count, np.int64)
        group = int(np.searchsorted(self._groups, first, side="right")) - 1
        done = 0
        with np.errstate(over="ignore"):
            while done < count:
                start, stop = self._groups[group : group + 2].tolist()
                own = rows[done : done + stop - (first + done)]
                key = plan_kernels.mix(self._key, np.uint64(group))
                plan_kernels.permute(first + done - start, stop - start, np.uint64(key), own)
                own += start
                own += self._shifts[np.searchsorted(self._ends, own, side="right")]
                done, group = done + len(own), group + 1
        return rows


class NodesOrder:
    """The same of several nodes: each has a part of the shards, of as many rows as any other, in an order of its own.

    The rows at some places are those of the first part, then as many of the second, and so on.

    Args:
        shards: the shards, in the store's order.
        num_parts: parts, which divides the places that are asked for.
        parts_key: decides the parts.
        key: decides the order within each.
    """

    def __init__(self, shards: Shards, num_parts: int, parts_key: np.uint64, key: np.uint64) -> None:
        parts = enumerate(parts_of(shards, num_parts, parts_key))
        self._orders = [ShardOrder(part, key_of(int(key), number)) for number, part in parts]

    @property
    def num_places(self) -> int:
        """Rows in the epoch, those that are repeated for parts of one size among them."""
        return len(self._orders) * self._orders[0].num_places

    def rows(self, first: int, count: int) -> Int64Array:
        """The rows at the places `first` to `first + count`, int64."""
        num_parts = len(self._orders)
        return np.concatenate([order.rows(first // num_parts, count // num_parts) for order in self._orders])


def parts_of(shards: Shards, num_parts: int, key: np.uint64) -> list[Stretches]:
    """Parts of as many rows each: whole shards, but for those at the ends; one that is a row short repeats one.

    Example:
        >>> shards = Shards(np.array([0, 4, 5, 9]), np.array([0, 0, 0]))
        >>> [(part.firsts.tolist(), part.sizes.tolist()) for part in parts_of(shards, 2, np.uint64(5))]
        [([5, 5], [4, 1]), ([4, 0], [1, 4])]
    """
    sizes = shards.sizes
    order = _spread(sizes, shards.sources, key)
    ends = np.cumsum(sizes[order])
    begins, total = ends - sizes[order], int(sizes.sum())
    if total < num_parts:
        raise InputError(f"nodes={num_parts}: there are {total} rows; give fewer nodes")
    bounds = np.arange(num_parts + 1) * total // num_parts
    most, parts = int(np.diff(bounds).max()), []
    for begin, end in itertools.pairwise(bounds.tolist()):
        own = np.flatnonzero((ends > begin) & (begins < end))
        from_, to = np.maximum(begins[own], begin), np.minimum(ends[own], end)
        chosen = order[own]
        part = Stretches(shards.firsts[chosen] + from_ - begins[own], to - from_, shards.sources[chosen])
        if end - begin < most:
            one = Stretches(part.firsts[:1], np.ones(1, np.int64), part.sources[:1])
            part = Stretches(*(np.append(*columns) for columns in zip(part, one, strict=True)))
        parts.append(part)
    return parts


def order_of(shards: Shards | None, options: PlanOptions, key: np.uint64) -> ShardOrder | NodesOrder | None:
    """The order that the options ask for, `None` where it is of rows."""
    if options.order == "rows" or options.policy == "sequential":
        return None
    if shards is None:
        raise InputError("order='shards' is for BatchLoader and BucketBatchSampler: plan_epoch knows lengths alone")
    if options.nodes > 1:
        return NodesOrder(shards, options.nodes, key_of(options.seed, _NO_EPOCH), key)
    return ShardOrder(shards, key)


def _spread(sizes: Int64Array, sources: Int64Array, key: np.uint64) -> Int64Array:
    """Shards in a random order, those of each source evenly over the epoch."""
    order = np.arange(len(sizes))
    with np.errstate(over="ignore"):
        plan_kernels.shuffle(order, key)
    places = np.empty(len(sizes))
    for source in np.unique(sources).tolist():
        own = order[sources[order] == source]
        ends = np.cumsum(sizes[own])
        places[own] = (ends - sizes[own] / 2) / max(int(ends[-1]), 1)
    found: Int64Array = order[np.argsort(places[order], kind="stable")]
    return found


def _groups(ends: Int64Array) -> Int64Array:
    """The first place of each group, then the number of rows; the last may have fewer shards."""
    bounds = [0]
    shards = 0
    for end in ends.tolist():
        shards += 1
        least = MIXED_ROWS if len(bounds) > 1 else min(FIRST_ROWS, MIXED_ROWS)
        if shards >= MIXED_SHARDS and end - bounds[-1] >= least:
            bounds.append(end)
            shards = 0
    total = int(ends[-1]) if len(ends) else 0
    if bounds[-1] < total:
        bounds.append(total)
    return np.array(bounds, np.int64)
