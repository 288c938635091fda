"""Small packs, told cell by cell: what `pack_rows` and `Packs` give, bounds and all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastcollate.collate import fill as kernels
from fastcollate.collate.collator import Collator
from fastcollate.errors import InputError
from fastcollate.plan.packing import Packs, _split, pack_lengths, pack_rows
from fastcollate.plan.plan import plan_epoch
from tests.helpers import make_shards

NONE = np.empty(0, np.int64)


def packs(rows: list[int], bounds: list[int], starts: list[int] | None = None) -> Packs:
    return Packs(np.array(rows, np.int64), NONE if starts is None else np.array(starts), np.array(bounds))


def told(found: Packs) -> tuple[list[int], list[int], list[int]]:
    return found.rows.tolist(), found.starts.tolist(), found.bounds.tolist()


def test_the_packs_of_most_rows_are_halved_first() -> None:
    eight = packs(list(range(10, 18)), [0, 5, 6, 8])
    assert told(eight.filled_up(3, repeat=True)) == (list(range(10, 18)), [], [0, 5, 6, 8])
    assert told(eight.filled_up(4, repeat=True)) == (list(range(10, 18)), [], [0, 2, 5, 6, 8])
    assert told(eight.filled_up(6, repeat=True)) == (list(range(10, 18)), [], [0, 2, 3, 5, 6, 7, 8])
    assert told(eight.filled_up(8, repeat=False)) == (list(range(10, 18)), [], list(range(9)))


def test_a_pack_of_two_is_halved_and_one_of_one_is_not() -> None:
    assert told(packs([4, 9], [0, 2]).filled_up(2, repeat=True)) == ([4, 9], [], [0, 1, 2])
    assert told(packs([4, 9], [0, 1, 2]).filled_up(5, repeat=True)) == ([4, 9, 4, 9, 4], [], [0, 1, 2, 3, 4, 5])
    assert told(packs([4, 9], [0, 1, 2]).filled_up(4, repeat=False)) == ([4, 9], [], [0, 1, 2, 2, 2])


def test_rows_are_repeated_with_their_starts_and_nothing_is_made_of_nothing() -> None:
    assert told(packs([7], [0, 1], [3]).filled_up(3, repeat=True)) == ([7, 7, 7], [3, 3, 3], [0, 1, 2, 3])
    assert told(packs([], [0]).filled_up(2, repeat=True)) == ([], [], [0, 0, 0])


def test_packs_in_another_order_and_end_to_end() -> None:
    some = packs([1, 2, 3, 4], [0, 1, 3, 4], [5, 6, 7, 8])
    assert told(some.take(np.array([2, 1]))) == ([4, 2, 3], [8, 6, 7], [0, 1, 3])
    assert told(some.followed_by(packs([9, 8], [0, 2], [1, 2]))) == (
        [1, 2, 3, 4, 9, 8], [5, 6, 7, 8, 1, 2], [0, 1, 3, 4, 6],
    )  # fmt: skip
    assert some.num_packs == 3


def pack(lengths: list[int], capacity: int, limit: int, long_rows: str) -> tuple[list[int], list[int], list[int]]:
    rows = np.arange(len(lengths)) + 100
    return told(pack_rows(rows, np.array(lengths, np.int32), capacity, limit, long_rows))


def test_best_fit_decreasing_by_hand() -> None:
    # 6 and 5 open packs; 4 fits the one of 6 exactly, 3 the one of 5; 2 fills that up.
    assert pack([3, 6, 2, 5, 4], 10, 10, "truncate") == ([101, 104, 100, 102, 103], [], [0, 2, 5])
    assert pack([10, 10], 10, 10, "truncate") == ([101, 100], [], [0, 1, 2])  # of equal ones the last first
    assert pack([], 10, 10, "truncate") == ([], [], [0])
    assert pack([0, 0], 10, 10, "truncate") == ([100, 101], [], [0, 2])


def test_rows_beyond_the_limit() -> None:
    assert pack([4, 5, 9], 8, 4, "truncate") == ([101, 102, 100], [], [0, 2, 3])
    assert pack([4, 5, 3], 8, 4, "drop") == ([100, 102], [], [0, 2])
    assert pack([5, 9], 8, 4, "drop") == ([], [], [0])
    rows, starts, bounds = pack([0, 9], 8, 4, "split")
    assert sorted(zip(rows, starts, strict=True)) == [(100, 0), (101, 0), (101, 4), (101, 8)]
    assert bounds[-1] == 4
    assert len(bounds) == 3


def test_too_many_parts_are_refused_before_memory_is_taken() -> None:
    with pytest.raises(InputError, match=r"2 rows in parts of 4 tokens .*\(row 101 alone has 2147483647 tokens\)"):
        pack_rows(np.array([100, 101]), np.array([4, 2**31 - 1], np.int32), 8, 4, "split")


def test_nothing_is_split_that_fits() -> None:
    assert pack([4, 4], 8, 4, "split") == ([100, 101], [], [0, 2])
    assert pack([], 8, 4, "split") == ([], [], [0])


def test_the_largest_capacity() -> None:
    pack_lengths([1], 1)
    pack_lengths([1], 16_777_216)
    for capacity in (0, -1, 16_777_217):
        with pytest.raises(InputError, match=r"give 1 to 16,777,216"):
            pack_lengths([1], capacity)


def test_lengths_that_are_none() -> None:
    assert pack_lengths([0, 3], 4).num_bins == 1
    for wrong in ([-1, 3], [[1, 2]], [1.5]):
        with pytest.raises(InputError, match="one integer of at least 0 a row"):
            pack_lengths(wrong, 4)


def plan_of(lengths: list[int], **options: Any) -> list[tuple[list[int], list[int]]]:
    """Each window's rows and the bounds of its packs."""
    plan = plan_epoch(np.array(lengths, np.int32), policy="packed", **options)
    windows = [plan.packs(index).packs for index in range(plan.num_windows)]
    return [(packs.rows.tolist(), packs.bounds.tolist()) for packs in windows]


def test_only_the_last_window_may_leave_a_step_short() -> None:
    # Each window of eight rows makes two packs; a step has four, which the first window is halved to.
    (_, first), (_, last) = plan_of([1] * 16, batch_size=4, capacity=4, window=8)
    assert len(first) - 1 == 4
    assert len(last) - 1 == 2
    ((_, only),) = plan_of([1] * 8, batch_size=4, capacity=4)
    assert len(only) - 1 == 2


@pytest.mark.parametrize("tail", ["repeat", "uneven"])
def test_a_window_of_fewer_rows_than_packs(tail: str) -> None:
    lengths = [9, 9, 9, 1] * 2  # the long ones are dropped: one row a window, of four packs
    for rows, bounds in plan_of(lengths, batch_size=4, capacity=4, window=4, long_rows="drop", tail=tail)[:1]:
        assert len(bounds) - 1 == 4
        if tail == "repeat":
            assert len(rows) == 4
            assert len(set(rows)) == 1
        else:
            assert len(rows) < 4


def test_what_is_left_after_the_last_whole_step() -> None:
    lengths = [4] * 10  # ten packs, of which two steps of four on each of two ranks take eight
    dropped = [plan_of(lengths, batch_size=2, capacity=4, world_size=2, rank=rank, drop_last=True) for rank in (0, 1)]
    assert [len(rows) for ((rows, _),) in dropped] == [4, 4]
    assert len({row for ((rows, _),) in dropped for row in rows}) == 8
    kept = [plan_of(lengths, batch_size=2, capacity=4, world_size=2, rank=rank) for rank in (0, 1)]
    assert sorted(row for ((rows, _),) in kept for row in rows) == list(range(10))
    odd = [plan_of([4] * 9, batch_size=2, capacity=4, world_size=2, rank=rank) for rank in (0, 1)]
    assert [len(rows) for ((rows, _),) in odd] == [5, 5]
    assert len({row for ((rows, _),) in odd for row in rows}) == 9
    uneven = [plan_of([4] * 9, batch_size=2, capacity=4, world_size=2, rank=rank, tail="uneven") for rank in (0, 1)]
    assert [len(rows) for ((rows, _),) in uneven] == [5, 4]


@pytest.mark.parametrize("index", [-1, 2])
def test_a_window_that_is_not_there(index: int) -> None:
    plan = plan_epoch([1] * 8, batch_size=2, window=4)
    packed = plan_epoch([1] * 8, batch_size=2, window=4, policy="packed", capacity=2)
    for ask in (plan.window, packed.window, packed.packs):
        with pytest.raises(IndexError, match=f"window {index} of a plan with 2"):
            ask(index)


def test_rows_are_split_in_order() -> None:
    parts = _split(np.array([7, 8, 9]), np.array([9, 0, 4], np.int32), 4, 4)
    assert [part.dtype for part in parts] == [np.int64, np.int64, np.int32]
    assert list(zip(*(part.tolist() for part in parts), strict=True)) == [
        (7, 0, 4), (7, 4, 4), (7, 8, 1), (8, 0, 0), (9, 0, 4),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
@pytest.mark.parametrize("inputs_dtype", [torch.int32, torch.int64])
def test_packs_of_every_kind_of_ids(dtype: Any, inputs_dtype: torch.dtype) -> None:
    rows = [[1, 2, 3], [40_000, 5], [6]]
    (shard,) = make_shards(rows)
    collator = Collator([shard._replace(input_ids=shard.input_ids.astype(dtype))], inputs_dtype=inputs_dtype)
    found = collator.pack([1, 0, 2], [0, 2, 3], capacity=5)
    assert found.inputs.dtype == inputs_dtype
    assert found.inputs.tolist() == [[40_000, 5, 1, 2, 3], [6, 50256, 50256, 50256, 50256]]
    assert found.targets.tolist() == [[5, 50256, 2, 3, 50256], [50256, -100, -100, -100, -100]]
    assert found.position_ids.tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 2, 3]]
    assert found.cu_seqlens.tolist() == [0, 2, 5, 6, 10]


def test_a_second_packed_batch_that_does_not_fit_is_left() -> None:
    collator = Collator(make_shards([[1, 2], [3], [4]]))
    report = np.zeros((2, kernels.REPORT_COLUMNS), np.int64)
    group = np.arange(3), NONE, np.array([0, 2, 3]), np.array([0, 1, 2]), 4
    one = collator.packed_cells(1, 4, 2)
    out = np.full(one + 1, 77, np.int64)
    assert collator.fill_packed_group(*group, out, report) == 1
    assert out[one] == 77
    assert collator.fill_packed_group(*group, np.empty(one + collator.packed_cells(1, 4, 1), np.int64), report) == 2


def test_iterating_over_a_packed_plan_gives_each_batch_its_rows() -> None:
    plan = plan_epoch([4, 4, 4, 2, 2], policy="packed", batch_size=2, capacity=4)
    batches = [rows.tolist() for rows in plan]
    assert sorted(map(len, batches)) == [2, 3]
    assert sorted(row for rows in batches for row in rows) == list(range(5))


def test_starts_go_with_the_rows_of_each_batch() -> None:
    collator = Collator(make_shards([[1, 2, 3, 4, 5], [6]]))
    report = np.zeros((2, kernels.REPORT_COLUMNS), np.int64)
    rows, starts, packs, batches = np.array([0, 1, 0]), np.array([2, 0, 4]), np.array([0, 1, 3]), np.array([0, 1, 2])
    out = np.empty(2 * collator.packed_cells(1, 4, 3), np.int64)
    assert collator.fill_packed_group(rows, starts, packs, batches, 4, out, report) == 2
    found = collator.packed_batches(out, report.tolist())
    assert [batch.inputs.tolist() for batch in found] == [[[3, 4, 5, 50256]], [[6, 5, 50256, 50256]]]


def test_a_row_of_a_pack_whose_spans_are_broken_is_named() -> None:
    shards = make_shards([[1], [2], [3, 4]], [[0, 1], [0, 1], [9, 9]])
    with pytest.raises(InputError, match=r"row 2 of the store\) is damaged"):
        Collator(shards, mask_prompt=True).pack([0, 1, 2], [0, 1, 3], capacity=4)
