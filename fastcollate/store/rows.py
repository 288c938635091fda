"""Where a store's rows lie in memory: the table that kernels read them by, and the loops that find a row in it.

A **table** describes the memory that rows are read from: int64 `(num_shards, TABLE_COLUMNS)`, a shard a line, its
columns named below. It holds addresses, so that one call reads from any number of shards; whoever builds it keeps
the arrays alive. Shards may come from files, so every row's offsets are checked before they are followed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastcollate.jit import part, view

_TABLE = range(10)
FIRST_ROW, NUM_ROWS, TOKENS, NUM_TOKENS, TOKEN_SIZE, OFFSETS, SPANS, NUM_SPANS, SPAN_SIZE, SPAN_OFFSETS = _TABLE
TABLE_COLUMNS = len(_TABLE)
READ_BEYOND = 8  # tokens that a fill may read behind a row, where its shard has them


@part
def shard_of(table: Any, row: int, guess: int) -> int:
    """The table's line that holds `row`, or -1; neighbours mostly share a shard, so `guess` is tried first."""
    first = np.int64(table[guess, FIRST_ROW])
    if first <= row < first + table[guess, NUM_ROWS]:
        return guess
    low, high = 0, len(table)
    while high - low > 1:
        middle = (low + high) >> 1
        if table[middle, FIRST_ROW] <= row:
            low = middle
        else:
            high = middle
    if row < table[low, FIRST_ROW] or row >= table[low, FIRST_ROW] + table[low, NUM_ROWS]:
        return -1
    return low


@part
def bounds_of(table: Any, shard: int, row: int, offsets: int = OFFSETS, total: int = NUM_TOKENS) -> tuple[int, int]:
    """First token (or span) and number of them in a row; number -1 where the offsets leave what the shard holds."""
    bounds = view(table[shard, offsets] + 8 * (row - table[shard, FIRST_ROW]), 2, np.int64)
    begin, end = bounds[0], bounds[1]
    if begin < 0 or end < begin or end > table[shard, total]:
        return 0, -1
    return begin, end - begin
