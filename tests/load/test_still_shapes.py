"""Batches whose shapes stand still, from each loader: what the plain options give, padded; one compilation a width."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from fastcollate import BatchLoader, BucketBatchSampler, ContextParallelBatch, PackedBatch, StoreDataset
from fastcollate.collate.reference import pad_columns
from fastcollate.errors import InputError
from fastcollate.store import TokenStore
from tests.helpers import random_rows, store_of_rows

ROWS, SPANS = random_rows(203, seed=3)
CP: dict[str, Any] = {"policy": "packed", "batch_size": 2, "capacity": 96, "seed": 3, "window": 64}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return store_of_rows(tmp_path_factory.mktemp("shapes") / "store", ROWS, SPANS)


def same(found: Any, wanted: Any) -> bool:
    return len(found) == len(wanted) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, wanted, strict=True)
    )


def copies(batches: Any) -> list[Any]:
    return [type(batch)(*map(torch.clone, batch)) for batch in batches]


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("sizes", [{"batch_size": 8}, {"max_tokens": 512}], ids=str)
def test_widths_of_every_loader(store: TokenStore, sizes: dict[str, Any], prefetch: int) -> None:
    options: dict[str, Any] = {"mask_prompt": True, "max_length": 40, "pad_to_multiple_of": 16}
    loader = BatchLoader(store, **sizes, **options, prefetch=prefetch)
    found = copies(loader)
    plain = BatchLoader(store, **sizes, **{**options, "pad_to_multiple_of": None})
    if "batch_size" in sizes:
        assert all(same(a, pad_columns(*b, 16)) for a, b in zip(found, plain, strict=True))
    assert {batch.inputs.shape[1] for batch in found} <= {16, 32, 48}
    assert all(batch.inputs.numel() <= 512 for batch in found) or "batch_size" in sizes
    stats = loader.stats
    assert stats.real_cells == sum(min(len(row), 40) for row in ROWS) or stats.rows != len(ROWS)
    assert stats.real_cells + stats.padded_cells == sum(batch.inputs.numel() for batch in found)
    dataset = StoreDataset(store, **options)  # the sampler counts what the data set pads
    sampler = BucketBatchSampler(dataset, max_length=40, **sizes)
    others = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate))
    assert all(same(a, b) for a, b in zip(found, others, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_packs_for_context_parallel_ranks_of_every_loader(store: TokenStore, workers: int) -> None:
    options: dict[str, Any] = {"max_length": 40, "mask_prompt": True, "cp_size": 2, "max_segments": 80}
    loader = BatchLoader(store, **CP, **options)
    found = copies(loader)
    assert all(type(batch) is ContextParallelBatch and len(batch.cu_seqlens) == 81 for batch in found)
    dataset = StoreDataset(store, **options)
    sampler = BucketBatchSampler(dataset, **CP)
    context = "spawn" if workers else None
    others = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=dataset.collate, num_workers=workers, multiprocessing_context=context
    )
    for mine, other in zip(found, others, strict=True):
        assert same(mine, other)
        assert other.max_seqlen == int(other.cu_seqlens_padded.diff().max())
        assert same(mine.shard(1, 2), other.shard(1, 2))
    trained = sorted(token for batch in found for token in batch.targets[batch.targets != -100].tolist())
    plain = [
        batch.targets for batch in BatchLoader(store, batch_size=1, tail="uneven", mask_prompt=True, max_length=40)
    ]
    assert set(trained) == {token for targets in plain for token in targets[targets != -100].tolist()}


def test_a_run_goes_on_with_the_ranks_shards(store: TokenStore) -> None:
    whole = copies(BatchLoader(store, **{**CP, "batch_size": 4}, cp_size=2))
    first = BatchLoader(store, **{**CP, "batch_size": 4}, cp_size=2)
    iterator = iter(first)
    for _ in range(3):
        next(iterator)
    state = json.loads(json.dumps(first.state_dict()))
    ranks = [BatchLoader(store, **CP, cp_size=2, rank=rank, world_size=2) for rank in range(2)]
    for loader in ranks:
        loader.load_state_dict(state)
    rows = [batch.inputs for pair in zip(*map(copies, ranks), strict=True) for batch in pair]
    assert sorted(map(tuple, torch.cat(rows).tolist())) == sorted(
        map(tuple, torch.cat([batch.inputs for batch in whole[3:]]).tolist())
    )
    with pytest.raises(InputError, match="has cp_size=2, this loader 4"):
        BatchLoader(store, **{**CP, "batch_size": 4}, cp_size=4).load_state_dict(state)


def test_a_sampler_and_a_data_set_that_disagree(store: TokenStore) -> None:
    dataset = StoreDataset(store)
    rows = next(iter(BucketBatchSampler(dataset, **CP, cp_size=2)))
    with pytest.raises(InputError, match="plans for cp_size=2, and the data set has None: give both the same"):
        dataset.collate(dataset.__getitems__(rows))


@pytest.mark.slow
def test_on_a_device_nothing_is_lost(store: TokenStore) -> None:
    for options in ({}, {"cp_size": 2}):
        batch: Any = next(iter(BatchLoader(store, **CP, **options, device="meta")))
        assert {tensor.device.type for tensor in batch} == {"meta"}
        assert 1 <= batch.max_seqlen <= 96  # known on the host: a tensor without memory could not say it
        assert batch.shard(0, 2).inputs.shape == (2, 48) if options else batch.seq_idx.shape == (2, 96)


def test_too_many_segments_are_told(store: TokenStore) -> None:
    with pytest.raises(InputError, match=r"a batch of packs has \d+ segments, more than max_segments=3: raise"):
        list(BatchLoader(store, **CP, max_segments=3))
    with pytest.raises(InputError, match="max_segments=3: for policy='packed'"):
        BatchLoader(store, batch_size=8, max_segments=3)


class Model(torch.nn.Module):
    """Embeds, mixes what lies before within the row, and tells the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(50257, 4), torch.nn.Linear(4, 8)

    def forward(self, batch: Any) -> torch.Tensor:
        found = self.embed(batch.inputs).cumsum(1)
        if isinstance(batch, PackedBatch):
            found = found - found.flatten(0, 1)[batch.cu_seqlens[batch.seq_idx.long()].long()]
        total: torch.Tensor = self.head(found).sum()
        return total


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_at_most_one_compilation_a_width(store: TokenStore, packed: bool) -> None:
    options: dict[str, Any] = {"drop_last": True, "max_length": 96}
    options |= {**CP, "max_segments": 80} if packed else {"batch_size": 8, "pad_to_multiple_of": 32}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Model()
    compiled = torch.compile(model, dynamic=False, backend="aot_eager", fullgraph=True)
    shapes, loader = set(), BatchLoader(store, **options)
    for _ in range(2):
        for batch in loader:
            shapes.add(tuple(batch.inputs.shape))
            assert torch.equal(compiled(batch), model(batch))
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compilations == len(shapes)
    assert compilations <= (1 if packed else 3)
    assert packed or len(shapes) > 1


def test_ranks_of_a_group_load_the_same_batch(store: TokenStore, tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist = torch.distributed
    inputs: dict[int, list[torch.Tensor]] = {}
    for rank in range(8):
        dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("dp", "cp", "tp"))
            place: dict[str, Any] = {"rank": mesh["dp"].get_local_rank(), "world_size": mesh["dp"].size()}
            cp_rank, cp_size = mesh["cp"].get_local_rank(), mesh["cp"].size()
            loader = BatchLoader(store, **CP, cp_size=cp_size, **place)
            inputs[rank] = [batch.shard(cp_rank, cp_size).inputs.clone() for batch in loader]  # type: ignore[union-attr]
            for use in (BatchLoader, BucketBatchSampler):
                with pytest.raises(InputError, match=r"cp_size=2: .* give rank=mesh\[.dp.\].get_local_rank"):
                    next(iter(use(store, **CP, cp_size=2)))
        finally:
            dist.destroy_process_group()
    for rank in range(0, 8, 2):
        assert same(inputs[rank], inputs[rank + 1])  # tensor parallelism: the same cells
    assert not same(inputs[0], inputs[2])
    wholes = [copies(BatchLoader(store, **CP, cp_size=2, rank=rank, world_size=2)) for rank in range(2)]
    for dp, whole in enumerate(wholes):
        for cp in range(2):
            assert same(inputs[4 * dp + 2 * cp], [batch.shard(cp, 2).inputs for batch in whole])
