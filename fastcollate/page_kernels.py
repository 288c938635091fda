"""Numba loops that ask the system for pages of memory-mapped files, before somebody waits for them.

A page that is not in memory is read when it is touched, one after another, and each costs a disk's latency. What is
asked for is read at once, while the caller goes on. It is a hint: nothing here reads what it asks for.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastcollate.jit import ask_for, kernel
from fastcollate.kernels import (
    FIRST_ROW,
    NUM_SPANS,
    NUM_TOKENS,
    OFFSETS,
    SPAN_OFFSETS,
    SPAN_SIZE,
    SPANS,
    STRIDE,
    TOKEN_SIZE,
    TOKENS,
    bounds_of,
    shard_of,
)


@kernel
def _ask_for_pages(first: int, last: int, page: int) -> int:
    """Ask for the pages from `first` to `last`, if there are any; how often it asked."""
    if last < first:
        return 0
    ask_for(first * page, (last + 1 - first) * page)
    return 1


@kernel
def _ask_for_stretches(begins: Any, ends: Any, page: int) -> int:
    """Ask for the pages of stretches of memory, each page once where they are in order; how often it asked."""
    asked, first, last = 0, np.int64(0), np.int64(-2)
    for i in range(len(begins)):
        if begins[i] < ends[i]:
            own_first, own_last = begins[i] // page, (ends[i] - 1) // page
            if first <= own_first <= last + 1:
                last = max(last, own_last)
            else:
                asked += _ask_for_pages(first, last, page)
                first, last = own_first, own_last
    return asked + int(_ask_for_pages(first, last, page))


@kernel
def ask_for_items(address: int, size: int, rows: Any, page: int) -> int:
    """Ask for the pages of some items of an array.

    Args:
        address: of the array.
        size: bytes an item.
        rows: the items' numbers, in order.
        page: bytes a page.

    Returns:
        How often it asked.
    """
    begins, ends = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    for i in range(len(rows)):
        begins[i] = address + size * np.int64(rows[i])
        ends[i] = begins[i] + size
    return int(_ask_for_stretches(begins, ends, page))


@kernel
def _ask_for_lists(
    table: Any, shards: Any, rows: Any, offsets: int, total: int, items: int, item_size: int, page: int
) -> int:
    """Ask for rows' offsets into a column, then, by these, for their items; how often it asked.

    Args:
        table: see `ask_for_rows`.
        shards: each row's line of the table; -1 where the row does not exist.
        rows: see `ask_for_rows`.
        offsets: the table's column with the offsets' address; and so `total`, `items` and `item_size`.
        page: bytes a page.
    """
    begins, ends = np.zeros((2, len(rows)), np.int64)
    for i in range(len(rows)):
        if shards[i] >= 0:
            begins[i] = table[shards[i], offsets] + 8 * (rows[i] - table[shards[i], FIRST_ROW])
            ends[i] = begins[i] + 16
    asked = _ask_for_stretches(begins, ends, page)
    ends[:] = 0
    for i in range(len(rows)):
        if shards[i] >= 0:
            first, count = bounds_of(table, shards[i], rows[i], offsets, total)
            size = table[shards[i], item_size]
            begins[i] = table[shards[i], items] + size * first
            if count > 0:  # a fill reads a little beyond a row
                ends[i] = begins[i] + size * min(count + STRIDE, table[shards[i], total] - first)
    return int(asked + _ask_for_stretches(begins, ends, page))


@kernel
def ask_for_rows(table: Any, rows: Any, with_spans: bool, page: int) -> int:
    """Ask for the pages of some rows' tokens, and of what tells where they are.

    Rows that do not exist, or whose offsets are broken, are passed over: whoever reads them says so.

    Args:
        table: see `kernels.fill_padded`.
        rows: row numbers, in order.
        with_spans: whether the spans will be read as well.
        page: bytes a page.

    Returns:
        How often it asked.
    """
    shards = np.empty(len(rows), np.int64)
    shard = 0
    for i in range(len(rows)):
        shards[i] = shard_of(table, rows[i], shard)
        shard = max(shards[i], 0)
    asked = _ask_for_lists(table, shards, rows, OFFSETS, NUM_TOKENS, TOKENS, TOKEN_SIZE, page)
    if with_spans:
        asked += _ask_for_lists(table, shards, rows, SPAN_OFFSETS, NUM_SPANS, SPANS, SPAN_SIZE, page)
    return int(asked)
