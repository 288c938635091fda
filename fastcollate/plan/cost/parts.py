"""Parts of like cost, one a rank: the largest differencing method, and exchanges that level what it leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastcollate.errors import InputError, integer
from fastcollate.jit import kernel

MOST_RANKS = 1 << 20
_MOST_EXCHANGES = 1 << 24  # times items
_CLOSE = 1e-6  # of the dearest part: nearer to level is not worth the time


@kernel
def _push(heap: Any, size: int, spreads: Any, slot: int) -> int:
    """Add a slot to a heap, the widest spread on top; returns the heap's size."""
    place = size
    while place > 0 and spreads[heap[(place - 1) // 2]] < spreads[slot]:
        heap[place] = heap[(place - 1) // 2]
        place = (place - 1) // 2
    heap[place] = slot
    return size + 1


@kernel
def _pop(heap: Any, size: int, spreads: Any) -> int:
    """Take the top away; the heap is one shorter then."""
    top, last, place = heap[0], heap[size - 1], 0
    while True:
        child = 2 * place + 1
        if child + 1 < size - 1 and spreads[heap[child + 1]] > spreads[heap[child]]:
            child += 1
        if child >= size - 1 or spreads[heap[child]] <= spreads[last]:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = last
    return top  # type: ignore[no-any-return]


@kernel
def _sift(sums: Any, heads: Any, tails: Any, place: int) -> None:
    """Move a part up to where its sum belongs among those before it, the largest first."""
    total, head, tail = sums[place], heads[place], tails[place]
    while place > 0 and sums[place - 1] < total:
        sums[place], heads[place], tails[place] = sums[place - 1], heads[place - 1], tails[place - 1]
        place -= 1
    sums[place], heads[place], tails[place] = total, head, tail


@kernel
def _join(sums: Any, heads: Any, tails: Any, following: Any, one: int, other: int) -> None:
    """Put the largest part of one slot and the smallest of the other together, and so on, into the first."""
    num_parts = sums.shape[1]
    for i in range(num_parts):
        j = num_parts - 1 - i
        sums[one, i] += sums[other, j]
        if heads[one, i] < 0:
            heads[one, i], tails[one, i] = heads[other, j], tails[other, j]
        elif heads[other, j] >= 0:
            following[tails[one, i]] = heads[other, j]
            tails[one, i] = tails[other, j]
    for i in range(1, num_parts):
        _sift(sums[one], heads[one], tails[one], i)


@kernel
def largest_differences(costs: Any, num_parts: int, equal_counts: bool, part_of: Any) -> None:
    """Karmarkar and Karp, "The differencing method of set partitioning", 1982, for several parts (Michiels et al.,
    2003): of what is left the two with the widest spread are put together, the largest part with the smallest.

    `costs` come dearest first; each is a slot of one item and empty parts, which is made when it is needed: at any time
    most of what is left is items, as a slot that has empty parts spreads no less than the next item costs. With equal
    counts the slots are so many neighbours each, an item a part.
    """
    num_items = len(costs)
    most = (num_items + num_parts - 1) // num_parts + 3
    sums = np.zeros((most, num_parts))
    heads = np.full((most, num_parts), -1, np.int64)
    tails = np.full((most, num_parts), -1, np.int64)
    following = np.full(num_items, -1, np.int64)
    spreads = np.zeros(most)
    heap, free = np.empty(most, np.int64), np.arange(most)
    size, num_used, item = 0, 0, 0
    if equal_counts:
        while item < num_items:
            slot, num_used = free[num_used], num_used + 1
            for part in range(min(num_parts, num_items - item)):
                sums[slot, part] = costs[item]
                heads[slot, part] = tails[slot, part] = item
                item += 1
            spreads[slot] = sums[slot, 0] - sums[slot, num_parts - 1]
            size = _push(heap, size, spreads, slot)
    while size + num_items - item > 1 or item < num_items:
        if size > 0 and (item == num_items or spreads[heap[0]] >= costs[item]):
            one = _pop(heap, size, spreads)
            size -= 1
        else:
            one, num_used = free[num_used], num_used + 1
            sums[one], heads[one], tails[one] = 0.0, -1, -1
            sums[one, 0] = costs[item]
            heads[one, 0] = tails[one, 0] = item
            item += 1
        if size > 0 and (item == num_items or spreads[heap[0]] >= costs[item]):
            other = _pop(heap, size, spreads)
            size -= 1
            _join(sums, heads, tails, following, one, other)
            num_used -= 1
            free[num_used] = other
        elif item < num_items:
            last = num_parts - 1
            sums[one, last] += costs[item]
            if heads[one, last] < 0:
                heads[one, last] = item
            else:
                following[tails[one, last]] = item
            tails[one, last] = item
            _sift(sums[one], heads[one], tails[one], last)
            item += 1
        spreads[one] = sums[one, 0] - sums[one, num_parts - 1]
        size = _push(heap, size, spreads, one)
    for part in range(num_parts if size else 0):
        i = heads[heap[0], part]
        while i >= 0:
            part_of[i] = part
            i = following[i]


@kernel
def exchange(costs: Any, num_parts: int, equal_counts: bool, part_of: Any) -> None:
    """Let the dearest part and the cheapest change what levels them best, an item for an item or (where counts may
    differ) for none, until nothing does. The dearest part only gets cheaper. `costs` come dearest first."""
    sums = np.zeros(num_parts)
    for i in range(len(costs)):
        sums[part_of[i]] += costs[i]
    few = np.empty(len(costs) + 1, np.int64)  # of the cheapest part
    for _ in range(_MOST_EXCHANGES // (len(costs) + 1) + 1):
        high, low = sums.argmax(), sums.argmin()
        gap = sums[high] - sums[low]
        if gap <= _CLOSE * sums[high]:
            return
        num_few = 0
        for i in range(len(costs)):
            if part_of[i] == low:
                few[num_few] = i
                num_few += 1
        best, given, taken, j = gap / 2, -1, -1, 0  # how far from level
        for i in range(len(costs)):
            if part_of[i] == high:
                while j < num_few and costs[i] - costs[few[j]] < gap / 2:
                    j += 1
                for other in range(max(j - 1, 0), min(j + 1, num_few)):
                    off = abs(costs[i] - costs[few[other]] - gap / 2)
                    if off < best:
                        best, given, taken = off, i, few[other]
                if not equal_counts and abs(costs[i] - gap / 2) < best:
                    best, given, taken = abs(costs[i] - gap / 2), i, -1
        if given < 0:
            return
        part_of[given] = low
        moved = costs[given]
        if taken >= 0:
            part_of[taken] = high
            moved -= costs[taken]
        sums[high] -= moved
        sums[low] += moved


def balance(costs: npt.ArrayLike, num_ranks: int, *, equal_counts: bool = False) -> npt.NDArray[np.int64]:
    """Deal items to ranks so that all have as much to do, such as the sequences of an RL step by what each costs.

    By the largest differencing method (Karmarkar and Karp, 1982); then the dearest rank and the cheapest exchange items
    while that helps.

    Args:
        costs: what each item costs, numbers of at least 0 `(num_items,)`, such as `24576 * lengths + lengths**2`.
        num_ranks: number of ranks.
        equal_counts: give each rank as many items, or one more.

    Returns:
        Each item's rank, int64 `(num_items,)`.

    Raises:
        InputError: the costs are not finite numbers of at least 0, or there is no rank.

    Example:
        >>> from fastcollate import balance
        >>> balance([8, 7, 6, 5, 4], num_ranks=2)  # 15 each
        array([1, 1, 0, 0, 0])
        >>> balance([9, 1, 1, 1], num_ranks=2, equal_counts=True)
        array([0, 1, 1, 0])
    """
    num_ranks = integer("num_ranks", num_ranks, 1, MOST_RANKS)
    given = np.asarray(costs)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iuf"):
        raise InputError(f"costs are {given.dtype} of shape {given.shape}: give one number of at least 0 an item")
    each = given.astype(np.float64)
    if not (np.isfinite(each) & (each >= 0)).all():
        place = int(np.flatnonzero(~(np.isfinite(each) & (each >= 0)))[0])
        raise InputError(f"costs[{place}]={each[place]}: give finite numbers of at least 0")
    order = np.argsort(-each, kind="stable")
    dealt = np.empty(len(each), np.int64)
    largest_differences(each[order], num_ranks, bool(equal_counts), dealt)
    exchange(each[order], num_ranks, bool(equal_counts), dealt)
    ranks = np.empty(len(each), np.int64)
    ranks[order] = dealt
    return ranks
