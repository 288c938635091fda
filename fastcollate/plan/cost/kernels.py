"""Numba loops of what batches cost and how steps are dealt; `deal.py` allocates."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastcollate.jit import kernel
from fastcollate.plan.kernels import LONGEST
from fastcollate.store import layout


@kernel
def pack_costs(lengths: Any, rows: Any, starts: Any, bounds: Any, limit: int, linear: int, costs: Any) -> None:
    """Each pack's sum of `linear * L + L**2` over its rows, or parts of rows, of at most `limit` tokens."""
    for pack in range(len(costs)):
        total = 0.0
        for i in range(bounds[pack], bounds[pack + 1]):
            length = min(np.int64(lengths[np.uint64(rows[i])]), LONGEST)
            if len(starts):
                most = starts[i] >> layout.COUNT_AT & layout.MOST_TOKENS
                length -= starts[i] & layout.FIRST_TOKEN
                if most > 0:
                    length = min(length, most)
            exact = np.float64(min(length, limit))
            total += exact * exact + linear * exact
        costs[pack] = total


@kernel
def group_sums(values: Any, bounds: Any, sums: Any) -> None:
    """Each group's sum, added up in order."""
    for group in range(len(sums)):
        total = 0.0
        for i in range(bounds[group], bounds[group + 1]):
            total += values[i]
        sums[group] = total


@kernel
def turn(items: Any, shifts: Any, out: Any) -> None:
    """Each step's rounds of items, `(num_steps, num_rounds, world_size)`, by so many places to the left."""
    size = items.shape[2]
    for step in range(len(items)):
        shift = shifts[step]
        for i in range(items.shape[1]):
            out[step, i, : size - shift] = items[step, i, shift:]
            out[step, i, size - shift :] = items[step, i, :shift]
