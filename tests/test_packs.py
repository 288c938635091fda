"""Small packs, told cell by cell: what `pack_rows` and `Packs` give, bounds and all."""

from __future__ import annotations

import numpy as np
import pytest

from fastcollate.errors import InputError
from fastcollate.packing import Packs, check_capacity, pack_lengths, pack_rows

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


def test_nothing_is_split_that_fits() -> None:
    assert pack([4, 4], 8, 4, "split") == ([100, 101], [], [0, 2])
    assert pack([], 8, 4, "split") == ([], [], [0])


def test_the_largest_capacity() -> None:
    check_capacity(1)
    check_capacity(16_777_216)
    for capacity in (0, -1, 16_777_217):
        with pytest.raises(InputError, match=r"give 1 to 16,777,216 cells"):
            check_capacity(capacity)


def test_lengths_that_are_none() -> None:
    assert pack_lengths([0, 3], 4).num_bins == 1
    for wrong in ([-1, 3], [[1, 2]], [1.5]):
        with pytest.raises(InputError, match="one integer of at least 0 a row"):
            pack_lengths(wrong, 4)
