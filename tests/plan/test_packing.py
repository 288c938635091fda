"""Packing: nothing lost, nothing overfull, nearly nothing unused, and batches as a plain oracle makes them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastcollate.check.reference_check import expected_batch
from fastcollate.collate.batch import PackedBatch
from fastcollate.collate.collator import Collator
from fastcollate.errors import InputError
from fastcollate.plan.packing import Packs, pack_lengths
from fastcollate.plan.plan import EpochPlan, plan_epoch
from fastcollate.store.store import Example
from fastcollate.train import MaskOptions
from tests.helpers import APPEND, make_shards

PAD = 50256


def plain_best_fit(lengths: list[int], capacity: int) -> int:
    """The number of bins that best fit decreasing needs, by looking at every bin."""
    rooms: list[int] = []
    for length in sorted((min(n, capacity) for n in lengths), reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


@given(st.lists(st.integers(0, 90), max_size=60), st.integers(1, 80))
def test_bins_are_those_of_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    bins, num_bins = pack_lengths(np.array(lengths, np.int64), capacity)
    used = np.bincount(bins, np.minimum(lengths, capacity), num_bins) if lengths else np.zeros(0)
    assert len(used) == num_bins == plain_best_fit(lengths, capacity)
    assert (used <= capacity).all()


def test_a_capacity_that_fills_its_last_word_of_rooms() -> None:
    for capacity in (31, 63, 32, 64):
        assert pack_lengths([capacity // 2 + 1] * 3, capacity).num_bins == 3


def test_lognormal_lengths_leave_half_a_percent_at_most() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(80), 0.7, 64_000), 8, 1024).astype(np.uint16)
    assert lengths.sum() / (pack_lengths(lengths, 1024).num_bins * 1024) >= 0.995


def test_wrong_values_are_named() -> None:
    for capacity in (0, 2**25):
        with pytest.raises(InputError, match=f"capacity={capacity}"):
            pack_lengths([1], capacity)
    with pytest.raises(InputError, match="lengths"):
        pack_lengths([-1], 4)
    for options, message in (
        ({"batch_size": 1}, "give capacity"),
        ({"batch_size": 1, "capacity": 0}, "capacity=0"),
        ({"max_tokens": 7, "capacity": 8}, "holds no pack"),
        ({"batch_size": 1, "capacity": 8, "long_rows": "cut"}, "long_rows='cut'"),
        ({"batch_size": 1, "capacity": 8, "policy": "bucketed"}, "for policy='packed'"),
    ):
        with pytest.raises(InputError, match=message):
            plan_epoch([1], **{"policy": "packed", **options})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ plans


def batches_of(plan: EpochPlan) -> list[Packs]:
    windows = [plan.packs(index) for index in range(plan.num_windows)]
    return [window.batch(number) for window in windows for number in range(window.num_batches)]


def parts_of(packs: Packs) -> list[list[tuple[int, int]]]:
    """Pack after pack: each part's row and first token."""
    starts = packs.starts.tolist() or [0] * len(packs.rows)
    parts = list(zip(packs.rows.tolist(), starts, strict=True))
    return [parts[a:b] for a, b in zip(packs.bounds[:-1].tolist(), packs.bounds[1:].tolist(), strict=True)]


def expected_parts(lengths: list[int], limit: int, long_rows: str) -> Counter[tuple[int, int]]:
    parts: Counter[tuple[int, int]] = Counter()
    for row, length in enumerate(lengths):
        if long_rows == "split":
            parts.update((row, start) for start in range(0, max(length, 1), limit))
        elif length <= limit or long_rows == "truncate":
            parts[row, 0] += 1
    return parts


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=120),
    capacity=st.integers(5, 50),
    max_length=st.none() | st.integers(3, 60),
    long_rows=st.sampled_from(["truncate", "split", "drop"]),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 4),
    window=st.none() | st.integers(1, 60),
    tail=st.sampled_from(["repeat", "uneven"]),
    drop_last=st.booleans(),
    seed=st.integers(0, 3),
)
def test_every_row_is_in_a_pack_that_holds_it(
    lengths: list[int], capacity: int, max_length: int | None, long_rows: str, batch_size: int, world_size: int,
    window: int | None, tail: str, drop_last: bool, seed: int,
) -> None:  # fmt: skip
    options: dict[str, Any] = {
        "policy": "packed", "batch_size": batch_size, "capacity": capacity, "max_length": max_length, "seed": seed,
        "long_rows": long_rows, "window": window, "tail": tail, "drop_last": drop_last, "world_size": world_size,
    }  # fmt: skip
    plans = [plan_epoch(lengths, rank=rank, **options) for rank in range(world_size)]
    batches = [batches_of(plan) for plan in plans]
    limit = min(max_length or capacity, capacity)
    seen: Counter[tuple[int, int]] = Counter()
    for plan, own in zip(plans, batches, strict=True):
        assert len(plan) == len(own)
        assert [rows.tolist() for rows in plan] == [packs.rows.tolist() for packs in own]
        for packs in own:
            assert packs.rows.dtype == packs.bounds.dtype == np.int64
            assert 1 <= packs.num_packs <= batch_size
            for pack in parts_of(packs):
                assert sum(min(lengths[row] - start, limit) for row, start in pack) <= capacity
                seen.update(pack)
    expected = expected_parts(lengths, limit, long_rows)
    assert set(seen) <= set(expected)
    if not drop_last:
        assert set(seen) == set(expected)
        if tail == "repeat":
            assert len({len(own) for own in batches}) == 1
            assert all(len({packs.num_packs for packs in step}) == 1 for step in zip(*batches, strict=True))
    if tail == "uneven":
        assert all(seen[part] == 1 for part in seen)


def test_every_step_but_the_last_is_full_and_little_is_unused() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(80), 0.7, 100_000), 8, 1024).astype(np.uint16)
    plan = plan_epoch(lengths, policy="packed", batch_size=8, capacity=1024, window=30_000)
    batches = batches_of(plan)
    assert plan.num_windows == 4
    assert {packs.num_packs for packs in batches[:-1]} == {8}
    assert lengths.sum() / (1024 * sum(packs.num_packs for packs in batches)) >= 0.995
    firsts = [int(lengths[packs.rows].max()) for packs in batches]
    assert abs(np.corrcoef(firsts[:-1], firsts[1:])[0, 1]) < 0.1  # packs of long rows are not next to each other


@pytest.mark.parametrize("balance", [True, False])
def test_a_step_holds_the_same_rows_at_every_world_size(balance: bool) -> None:
    lengths = np.random.default_rng(1).integers(1, 30, 500)
    options: dict[str, Any] = {"policy": "packed", "capacity": 60, "seed": 3, "window": 120, "balance": balance}
    whole = [sorted(packs.rows.tolist()) for packs in batches_of(plan_epoch(lengths, batch_size=12, **options))]
    for size in (2, 3, 4):
        ranks = [
            batches_of(plan_epoch(lengths, batch_size=12 // size, rank=rank, world_size=size, **options))
            for rank in range(size)
        ]
        steps = zip(*ranks, strict=True)
        assert [sorted(row for packs in step for row in packs.rows.tolist()) for step in steps] == whole


def test_seed_and_epoch_change_the_packs_and_nothing_else_does() -> None:
    lengths = np.random.default_rng(2).integers(1, 30, 300)
    orders = [
        [packs.rows.tolist() for packs in batches_of(
            plan_epoch(lengths, policy="packed", batch_size=2, capacity=64, window=100, seed=seed, epoch=epoch)
        )]
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]  # fmt: skip
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_sizes_are_taken_from_one_another() -> None:
    lengths = [5] * 40
    for plan, sizes in (
        (plan_epoch(lengths, policy="packed", max_tokens=33, max_length=10), (3, 10)),
        (plan_epoch(lengths, policy="packed", max_tokens=33), (1, 33)),
        (plan_epoch(lengths, policy="packed", batch_size=2, max_length=7), (2, 7)),
    ):
        assert (plan.batch_size, plan.capacity) == sizes


# ---------------------------------------------------------------------------------------------------------- batches


def oracle(
    examples: list[Example], packs: list[list[tuple[int, int]]], capacity: int, options: MaskOptions, *, left: bool
) -> tuple[list[list[int]], list[list[int]], list[list[int]], list[int]]:
    """Inputs, targets, positions and bounds, cell by cell, each row by the reference in a batch of its own."""
    limit = min(options.max_length or capacity, capacity)
    whole = MaskOptions(mask_prompt=options.mask_prompt, mode=options.mode)
    batch: tuple[list[list[int]], list[list[int]], list[list[int]]] = ([], [], [])
    ends = [0]
    for number, pack in enumerate(packs):
        cells: list[tuple[int, int, int]] = []
        for row, start in pack:
            inputs, targets = (one[0].tolist() for one in expected_batch([examples[row]], APPEND, whole))
            if left:
                start = max(len(inputs) - limit, 0)
            part = slice(start, start + limit)
            cells += [(a, b, i) for i, (a, b) in enumerate(zip(inputs[part], targets[part], strict=True))]
            if inputs[part]:
                ends.append(number * capacity + len(cells))
        while len(cells) < capacity:
            count = min(limit, capacity - len(cells))
            cells += [(PAD, -100, i) for i in range(count)]
            ends.append(number * capacity + len(cells))
        for column, one in zip(zip(*cells, strict=True), batch, strict=True):
            one.append(list(column))
    return *batch, ends


def assert_is(batch: PackedBatch, expected: tuple[Any, ...], inputs_dtype: torch.dtype) -> None:
    assert [tensor.tolist() for tensor in batch] == list(expected)
    assert [tensor.dtype for tensor in batch] == [inputs_dtype, torch.int64, torch.int64, torch.int32]
    assert all(tensor.is_contiguous() for tensor in batch)
    assert batch.max_seqlen == max(b - a for a, b in zip(expected[3][:-1], expected[3][1:], strict=True))


@st.composite
def examples(draw: st.DrawFn) -> list[Example]:
    """Rows of short texts, end-of-text inside now and then, with one turn or several."""
    rows = draw(st.lists(st.lists(st.sampled_from([1, 2, 3, PAD]) | st.integers(0, 50255), max_size=25), min_size=1))
    made = []
    for number, ids in enumerate(rows):
        cuts = sorted(draw(st.lists(st.integers(0, len(ids)), min_size=1, max_size=3)))
        spans = np.diff([0, *cuts, len(ids)])
        made.append(Example(np.array(ids, np.uint16), spans.astype(np.uint32), number))
    return made


@pytest.mark.slow
@given(
    examples=examples(),
    capacity=st.integers(3, 40),
    max_length=st.none() | st.integers(3, 30),
    long_rows=st.sampled_from(["truncate", "split", "drop"]),
    truncation=st.sampled_from(["right", "left"]),
    mask_prompt=st.booleans(),
    mode=st.sampled_from(["reference", "positional"]),
    narrow=st.booleans(),
    num_shards=st.integers(1, 3),
    batch_size=st.integers(1, 3),
)
def test_packs_equal_the_oracle(
    examples: list[Example], capacity: int, max_length: int | None, long_rows: str, truncation: str, mask_prompt: bool,
    mode: str, narrow: bool, num_shards: int, batch_size: int,
) -> None:  # fmt: skip
    options = MaskOptions(max_length=max_length, mask_prompt=mask_prompt, mode=mode)
    lengths = [len(example.input_ids) for example in examples]
    shards = make_shards(
        [e.input_ids.tolist() for e in examples], [e.spans.tolist() for e in examples], num_shards=num_shards
    )
    dtype = torch.int32 if narrow else torch.int64
    collator = Collator(
        shards, max_length=max_length, mask_prompt=mask_prompt, mode=mode, truncation=truncation, inputs_dtype=dtype
    )
    plan = plan_epoch(
        lengths, policy="packed", batch_size=batch_size, capacity=capacity, max_length=max_length, long_rows=long_rows
    )
    for packs in batches_of(plan):
        batch = collator.pack(packs.rows, packs.bounds, capacity=capacity, starts=packs.starts)
        left = truncation == "left" and len(packs.starts) == 0
        assert_is(batch, oracle(examples, parts_of(packs), capacity, options, left=left), dtype)


def test_packs_by_hand() -> None:
    shards = make_shards([[1, 2, 3], [4, 5, 6, 7], [8]], [[2, 1], [0, 4], [0, 1]], num_shards=2)
    collator = Collator(shards, mask_prompt=True, mode="positional")
    batch = collator.pack([0, 2, 1], [0, 2, 3], capacity=5)
    assert batch.inputs.tolist() == [[1, 2, 3, 8, PAD], [4, 5, 6, 7, PAD]]
    assert batch.targets.tolist() == [[-100, 3, PAD, PAD, -100], [5, 6, 7, PAD, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 0]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 5, 9, 10]
    assert batch.max_seqlen == 4
    parts = collator.pack([1, 1], [0, 1, 2], starts=[0, 2], capacity=2)
    assert (parts.inputs.tolist(), parts.targets.tolist()) == ([[4, 5], [6, 7]], [[5, 6], [7, PAD]])


def test_packs_that_cannot_be_are_named() -> None:
    collator = Collator(make_shards([[1, 2, 3], [4, 5, 6, 7], []]))
    for rows, bounds, options, message in (
        ([0, 1], [0, 2], {"capacity": 6}, "pack 0 take 7 cells up to row 1, more than capacity=6"),
        ([1, 0, 1], [0, 1, 3], {"capacity": 6}, "pack 1 take 7 cells"),
        ([0, 0, 1], [0, 3], {"capacity": 6}, "take 10 cells up to row 1"),  # the two before it fill the pack
        ([0, 3], [0, 2], {"capacity": 6}, "row 3 of the store, which has 3 rows"),
        ([0], [0, 1], {"capacity": 2, "starts": [4]}, "cannot start at token 4"),
        ([0], [0, 1], {"capacity": 2, "starts": [-1]}, "cannot start at token -1"),
        ([2], [0, 1], {"capacity": 2, "starts": [1]}, "row 2 fills 0 cells: a part of it cannot start at token 1"),
        ([0, 1, 0], [0, 3], {"capacity": 3, "starts": [3, 0, 0]}, "take 6 cells up to row 0, more than capacity=3"),
        ([0], [0, 1], {"capacity": 2, "starts": [0, 1]}, "2 starts of 1 rows"),
        ([0, 1], [0, 1], {"capacity": 9}, "bounds"),
        ([0], [0], {"capacity": 9}, "bounds"),
        ([0, 1], [0, 2, 1, 2], {"capacity": 9}, "bounds"),
        ([0], [0, 1], {"capacity": 2**31}, "give 1 to 16,777,216"),
        ([0], [0] + [1] * 128, {"capacity": 2**24}, "int32"),
    ):
        with pytest.raises(InputError, match=message):
            collator.pack(rows, bounds, **options)
