"""Planning: one billion rows, padding and correlation by window, balance of ranks, `LengthGroupedSampler`.

    python -m benchmarks.plan [billion windows sampler]

Each part replaces its own figures in `bench_results/plan.json`. The billion rows' lengths are a file of 2 GB, put out
of the page cache before each measurement; every measurement is a process of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import RESULTS, interleave, medians, save
from benchmarks.synthetic import LENGTHS, make_lengths
from fastcollate import plan_epoch
from fastcollate.plan.plan import EpochPlan

BILLION = 1_000_000_000
MILLION = 1_000_000
BATCH = 64
WINDOWS = (1, 10, 50, 100, 250, 500, 1000, 2000, 4000, 15625)  # batches
REPEATS = 5

COLD = """
import json, sys, time, tracemalloc, warnings
import numpy as np
if sys.argv[3] == "bare":
    warnings.simplefilter("ignore")
    sys.modules["awkward"] = None
from fastcollate import plan_epoch
import fastcollate.plan.plan
def anon():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e6
path, batch, warm, windows = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "warm", int(sys.argv[4])
lengths = np.load(path, mmap_mode="r")
if warm:  # the kernels are loaded by a plan of rows that are not in the file
    small = np.full(200_000, 9, np.uint16)
    small.flags.writeable = False
    for options in ({}, {"block": 64}):
        next(iter(plan_epoch(small, batch_size=batch, **options)))
before = anon()
start = time.perf_counter()
plan = plan_epoch(lengths, batch_size=batch)
first = next(iter(plan))
first_s = time.perf_counter() - start
later = []
for step in np.random.default_rng(0).integers(0, plan.num_windows, 5).tolist():
    start = time.perf_counter()
    plan.window(step)
    later.append(time.perf_counter() - start)
tracemalloc.start()
peak = before
for window in range(windows):
    plan.window(window)
    peak = max(peak, anon())
print(json.dumps({
    "first_batch_ms": 1e3 * first_s, "other_windows_ms": [1e3 * s for s in later],
    "arrays_peak_mb": tracemalloc.get_traced_memory()[1] / 1e6, "anon_growth_mb": peak - before,
    "batches": len(plan), "block": plan.block, "window_rows": plan.window_rows,
}))
"""


def write_lengths(path: Path) -> None:
    """A `.npy` file of a billion log-normal lengths, uint16, written in pieces."""
    with open(path, "wb") as file:
        header = {"descr": "<u2", "fortran_order": False, "shape": (BILLION,)}
        np.lib.format.write_array_header_1_0(file, header)
        piece = make_lengths(10 * MILLION).astype(np.uint16)
        for number in range(BILLION // len(piece)):
            file.write(np.roll(piece, 977 * number).tobytes())
        file.flush()
        os.fsync(file.fileno())


def drop_from_cache(path: Path) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def billion() -> dict[str, Any]:
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lengths.npy"
        write_lengths(path)
        for name, batch, how in (
            ("batch 64", 64, "warm"),
            ("batch 512", 512, "warm"),
            ("batch 64, new process", 64, ""),
            ("batch 64, new process, without awkward", 64, "bare"),
        ):
            runs = []
            for _ in range(REPEATS):
                drop_from_cache(path)
                command = [sys.executable, "-c", COLD, str(path), str(batch), how or "new", "30"]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs.append(json.loads(done.stdout))
            cases[name] = {
                "first_batch_ms": round(statistics.median(run["first_batch_ms"] for run in runs), 1),
                "first_batch_ms_by_run": [round(run["first_batch_ms"], 1) for run in runs],
                "another_window_ms": round(statistics.median(ms for run in runs for ms in run["other_windows_ms"]), 1),
                "arrays_peak_mb": round(max(run["arrays_peak_mb"] for run in runs), 1),
                "anon_growth_mb": round(max(run["anon_growth_mb"] for run in runs), 1),
                **{key: runs[0][key] for key in ("batches", "block", "window_rows")},
            }
            print(name, cases[name], flush=True)
    return {
        "rows": BILLION,
        "lengths_file_bytes": 2 * BILLION,
        "limits": {"first_batch_ms": 250, "memory_mb": 64},
        "note": "warm: the compiled kernels are loaded before; new process: loading them is part of the first batch, "
        "and so is what other packages register with Numba (awkward, which gigatoken brings)",
        "cases": cases,
    }


# ------------------------------------------------------------------------------------------------ padding by window


def describe(plan: EpochPlan, lengths: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Padding, and the correlation of neighbouring batches' mean lengths; every row once, or it fails."""
    widths, means, seen = [], [], np.zeros(len(lengths), np.int64)
    real = 0
    for index in range(plan.num_windows):
        rows, bounds = plan.window(index)
        own, sizes = lengths[rows], np.diff(bounds)
        widths.append(np.maximum.reduceat(own, bounds[:-1]) * sizes)
        means.append(np.add.reduceat(own, bounds[:-1]) / sizes)
        np.add.at(seen, rows, 1)
        real += int(own.sum())
    assert (seen == 1).all()
    mean = np.concatenate(means)
    cells = int(np.concatenate(widths).sum())
    return {
        "padding": round(1 - real / cells, 5),
        "neighbour_correlation": round(float(np.corrcoef(mean[:-1], mean[1:])[0, 1]), 4),
    }


def balance(lengths: npt.NDArray[np.int64], world_size: int, batch_size: int) -> dict[str, Any]:
    """The widest rank's cells over the mean of all ranks, step by step."""
    ratios = []
    plans = [plan_epoch(lengths, batch_size=batch_size, world_size=world_size, rank=rank) for rank in range(world_size)]
    for index in range(plans[0].num_windows):
        windows = [plan.window(index) for plan in plans]
        cells = np.array([np.maximum.reduceat(lengths[w.rows], w.bounds[:-1]) * np.diff(w.bounds) for w in windows])
        ratios.append(cells.max(0) / cells.mean(0))
    ratio = np.concatenate(ratios)
    return {
        "world_size": world_size,
        "batch_size": batch_size,
        "mean": round(float(ratio.mean()), 5),
        "p99": round(float(np.percentile(ratio, 99)), 5),
        "max": round(float(ratio.max()), 5),
        "share_of_steps_above_1.05": round(float((ratio > 1.05).mean()), 6),
    }


def windows() -> dict[str, Any]:
    lengths = make_lengths(MILLION)
    table = []
    next(iter(plan_epoch(lengths, batch_size=BATCH)))  # loads the kernels
    for batches in WINDOWS:
        plan = plan_epoch(lengths, batch_size=BATCH, window=batches * BATCH)
        start = time.perf_counter()
        first = plan.window(0)
        table.append(
            {
                "window_batches": batches,
                "first_window_ms": round(1e3 * (time.perf_counter() - start), 2),
                "window_mb": round((first.rows.nbytes + first.bounds.nbytes) / 1e6, 2),
                **describe(plan, lengths),
            }
        )
        print(table[-1], flush=True)
    plan = plan_epoch(lengths, batch_size=BATCH)
    default = {"window_batches": plan.window_rows // BATCH, "every_row_once": True, **describe(plan, lengths)}
    blocked = {"block": 64, **describe(plan_epoch(lengths, batch_size=BATCH, block=64), lengths)}
    print(default, blocked)
    return {
        "rows": MILLION,
        "batch_size": BATCH,
        "by_window": table,
        "default": default,
        "default_with_blocks": blocked,
        "within_limits": default["padding"] <= 0.006 and abs(default["neighbour_correlation"]) < 0.05,
        "balance": [balance(lengths, *sizes) for sizes in ((2, 32), (4, 16), (8, 8), (8, 64))],
    }


# ------------------------------------------------------------------------------------------------------- the sampler


def padding_of(batches: Iterator[npt.NDArray[np.int64]], lengths: npt.NDArray[np.int64]) -> float:
    real = cells = 0
    for rows in batches:
        own = lengths[rows]
        real += int(own.sum(dtype=np.int64))
        cells += len(rows) * int(own.max())
    return 1 - real / cells


def use_up(items: Iterable[object]) -> None:
    """Take one after another, as a loop does, which keeps none."""
    deque(items, maxlen=0)


def sampler() -> dict[str, Any]:
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    from fastcollate import BucketBatchSampler

    lengths = make_lengths(MILLION).astype(np.uint16)  # as a store has them
    as_list = lengths.tolist()

    def theirs() -> LengthGroupedSampler:
        return LengthGroupedSampler(BATCH, lengths=as_list, generator=torch.Generator().manual_seed(0))

    def ours() -> EpochPlan:
        return plan_epoch(lengths, batch_size=BATCH)

    contenders: dict[str, Callable[[], object]] = {
        "plan_epoch": lambda: list(ours()),
        "plan_epoch, one after another": lambda: use_up(ours()),
        "BucketBatchSampler": lambda: list(BucketBatchSampler(lengths, batch_size=BATCH)),
        "LengthGroupedSampler": lambda: list(theirs()),
        "LengthGroupedSampler, one after another": lambda: use_up(theirs()),
    }
    order = np.array(list(theirs()))
    assert np.array_equal(np.sort(order), np.arange(MILLION))
    own = [np.array(rows) for rows in BucketBatchSampler(lengths, batch_size=BATCH)]
    assert np.array_equal(np.sort(np.concatenate(own)), np.arange(MILLION))
    padding = {
        "fastcollate": padding_of(iter(own), lengths),
        "LengthGroupedSampler": padding_of((order[i : i + BATCH] for i in range(0, MILLION, BATCH)), lengths),
    }
    seconds = interleave(contenders, repeats=REPEATS)
    median = medians(seconds)
    result = {
        "rows": MILLION,
        "batch_size": BATCH,
        "lengths_dtype": "uint16; a list of integers for LengthGroupedSampler",
        "seconds": {name: round(value, 4) for name, value in median.items()},
        "seconds_by_run": {name: [round(s, 4) for s in own_s] for name, own_s in seconds.items()},
        "padding": {name: round(value, 5) for name, value in padding.items()},
        "times_faster": round(median["LengthGroupedSampler"] / median["plan_epoch"], 1),
        "times_faster_one_after_another": round(
            median["LengthGroupedSampler, one after another"] / median["plan_epoch, one after another"], 1
        ),
        "times_faster_as_lists": round(median["LengthGroupedSampler"] / median["BucketBatchSampler"], 1),
        "times_less_padding": round(padding["LengthGroupedSampler"] / padding["fastcollate"], 1),
        "limits": {"times_faster": 30, "times_less_padding": 10},
    }
    print(result)
    return result


PARTS = {"billion": billion, "windows": windows, "sampler": sampler}


def main() -> None:
    path = RESULTS / "plan.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found = {"lengths": LENGTHS, **{name: found[name] for name in PARTS if name in found}}
    for name in sys.argv[1:] or PARTS:
        found[name] = PARTS[name]()
    save("plan", found)


if __name__ == "__main__":
    main()
