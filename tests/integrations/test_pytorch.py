"""BucketBatchSampler and StoreDataset under PyTorch's own DataLoader and torchdata's StatefulDataLoader."""

from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

import fastcollate
from fastcollate import BatchLoader, BucketBatchSampler, StoreDataset
from fastcollate.collate.reference import custom_collate_with_masking_fn
from fastcollate.errors import InputError
from fastcollate.plan.mixing import MixedStore
from fastcollate.plan.plan import plan_epoch
from fastcollate.store.store import TokenStore
from tests.helpers import make_store, random_rows, store_of_rows

ROWS, SPANS = random_rows(203)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> StoreDataset:
    store = store_of_rows(tmp_path_factory.mktemp("pytorch") / "store", ROWS, SPANS)
    return StoreDataset(store, mask_prompt=True, max_length=40)


def expected(rows: list[int]) -> Any:
    return custom_collate_with_masking_fn([(SPANS[i][0], ROWS[i]) for i in rows], allowed_max_length=40)


def same(found: Any, wanted: Any) -> bool:
    return len(found) == len(wanted) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "fork"), (2, "spawn")])
def test_batches_equal_the_reference_over_the_plan(dataset: StoreDataset, workers: int, context: str | None) -> None:
    sampler = BucketBatchSampler(dataset, batch_size=8, seed=3)
    loader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=dataset.collate, num_workers=workers, multiprocessing_context=context
    )
    assert len(loader) == 26
    seen = []
    for epoch in range(2):
        plan = list(plan_epoch(dataset.lengths, batch_size=8, seed=3, epoch=epoch))
        batches = list(loader)
        assert all(same(batch, expected(rows)) for batch, rows in zip(batches, plan, strict=True))
        seen.append([rows.tolist() for rows in plan])
    assert seen[0] != seen[1]


@pytest.mark.slow
@pytest.mark.parametrize("long_rows", ["truncate", "split", "drop"])
@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "spawn")])
def test_packed_batches_are_the_loaders(
    dataset: StoreDataset, workers: int, context: str | None, long_rows: str
) -> None:
    options: dict[str, Any] = {"policy": "packed", "batch_size": 2, "capacity": 90, "seed": 3, "long_rows": long_rows}
    sampler = BucketBatchSampler(dataset, **options)
    loader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=dataset.collate, num_workers=workers, multiprocessing_context=context
    )
    wanted = fastcollate.BatchLoader(dataset.store, mask_prompt=True, max_length=40, **options)
    assert len(loader) == len(wanted)
    for found, batch in zip(loader, wanted, strict=True):
        assert isinstance(found, fastcollate.PackedBatch)
        assert same(found, batch)


def test_packed_rows_are_the_chosen_ones_and_go_on_where_they_stopped(dataset: StoreDataset) -> None:
    chosen = np.arange(5, 180, 3)
    options: dict[str, Any] = {"policy": "packed", "batch_size": 1, "capacity": 90, "window": 20, "rows": chosen}
    sampler = BucketBatchSampler(dataset, **options)
    batches = list(sampler)
    assert sorted(row for rows in batches for row in rows) == chosen.tolist()
    other = BucketBatchSampler(dataset, **options)
    for step in (0, 3, len(batches)):
        other.set_position(0, step)
        rest = list(other)
        assert rest == batches[step:]
        assert [rows.bounds for rows in rest] == [rows.bounds for rows in batches[step:]]  # type: ignore[attr-defined]
    subset = dataset.collate(dataset.__getitems__(batches[0])[:1])  # part of a batch is not packed
    assert same(subset, expected(batches[0][:1]))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_drop_in_collate_fn_in_workers(workers: int) -> None:
    pairs = [(spans[0], row) for spans, row in zip(SPANS, ROWS, strict=True)]
    sampler = BucketBatchSampler([len(row) for row in ROWS], batch_size=8)
    loader = DataLoader(
        pairs,
        batch_sampler=sampler,
        collate_fn=partial(fastcollate.collate_fn, allowed_max_length=40),
        num_workers=workers,
    )
    plan = plan_epoch([len(row) for row in ROWS], batch_size=8)
    assert all(same(batch, expected(rows.tolist())) for batch, rows in zip(loader, plan, strict=True))


@pytest.mark.parametrize(
    "options", [{"max_tokens": 300}, {"batch_size": 8, "window": 32, "policy": "shuffled"}], ids=str
)
def test_the_ranks_share_each_step(dataset: StoreDataset, options: dict[str, Any]) -> None:
    parts = [list(BucketBatchSampler(dataset, rank=rank, world_size=2, tail="uneven", **options)) for rank in range(2)]
    assert sorted(row for part in parts for batch in part for row in batch) == list(range(203))
    for rank, part in enumerate(parts):
        plan = plan_epoch(dataset.lengths, rank=rank, world_size=2, tail="uneven", **options)
        assert part == [rows.tolist() for rows in plan]


@pytest.mark.parametrize("step", [0, 1, 4, 5, 25, 26])
def test_state_is_exact_to_the_batch(dataset: StoreDataset, step: int) -> None:
    def sampler() -> BucketBatchSampler:
        return BucketBatchSampler(dataset, batch_size=8, window=32, seed=5)

    first, resumed, placed = sampler(), sampler(), sampler()
    for one in (first, placed):
        one.set_epoch(2)
    iterator = iter(first)
    for _ in range(step):
        next(iterator)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    placed.set_position(2, step)
    rest = list(iterator)
    assert len(rest) == 26 - step
    assert list(resumed) == rest
    assert list(placed) == rest
    assert first.epoch == resumed.epoch == placed.epoch == 3
    assert list(first) == list(resumed)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_data_loader_resumes_mid_epoch(dataset: StoreDataset, workers: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        sampler = BucketBatchSampler(dataset, batch_size=8, seed=3)
        return stateful.StatefulDataLoader(
            dataset, batch_sampler=sampler, collate_fn=dataset.collate, num_workers=workers
        )

    whole = loader()
    batches = [batch for _ in range(2) for batch in whole]
    stopped = loader()
    iterator = iter(stopped)
    for _ in range(7):
        next(iterator)
    state = pickle.loads(pickle.dumps(stopped.state_dict()))
    resumed = loader()
    resumed.load_state_dict(state)
    rest = [batch for _ in range(2) for batch in resumed]
    assert len(rest) == len(batches) - 7
    assert all(same(a, b) for a, b in zip(rest, batches[7:], strict=True))


def test_accelerate_goes_on_with_a_later_epoch_or_says_how(dataset: StoreDataset) -> None:
    accelerate = pytest.importorskip("accelerate")

    def prepared() -> tuple[Any, BucketBatchSampler]:
        sampler = BucketBatchSampler(dataset, batch_size=8, seed=3)
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate)
        return accelerate.Accelerator(cpu=True).prepare(loader), sampler

    order = BucketBatchSampler(dataset, batch_size=8, seed=3)
    order.set_position(2, 20)
    loader, sampler = prepared()
    sampler.load_state_dict(order.state_dict())
    with pytest.raises(InputError, match=r"Begin with set_epoch\(2\) \(under accelerate"):
        next(iter(loader))  # which counts epochs from 0
    loader.set_epoch(2)
    for _ in range(2):
        wanted = [expected(rows) for rows in order]
        assert all(same(batch, one) for batch, one in zip(loader, wanted, strict=True))


def test_rows_of_a_split_and_subsets(dataset: StoreDataset) -> None:
    rows = np.arange(10, 60, 2)
    batches = list(BucketBatchSampler(dataset, batch_size=8, rows=rows, tail="uneven"))
    assert sorted(row for batch in batches for row in batch) == rows.tolist()
    subset = Subset(dataset, rows.tolist())
    (batch,) = DataLoader(subset, batch_size=25, collate_fn=dataset.collate)
    assert same(batch, expected(rows.tolist()))


def test_a_mix_is_drawn_counted_and_resumed(tmp_path: Path) -> None:
    stores = {name: store_of_rows(tmp_path / name, *random_rows(n, seed=n)) for name, n in (("a", 120), ("b", 30))}
    mix = MixedStore(stores, weights={"a": 1, "b": 1}, num_rows=64)
    dataset = StoreDataset(mix)
    sampler = BucketBatchSampler(dataset, batch_size=8)
    epochs = [list(sampler) for _ in range(3)]
    assert sampler.source_rows == {"a": 96, "b": 96}
    for epoch, batches in enumerate(epochs):
        assert sorted(row for batch in batches for row in batch) == sorted(mix.rows_of_epoch(epoch).tolist())
    first = BucketBatchSampler(dataset, batch_size=8)
    iterator = iter(first)
    taken = [next(iterator) for _ in range(3)]
    resumed = BucketBatchSampler(dataset, batch_size=8)
    resumed.load_state_dict(first.state_dict())
    assert taken + list(resumed) == epochs[0]
    assert resumed.source_rows == {"a": 32, "b": 32}
    for inputs, targets in DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate, num_workers=2):
        assert inputs.shape == targets.shape


def test_single_rows(dataset: StoreDataset) -> None:
    assert len(dataset) == 203
    row = dataset[-1]
    assert row.example.input_ids.tolist() == ROWS[-1]
    assert len(row) == len(ROWS[-1])
    with pytest.raises(IndexError):
        dataset[203]
    copy = pickle.loads(pickle.dumps(dataset))
    assert same(copy.collate([copy[3], copy[5]]), expected([3, 5]))


@pytest.mark.slow
def test_a_store_opened_by_a_relative_path_is_found_after_chdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_of_rows(tmp_path / "here" / "store", ROWS, SPANS)
    monkeypatch.chdir(tmp_path / "here")
    data = StoreDataset("store")
    mix = StoreDataset(MixedStore({"a": TokenStore("store"), "b": TokenStore(Path("./store"))}))
    loader = fastcollate.BatchLoader("store", batch_size=8, prefetch=0)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")

    def again(made: StoreDataset) -> Any:
        copy = pickle.loads(pickle.dumps(made))
        return copy.collate([copy[3], copy[5]])

    for made in (data, mix):
        assert same(again(made), made.collate([made[3], made[5]]))
    assert same(next(iter(pickle.loads(pickle.dumps(loader)))), next(iter(loader)))
    batches = DataLoader(
        mix, batch_sampler=BucketBatchSampler(mix, batch_size=8), collate_fn=mix.collate, num_workers=1,
        multiprocessing_context="spawn",
    )  # fmt: skip
    assert sum(len(batch.inputs) for batch in batches) == 2 * len(ROWS)


def test_a_shuffle_flag_is_refused(dataset: StoreDataset) -> None:
    with pytest.raises(InputError, match="choose policy='bucketed'"):
        BucketBatchSampler(dataset, batch_size=8, shuffle=True)
    with pytest.raises(ValueError, match="mutually exclusive"):  # PyTorch's own check comes first
        DataLoader(dataset, shuffle=True, batch_sampler=BucketBatchSampler(dataset, batch_size=8))


def test_mistakes_are_named(dataset: StoreDataset) -> None:
    sampler = BucketBatchSampler(dataset, batch_size=8)
    with pytest.raises(InputError, match=r"batch_sampler=\.\.\."):
        next(iter(DataLoader(dataset, sampler=sampler, collate_fn=dataset.collate)))
    with pytest.raises(InputError, match="not rows of a StoreDataset"):
        dataset.collate([[1, 2]])  # type: ignore[list-item]
    with pytest.raises(InputError, match="0 to 202"):
        BucketBatchSampler(dataset, batch_size=8, rows=[203])
    with pytest.raises(InputError, match="either batch_size"):
        BucketBatchSampler(dataset)
    split = BucketBatchSampler(dataset, batch_size=2, policy="packed", max_length=41, long_rows="split")
    with pytest.raises(InputError, match="both the same max_length"):
        dataset.collate(dataset.__getitems__(next(iter(split))))
    with pytest.raises(InputError, match="has 26 batches"):
        sampler.set_position(0, 27)
    with pytest.raises(InputError, match="seed=0, this sampler 1"):
        BucketBatchSampler(dataset, batch_size=8, seed=1).load_state_dict({**sampler.state_dict(), "seed": 0})
    with pytest.raises(InputError, match="no finished token store"):
        StoreDataset("/nowhere")


@pytest.mark.parametrize("asked", [None, 5, 16])
@pytest.mark.parametrize("own", [None, 5, 16])
def test_a_stride_is_the_samplers_and_the_data_sets(asked: int | None, own: int | None) -> None:
    """One that only one of them knew would train tokens twice, or never."""
    store = make_store([list(range(n)) for n in (40, 9, 77, 16)])
    options: dict[str, Any] = {"policy": "packed", "batch_size": 2, "capacity": 32, "max_length": 16}
    options["long_rows"] = "split"
    dataset = StoreDataset(store, stride=own, mode="positional")
    source = dataset if asked is None else store  # a sampler takes the data set's where it is not told its own
    sampler = BucketBatchSampler(source, stride=asked, **options)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate)
    if asked not in (None, own):
        with pytest.raises(InputError, match=f"plans for stride={asked}, and the data set has {own}: give both the"):
            next(iter(loader))
        return
    wanted = list(BatchLoader(store, stride=own, mode="positional", **options))
    found = list(loader)
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for pair in zip(found, wanted, strict=True) for a, b in zip(*pair, strict=True))
    assert sum(int((batch.targets != -100).sum()) for batch in found) == 40 + 9 + 77 + 16
    assert pickle.loads(pickle.dumps(next(iter(sampler)))).stride == own
