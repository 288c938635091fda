"""Random pairs through every policy, stopped and resumed at other world sizes: none is parted, each comes once.

`python -m tests.pairs_everywhere [NUM_PAIRS] [SEED]`; 100,000 by default. It prints a line a case, and how many epochs.
"""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np

from fastcollate import BucketBatchSampler

POLICIES: dict[str, dict[str, Any]] = {
    "sequential": {"policy": "sequential", "batch_size": 24},
    "shuffled": {"policy": "shuffled", "batch_size": 24},
    "bucketed": {"batch_size": 24},
    "longest first": {"batch_size": 24, "longest_first": True, "pad_to_multiple_of": 8},
    "max_tokens": {"max_tokens": 24 * 4096, "balance": False, "shares": 12},
    "balanced": {"max_tokens": 24 * 4096, "balance": True},
    "packed": {"policy": "packed", "batch_size": 12, "capacity": 4096},
    "packed in turn": {"policy": "packed", "batch_size": 12, "capacity": 4096, "balance": False},
}
WORLD_SIZES = (1, 2, 3, 4, 6, 12)


def make_source(num_pairs: int, seed: int) -> Any:
    """What a plan needs of a store of pairs: lengths from 1 to 2,048, few of them long."""
    lengths = np.minimum(np.random.default_rng(seed).lognormal(5, 1, 2 * num_pairs).astype(np.int64) + 1, 2048)
    return SimpleNamespace(lengths=lengths.astype(np.uint16), kind="pairs", fingerprint=f"{num_pairs} {seed}")


def samplers_of(source: Any, options: dict[str, Any], world_size: int, seed: int) -> list[BucketBatchSampler]:
    own = dict(options)
    for name in ("batch_size", "max_tokens"):  # of all ranks together, but balanced batches are by number
        if name in own and (name == "batch_size" or not own.get("balance")):
            own[name] //= world_size
    if own.get("balance") and "max_tokens" in own:
        own["accumulation"] = 12 // world_size
    return [
        BucketBatchSampler(source, **own, seed=seed, tail="uneven", rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


def parted(rows: list[int]) -> bool:
    """Whether a batch is not the rows of whole pairs."""
    return {row ^ 1 for row in rows} != {*rows} or len({*rows}) != len(rows)


def run(source: Any, options: dict[str, Any], seed: int, stops: int) -> int:
    """One epoch, stopped and resumed so often, each time with another number of ranks; returns the pairs given."""
    chance = random.Random(seed)
    seen = np.zeros(len(source.lengths), np.int64)
    state, epoch_over = None, False
    for part in range(stops + 1):
        samplers = samplers_of(source, options, chance.choice(WORLD_SIZES), seed)
        whole = 12 // len(samplers) if options.get("balance") else 1  # batches of an optimizer step
        steps = None if part == stops else whole * chance.randint(1, 300)
        for sampler in samplers:
            if state is not None:
                sampler.load_state_dict(state)
            for count, rows in enumerate(sampler, 1):
                assert not parted(rows), rows
                np.add.at(seen, rows, 1)
                if count == steps:
                    break
            else:
                epoch_over = True
        if epoch_over:
            assert all(sampler.epoch == 1 for sampler in samplers)
            break
        state = samplers[0].state_dict()
    assert epoch_over
    assert (seen == 1).all(), np.unique(seen, return_counts=True)
    return len(seen) // 2


def main(num_pairs: int = 100_000, seed: int = 0) -> None:
    source = make_source(num_pairs, seed)
    for name, options in POLICIES.items():
        for stops in (0, 2, 5):
            found = run(source, options, seed + stops, stops)
            print(f"{name}, {stops} stops: {found:,} pairs, none parted, each once", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
