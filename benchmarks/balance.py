"""Ranks that finish together: what an epoch takes by the cost model, beside the ideal and the release before.

    python -m benchmarks.balance [plans sequences wall] [--baseline FOLDER]

`plans`: 200,000 rows of three kinds on 8 and 64 ranks, packed and by `max_tokens`: the sum over steps of the slowest
rank's cost (24,576 L + L^2 a row, a padded row as wide as its batch), over the mean of all ranks; cells used; the time
to plan the epoch, in turns with the code in FOLDER (with dealing in turn, where none is given). `sequences`: `balance`
on 100,000 sequences over 64 ranks beside longest-first. `wall`: two processes that sleep as long as a batch costs.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import interleave, medians, save_part
from fastcollate import balance, plan_epoch

ROWS, LINEAR, REPEATS, PLANS = 200_000, 24_576, 7, 61
Lengths = npt.NDArray[np.int64]

PLAN = """
import json, sys, time
import numpy as np
from fastcollate import plan_epoch
lengths = np.load(sys.argv[1])
for line in sys.stdin:
    options = json.loads(line)
    plan = plan_epoch(lengths, rank=options["world_size"] // 2, **options)
    start = time.perf_counter()
    for index in range(plan.num_windows):
        plan.packs(index) if plan.capacity else plan.window(index)
    print(time.perf_counter() - start, flush=True)
"""


def lengths_of(kind: str) -> Lengths:
    """Lengths as issue 20 draws them, seed 0."""
    rng = np.random.default_rng(0)
    median, sigma, longest = (80, 0.7, 1024) if kind == "short" else (400, 1.0, 8000 if kind == "traces" else 32_768)
    lengths = np.clip(np.rint(rng.lognormal(np.log(median), sigma, ROWS)), 8, longest).astype(np.int64)
    if kind == "traces":
        chosen = rng.random(ROWS) < 0.03
        lengths[chosen] = rng.integers(8000, 32_769, int(chosen.sum()))
    return lengths


def price(lengths: Lengths) -> npt.NDArray[np.float64]:
    return LINEAR * lengths.astype(np.float64) + lengths.astype(np.float64) ** 2


def describe(lengths: Lengths, options: dict[str, Any]) -> dict[str, float]:
    """The epoch by the cost model, from what each rank is given; each row once, or it fails."""
    seen, ranks, cells = np.zeros(len(lengths), np.int64), [], 0
    for rank in range(options["world_size"]):
        plan, own = plan_epoch(lengths, rank=rank, **options), []
        for index in range(plan.num_windows):
            if plan.capacity:
                packs, bounds = plan.packs(index)
                np.add.at(seen, packs.rows, 1)
                each = np.add.reduceat(price(lengths[packs.rows]), packs.bounds[:-1])
                own.append(np.add.reduceat(each, bounds[:-1]))
                cells += packs.num_packs * plan.capacity
            else:
                rows, bounds = plan.window(index)
                np.add.at(seen, rows, 1)
                widths, counts = np.maximum.reduceat(lengths[rows], bounds[:-1]), np.diff(bounds)
                own.append(price(widths) * counts)
                cells += int((widths * counts).sum())
        ranks.append(np.concatenate(own))
    assert seen.min() == 1
    costs = np.array(ranks)
    return {
        "epoch_over_mean": round(float(costs.max(0).sum() / costs.mean(0).sum()), 4),
        "epoch_over_ideal": round(float(costs.max(0).sum() * len(costs) / price(lengths).sum()), 4),
        "worst_step": round(float((costs.max(0) / costs.mean(0)).max()), 3),
        "steps": costs.shape[1],
        "rows_twice": int(seen.sum() - len(lengths)),
        "cells_used": round(float(lengths.sum() / cells), 4),
    }


class Planner:
    """A process that plans epochs with the code in a folder, and tells how long each took."""

    def __init__(self, path: Path, folder: str | None) -> None:
        environment = {**os.environ, **({"PYTHONPATH": folder} if folder else {})}
        self._process = subprocess.Popen(
            [sys.executable, "-c", PLAN, str(path)], stdin=-1, stdout=-1, text=True, env=environment, cwd=folder
        )

    def seconds(self, options: dict[str, Any]) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(options), file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def plans(baseline: str | None) -> dict[str, Any]:
    path, cases = Path(os.environ.get("TMPDIR", "/tmp")) / f"lengths-{os.getpid()}.npy", []
    for kind in ("short", "chat", "traces"):
        lengths = lengths_of(kind)
        np.save(path, lengths)
        own, before = Planner(path, None), Planner(path, baseline)
        for policy in ("packed", "max_tokens"):
            for world_size in (8, 64):
                capacity = 1024 if kind == "short" else 32_768
                options: dict[str, Any] = {"world_size": world_size, "max_tokens": capacity}
                if policy == "packed":
                    options = {"world_size": world_size, "policy": "packed", "capacity": capacity, "batch_size": 1}
                off = {} if baseline else {"balance": False}
                times = [(own.seconds(options), before.seconds({**options, **off})) for _ in range(2 + PLANS)][2:]
                dealt, in_turn = describe(lengths, options), describe(lengths, {**options, "balance": False})
                cases.append({
                    "rows": kind, "policy": policy, "ranks": world_size, **dealt, "in_turn": in_turn,
                    "plan_ms": round(1e3 * statistics.median(a for a, _ in times), 2),
                    "plan_ms_before": round(1e3 * statistics.median(b for _, b in times), 2),
                    "plan_times_before": round(statistics.median(a / b for a, b in times), 2),
                })  # fmt: skip
                print(cases[-1], flush=True)
        own.close()
        before.close()
    path.unlink()
    most = {8: 1.01, 64: 1.03}
    return {
        "before": "the release before" if baseline else "balance=False",
        "limits": {"epoch_over_mean": most, "cells_used": 0.994, "plan_times_before": 1.3},
        "within_limits": all(
            case["epoch_over_mean"] <= most[case["ranks"]] and case["cells_used"] >= 0.994 for case in cases
        ),
        "cases": cases,
    }


def longest_first(costs: npt.NDArray[np.float64], num_ranks: int) -> npt.NDArray[np.int64]:
    """Graham's rule, as RL trainers write it in Python."""
    heap = [(0.0, rank) for rank in range(num_ranks)]
    dealt = np.empty(len(costs), np.int64)
    for item in np.argsort(-costs, kind="stable").tolist():
        total, rank = heapq.heappop(heap)
        dealt[item] = rank
        heapq.heappush(heap, (total + float(costs[item]), rank))
    return dealt


def sequences(_: str | None) -> dict[str, Any]:
    lengths = np.clip(np.rint(np.random.default_rng(0).lognormal(np.log(400), 1.0, 100_000)), 8, 32_768)
    costs = price(lengths.astype(np.int64))
    contenders = {
        "balance": lambda: balance(costs, 64),
        "balance, equal counts": lambda: balance(costs, 64, equal_counts=True),
        "longest first, Python": lambda: longest_first(costs, 64),
    }
    over = {}
    for name, deal in contenders.items():
        dealt = deal()
        sums, counts = np.bincount(dealt, costs), np.bincount(dealt)
        over[name] = float(sums.max() / sums.mean() - 1)
        assert "equal" not in name or np.ptp(counts) <= 1
    seconds = medians(interleave(contenders, repeats=REPEATS))
    return {
        "sequences": len(costs),
        "ranks": 64,
        "milliseconds": {name: round(1e3 * value, 1) for name, value in seconds.items()},
        "max_over_mean_minus_1": {name: float(f"{value:.2g}") for name, value in over.items()},
    }


WALL = """
import json, sys, time
import numpy as np
import torch
import torch.distributed as dist
from fastcollate import BucketBatchSampler
dist.init_process_group("gloo")
lengths = np.load(sys.argv[1])
cost = lambda rows: float((24576.0 * lengths[rows] + lengths[rows].astype(float) ** 2).sum())
found = {}
for balance in (True, False):
    sampler = BucketBatchSampler(lengths, policy="packed", capacity=32768, batch_size=1, balance=balance)
    costs = [cost(np.array(rows)) for rows in sampler]
    sampler.set_epoch(0)
    unit = float(sys.argv[2]) / np.mean(costs)
    dist.barrier()
    start = time.perf_counter()
    for batch in sampler:
        time.sleep(unit * cost(np.array(batch)))
        dist.all_reduce(torch.zeros(1))
    wall = time.perf_counter() - start
    both = [torch.zeros(len(costs), dtype=torch.float64) for _ in range(2)]
    dist.all_gather(both, torch.tensor(costs, dtype=torch.float64) * unit)
    each = torch.stack(both)
    model = float(each.max(0).values.sum())
    found[str(balance)] = {"wall_s": wall, "model_s": model, "over_mean": model / float(each.mean(0).sum())}
if dist.get_rank() == 0:
    print(json.dumps(found))
dist.destroy_process_group()
"""


def wall(_: str | None) -> dict[str, Any]:
    """Rows of very different lengths, a step that takes as long as it costs."""
    lengths = lengths_of("traces")[:24_000]
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"wall-{os.getpid()}.npy"
    np.save(path, lengths)
    script = path.with_suffix(".py")
    script.write_text(WALL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([*command, str(path), "0.02"], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    for file in (path, script):
        file.unlink()
    names = {"True": "balanced", "False": "dealt in turn"}
    return {
        "rows": len(lengths),
        "ranks": 2,
        **{names[key]: {name: round(value, 3) for name, value in row.items()} for key, row in found.items()},
    }


PARTS = {"plans": plans, "sequences": sequences, "wall": wall}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parser.add_argument("--baseline", help="a folder with the release before")
    chosen = parser.parse_args()
    for name in chosen.parts:
        save_part("balance", name, PARTS[name](chosen.baseline))


if __name__ == "__main__":
    main()
