"""Pairs stay together: in every policy, in mixes and splits, stopped and resumed; what would part one is refused."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastcollate import BucketBatchSampler, MixedStore, TokenStore, prepare, split_rows
from fastcollate.errors import InputError
from tests import pairs_everywhere


@pytest.mark.parametrize("name", pairs_everywhere.POLICIES)
@pytest.mark.parametrize("stops", [0, 3])
def test_no_pair_is_parted_and_each_comes_once(name: str, stops: int) -> None:
    source = pairs_everywhere.make_source(3000, seed=stops)
    assert pairs_everywhere.run(source, pairs_everywhere.POLICIES[name], 7 + stops, stops) == 3000


def source_of(*pairs: tuple[int, int]) -> Any:
    return SimpleNamespace(lengths=np.array(pairs).reshape(-1), kind="pairs", fingerprint="x")


def batches(source: Any, **options: Any) -> list[list[int]]:
    return [*map(list, BucketBatchSampler(source, **options))]


def test_a_pair_counts_by_its_longer_row_and_packed_by_both() -> None:
    source = source_of((1, 90), (50, 50), (2, 10), (60, 1), (9, 9), (40, 39))
    by_length = sorted(batches(source, batch_size=2), key=max)
    assert sorted(map(sorted, by_length)) == [[0, 1, 6, 7], [2, 3, 10, 11], [4, 5, 8, 9]]
    for rows in by_length:  # the chosen ones, then the rejected ones in the same order
        assert [row + 1 for row in rows[:2]] == rows[2:]
    assert max(2 * 90, *(len(rows) * max(source.lengths[rows]) for rows in batches(source, max_tokens=200))) == 200
    packs = batches(source, policy="packed", batch_size=1, capacity=100)
    assert sorted(map(sorted, packs)) == [[0, 1], [2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_rows_by_number_are_whole_pairs() -> None:
    source = source_of(*[(5, 6)] * 10)
    assert sorted(chain(*batches(source, rows=[4, 5, 0, 1], batch_size=1))) == [0, 1, 4, 5]
    assert sorted(chain(*batches(source, rows=range(2, 8), batch_size=2))) == [*range(2, 8)]
    for rows in ([4], [5, 4], [1, 2], [0, 2], range(1, 5)):
        with pytest.raises(InputError, match=r"rows part a pair at row \d: give both rows of each pair"):
            BucketBatchSampler(source, rows=rows, batch_size=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"policy": "packed", "batch_size": 1, "capacity": 100},
            r"rows 2 and 3 takes 150 cells, more than capacity=100",
        ),
        ({"max_tokens": 100}, r"rows 2 and 3 takes 180 cells, more than max_tokens=100 .*max_length of at most 50"),
        ({"policy": "packed", "batch_size": 1, "capacity": 200, "long_rows": "split"}, "a part of a row is no answer"),
    ],
)
def test_what_would_part_a_pair_is_refused(options: dict[str, Any], message: str) -> None:
    source = source_of((5, 6), (90, 60), (20, 30))
    with pytest.raises(InputError, match=message):
        BucketBatchSampler(source, **options)
    if "capacity" in options and "long_rows" not in options:
        assert sorted(chain(*batches(source, **options, long_rows="drop"))) == [0, 1, 4, 5]
    if options.get("long_rows") != "split":
        assert len([*chain(*batches(source, **options, max_length=50))]) == 6


def make_pairs(folder: Path, count: int, word: str) -> TokenStore:
    records = [
        {"prompt": f"{word} {n % 7}?", "chosen": f" {n} " * (n % 5 + 1), "rejected": f" no {n}" * (n % 3 + 1)}
        for n in range(count)
    ]
    prepare(records, folder, template="preference")
    return TokenStore(folder)


@pytest.mark.slow
def test_pairs_are_mixed_whole(tmp_path: Path) -> None:
    stores = {name: make_pairs(tmp_path / name, count, name) for name, count in (("a", 40), ("b", 25))}
    mix = MixedStore(stores, weights={"a": 1, "b": 3}, num_rows=40)
    assert mix.shares.tolist() == [10, 30]  # pairs
    for options in ({"batch_size": 4}, {"policy": "packed", "batch_size": 1, "capacity": 128}):
        sampler = BucketBatchSampler(mix, **options)
        drawn = []
        for epoch in range(4):
            sampler.set_epoch(epoch)
            for rows in sampler:
                assert {row ^ 1 for row in rows} == {*rows}  # one may come twice
                drawn += rows
        assert sampler.source_rows == {"a": 80, "b": 240}  # rows, two a pair
        assert np.bincount(drawn, minlength=80)[:80].tolist() == [1] * 80
    with pytest.raises(InputError, match=r"a store of rows; this makes batches of pairs"):
        MixedStore({**stores, "c": rows_store(tmp_path / "c")})
    with pytest.raises(InputError, match=r"rows\['a'\] of .* part a pair at row 3"):
        MixedStore(stores, rows={"a": [0, 1, 3]})


def rows_store(folder: Path) -> TokenStore:
    prepare([{"prompt": "a", "completion": "b"}], folder)
    return TokenStore(folder)


@pytest.mark.parametrize("key", ["row", "prompt"])
def test_splits_keep_pairs_whole(tmp_path: Path, key: str) -> None:
    store = make_pairs(tmp_path / "a", 200, "a")
    parts = split_rows(store, {"train": 0.7, "test": 0.3}, key=key)
    assert sorted(np.concatenate([*parts.values()]).tolist()) == [*range(400)]
    for rows in parts.values():
        assert len(rows) > 50
        assert not pairs_everywhere.parted(rows.tolist())
        assert sum(map(len, batches(store, rows=rows, batch_size=4, tail="uneven"))) == len(rows)
