"""Numba loops that cut documents into packs without padding; `pack.py` allocates."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastcollate.jit import kernel, part
from fastcollate.store import layout


@kernel
def cut_stream(lengths: Any, sizes: Any, items: Any, slices: Any, bounds: Any) -> int:
    """Cut documents, one behind the other, into packs of so many tokens each, all of them together.

    Writes the parts (a document, and a slice of it) and the packs' bounds; returns the number of parts.
    """
    count = pack = left = 0
    bounds[0] = 0
    if len(sizes) > 0:
        left = sizes[0]
    for i in range(len(lengths)):
        first, length = np.int64(0), np.int64(lengths[i])
        while first < length:
            while left == 0:
                pack += 1
                bounds[pack] = count
                left = sizes[pack]
            own = min(left, length - first)
            items[count], slices[count] = i, first | own << layout.COUNT_AT
            first, left, count = first + own, left - own, count + 1
    bounds[pack + 1 :] = count
    return count


@part
def _longest_within(words: Any, room: int) -> int:
    """The largest number up to `room` whose bit is set, or 0; `words` has 32 bits an item."""
    index = room >> 5
    word = words[index] & ((2 << (room & 31)) - 1)
    while word == 0:
        if index == 0:
            return 0
        index -= 1
        word = words[index]
    found = index << 5
    for half in (16, 8, 4, 2, 1):
        if word >> half:
            word >>= half
            found += half
    return found


@kernel
def crop_best_fit(order: Any, ends: Any, capacity: int, items: Any, slices: Any, bounds: Any) -> tuple[int, int]:
    """Fill packs: always the longest document that fits, and where none does, the head of the shortest one left.

    Args:
        order: documents of one token or more, shortest first, those beyond the capacity in any order.
        ends: int64 `(capacity + 2,)`: where those of each length end in `order`; the last one counts all longer ones.
        capacity: tokens a pack.
        items: int64, as many as `order`.
        slices: int64, of the same size: 0 for a whole document.
        bounds: int64, one more.

    Returns:
        The numbers of parts and of packs.
    """
    words = np.zeros((capacity >> 5) + 1, np.int64)
    taken = np.zeros(len(ends), np.int64)  # by length: those before this place in `order` are packed
    for length in range(1, len(ends)):
        taken[length] = ends[length - 1]
        if length <= capacity and ends[length] > ends[length - 1]:
            words[length >> 5] |= 1 << (length & 31)
    count = packs = 0
    shortest = 1
    bounds[0] = 0
    while count < len(order):
        room = capacity
        while room > 0 and count < len(order):
            length = _longest_within(words, room)
            own, piece = 1, np.int64(0)
            if length > 0:
                own = min(room // length, ends[length] - taken[length])
                room -= own * length
            else:
                while taken[shortest] == ends[shortest]:
                    shortest += 1
                length, piece, room = shortest, room << layout.COUNT_AT | layout.LOST, 0
            for _ in range(own):
                items[count], slices[count] = order[taken[length]], piece
                taken[length] += 1
                count += 1
            if length <= capacity and taken[length] == ends[length]:
                words[length >> 5] &= ~(1 << (length & 31))
        packs += 1
        bounds[packs] = count
    return count, packs
