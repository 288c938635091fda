"""Numba loops that plan: permutations, sorting by length, cutting, dealing to ranks, packing; nothing else.

`plan.py` validates and allocates; see `jit.py` for how they are compiled.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastcollate.jit import kernel

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_27, _30, _31, _32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)
_ROUNDS = 6


@kernel
def mix(key: Any, counter: Any) -> Any:
    """The `counter`-th number of the stream `key` (splitmix64); both uint64, and so is the result."""
    z = key + (counter + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> _30)) * _MIX_1
    z = (z ^ (z >> _27)) * _MIX_2
    return z ^ (z >> _31)


@kernel
def _below(key: Any, counter: Any, bound: Any) -> Any:
    """A number below `bound` (uint64, at most 2**32) of the stream `key`."""
    return ((mix(key, counter) >> _32) * bound) >> _32


@kernel
def shuffle(values: Any, key: Any) -> None:
    """Fisher-Yates in place."""
    for i in range(len(values) - 1, 0, -1):
        j = np.int64(_below(key, np.uint64(i), np.uint64(i + 1)))
        kept = values[i]
        values[i] = values[j]
        values[j] = kept


@kernel
def _permuted(position: Any, size: Any, rows: Any, columns: Any, key: Any) -> Any:
    """Where a keyed bijection on `[0, size)` sends a position.

    A Feistel network over a grid of `rows * columns >= size` cells, walked until it lands below `size`.
    """
    while True:
        left, right = position // columns, position % columns
        for turn in range(_ROUNDS):
            salt = np.uint64(turn) << _32
            if turn & 1:
                right += _below(key, salt | left, columns)
                if right >= columns:
                    right -= columns
            else:
                left += _below(key, salt | right, rows)
                if left >= rows:
                    left -= rows
        position = left * columns + right
        if position < size:
            return position


@kernel
def permuted_rows(first: int, num_rows: int, block: int, key: Any, rotation: int, out: Any) -> None:
    """The rows at positions `first`, `first + 1`, ... of a permutation that moves blocks of neighbouring rows.

    Args:
        first: the first position.
        num_rows: the size of the data set.
        block: rows a block; a last, shorter block stays last.
        key: uint64.
        rotation: where the first block starts, so that the blocks differ from epoch to epoch.
        out: int64, written, a row number a position.
    """
    num_blocks = np.uint64(num_rows // block)
    columns = np.uint64(np.ceil(np.sqrt(np.float64(num_blocks))))
    rows = (num_blocks + columns - np.uint64(1)) // columns if columns else columns
    whole = np.int64(num_blocks) * block
    i = 0
    while i < len(out):
        position = first + i
        if position < whole:
            moved = np.int64(_permuted(np.uint64(position // block), num_blocks, rows, columns, key))
            row = moved * block + position % block
            count = min(block - position % block, len(out) - i)
        else:
            row, count = position, len(out) - i
        row += rotation
        for j in range(count):
            out[i + j] = row + j if row + j < num_rows else row + j - num_rows
        i += count


@kernel
def gather_lengths(lengths: Any, rows: Any, limit: int, out: Any) -> None:
    """Each row's length, at most `limit`."""
    for i in range(len(rows)):
        out[i] = min(np.int64(lengths[rows[i]]), limit)


@kernel
def sort_by_length(rows: Any, lengths: Any, longest: int, sorted_rows: Any, sorted_lengths: Any) -> None:
    """A stable counting sort, shortest first; `lengths` are at most `longest`."""
    starts = np.zeros(longest + 2, np.int64)
    for i in range(len(rows)):
        starts[lengths[i] + 1] += 1
    for length in range(longest + 1):
        starts[length + 1] += starts[length]
    for i in range(len(rows)):
        place = starts[lengths[i]]
        starts[lengths[i]] = place + 1
        sorted_rows[place] = rows[i]
        sorted_lengths[place] = lengths[i]


@kernel
def cut_by_tokens(lengths: Any, budget: int, shares: int, bounds: Any) -> int:
    """Cut rows into groups of at most `budget` cells, padding included, in multiples of `shares` rows.

    Returns:
        The number of groups, whose bounds are written, or `-1 - i` where the row `i` is too long for the budget.
    """
    num_groups = start = widest_row = 0
    bounds[0] = 0
    for i in range(0, len(lengths), shares):
        end = min(i + shares, len(lengths))
        width = widest_row
        for j in range(i, end):
            width = max(width, max(np.int64(lengths[j]), 1))
        if (i + shares - start) * width > budget:
            if i > start:
                num_groups += 1
                bounds[num_groups] = i
                start = i
            width = 1
            for j in range(i, end):
                width = max(width, np.int64(lengths[j]))
                if shares * width > budget:
                    return -1 - j
        widest_row = width
    if len(lengths) > start:
        num_groups += 1
        bounds[num_groups] = len(lengths)
    return num_groups


@kernel
def deal(items: Any, bounds: Any, order: Any, rank: int, world_size: int, out: Any, out_bounds: Any) -> None:
    """One rank's share of each group, the groups in the given order: items `rank`, `rank + world_size`, ..."""
    count = 0
    out_bounds[0] = 0
    for g in range(len(order)):
        for i in range(bounds[order[g]] + rank, bounds[order[g] + 1], world_size):
            out[count] = items[i]
            count += 1
        out_bounds[g + 1] = count


@kernel
def _next_room(words: Any, room: int, capacity: int) -> int:
    """The least room from `room` on that a bin has, or `capacity + 1`; `words` has a bit for each room."""
    index = room >> 5
    word = words[index] >> (room & 31) << (room & 31)
    while word == 0:
        index += 1
        if index == len(words):
            return capacity + 1
        word = words[index]
    room = index << 5
    for half in (16, 8, 4, 2, 1):
        if word & ((1 << half) - 1) == 0:
            word >>= half
            room += half
    return room


@kernel
def pack_best_fit(items: Any, lengths: Any, capacity: int, bin_of: Any) -> int:
    """Best fit decreasing: each item goes to the bin with the least room that still holds it.

    A bin that takes one item of a length is the best fit for the next one too, as long as that fits: so each bin takes
    as many of a length as it holds at once.

    Args:
        items: int64, shortest first; they are packed from the end.
        lengths: each item's length in the same order, in `[0, capacity]`.
        capacity: cells a bin.
        bin_of: int64, written: each item's bin, by the item's number.

    Returns:
        The number of bins.
    """
    heads = np.full(capacity + 1, -1, np.int64)  # by room left: the last bin put there
    below = np.empty(len(items), np.int64)  # by bin: the one put there before it
    words = np.zeros((capacity >> 5) + 1, np.int64)
    num_bins = 0
    end = len(items)
    while end > 0:
        room = length = np.int64(lengths[end - 1])
        first = end - 1
        while first > 0 and lengths[first - 1] == length:
            first -= 1
        while end > first:
            if room <= capacity:  # beyond it: no bin had room for this length, and none has got any since
                room = _next_room(words, room, capacity)
            if room > capacity:
                chosen, left = num_bins, capacity
                num_bins += 1
            else:
                chosen, left = heads[room], room
                heads[room] = below[chosen]
                if heads[room] < 0:
                    words[room >> 5] &= ~(1 << (room & 31))
            count = end - first
            if count * length > left:
                count = left // length
            for i in range(end - count, end):
                bin_of[items[i]] = chosen
            end -= count
            left -= count * length
            below[chosen] = heads[left]
            heads[left] = chosen
            words[left >> 5] |= 1 << (left & 31)
    return num_bins


@kernel
def group_by_bin(bin_of: Any, items: Any, bounds: Any) -> None:
    """Items by bin, in the order of their numbers: bin `b` is `items[bounds[b]:bounds[b + 1]]`; both are written."""
    bounds[:] = 0
    for i in range(len(bin_of)):
        bounds[bin_of[i] + 1] += 1
    for b in range(len(bounds) - 1):
        bounds[b + 1] += bounds[b]
    for i in range(len(bin_of)):
        place = bounds[bin_of[i]]
        bounds[bin_of[i]] = place + 1
        items[place] = i
    for b in range(len(bounds) - 1, 0, -1):  # each bound has moved to its bin's end
        bounds[b] = bounds[b - 1]
    bounds[0] = 0


@kernel
def take_groups(values: Any, bounds: Any, order: Any, out: Any, out_bounds: Any) -> None:
    """Groups of values in another order, end to end."""
    count = 0
    out_bounds[0] = 0
    for g in range(len(order)):
        for i in range(bounds[order[g]], bounds[order[g] + 1]):
            out[count] = values[i]
            count += 1
        out_bounds[g + 1] = count


@kernel
def split_rows(rows: Any, lengths: Any, limit: int, out: Any, out_starts: Any, out_lengths: Any) -> None:
    """Each row as parts of at most `limit` tokens; a row without tokens is one part.

    Args:
        rows: int64, row numbers.
        lengths: each row's length.
        limit: tokens a part.
        out: int64, written: each part's row.
        out_starts: int64, written: each part's first token.
        out_lengths: written: each part's length.
    """
    count = 0
    for i in range(len(rows)):
        for start in range(0, max(np.int64(lengths[i]), 1), limit):
            out[count] = rows[i]
            out_starts[count] = start
            out_lengths[count] = min(np.int64(lengths[i]) - start, limit)
            count += 1
