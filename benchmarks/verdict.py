"""What `bench` says that a loop waits, beside what a plain loop over torch's `DataLoader` with such a sleep shows.

The plain loop is written here without anything of `bench`: batches of the chapter's collate, 1, 2 and 4 workers, a
sleep for a step; what is not slept is waited. Both go over the same rows in turn, each as long as `bench` does by
default, three times; medians are compared.

    python -m benchmarks.verdict
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from benchmarks.harness import save
from benchmarks.synthetic import LENGTHS, make_store
from fastcollate import TokenStore, plan_epoch
from fastcollate.check.measure import _contenders as contenders_of
from fastcollate.check.measure import wait_share
from fastcollate.collate.reference import custom_collate_fn
from fastcollate.train import MaskOptions

CASES = {8: 10, 64: 20, 512: 150}  # rows a batch, a step in milliseconds
WORKERS = (1, 2, 4)
NUM_ROWS = 40_000
SECONDS = 2.5  # of a loop: five rounds of half a second
REPEATS = 3
LIMIT = 0.02


def plain_share(rows: list[list[int]], batches: list[list[int]], workers: int, step_s: float) -> float:
    """What is waited of a loop's time, once the batches that workers have made at its start are used up."""
    loader: Any = DataLoader(
        rows,  # type: ignore[arg-type]  # a list does
        batch_sampler=batches,
        collate_fn=custom_collate_fn,
        num_workers=workers,
    )
    found = iter(loader)
    for _ in islice(found, 2 * workers + 1):
        time.sleep(step_s)
    slept, steps, begun = 0.0, 0, time.perf_counter()
    while time.perf_counter() < begun + SECONDS or steps < 16:
        asleep = time.perf_counter()
        time.sleep(step_s)
        slept += time.perf_counter() - asleep
        next(found)
        steps += 1
    return 1 - slept / (time.perf_counter() - begun)


def measure(store: TokenStore, rows: list[list[int]], batch_size: int, step_ms: float) -> dict[str, dict[str, Any]]:
    """The shares of each number of workers."""
    sources = contenders_of(store, MaskOptions().of(store), {"policy": "bucketed", "batch_size": batch_size, "seed": 0})
    batches = [batch.tolist() for batch in plan_epoch(store.cells, batch_size=batch_size, policy="bucketed")]
    told: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    shown: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    for _ in range(REPEATS):
        for workers in WORKERS:
            shown[workers].append(plain_share(rows, batches, workers, step_ms / 1000))
            told[workers].append(wait_share(sources[f"DataLoader, {workers} workers"], step_ms / 1000, seconds=SECONDS))
    return {
        f"{workers} workers": {
            "bench": round(statistics.median(told[workers]), 4),
            "sleep": round(statistics.median(shown[workers]), 4),
            "points": round(100 * (statistics.median(told[workers]) - statistics.median(shown[workers])), 2),
            "bench_by_run": [round(share, 4) for share in told[workers]],
            "sleep_by_run": [round(share, 4) for share in shown[workers]],
        }
        for workers in WORKERS
    }


def main() -> None:
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", NUM_ROWS)
        rows = [row.input_ids.tolist() for row in store]
        results = {f"batch {size}, {step} ms": measure(store, rows, size, step) for size, step in CASES.items()}
    for name, result in results.items():
        for workers, found in result.items():
            print(
                f"{name:18} {workers} bench {found['bench']:.1%} sleep {found['sleep']:.1%} {found['points']:+} points"
            )
    worst = max(abs(found["points"]) for result in results.values() for found in result.values())
    save(
        "verdict",
        {
            "what": "share of a loop's time that waits for batches: what bench says, and a plain loop that sleeps",
            "rows": NUM_ROWS,
            "lengths": LENGTHS,
            "limit_points": 100 * LIMIT,
            "largest_points": worst,
            "within_limit": worst <= 100 * LIMIT,
            "cases": results,
        },
    )
    if worst > 100 * LIMIT:
        sys.exit(f"{worst} points apart, more than {100 * LIMIT:.0f}")


if __name__ == "__main__":
    main()
