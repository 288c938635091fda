"""Splits: every row once, stable when records come and go, keys kept together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastcollate.errors import InputError
from fastcollate.plan.splits import split_rows
from tests.helpers import random_rows, store_of_rows

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}


def test_each_row_lands_in_one_split_in_about_the_right_share(tmp_path: Path) -> None:
    rows, spans = random_rows(4000)
    parts = split_rows(store_of_rows(tmp_path / "s", rows, spans), SHARES)
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(4000))
    for name, share in SHARES.items():
        assert abs(len(parts[name]) - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5
        assert parts[name].dtype == np.int64


@pytest.mark.parametrize("key", ["row", "prompt"])
def test_appended_records_move_nobody(tmp_path: Path, key: str) -> None:
    rows, spans = random_rows(500)
    more_rows, more_spans = random_rows(300, seed=9)
    before = split_rows(store_of_rows(tmp_path / "a", rows, spans), SHARES, key=key)
    after = split_rows(
        store_of_rows(tmp_path / "b", rows + more_rows, spans + more_spans, num_shards=5, vocab_size=100_000),
        SHARES,
        key=key,
    )
    for name in SHARES:
        assert np.array_equal(after[name][after[name] < 500], before[name])


def test_duplicates_and_rows_of_one_key_stay_together(tmp_path: Path) -> None:
    rows, spans = random_rows(200)
    store = store_of_rows(tmp_path / "s", rows + rows, spans + spans)
    for parts in (
        split_rows(store, SHARES),
        split_rows(store, SHARES, key=[f"problem {i % 200}" for i in range(400)]),
        split_rows(store, SHARES, key=lambda example: int(example.source_row) % 200),
    ):
        for part in parts.values():
            assert np.array_equal(part[part < 200], part[part >= 200] - 200)


def test_the_seed_deals_differently(tmp_path: Path) -> None:
    store = store_of_rows(tmp_path / "s", random_rows(200)[0])
    assert not np.array_equal(split_rows(store, SHARES)["train"], split_rows(store, SHARES, seed=1)["train"])


@pytest.mark.parametrize("shares", [{}, {"train": 0.5}, {"train": 1.2, "val": -0.2}, {"train": 0.9, "val": 0.2}])
def test_wrong_shares_are_shown(tmp_path: Path, shares: dict[str, float]) -> None:
    with pytest.raises(InputError, match="sum of 1"):
        split_rows(store_of_rows(tmp_path / "s", [[1, 2]]), shares)


def test_wrong_keys_are_shown(tmp_path: Path) -> None:
    store = store_of_rows(tmp_path / "s", [[1, 2], [3]])
    for key, message in (("rows", "choose 'row'"), ([1], "1 keys for 2 rows"), ([1.5, 2.5], "string or an integer")):
        with pytest.raises(InputError, match=message):
            split_rows(store, SHARES, key=key)
