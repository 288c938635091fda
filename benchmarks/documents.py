"""Documents without padding: what is cropped, beside nanochat's way on the same lengths, and the speed of packing.

Run as `python -m benchmarks.documents [--rows N]`; writes `bench_results/documents.json`. Lengths are log-normal, with
the median and the spread of texts of the web. nanochat's loader keeps a buffer of 1,000 documents, fills rows of
T + 1 tokens with the longest that fits, and where none does, with the head of the shortest; that rule is written here
anew, over lengths alone. Ours is checked first: no document twice, no pack overfull, none but the last short.
"""

from __future__ import annotations

import argparse
import itertools
from bisect import bisect_right, insort
from functools import partial
from typing import Any

import numpy as np

from benchmarks.harness import interleave, medians, save
from fastcollate.plan.documents.pack import packs_of_window
from fastcollate.plan.plan import EpochPlan, plan_epoch
from fastcollate.store import layout

CAPACITIES = (1024, 2048, 8192)
BATCH = 64  # packs
BUFFER = 1000


def make_lengths(num_rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens of each document."""
    drawn = np.exp(np.random.default_rng(0).normal(6.2, 1.1, num_rows))
    return np.clip(drawn, 16, 200_000).astype(np.int64)


def lost_by_buffer(lengths: list[int], room_of_a_row: int) -> int:
    """Tokens that nanochat's rule leaves out of documents that come in this order."""
    waiting, rest, lost = sorted(lengths[:BUFFER]), iter(lengths[BUFFER:]), 0
    while waiting:
        room = room_of_a_row
        while room and waiting:
            place = bisect_right(waiting, room) - 1
            length = waiting.pop(max(place, 0))
            lost, room = lost + max(length - room, 0), room - min(length, room)
            for following in itertools.islice(rest, 1):
                insort(waiting, following)
    return lost


def used_by(plan: EpochPlan, lengths: np.ndarray[Any, np.dtype[np.int64]]) -> int:
    """Tokens in a plan's packs, which are checked."""
    assert plan.options.capacity is not None
    used, seen = 0, np.zeros(len(lengths), np.int64)
    for window in range(plan.num_windows):
        packs = plan.packs(window).packs
        most = packs.starts >> layout.COUNT_AT & layout.MOST_TOKENS
        own = np.where(most > 0, most, lengths[packs.rows])
        sizes = np.add.reduceat(own, packs.bounds[:-1])
        assert sizes.max() <= plan.options.capacity
        assert (sizes == plan.options.capacity).mean() > 0.9
        np.add.at(seen, packs.rows, own)
        used += int(own.sum())
    assert (seen <= lengths).all()
    if plan.options.packing == "concatenate":
        assert (seen == lengths).all()
    return used


def whole_plan(plan: EpochPlan) -> None:
    """An epoch: permute, pack, deal to steps by cost."""
    for window in range(plan.num_windows):
        plan.packs(window)


def packer_alone(plan: EpochPlan, lengths: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    """Documents in the order that they have, a window at a time."""
    assert plan.options.capacity is not None
    for first in range(0, len(lengths), plan.window_rows):
        own = lengths[first : first + plan.window_rows]
        packs_of_window(np.arange(len(own)), own, plan.options, plan.options.capacity, is_last=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1 << 20)
    lengths = make_lengths(parser.parse_args().rows)
    total = int(lengths.sum())
    results: dict[str, Any] = {
        "documents": len(lengths), "tokens": total, "median": int(np.median(lengths)),
        "mean": round(total / len(lengths), 1), "longest": int(lengths.max()), "capacities": {},
    }  # fmt: skip
    order = np.random.default_rng(1).permutation(len(lengths))
    for capacity in CAPACITIES:
        plans = {
            packing: plan_epoch(lengths, policy="packed", packing=packing, capacity=capacity, batch_size=BATCH)
            for packing in ("concatenate", "crop")
        }
        used = {packing: used_by(plan, lengths) for packing, plan in plans.items()}
        assert used["concatenate"] == total
        share = 1 - used["crop"] / total
        theirs = lost_by_buffer(lengths[order].tolist(), capacity + 1) / total
        assert share <= theirs, "more is cropped than with a buffer"
        runs = {name: partial(whole_plan, plan) for name, plan in plans.items()}
        runs |= {f"{name}_packer": partial(packer_alone, plan, lengths) for name, plan in plans.items()}
        times = medians(interleave(runs, repeats=7))
        results["capacities"][str(capacity)] = {
            "cropped": round(share, 5),
            "cropped_by_nanochats_rule": round(theirs, 5),
            "beyond_capacity": round(float(np.maximum(lengths - capacity, 0).sum()) / total, 5),
            "million_documents_per_s": {name: round(len(lengths) / s / 1e6, 1) for name, s in times.items()},
        }
        print(capacity, results["capacities"][str(capacity)])
    save("documents", results)


if __name__ == "__main__":
    main()
