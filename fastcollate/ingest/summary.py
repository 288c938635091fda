"""What a job has to tell: counts over rows, length percentiles, the padding to expect, the records it left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcollate.store import ShardInfo, shards

_SAMPLE_ROWS = 1 << 20
_WINDOW_BATCHES = 64


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What a job did.

    Attributes:
        store: the store's directory.
        reused: whether a finished store of the same fingerprint was found and left as it is.
        seconds: time taken.
        tokenize_seconds: time inside the tokenizer, summed over workers; 0 for what an earlier run has done.
        backend: what tokenized.
        summary: counts, length percentiles, padding to expect; as in the manifest.
        skipped_report: the file that lists skipped records, or `None`.
    """

    store: str
    reused: bool
    seconds: float
    tokenize_seconds: float
    backend: str
    summary: dict[str, Any]
    skipped_report: str | None

    @property
    def num_rows(self) -> int:
        """Rows stored."""
        return int(self.summary["num_rows"])

    def __str__(self) -> str:
        """A line a figure."""
        verb = "found unchanged" if self.reused else f"finished in {self.seconds:.1f} s"
        lines = [f"{self.store}: {verb}"]
        lines += [f"  {name.replace('_', ' ')}: {value}" for name, value in self.summary.items()]
        return "\n".join(lines)


@dataclass(slots=True)
class Counts:
    """Sums over rows, for the report; the same whatever the number of workers.

    Attributes:
        num_rows: rows stored.
        num_tokens: tokens in them.
        boundary_mismatches: rows whose prompt's tokens are not a prefix of the row's.
        untrained_rows: rows without a trained token within the limit.
        corner_rows: rows on which reference and positional mode differ.
        long_prompts: rows whose prompt fills the limit, kept or cut.
    """

    num_rows: int = 0
    num_tokens: int = 0
    boundary_mismatches: int = 0
    untrained_rows: int = 0
    corner_rows: int = 0
    long_prompts: int = 0

    def add(self, other: Counts) -> None:
        """Add another unit's counts."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


def length_summary(root: Path, infos: Sequence[ShardInfo]) -> dict[str, Any]:
    """Percentiles of row lengths, and the padded share of batches of 8 and 64 rows, random and bucketed.

    Of more than about a million rows, evenly spaced ones are taken. The end-of-text is not counted.
    """
    num_rows = sum(info.num_rows for info in infos)
    step = -(-num_rows // _SAMPLE_ROWS)
    lengths = np.concatenate([shards.shard_lengths(root, info)[::step] for info in infos])
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
