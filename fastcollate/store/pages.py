"""Has the disk read a window's pages of a memory-mapped file at once, before they are touched one by one.

A page that is not in memory is read when it is touched, one after another, and each costs a disk's latency. What is
asked for is read at once, while the caller goes on. It is a hint: nothing here reads what it asks for. Where the pages
are in memory already, a look at a few of them is all that it costs.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcollate.jit import ask_for, kernel, part
from fastcollate.store import layout

Rows = npt.NDArray[Any]

FEW = 4096  # rows that are not worth asking for
SAMPLE = 32  # rows asked for first
WARM_S = 3e-6  # an ask takes a third of this where the page is in memory, twice this where a disk has to be told


def expect_single_pages(array: npt.NDArray[Any]) -> None:
    """Tell the system how a memory map is read: reading ahead would fetch most of a large file for one window."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(base, "madvise"):
        base.madvise(mmap.MADV_RANDOM)


def ask_for_items(array: npt.NDArray[Any], rows: Rows) -> None:
    """Ask for some items of a contiguous one-dimensional array, in memory or mapped, by their numbers in any order."""
    address, size = array.ctypes.data, array.itemsize
    _ask(lambda few: ask_for_item_pages(address, size, few, mmap.PAGESIZE), rows)


def ask_for_rows(table: npt.NDArray[np.int64], rows: Rows, *, with_spans: bool) -> None:
    """Ask for some rows of a store (`Table.array`), by their numbers in any order."""
    _ask(lambda few: ask_for_row_pages(table, few, with_spans, mmap.PAGESIZE), rows)


def _ask(ask: Callable[[Rows], int], rows: Rows) -> None:
    if len(rows) < FEW:
        return
    start = time.perf_counter()
    asked = ask(np.sort(rows[:: len(rows) // SAMPLE]))
    if time.perf_counter() - start > WARM_S * asked:
        ask(np.sort(rows))


# --------------------------------------------------------------------------------------------------- the kernels

_NO_PAGES = np.int64(0), np.int64(-2)  # first and last: nothing joins these


@part
def _ask_for_pages(first: int, last: int, page: int) -> int:
    """Ask for the pages from `first` to `last`, if there are any; how often it asked."""
    if last < first:
        return 0
    ask_for(first * page, (last + 1 - first) * page)
    return 1


@part
def _add_stretch(first: int, last: int, begin: int, end: int, page: int) -> tuple[int, int, int]:
    """Join a stretch of memory, not empty, to the pages `first` to `last`, or ask for these where it lies apart.

    Returns how often it asked, and the first and last page that are still to be asked for.
    """
    own_first, own_last = begin // page, (end - 1) // page
    if first <= own_first <= last + 1:
        return 0, first, max(last, own_last)
    return _ask_for_pages(first, last, page), own_first, own_last


@kernel
def ask_for_item_pages(address: int, size: int, rows: Any, page: int) -> int:
    """Ask for the pages of some items of an array, numbered in order, each page once; how often it asked."""
    asked = 0
    first, last = _NO_PAGES
    for i in range(len(rows)):
        begin = address + size * np.int64(rows[i])
        more, first, last = _add_stretch(first, last, begin, begin + size, page)
        asked += more
    return int(asked + _ask_for_pages(first, last, page))


@part
def _ask_for_column(table: Any, rows: Any, offsets: int, total: int, items: int, item_size: int, page: int) -> int:
    """Ask for what rows have in a column, or (`items` is `offsets`) for where that is; how often it asked.

    `offsets`, `total`, `items` and `item_size` are columns of the table, see `layout.py`.
    """
    asked, shard = 0, 0
    first, last = _NO_PAGES
    for i in range(len(rows)):
        shard = layout.shard_of(table, rows[i], max(shard, 0))
        if shard < 0:
            continue
        if items == offsets:
            begin = table[shard, offsets] + 8 * (rows[i] - table[shard, layout.FIRST_ROW])
            end = begin + 16
        else:
            start, count = layout.bounds_of(table, shard, rows[i], offsets, total)
            if count <= 0:
                continue
            size = table[shard, item_size]
            begin = table[shard, items] + size * start
            end = begin + size * min(count + layout.READ_BEYOND, table[shard, total] - start)
        more, first, last = _add_stretch(first, last, begin, end, page)
        asked += more
    return int(asked + _ask_for_pages(first, last, page))


@kernel
def ask_for_row_pages(table: Any, rows: Any, with_spans: bool, page: int) -> int:
    """Ask for the pages of some rows' tokens, and of what tells where they are; how often it asked.

    The row numbers are in order. Rows that do not exist, or whose offsets are broken, are passed over: whoever reads
    them says so.
    """
    offsets, total, size = layout.SPAN_OFFSETS, layout.NUM_SPANS, layout.SPAN_SIZE
    asked = _ask_for_column(table, rows, layout.OFFSETS, layout.NUM_TOKENS, layout.OFFSETS, layout.TOKEN_SIZE, page)
    if with_spans:
        asked += _ask_for_column(table, rows, offsets, total, offsets, size, page)
    asked += _ask_for_column(table, rows, layout.OFFSETS, layout.NUM_TOKENS, layout.TOKENS, layout.TOKEN_SIZE, page)
    if with_spans:
        asked += _ask_for_column(table, rows, offsets, total, layout.SPANS, size, page)
    return int(asked)
