"""Has the disk read a window's pages of a memory-mapped file at once, before they are touched one by one.

Where they are in memory already, a look at a few of them is all that it costs.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcollate.store import page_kernels

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
    """Ask for some items of a one-dimensional array.

    Args:
        array: C-contiguous; in memory or a memory map.
        rows: the items' numbers, all of which exist, in any order.
    """
    address, size = array.ctypes.data, array.itemsize
    _ask(lambda few: page_kernels.ask_for_items(address, size, few, mmap.PAGESIZE), rows)


def ask_for_rows(table: npt.NDArray[np.int64], rows: Rows, *, with_spans: bool) -> None:
    """Ask for some rows of a store.

    Args:
        table: `Table.array`.
        rows: int64, row numbers in any order.
        with_spans: whether the rows' spans will be read as well.
    """
    _ask(lambda few: page_kernels.ask_for_rows(table, few, with_spans, mmap.PAGESIZE), rows)


def _ask(ask: Callable[[Rows], int], rows: Rows) -> None:
    if len(rows) < FEW:
        return
    start = time.perf_counter()
    asked = ask(np.sort(rows[:: len(rows) // SAMPLE]))
    if time.perf_counter() - start > WARM_S * asked:
        ask(np.sort(rows))
