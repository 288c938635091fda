"""How long a consumer waits that computes without the GIL: `BatchLoader` beside torch's `DataLoader` with two workers.

The consumer spins without the GIL for 200 microseconds / 500 microseconds / 2 milliseconds a step at batch 8 / 64 /
512, as a kernel of a training step on the processor would. What it waits is the time that asking for a batch takes.
Shuffled rows, the widest batches. The first batch of an epoch, for which threads or workers start, is told apart.

    python -m benchmarks.waiting [--baseline CHECKOUT]    # an older checkout's code as one more contender
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.baseline import Baseline, write_rows
from benchmarks.harness import save
from benchmarks.spin import stalls, turns_per_us
from benchmarks.synthetic import LENGTHS, NUM_ROWS, make_store
from fastcollate import BatchLoader, TokenStore, plan_epoch
from fastcollate.collate.reference import custom_collate_fn

STEP_US = {8: 200, 64: 500, 512: 2000}
SECONDS = 1.0  # that the measured steps take, without waiting
REPEATS = 5
LIMIT = 0.05


def make_sources(store: TokenStore, batch_size: int, steps: int) -> dict[str, Callable[[], Iterable[Any]]]:
    """Endless over epochs where an epoch is shorter than the measured steps."""
    rows = [row.input_ids.tolist() for row in islice(store, min(NUM_ROWS, (steps + 40) * batch_size))]

    def ours(**options: Any) -> Iterable[Any]:
        loader = BatchLoader(store, policy="shuffled", batch_size=batch_size, **options)
        return chain.from_iterable(loader for _ in range(1 + steps // len(loader)))

    def torch_loader() -> Iterable[Any]:
        torch.manual_seed(0)
        loader = DataLoader(
            rows,  # type: ignore[arg-type]  # a list does
            batch_size=batch_size,
            shuffle=True,
            num_workers=2,
            collate_fn=custom_collate_fn,
            drop_last=True,
        )
        return chain.from_iterable(loader for _ in range(2 + steps // len(loader)))

    return {"fastcollate": ours, "without threads": partial(ours, prefetch=0), "DataLoader, 2 workers": torch_loader}


def check(store: TokenStore, batch_size: int) -> None:
    """The batches are the reference's."""
    loader = BatchLoader(store, policy="shuffled", batch_size=batch_size)
    plan = plan_epoch(store.lengths, policy="shuffled", batch_size=batch_size)
    for batch, rows in islice(zip(loader, plan, strict=True), 20):
        expected = custom_collate_fn([store[int(row)].input_ids.tolist() for row in rows])
        assert all(torch.equal(a, b) for a, b in zip(batch, expected, strict=True))


def measure(store: TokenStore, batch_size: int, rate: float, baseline: Baseline | None) -> dict[str, Any]:
    check(store, batch_size)
    step_us = STEP_US[batch_size]
    steps = int(SECONDS / step_us * 1e6)
    sources = make_sources(store, batch_size, steps)
    runs: dict[str, list[tuple[float, list[float], float]]] = {name: [] for name in sources}
    if baseline is not None:
        runs["baseline"] = []
    for _ in range(REPEATS):
        if baseline is not None:
            turns = int(step_us * rate)
            runs["baseline"].append(baseline.ask("waiting", batch_size=batch_size, steps=steps, turns=turns))
        for name, source in sources.items():
            # Workers in Python stall for milliseconds: a tenth of the steps tells as much.
            count = steps // 10 if name.startswith("DataLoader") else steps
            runs[name].append(stalls(source(), count, int(step_us * rate)))
    result: dict[str, Any] = {"step_us": step_us, "steps": steps, "computed_us": {}, "contenders": {}}
    for name, own in runs.items():
        means = [1e6 * statistics.fmean(waits) for _, waits, _ in own]
        everything = np.concatenate([waits for _, waits, _ in own]) * 1e6
        result["computed_us"][name] = round(1e6 * statistics.median(computed for _, _, computed in own), 1)
        result["contenders"][name] = {
            "mean_stall_us": round(statistics.median(means), 2),
            "by_run_us": [round(mean, 2) for mean in means],
            "stall_share": round(statistics.median(means) / step_us, 4),
            "median_us": round(float(np.median(everything)), 2),
            "p99_us": round(float(np.percentile(everything, 99)), 1),
            "longest_us": round(float(everything.max()), 1),
            "first_batch_ms": round(1e3 * statistics.median(first for first, _, _ in own), 2),
        }
    return result


def main(checkout: Path | None) -> None:
    rate = turns_per_us()
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store")
        write_rows(store, Path(folder))
        baseline = Baseline(checkout, Path(folder)) if checkout else None
        results = {f"batch {batch_size}": measure(store, batch_size, rate, baseline) for batch_size in STEP_US}
        if baseline is not None:
            baseline.close()
    for name, result in results.items():
        for contender, figures in result["contenders"].items():
            print(f"{name:9} {contender:22} stall {figures['mean_stall_us']:9.1f} us, {figures['stall_share']:.1%}")
    save(
        "waiting",
        {
            "what": "mean seconds a step that a consumer waits for its batch, which computes without the GIL",
            "rows": NUM_ROWS,
            "lengths": LENGTHS,
            "policy": "shuffled",
            "limit_share": LIMIT,
            "within_limit": {
                name: result["contenders"]["fastcollate"]["stall_share"] <= LIMIT for name, result in results.items()
            },
            "batch_sizes": results,
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--baseline", type=Path, help="a checkout whose code is measured too")
    main(parser.parse_args().baseline)
