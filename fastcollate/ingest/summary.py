"""Length percentiles, and the padding to expect, from a store's shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcollate.store.store import ShardInfo, shard_lengths

_SAMPLE_ROWS = 1 << 20
_WINDOW_BATCHES = 64


def length_summary(root: Path, shards: Sequence[ShardInfo]) -> dict[str, Any]:
    """Percentiles of row lengths, and the padded share of batches of 8 and 64 rows, random and bucketed.

    Of more than about a million rows, evenly spaced ones are taken. The end-of-text is not counted.
    """
    num_rows = sum(shard.num_rows for shard in shards)
    step = -(-num_rows // _SAMPLE_ROWS)
    lengths = np.concatenate([shard_lengths(root, shard)[::step] for shard in shards])
    order = np.random.default_rng(0).permutation(lengths)
    quantiles = (0, 5, 50, 95, 99, 100)
    found = np.percentile(lengths, quantiles, method="nearest").tolist()
    summary: dict[str, Any] = {f"length_p{q}": int(length) for q, length in zip(quantiles, found, strict=True)}
    summary["length_mean"] = round(float(lengths.mean()), 2)
    for batch_size in (8, 64):
        summary[f"padding_{batch_size}_random"] = _padding(order, batch_size)
        summary[f"padding_{batch_size}_bucketed"] = _padding(_bucket(order, batch_size * _WINDOW_BATCHES), batch_size)
    return summary


def _bucket(lengths: npt.NDArray[Any], window: int) -> npt.NDArray[Any]:
    return np.concatenate([np.sort(lengths[i : i + window]) for i in range(0, len(lengths), window)])


def _padding(lengths: npt.NDArray[Any], batch_size: int) -> float:
    """The share of cells that are padding."""
    padded = np.zeros(-(-len(lengths) // batch_size) * batch_size, np.int64)
    padded[: len(lengths)] = lengths
    widest = padded.reshape(-1, batch_size).max(axis=1)
    rows = np.full(len(widest), batch_size)
    rows[-1] = len(lengths) - batch_size * (len(widest) - 1)
    cells = int((widest * rows).sum())
    return round(1 - int(padded.sum()) / cells, 4) if cells else 0.0
