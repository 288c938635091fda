"""A consumer that computes without the GIL, and what it waits; imports nothing of fastcollate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any

from numba import njit


@njit(nogil=True)
def spin(turns: int) -> float:
    """Busy without the GIL."""
    value = 1.0
    for turn in range(turns):
        value = value * 1.0000001 + 1e-9 * (turn & 3)
    return value


def turns_per_us() -> float:
    """How far the spin counts in a microsecond; the median of several, on a machine that is otherwise idle."""
    spin(10)
    rates = []
    for _ in range(9):
        start = time.perf_counter()
        spin(2_000_000)
        rates.append(2.0 / (time.perf_counter() - start))
    return statistics.median(rates)


def stalls(source: Iterable[Any], steps: int, turns: int) -> tuple[float, list[float], float]:
    """Seconds for the first batch, for each later one, and for a step's computing on average."""
    batches = iter(source)
    start = time.perf_counter()
    batch = next(batches)
    first = time.perf_counter() - start
    waits, computed = [], 0.0
    for _ in range(steps):
        start = time.perf_counter()
        spin(turns)
        computed += time.perf_counter() - start
        start = time.perf_counter()
        batch = next(batches)  # noqa: F841  # the last batch is kept meanwhile, as a loop's variable does
        waits.append(time.perf_counter() - start)
    return first, waits, computed / steps
