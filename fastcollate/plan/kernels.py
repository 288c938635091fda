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
_LOW = np.uint64(0xFFFFFFFF)
_FACTOR_1, _FACTOR_2 = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)  # see `_hash`
_12, _15, _20 = np.uint32(12), np.uint32(15), np.uint32(20)
_ROUNDS = 4
_SMALL = 1 << 12
LONGEST = 2**31 - 1  # tokens of a row: more count as so many
_STRETCH = 2048  # positions permuted at once


@kernel
def mix(key: Any, counter: Any) -> Any:
    """The `counter`-th number of the stream `key`; both uint64, and so is the result.

    splitmix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014, with Stafford's mix 13.
    """
    z = key + (counter + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> _30)) * _MIX_1
    z = (z ^ (z >> _27)) * _MIX_2
    return z ^ (z >> _31)


@kernel
def _below(key: Any, counter: Any, bound: Any) -> Any:
    """A number below `bound` (uint64, at most 2**32) of the stream `key`: a product's upper half (Lemire, 2019).

    Without Lemire's rejection: of `n` numbers some come more often, by at most `n` in 2**32.
    """
    return ((mix(key, counter) >> _32) * bound) >> _32


@kernel
def shuffle(values: Any, key: Any) -> None:
    """Fisher-Yates in place (Durstenfeld, 1964)."""
    for i in range(len(values) - 1, 0, -1):
        j = np.int64(_below(key, np.uint64(i), np.uint64(i + 1)))
        kept = values[i]
        values[i] = values[j]
        values[j] = kept


@kernel
def _salts(key: Any) -> Any:
    """Two uint32 numbers for each round, made of a uint64 key."""
    salts = np.empty((_ROUNDS, 2), np.uint32)
    for turn in range(_ROUNDS):
        number = mix(key, np.uint64(turn))
        salts[turn, 0], salts[turn, 1] = np.uint32(number >> _32), np.uint32(number & _LOW)
    return salts


@kernel
def _turn(moved: Any, fixed: Any, size: int, salt: Any, salt_2: Any) -> None:
    """One round: add to each `moved`, modulo `size`, a keyed number that its `fixed` decides; all of them uint32.

    In 32 bits throughout, so that a processor does eight or more at once. Up to `_SMALL` a number is scaled down to
    `size` by its upper 20 bits, whose product fits 32: even to 1 in 256, and done in half the time.
    """
    modulus, bound = np.uint32(size), np.uint64(size)
    if size <= _SMALL:
        for i in range(np.uint64(len(moved))):
            z = _hash(fixed[i], salt, salt_2)
            total = np.uint32(moved[i] + np.uint32(np.uint32(np.uint32(z >> _12) * modulus) >> _20))
            moved[i] = min(total, np.uint32(total - modulus))  # what is below zero wraps around to the top
    else:
        for i in range(np.uint64(len(moved))):
            z = _hash(fixed[i], salt, salt_2)
            total = np.uint32(moved[i] + np.uint32((np.uint64(z) * bound) >> _32))
            moved[i] = min(total, np.uint32(total - modulus))


@kernel
def _hash(value: Any, salt: Any, salt_2: Any) -> Any:
    """A uint32 number that looks random, of a uint32 value and two salts.

    The multipliers and the shift between them are those of Wellons' lowbias32 (2018).
    """
    z = np.uint32(np.uint32(value ^ salt) * _FACTOR_1)
    return np.uint32(np.uint32(np.uint32(z ^ np.uint32(z >> _15)) + salt_2) * _FACTOR_2)


@kernel
def _turns(lefts: Any, rights: Any, rows: int, columns: int, salts: Any) -> None:
    for turn in range(0, _ROUNDS, 2):
        _turn(lefts, rights, rows, salts[turn, 0], salts[turn, 1])
        _turn(rights, lefts, columns, salts[turn + 1, 0], salts[turn + 1, 1])


@kernel
def _cells(first: int, columns: int, lefts: Any, rights: Any) -> None:
    """Row and column, in a grid of so many columns, of the positions `first`, `first + 1`, ..."""
    left, right = first // columns, first % columns
    i = 0
    while i < len(lefts):
        count = min(columns - right, len(lefts) - i)
        own_lefts, own_rights = lefts[i : i + count], rights[i : i + count]
        for j in range(np.uint64(count)):
            own_lefts[j], own_rights[j] = left, right + np.int64(j)
        left, right, i = left + 1, 0, i + count


@kernel
def _join(lefts: Any, rights: Any, columns: int, size: int, out: Any) -> bool:
    """Cells of a grid as numbers; returns whether one of them is not below `size`."""
    beyond = 0
    if out.itemsize == 4:
        factor, end = np.uint32(columns), np.uint32(size)
        for i in range(np.uint64(len(out))):
            narrow = np.uint32(np.uint32(lefts[i] * factor) + rights[i])
            out[i] = narrow
            beyond |= narrow >= end
    else:
        for i in range(np.uint64(len(out))):
            place = np.int64(lefts[i]) * columns + np.int64(rights[i])
            out[i] = place
            beyond |= place >= size
    return beyond != 0


@kernel
def permute(first: int, size: int, key: Any, out: Any) -> None:
    """Where a keyed bijection on `[0, size)` sends the positions `first`, `first + 1`, ...

    A Feistel network over a grid of `rows * columns >= size` cells, walked until it lands below `size`: Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002, their third method. Four rounds, for order, not secrecy.
    The key is uint64, `out` int64 or uint32; the size is at most 2**62, so that a side of the grid fits 31 bits, and at
    most 2**31 where `out` is uint32.
    """
    columns = np.int64(np.ceil(np.sqrt(np.float64(size))))
    rows = (size + columns - 1) // max(columns, 1)
    salts = _salts(key)
    lefts, rights = np.empty(_STRETCH, np.uint32), np.empty(_STRETCH, np.uint32)
    for start in range(0, len(out), _STRETCH):
        count = min(len(out) - start, _STRETCH)
        _cells(first + start, columns, lefts[:count], rights[:count])
        _turns(lefts[:count], rights[:count], rows, columns, salts)
        part = out[start : start + count]
        if _join(lefts[:count], rights[:count], columns, size, part):  # seldom: there are few cells beyond
            for i in range(count):
                while part[i] >= size:
                    _turns(lefts[i : i + 1], rights[i : i + 1], rows, columns, salts)
                    part[i] = np.int64(lefts[i]) * columns + np.int64(rights[i])


@kernel
def permuted_rows(first: int, num_rows: int, block: int, key: Any, rotation: int, out: Any) -> None:
    """The rows at positions `first`, `first + 1`, ... of a permutation that moves blocks of neighbouring rows.

    A last, shorter block stays last; the first one starts at `rotation`, so that the blocks differ from epoch to epoch.
    `out` is int64, or uint32 for less than 2**31 rows.
    """
    if block == 1:
        permute(first, num_rows, key, out)
        for i in range(np.uint64(len(out))):
            row = np.int64(out[i]) + rotation
            out[i] = row if row < num_rows else row - num_rows
        return
    num_blocks = num_rows // block
    first_block = first // block
    last_block = min((first + len(out) + block - 1) // block, num_blocks)
    moved = np.empty(max(last_block - first_block, 0), np.int64)
    permute(first_block, num_blocks, key, moved)
    i = 0
    while i < len(out):
        position = first + i
        if position < num_blocks * block:
            row = moved[position // block - first_block] * block + position % block
            count = min(block - position % block, len(out) - i)
        else:
            row, count = position, len(out) - i
        row += rotation
        for j in range(count):
            out[i + j] = row + j if row + j < num_rows else row + j - num_rows
        i += count


@kernel
def gather_lengths(lengths: Any, rows: Any, limit: int, out: Any) -> None:
    """Each row's length, at most `limit`; -1 where it is negative."""
    for i in range(np.uint64(len(rows))):
        length = np.int64(lengths[np.uint64(rows[i])])  # an unsigned index is not tried for a negative one
        out[i] = max(min(length, limit), -1)


@kernel
def sort_by_length(rows: Any, lengths: Any, longest: int, sorted_rows: Any, sorted_lengths: Any) -> None:
    """A stable counting sort (Seward, 1954), shortest first; `lengths` (any numbers) are 0 to `longest`.

    `sorted_lengths` of size 0 are not written.
    """
    starts = np.zeros(longest + 2, np.int64)
    for i in range(np.uint64(len(rows))):
        starts[np.uint64(lengths[i]) + np.uint64(1)] += 1
    for length in range(longest + 1):
        starts[length + 1] += starts[length]
        if len(sorted_lengths):
            sorted_lengths[starts[length] : starts[length + 1]] = length
    for i in range(np.uint64(len(rows))):
        length = np.uint64(lengths[i])
        place = np.uint64(starts[length])
        starts[length] += 1
        sorted_rows[place] = rows[i]


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
def cut_batches(lengths: Any, budget: int, bounds: Any) -> int:
    """Cut rows into batches of at most `budget` cells, padding included, and of one row where that alone is longer.

    Writes the bounds and returns the number of batches.
    """
    num_batches = start = widest_row = 0
    bounds[0] = 0
    for i in range(len(lengths)):
        width = max(widest_row, max(np.int64(lengths[i]), 1))
        if i > start and (i + 1 - start) * width > budget:
            num_batches += 1
            bounds[num_batches] = start = i
            width = max(np.int64(lengths[i]), 1)
        widest_row = width
    if len(lengths):
        num_batches += 1
        bounds[num_batches] = len(lengths)
    return num_batches


@kernel
def cut_sorted_batches(lengths: Any, budget: int, bounds: Any) -> int:
    """The same of rows that come shortest first: no batch has more rows than the one before."""
    num_batches = start = 0
    bounds[0] = 0
    size = np.int64(len(lengths))
    while start < len(lengths):
        size = min(size, len(lengths) - start)
        while size > 1 and size * max(np.int64(lengths[start + size - 1]), 1) > budget:
            size = min(size - 1, max(budget // max(np.int64(lengths[start]), 1), 1))
        start += size
        num_batches += 1
        bounds[num_batches] = start
    return num_batches


@kernel
def deal(items: Any, bounds: Any, order: Any, rank: int, world_size: int, out: Any, out_bounds: Any) -> None:
    """One rank's share of each group, the groups in the given order: items `rank`, `rank + world_size`, ..."""
    count = 0
    out_bounds[0] = 0
    for g in range(len(order)):
        begin, end = bounds[order[g]] + rank, bounds[order[g] + 1]
        own = out[count : count + max(0, (end - begin + world_size - 1) // world_size)]
        group = items[begin:end]
        for i in range(np.uint64(len(own))):
            own[i] = group[i * np.uint64(world_size)]
        count += len(own)
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
    """Best fit decreasing (Johnson, 1973): each item goes to the bin with the least room that still holds it.

    A bin that takes one item of a length is the best fit for the next one too, as long as that fits: so each bin takes
    as many of a length as it holds at once. Items come shortest first, with their lengths of at most `capacity`, and
    are packed from the end. Writes each item's bin, by the item's number, and returns the number of bins.
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
