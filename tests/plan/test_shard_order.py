"""The order by shards: each row once, each shard in one stretch of the epoch, the same on any ranks and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pytest

from fastcollate import BatchLoader, BucketBatchSampler, MixedStore
from fastcollate.errors import InputError
from fastcollate.plan import plan_epoch
from fastcollate.plan.sharded import order as module
from fastcollate.plan.sharded.order import ShardOrder, Shards
from fastcollate.store.store import TokenStore
from tests.helpers import numbered_store


@pytest.fixture
def few_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards at a time."""
    monkeypatch.setattr(module, "MIXED_SHARDS", 2)
    monkeypatch.setattr(module, "MIXED_ROWS", 1)


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    """Ten shards of 100 rows, the last of 57."""
    return numbered_store(tmp_path / "store", 957)


def shards_of(sizes: list[int], sources: list[int] | None = None) -> Shards:
    return Shards(np.cumsum([0, *sizes]), np.array(sources or [0] * len(sizes)))


@pytest.mark.parametrize("sizes", [[1], [5, 0, 3], [100] * 9, list(range(40)), [7] * 100, [1 << 18, 5, 1 << 17, 9]])
@pytest.mark.parametrize("seed", range(3))
def test_each_row_once_at_any_cut(sizes: list[int], seed: int) -> None:
    order, total = ShardOrder(shards_of(sizes), np.uint64(seed)), sum(sizes)
    rows = order.rows(0, total)
    assert rows.dtype == np.int64
    assert np.array_equal(np.sort(rows), np.arange(total))
    for first in {0, total // 3, total // 2, total - 1}:
        assert np.array_equal(order.rows(first, total - first), rows[first:])
        assert np.array_equal(order.rows(first, min(5, total - first)), rows[first : first + 5])


@pytest.mark.usefixtures("few_mixed")
def test_a_shard_is_read_in_one_stretch_mixed_with_others() -> None:
    shards = shards_of([100] * 20)
    orders = [ShardOrder(shards, np.uint64(seed)).rows(0, 2000) for seed in range(50)]
    for rows in orders:
        own = np.searchsorted(shards.starts, rows, side="right") - 1
        for group in own.reshape(10, 200):
            counts = np.bincount(group, minlength=20)
            assert sorted(counts.tolist())[-3:] == [0, 100, 100]
            changes = int((np.diff(group) != 0).sum())
            assert 60 < changes < 140  # 100 expected of a random order of two shards, 7 one standard deviation
    firsts = np.array([rows[0] // 100 for rows in orders])
    assert len(np.unique(firsts)) > 10  # another order with each key


@pytest.mark.usefixtures("few_mixed")
def test_where_rows_go_is_uniform() -> None:
    """Ten parts of the data set by ten parts of the epoch, over 400 epochs: each row's place is uniform."""
    shards, counts = shards_of([10] * 40), np.zeros((10, 10))
    for key in range(400):
        where = np.empty(400, np.int64)
        where[ShardOrder(shards, np.uint64(key * 7919)).rows(0, 400)] = np.arange(400)
        np.add.at(counts, (np.arange(400) // 40, where // 40), 1)
    # 4 shards of a part, 20 draws of groups: of 160,000 rows 1,600 a cell; shards count as one draw each
    statistic = float(((counts - 1600) ** 2 / 1600).sum()) / 10
    assert statistic < 81 + 6 * np.sqrt(2 * 81)


@pytest.mark.usefixtures("few_mixed")
def test_the_shards_of_each_source_come_evenly() -> None:
    sizes, sources = [10] * 60, [0] * 40 + [1] * 20
    rows = ShardOrder(shards_of(sizes, sources), np.uint64(3)).rows(0, 600)
    for part in (rows >= 400).reshape(5, 120):
        assert 30 <= part.sum() <= 50


OPTIONS: list[dict[str, Any]] = [
    {"batch_size": 8, "policy": "shuffled", "window": 64},
    {"batch_size": 8, "policy": "bucketed", "window": 128, "drop_last": True},
    {"max_tokens": 200, "policy": "bucketed", "window": 128, "balance": True},
    {"batch_size": 2, "policy": "packed", "max_length": 64, "window": 128},
]


def steps(loader: Any, epoch: int = 0) -> list[npt.NDArray[np.int64]]:
    loader.set_epoch(epoch)
    return [np.array(rows) for rows in loader]


@pytest.mark.usefixtures("few_mixed")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(options["policy"]))
def test_ranks_have_disjoint_rows_and_all_of_them(store: TokenStore, options: dict[str, Any]) -> None:
    world = 4
    parts = [
        np.concatenate(
            steps(BucketBatchSampler(store, order="shards", rank=rank, world_size=world, **options), epoch=3)
        )
        for rank in range(world)
    ]
    rows = np.concatenate(parts)
    assert len(np.unique(rows)) >= (len(store) if not options.get("drop_last") else len(store) - 32)
    assert len(rows) - len(np.unique(rows)) < 4 * 8  # some repeat at the end


@pytest.mark.usefixtures("few_mixed")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(options["policy"]))
def test_resume_gives_the_rest_also_at_another_world_size(store: TokenStore, options: dict[str, Any]) -> None:
    loader = BatchLoader(store, order="shards", **options)
    batches = iter(loader)
    for _ in range(7):
        next(batches)
    state = loader.state_dict()
    rest = [batch.inputs for batch in batches]
    again = BatchLoader(store, order="shards", **options)
    again.load_state_dict(state)
    assert all((a == b.inputs).all() for a, b in zip(rest, again, strict=True))
    with pytest.raises(InputError, match="order="):
        BatchLoader(store, **options).load_state_dict(state)
    if options.get("batch_size") == 8:
        halves = [
            BatchLoader(store, order="shards", **{**options, "batch_size": 4}, rank=rank, world_size=2)
            for rank in range(2)
        ]
        for half in halves:
            half.load_state_dict(state)
        rows = sum(len(batch.inputs) for half in halves for batch in half)
        assert rows - sum(map(len, rest)) in (0, 1)  # of an odd number one repeats


@pytest.mark.usefixtures("few_mixed")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(options["policy"]))
def test_batches_of_a_remote_store_within_few_shards_are_the_local_ones(
    store: TokenStore, tmp_path: Path, options: dict[str, Any]
) -> None:
    fsspec.filesystem("memory").put(str(store.path), f"{tmp_path}/bucket", recursive=True)
    size = max(shard["num_bytes"] for shard in store.manifest["shards"])
    behind = TokenStore(f"memory://{tmp_path}/bucket", cache=tmp_path / "cache", cache_limit=6 * size)
    for got, wanted in zip(
        BatchLoader(behind, order="shards", **options), BatchLoader(store, order="shards", **options), strict=True
    ):
        assert all((a == b).all() for a, b in zip(got, wanted, strict=True))


@pytest.mark.usefixtures("few_mixed")
def test_rows_by_number_and_mixes(store: TokenStore, tmp_path: Path) -> None:
    chosen = np.random.default_rng(0).permutation(957)[:400]
    rows = np.concatenate(steps(BucketBatchSampler(store, rows=chosen, order="shards", batch_size=8)))
    assert np.array_equal(np.sort(rows), np.sort(chosen))
    part = np.concatenate(steps(BucketBatchSampler(store, rows=range(150, 550), order="shards", batch_size=8)))
    assert np.array_equal(np.sort(part), np.arange(150, 550))
    other = numbered_store(tmp_path / "other", 300)
    mix = MixedStore({"a": store, "b": other}, weights={"a": 2, "b": 1}, num_rows=600)
    drawn = np.concatenate(steps(BucketBatchSampler(mix, order="shards", batch_size=8, policy="shuffled"), epoch=1))
    assert np.array_equal(np.sort(drawn), np.sort(mix.rows_of_epoch(1)))


def test_what_has_no_shards_is_refused(store: TokenStore) -> None:
    with pytest.raises(InputError, match="order='shards' is for BatchLoader and BucketBatchSampler"):
        plan_epoch([1, 2, 3], batch_size=1, order="shards")
    with pytest.raises(InputError, match="order='shards' is for rows of a store"):
        BucketBatchSampler([1, 2, 3], batch_size=1, order="shards")
    with pytest.raises(InputError, match="order='shard': choose one of 'rows', 'shards'"):
        BatchLoader(store, batch_size=1, order="shard")
    mix = MixedStore({"a": store}, step_rows=8)
    with pytest.raises(InputError, match="by step_rows"):
        list(BatchLoader(mix, batch_size=8, order="shards"))
