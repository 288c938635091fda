"""What a finished job says of its rows' lengths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcollate.plan import plan_epoch

_SAMPLE_ROWS = 1 << 20


def length_summary(lengths: Iterable[npt.NDArray[Any]], num_rows: int, end: str = "append") -> dict[str, Any]:
    """Percentiles of row lengths, and the padded share of a loader's batches of 8 and 64 rows, shuffled and bucketed.

    Of more than about a million rows, evenly spaced ones are taken. An end-of-text that is appended is not counted. A
    percentile is the smallest length that at least so many rows do not exceed.
    """
    step = -(-num_rows // _SAMPLE_ROWS)
    taken = np.concatenate([of_shard[::step] for of_shard in lengths]).astype(np.int64)
    quantiles = (0, 5, 50, 95, 99, 100)
    found = np.percentile(taken, quantiles, method="inverted_cdf").tolist()
    summary: dict[str, Any] = {f"length_p{q}": int(length) for q, length in zip(quantiles, found, strict=True)}
    summary["length_mean"] = round(float(taken.mean()), 2)
    cells = taken - (taken > 0) * (end == "in_row")
    for batch_size in (8, 64):
        summary[f"padding_{batch_size}_random"] = _padding(cells, batch_size, "shuffled")
        summary[f"padding_{batch_size}_bucketed"] = _padding(cells, batch_size, "bucketed")
    return summary


def _padding(lengths: npt.NDArray[np.int64], batch_size: int, policy: str) -> float:
    """The share of cells that are padding, in the first epoch of a loader with its own defaults."""
    plan = plan_epoch(lengths, batch_size=batch_size, policy=policy)
    cells = filled = 0
    for rows, bounds in map(plan.window, range(plan.num_windows)):
        own = lengths[rows]
        cells += int((np.maximum.reduceat(own, bounds[:-1]) * np.diff(bounds)).sum())
        filled += int(own.sum())
    return round(1 - filled / cells, 4) if cells else 0.0
