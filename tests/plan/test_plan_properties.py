"""Plans as pure functions: every row, disjoint ranks, no group over its budget, the same again for the same seed."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastcollate import BucketBatchSampler
from fastcollate.errors import InputError
from fastcollate.plan.plan import plan_epoch
from fastcollate.store import layout

lengths_strategy = st.lists(st.integers(0, 30), min_size=1, max_size=150).map(lambda n: np.array(n, np.uint16))
policies = st.sampled_from(["sequential", "shuffled", "bucketed"])


@given(
    lengths=lengths_strategy,
    policy=policies,
    batch_size=st.integers(1, 7),
    world_size=st.integers(1, 4),
    window=st.none() | st.integers(1, 60),
    tail=st.sampled_from(["repeat", "uneven"]),
    drop_last=st.booleans(),
    seed=st.integers(0, 5),
)
def test_batches_of_a_size(
    lengths: np.ndarray, policy: str, batch_size: int, world_size: int, window: int | None, tail: str,
    drop_last: bool, seed: int,
) -> None:  # fmt: skip
    options = {"policy": policy, "batch_size": batch_size, "window": window, "seed": seed, "tail": tail}
    plans = [
        plan_epoch(lengths, rank=rank, world_size=world_size, drop_last=drop_last, **options)
        for rank in range(world_size)
    ]
    batches = [list(plan) for plan in plans]
    group = batch_size * world_size
    counts = Counter(int(row) for own in batches for rows in own for row in rows)
    assert set(counts) <= set(range(len(lengths)))
    for plan, own in zip(plans, batches, strict=True):
        assert len(plan) == len(own)
        assert all(1 <= len(rows) <= batch_size and rows.dtype == np.int64 for rows in own)
        assert sum(len(rows) < batch_size for rows in own) <= 1
        windows = [plan.window(index) for index in range(plan.num_windows)]
        by_window = [rows[a:b] for rows, bounds in windows for a, b in pairwise(bounds)]
        assert [rows.tolist() for rows in by_window] == [rows.tolist() for rows in own]
    if drop_last:
        assert sum(counts.values()) == len(lengths) // group * group
        assert max(counts.values(), default=1) == 1
        assert all(len(rows) == batch_size for own in batches for rows in own)
    else:
        assert set(counts) == set(range(len(lengths)))
        extra = sum(counts.values()) - len(lengths)
        assert extra == (-len(lengths) % world_size if tail == "repeat" else 0)
        if tail == "repeat":
            assert len({len(own) for own in batches}) == 1
    again = plan_epoch(lengths, world_size=world_size, drop_last=drop_last, **options)
    assert [rows.tolist() for rows in again] == [rows.tolist() for rows in batches[0]]


@given(
    lengths=lengths_strategy,
    policy=policies,
    budget=st.integers(30, 200),
    world_size=st.integers(1, 3),
    balance=st.sampled_from([None, False]),
)
def test_batches_of_a_token_budget(
    lengths: np.ndarray, policy: str, budget: int, world_size: int, balance: bool | None
) -> None:
    seen: Counter[int] = Counter()
    sizes = set()
    for rank in range(world_size):
        plan = plan_epoch(lengths, policy=policy, max_tokens=budget, rank=rank, world_size=world_size, balance=balance)
        batches = list(plan)
        assert len(plan) == len(batches)
        sizes.add(len(batches))
        for rows in batches:
            assert len(rows) >= 1
            assert len(rows) * int(lengths[rows].max()) <= budget
            seen.update(rows.tolist())
        if world_size == 1 and policy == "sequential":  # a group ends only where the next row does not fit
            for rows, following in pairwise(batches):
                width = max(int(lengths[rows].max()), int(lengths[following[0]]), 1)
                assert (len(rows) + 1) * width > budget
    assert set(seen) == set(range(len(lengths)))
    repeated = sum(seen.values()) - len(lengths)
    halved = plan.balance and len(batches) * world_size < len(lengths)  # before a row is repeated
    assert repeated == (0 if halved else -len(lengths) % world_size)
    assert len(sizes) == 1


@st.composite
def any_plan(draw: st.DrawFn) -> dict[str, Any]:
    """Options of every kind together, of few rows, so that ends and steps that are not full come often."""
    how = draw(st.sampled_from(["rows", "tokens", "packs"]))
    world_size, accumulation = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    options: dict[str, Any] = {
        "accumulation": accumulation, "tail": draw(st.sampled_from(["repeat", "uneven"])),
        "drop_last": draw(st.booleans()), "seed": draw(st.integers(0, 3)), "world_size": world_size,
        "window": draw(st.sampled_from([None, 3, 7, 20])), "order": draw(st.sampled_from(["rows", "shards"])),
    }  # fmt: skip
    if how == "packs":
        filled: dict[str, Any] = draw(
            st.sampled_from(
                [
                    {"packing": "concatenate"}, {"packing": "crop"}, {"cp_size": 2}, {}, {"long_rows": "drop"},
                    {"long_rows": "split"}, {"long_rows": "split", "stride": 9}, {"max_length": 20},
                ]
            )
        )  # fmt: skip
        capacity = draw(st.sampled_from([32, 60, 88] if "cp_size" in filled else [9, 25, 33, 90]))
        batch_size, balance = draw(st.integers(1, 3)), draw(st.sampled_from([None, False]))
        return {
            **options, **filled, "policy": "packed", "capacity": capacity, "batch_size": batch_size, "balance": balance
        }  # fmt: skip
    options |= {"policy": draw(policies), "balance": draw(st.sampled_from([None, False])) if how == "tokens" else None}
    if how == "tokens":
        return {**options, "max_tokens": draw(st.sampled_from([30, 35, 60, 200]))}
    return {**options, "batch_size": draw(st.integers(1, 4))}


def store_of(lengths: list[int], kind: str, shard: int) -> Any:
    """What a sampler asks of a store, in shards of so many rows (pairs)."""
    lengths, shard = (lengths + lengths[::-1], 2 * shard) if kind == "pairs" else (lengths, shard)
    sizes = [min(shard, len(lengths) - first) for first in range(0, len(lengths), shard)]
    manifest = {"shards": [{"num_rows": size} for size in sizes]}
    return SimpleNamespace(lengths=np.array(lengths), kind=kind, fingerprint="x", manifest=manifest)


few_lengths = st.lists(st.sampled_from([0, 1, 10, 16, 29, 30]), min_size=1, max_size=9)


@given(
    lengths=few_lengths | st.lists(st.integers(0, 30), min_size=1, max_size=40),
    options=any_plan(), kind=st.sampled_from(["rows", "pairs"]), shard=st.sampled_from([1, 4, 11]),
)  # fmt: skip
@example(lengths=[0, 16, 0], kind="rows", shard=1,
         options={"policy": "shuffled", "max_tokens": 30, "world_size": 2, "drop_last": False, "tail": "repeat"}
)  # fmt: skip
def test_no_rank_has_more_steps_than_another(
    lengths: list[int], options: dict[str, Any], kind: str, shard: int
) -> None:
    """A rank that goes on alone waits for the others for ever."""
    store = store_of(lengths, kind, shard)
    ranks = []
    try:
        ranks = [BucketBatchSampler(store, rank=rank, **options) for rank in range(options["world_size"])]
    except InputError as error:  # what cannot be is told when the sampler is made
        told = str(error)
    if not ranks:
        assert re.search("leave no batch|is no answer|has room for", told)
        return
    lens = [len(sampler) for sampler in ranks]
    batches = [[*sampler] for sampler in ranks]
    assert lens == [len(own) for own in batches]
    if options["drop_last"] or options["tail"] == "repeat":
        assert len(set(lens)) == 1
    parts = Counter(part for own in batches for rows in own for part in parts_of(rows))
    if options["drop_last"] or options["tail"] == "uneven":
        assert max(parts.values(), default=1) == 1
    if not options["drop_last"] and options.get("packing") != "crop" and options.get("long_rows") != "drop":
        missing = set(range(len(store.lengths))) - {row for row, _ in parts}
        assert all(options.get("packing") == "concatenate" and not store.lengths[row] for row in missing)
    if kind == "pairs":
        assert Counter(row for row, _ in parts.elements() if row % 2) == Counter(
            row + 1 for row, _ in parts.elements() if row % 2 == 0
        )


def parts_of(rows: list[int]) -> list[tuple[int, int]]:
    """The rows of a batch, each with the token that its part begins with."""
    starts = getattr(rows, "starts", None) or [0] * len(rows)
    return [(row, start & layout.FIRST_TOKEN) for row, start in zip(rows, starts, strict=True)]


def test_the_policies_order() -> None:
    lengths = np.random.default_rng(0).permutation(64)
    assert np.concatenate(list(plan_epoch(lengths, policy="sequential", batch_size=5))).tolist() == list(range(64))
    shuffled = np.concatenate(list(plan_epoch(lengths, policy="shuffled", batch_size=4)))
    assert shuffled.tolist() != list(range(64))
    bucketed = list(plan_epoch(lengths, policy="bucketed", batch_size=4))
    spans = sorted(sorted(lengths[rows].tolist()) for rows in bucketed)
    assert spans == [list(range(first, first + 4)) for first in range(0, 64, 4)]
    assert [lengths[rows].min() for rows in bucketed] != list(range(0, 64, 4))


def test_seed_and_epoch_change_the_order() -> None:
    lengths = np.full(200, 9)
    orders = {
        (seed, epoch): np.concatenate(
            list(plan_epoch(lengths, policy="shuffled", batch_size=8, window=40, seed=seed, epoch=epoch))
        ).tobytes()
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4


def test_a_step_holds_the_same_rows_at_every_world_size() -> None:
    lengths = np.random.default_rng(1).integers(1, 99, 240)
    whole = [sorted(rows.tolist()) for rows in plan_epoch(lengths, batch_size=12, seed=3)]
    for world_size in (2, 3, 4):
        plans = [
            list(plan_epoch(lengths, batch_size=12 // world_size, seed=3, rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        assert [sorted(np.concatenate(step).tolist()) for step in zip(*plans, strict=True)] == whole


@pytest.mark.parametrize(
    "options",
    [
        {}, {"batch_size": 2, "max_tokens": 9}, {"batch_size": 0}, {"batch_size": 2, "window": 0},
        {"batch_size": 2, "policy": "sorted"}, {"batch_size": 2, "tail": "cut"}, {"batch_size": 2, "rank": 1},
        {"batch_size": 2, "rank": -1}, {"max_tokens": 9, "world_size": 2, "shares": 3}, {"max_tokens": 0},
        {"batch_size": 2, "max_length": 0}, {"batch_size": 2, "block": 0}, {"batch_size": 2**63},
        {"max_tokens": 2**40}, {"batch_size": 2, "window": 2**70}, {"batch_size": 2, "epoch": -1},
        {"batch_size": 2, "epoch": 2**63}, {"batch_size": 2, "world_size": 2**21},
        {"max_tokens": 9, "shares": 2**21}, {"max_tokens": 9, "shares": 0},
    ],
)  # fmt: skip
def test_wrong_options(options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        plan_epoch([1, 2, 3], **options)  # type: ignore[arg-type]


def test_wrong_lengths() -> None:
    for lengths in ([1.5], [[1, 2]], "ab"):
        with pytest.raises(InputError):
            plan_epoch(lengths, batch_size=1)
    assert list(plan_epoch([], batch_size=1)) == []
    with pytest.raises(InputError, match="row 1 has 10 tokens, more than max_tokens=9"):
        list(plan_epoch([3, 10], max_tokens=9, policy="sequential"))
    plan = plan_epoch([3, 10], max_tokens=9, max_length=9)
    assert sorted(row for rows in plan for row in rows.tolist()) == [0, 1]
    with pytest.raises(IndexError):
        plan.window(1)


@pytest.mark.parametrize("length", [-1, -5, -(2**31), -(2**32), -(2**63), 2**64 - 1])
@pytest.mark.parametrize(
    "options",
    [
        {"policy": "bucketed", "batch_size": 4},
        {"policy": "bucketed", "batch_size": 4, "max_length": 10},
        {"policy": "shuffled", "max_tokens": 64},
        {"policy": "packed", "batch_size": 1, "capacity": 32},
        {"policy": "bucketed", "batch_size": 4, "window": 100, "block": 64},
    ],
)
def test_a_negative_length_is_told(length: int, options: dict[str, Any]) -> None:
    lengths = np.full(300, 9, np.uint64 if length > 0 else np.int64)
    lengths[217] = length
    with pytest.raises(InputError, match=f"row 217 has a length of {length}"):
        list(plan_epoch(lengths, **options))


@pytest.mark.parametrize("max_length", [None, 2**35, 10**30])
def test_lengths_beyond_32_bits_are_long(max_length: int | None) -> None:
    lengths = np.array([3, 2**33, 1, 2**31, 2, 2**62])
    rows = np.concatenate(list(plan_epoch(lengths, policy="bucketed", batch_size=6, max_length=max_length)))
    assert rows[:3].tolist() == [2, 4, 0]
    assert sorted(rows[3:].tolist()) == [1, 3, 5]


def test_a_window_far_wider_than_the_rows_counts_no_more_than_these() -> None:
    (rows,) = plan_epoch([3, 2**31, 1], policy="bucketed", batch_size=3, window=2**39)
    assert rows.tolist() == [2, 0, 1]


def test_an_uneven_tail_leaves_no_batch_without_rows() -> None:
    """With `max_tokens` the last rows of a window may be fewer than the ranks; the batches are shuffled."""
    lengths = np.tile([3, 90, 7], 17)[:50]
    without = 0
    for seed in range(40):
        plans = [
            plan_epoch(lengths, max_tokens=100, world_size=4, rank=rank, tail="uneven", seed=seed, balance=False)
            for rank in range(4)
        ]
        batches = [list(plan) for plan in plans]
        assert all(len(rows) for own in batches for rows in own)
        assert sorted(int(row) for own in batches for rows in own for row in rows) == list(range(50))
        without += len({len(own) for own in batches}) > 1
    assert without > 0


def of_rows(num_rows: int) -> np.ndarray:
    return np.broadcast_to(np.uint16(1), num_rows)  # takes no memory


def test_windows_and_blocks_by_default() -> None:
    many = of_rows(5_000_000)
    assert plan_epoch(many, batch_size=64).window_rows == 65_536
    assert plan_epoch(many, batch_size=32, world_size=2).window_rows == 65_536
    assert plan_epoch(many, batch_size=17).window_rows == 17_408
    assert plan_epoch(many, batch_size=1).window_rows == 16_384
    assert plan_epoch(many, batch_size=1000).window_rows == 263_000
    assert plan_epoch(many, max_tokens=4096).window_rows == 16_384
    assert plan_epoch(many, batch_size=2, policy="packed", capacity=8).window_rows == 262_144
    assert plan_epoch(many, batch_size=8, window=17).window_rows == 24
    assert [plan_epoch(of_rows(n), batch_size=8).block for n in (4_194_303, 4_194_304)] == [1, 64]


def test_a_plan_cannot_be_changed() -> None:
    plan = plan_epoch([1, 2, 3], batch_size=2)
    with pytest.raises(AttributeError):
        plan.seed = 1
    with pytest.raises(AttributeError):
        plan.epoch = 1  # type: ignore[misc]
    assert (plan.seed, plan.epoch, plan.batch_size, plan.policy) == (0, 0, 2, "bucketed")
    with pytest.raises(AttributeError, match="'sed'"):
        plan.sed  # noqa: B018
    assert [rows.tolist() for rows in pickle.loads(pickle.dumps(plan))] == [rows.tolist() for rows in plan]


@pytest.mark.parametrize("windows", [1, 2, 3])
@pytest.mark.parametrize("block", [1, 2, 4])
def test_every_row_is_shuffled_however_many_windows(windows: int, block: int) -> None:
    plan = plan_epoch(of_rows(96), policy="shuffled", batch_size=4, window=96 // windows, block=block, seed=5)
    assert plan.num_windows == windows
    rows = np.concatenate(list(plan))
    assert sorted(rows.tolist()) == list(range(96))
    assert (np.diff(rows) == 1).sum() < 12  # a row's neighbour follows it by chance only
    first = rows[: 96 // windows]
    assert windows == 1 or first.max() - first.min() > 96 // windows + 3  # drawn from everywhere


@pytest.mark.parametrize("num_rows", [100, 103])
@pytest.mark.parametrize("window", [25, 30, 200])
def test_windows_that_begin_within_a_block(num_rows: int, window: int) -> None:
    plan = plan_epoch(of_rows(num_rows), policy="shuffled", batch_size=5, window=window, block=4, seed=3)
    assert sorted(np.concatenate(list(plan)).tolist()) == list(range(num_rows))


@pytest.mark.parametrize("shares", [0, -2, 3])
def test_shares_that_ranks_cannot_divide(shares: int) -> None:
    with pytest.raises(InputError, match=f"shares={shares}: give a multiple of world_size=2"):
        plan_epoch([1, 2], max_tokens=8, world_size=2, shares=shares)


@pytest.mark.parametrize("num_rows", [4096, 4096 - 3])
def test_the_widest_batch_of_a_window_comes_anywhere_but_what_is_left_over_last(num_rows: int) -> None:
    lengths = np.random.default_rng(0).permutation(num_rows) + 1
    plan = plan_epoch(lengths, batch_size=8, window=64)
    places = []
    for index in range(plan.num_windows):
        rows, bounds = plan.window(index)
        if len(rows) % 8:
            assert len(rows) - bounds[-2] == len(rows) % 8
        else:
            places.append(int(np.argmax(np.maximum.reduceat(lengths[rows], bounds[:-1]))))
    counts = np.bincount(places, minlength=8)  # of 63 or 64 windows, eight in each place on average
    assert counts.min() >= 1
    assert counts.max() <= 22  # beyond five standard deviations
