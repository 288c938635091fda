"""Numba loops that turn exact shares of steps into whole rows; `schedule.py` validates and allocates."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastcollate.jit import kernel, part
from fastcollate.plan.kernels import mix, shuffle

_NOISE = 1e-6  # of sums: what lacks no more than this is there
_NEVER = 1 << 62


@part
def _share(lines: Any, shares: Any, line: int, step: int, source: int) -> float:
    """Exact rows of a source in a step: linear between the line and the next one, constant behind the last."""
    first = shares[line, source]
    if line + 1 == len(lines):
        return float(first)
    done = np.float64(step - lines[line]) / np.float64(lines[line + 1] - lines[line])
    return float(first + (shares[line + 1, source] - first) * done)


@part
def _sum_of_shares(lines: Any, shares: Any, line: int, step: int, count: int, source: int) -> float:
    """Exact rows of a source in `count` steps from `step` on, all of them before the next line."""
    ends = _share(lines, shares, line, step, source) + _share(lines, shares, line, step + count - 1, source)
    return float(np.float64(count) * ends / 2)


@part
def _steps_until(lines: Any, shares: Any, line: int, step: int, source: int, need: float) -> int:
    """Steps from `step` on after which a source's exact rows have grown by `need`, above 0."""
    passed = 0
    while line + 1 < len(lines):
        count = lines[line + 1] - step
        grown = _sum_of_shares(lines, shares, line, step, count, source) if count > 0 else 0.0
        if grown >= need:
            low, high = 0, count
            while high - low > 1:
                middle = (low + high) >> 1
                if _sum_of_shares(lines, shares, line, step, middle, source) >= need:
                    high = middle
                else:
                    low = middle
            return int(passed + high)
        need, passed, step, line = need - grown, passed + max(count, 0), max(step, lines[line + 1]), line + 1
    last = shares[line, source]
    return int(passed + np.int64(np.ceil(need / last))) if last * 1e12 > need else _NEVER


@kernel
def rows_of_steps(lines: Any, shares: Any, rows: int, skipped: int, drawn: Any, counts: Any) -> None:
    """Whole rows of each source in each step, such that all rows up to any step are within one of the exact ones.

    A step has so many rows. A source must have as many whole rows as its exact ones reach, and may have one more: that
    goes to the sources whose exact rows reach it first (earliest deadline first: Tijdeman, "The chairman assignment
    problem", 1980).

    Args:
        lines: int64 `(num_lines,)`, steps, ascending from 0; behind the last one shares are constant.
        shares: float64 `(num_lines, num_sources)`, exact rows of a step; those of a line sum to `rows`.
        rows: rows a step.
        skipped: steps before the first one that is counted.
        drawn: int64 `(num_sources,)`: rows of these.
        counts: int64 `(num_steps, num_sources)`.
    """
    num_sources = shares.shape[1]
    due = np.zeros(num_sources)  # exact rows that are not yet dealt
    until = np.empty(num_sources, np.int64)
    own = np.empty(num_sources, np.int64)
    drawn[:] = 0
    line = 0
    for step in range(skipped + len(counts)):
        while line + 1 < len(lines) and step >= lines[line + 1]:
            line += 1
        left = rows
        for source in range(num_sources):
            due[source] += _share(lines, shares, line, step, source)
            own[source] = min(max(np.int64(np.floor(due[source] + _NOISE)), 0), left)
            left -= own[source]
            until[source] = -1
        while left > 0:
            best, most = 0, -np.inf
            for source in range(num_sources):
                rest = due[source] - own[source]
                if rest > _NOISE and until[source] < 0:
                    until[source] = _steps_until(lines, shares, line, step + 1, source, 1.0 - rest - _NOISE)
                urgency = rest - (np.float64(until[source]) if rest > _NOISE else np.float64(_NEVER))
                if urgency > most:
                    best, most = source, urgency
            own[best] += 1
            left -= 1
        for source in range(num_sources):
            due[source] -= own[source]
            if step < skipped:
                drawn[source] += own[source]
            else:
                counts[step - skipped, source] = own[source]


@kernel
def shuffle_steps(values: Any, size: int, key: Any) -> None:
    """Shuffle each step's values, `size` of them, by themselves."""
    for step in range(len(values) // size):
        shuffle(values[step * size : (step + 1) * size], mix(key, np.uint64(step)))
