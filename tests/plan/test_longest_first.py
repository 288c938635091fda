"""The longest batch first: the same batches as without, of which two have changed places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastcollate import BatchLoader, BucketBatchSampler, plan_epoch
from fastcollate.errors import InputError
from tests.helpers import make_store

LENGTHS = np.random.default_rng(0).integers(1, 60, 500)


def cells(lengths: Any, ranks: list[list[Any]], step: int, limit: int) -> int:
    """Cells of a step on all ranks together, by its longest row."""
    rows = [row for batches in ranks if step < len(batches) for row in batches[step]]
    return len(rows) * max((min(int(lengths[row]), limit) for row in rows), default=0)


@pytest.mark.parametrize("seed", range(60))
def test_two_steps_change_places_and_the_first_is_the_largest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 50, rng.integers(1, 300))
    options: dict[str, Any] = {
        "policy": ("sequential", "shuffled", "bucketed")[seed % 3],
        "window": int(rng.integers(8, 80)), "seed": seed, "tail": ("repeat", "uneven")[seed // 3 % 2],
        "drop_last": seed % 4 == 3, "max_length": (None, 30)[seed // 5 % 2], "world_size": int(rng.integers(1, 5)),
        **({"batch_size": int(rng.integers(1, 9))} if seed // 2 % 2 else {"max_tokens": int(rng.integers(50, 200))}),
        "epoch": seed % 3, "balance": False,
    }  # fmt: skip
    ranks = range(options["world_size"])
    plain = [list(plan_epoch(lengths, rank=rank, **options)) for rank in ranks]
    first = [list(plan_epoch(lengths, rank=rank, longest_first=True, **options)) for rank in ranks]
    moved = set()
    for old, new in zip(plain, first, strict=True):
        assert sorted(map(tuple, old)) == sorted(map(tuple, new))
        moved.add(tuple(step for step, (a, b) in enumerate(zip(old, new, strict=True)) if a.tolist() != b.tolist()))
    assert len(max(moved, default=(), key=len)) in (0, 2)
    limit, group = options["max_length"] or 60, plan_epoch(lengths, **options).options.group
    even = [s for s in range(len(first[0])) if sum(len(own[s]) for own in first if s < len(own)) % group == 0]
    assert all(cells(lengths, first, 0, limit) >= cells(lengths, first, step, limit) for step in even)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_first_step_of_balanced_batches_has_the_largest_one(accumulation: int) -> None:
    for seed in range(20):
        options: dict[str, Any] = {
            "max_tokens": 150, "window": 100, "seed": seed, "world_size": 2, "accumulation": accumulation,
            "policy": ("bucketed", "shuffled")[seed % 2],
        }  # fmt: skip
        plain = [list(plan_epoch(LENGTHS, rank=rank, **options)) for rank in range(2)]
        first = [list(plan_epoch(LENGTHS, rank=rank, longest_first=True, **options)) for rank in range(2)]
        for old, new in zip(plain, first, strict=True):
            assert sorted(map(tuple, old)) == sorted(map(tuple, new))
        cells = [[len(rows) * int(LENGTHS[rows].max()) for rows in own] for own in first]
        assert max(max(own[:accumulation]) for own in cells) == max(map(max, cells))


def test_a_run_continues_at_another_world_size_and_gives_each_row_once() -> None:
    options: dict[str, Any] = {"policy": "bucketed", "window": 64, "seed": 3, "longest_first": True}
    for steps in (0, 1, 7, 20):
        ranks = [BucketBatchSampler(LENGTHS, batch_size=4, rank=r, world_size=2, **options) for r in range(2)]
        given = [row for sampler in ranks for batch, _ in zip(sampler, range(steps), strict=False) for row in batch]
        for sampler in ranks:
            sampler.set_position(0, steps)
        other = BucketBatchSampler(LENGTHS, batch_size=8, **options)
        other.load_state_dict(ranks[0].state_dict())
        rest = [row for batch in other for row in batch]
        assert sorted({*given, *rest}) == list(range(500))
        assert len(given) == 8 * steps
        assert not set(given) & set(rest[: len(rest) - (-500 % 8)])


def test_the_loader_meets_the_largest_batch_at_once() -> None:
    store = make_store([list(range(1, length + 1)) for length in LENGTHS.tolist()])
    batches = [tuple(b.inputs.shape) for b in BatchLoader(store, policy="shuffled", batch_size=8, longest_first=True)]
    assert batches[0][1] == max(width for _, width in batches) == LENGTHS.max()


def test_states_from_before_and_of_another_order() -> None:
    sampler = BucketBatchSampler(LENGTHS, batch_size=8)
    state = sampler.state_dict()
    assert state.pop("longest_first") is False
    state = {name: state[name] for name in state if name not in ("balance", "accumulation", "cost")} | {"version": 3}
    sampler.load_state_dict(state)
    with pytest.raises(InputError, match="longest_first=False, this sampler True"):
        BucketBatchSampler(LENGTHS, batch_size=8, longest_first=True).load_state_dict(state)


def test_what_it_cannot_be() -> None:
    with pytest.raises(InputError, match="longest_first=True with policy='packed'"):
        plan_epoch(LENGTHS, batch_size=2, policy="packed", capacity=64, longest_first=True)
    with pytest.raises(InputError, match="longest_first='yes': give True or False"):
        plan_epoch(LENGTHS, batch_size=2, longest_first="yes")  # type: ignore[arg-type]
