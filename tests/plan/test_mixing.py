"""Mixing: shares by weight, every row as often as the others over time, a pure function of the epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcollate.errors import InputError
from fastcollate.plan.mixing import MixedStore
from fastcollate.plan.moving.schedule import exact_shares, whole_shares
from fastcollate.store.store import TokenStore
from tests.helpers import random_rows, store_of_rows


@pytest.fixture
def stores(tmp_path: Path) -> dict[str, TokenStore]:
    return {
        name: store_of_rows(tmp_path / name, *random_rows(count, seed=count))
        for name, count in (("big", 300), ("small", 40))
    }


def test_reads_like_the_stores_end_to_end(stores: dict[str, TokenStore]) -> None:
    mix = MixedStore(stores)
    expected = [*stores["big"], *stores["small"]]
    assert len(mix) == 340
    for index in (0, 299, 300, 339, -1):
        assert np.array_equal(mix[index].input_ids, expected[index].input_ids)
        assert mix.lengths[index] == len(expected[index].input_ids)
    with pytest.raises(IndexError):
        mix[340]


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({}, [300, 40]),
        ({"weights": {"big": 1, "small": 1}, "num_rows": 101}, [51, 50]),
        ({"weights": {"big": 3, "small": 1}, "num_rows": 100}, [75, 25]),
        ({"temperature": 2.0, "num_rows": 1000}, [733, 267]),  # 300**0.5 : 40**0.5
        ({"temperature": 1e9, "num_rows": 1000}, [500, 500]),
        ({"weights": {"big": 1, "small": 0}}, [340, 0]),
    ],
    ids=str,
)
def test_shares(stores: dict[str, TokenStore], options: dict[str, object], shares: list[int]) -> None:
    mix = MixedStore(stores, **options)  # type: ignore[arg-type]
    assert mix.shares.tolist() == shares
    assert mix.count_sources(mix.rows_of_epoch(3)).tolist() == shares


def test_over_time_every_row_is_drawn_as_often_as_the_others(stores: dict[str, TokenStore]) -> None:
    mix = MixedStore(stores, weights={"big": 1, "small": 2}, num_rows=150, seed=4)
    drawn = np.zeros(len(mix), np.int64)
    for epoch in range(7):
        drawn += np.bincount(mix.rows_of_epoch(epoch), minlength=len(mix))
        for part in (drawn[:300], drawn[300:]):
            assert part.max() - part.min() <= 1
    assert drawn[:300].sum() == 7 * 50
    assert drawn[300:].sum() == 7 * 100


def test_draws_are_a_pure_function_of_seed_and_epoch(stores: dict[str, TokenStore]) -> None:
    mix, same, other = (MixedStore(stores, num_rows=100, seed=seed) for seed in (1, 1, 2))
    later = same.rows_of_epoch(5)
    assert np.array_equal(mix.rows_of_epoch(5), later)
    assert not np.array_equal(other.rows_of_epoch(5), later)
    assert not np.array_equal(mix.rows_of_epoch(6), later)


def test_a_part_of_each_store(stores: dict[str, TokenStore]) -> None:
    mix = MixedStore(stores, rows={"big": range(10, 20), "small": [3]})
    assert sorted(mix.rows_of_epoch(0).tolist()) == [*range(10, 20), 303]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(1, 10_000), st.floats(0.2, 10))
def test_shares_are_whole_and_sum_up(sizes: list[int], num_rows: int, temperature: float) -> None:
    names = [str(index) for index in range(len(sizes))]
    shares = whole_shares(exact_shares(names, sizes, None, temperature), num_rows)
    wanted = np.array(sizes, float) ** (1 / temperature)
    assert shares.sum() == num_rows
    assert np.abs(shares - wanted / wanted.sum() * num_rows).max() < 1


def test_mistakes_are_named(stores: dict[str, TokenStore], tmp_path: Path) -> None:
    other = store_of_rows(tmp_path / "other", [[1, 2]], vocab_size=100)
    for options, message in (
        ({"weights": {"big": 1}}, "give each of"),
        ({"weights": {"big": 1, "smal": 1}}, "smal"),
        ({"weights": {"big": 1, "small": -1}}, "0 or more"),
        ({"weights": {"big": 1, "small": 1}, "temperature": 2}, "not both"),
        ({"temperature": 0}, "positive"),
        ({"rows": {"big": [300]}}, "0 to 299"),
        ({"rows": {"big": []}, "weights": {"big": 1, "small": 1}}, "without rows"),
    ):
        with pytest.raises(InputError, match=message):
            MixedStore(stores, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="different texts"):
        MixedStore({**stores, "other": other})
    with pytest.raises(InputError, match="no store"):
        MixedStore({})
