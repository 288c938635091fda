"""The loader's packed batches: those of the plan, resumed to the batch, on as many ranks as one likes."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from fastcollate.collate.batch import PackedBatch
from fastcollate.collate.collator import Collator
from fastcollate.errors import InputError
from fastcollate.load.loader import BatchLoader
from fastcollate.plan.plan import plan_epoch
from tests.helpers import make_store

RNG = np.random.default_rng(5)
ROWS = [RNG.integers(0, 50256, n).tolist() for n in np.clip(RNG.lognormal(2, 0.7, 403), 1, 60).astype(int)]
STORE = make_store(ROWS, num_shards=3)
OPTIONS: dict[str, Any] = {"policy": "packed", "capacity": 50, "seed": 4, "window": 120}


def same(one: PackedBatch, other: PackedBatch) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def copies(loader: BatchLoader) -> list[PackedBatch]:
    return [PackedBatch(*(tensor.clone() for tensor in batch)) for batch in loader]


@pytest.mark.parametrize("long_rows", ["truncate", "split", "drop"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_are_those_of_the_plan(long_rows: str, prefetch: int) -> None:
    options = OPTIONS | {"long_rows": long_rows, "max_length": 40, "batch_size": 3}
    loader = BatchLoader(STORE, **options, prefetch=prefetch, inputs_dtype=torch.int32, mode="positional")
    collator = Collator(STORE.shards, max_length=40, inputs_dtype=torch.int32, mode="positional")
    plan = plan_epoch(STORE.lengths, **options)
    batches = copies(loader)
    loader.set_epoch(0)
    assert len(batches) == len(loader) == len(plan)
    found = iter(batches)
    rows = 0
    for index in range(plan.num_windows):
        window = plan.packs(index)
        for number in range(window.num_batches):
            packs = window.batch(number)
            rows += len(packs.rows)
            assert same(next(found), collator.pack(packs.rows, packs.bounds, capacity=50, starts=packs.starts))
    stats = loader.stats
    assert (stats.batches, stats.rows) == (len(plan), rows)
    assert stats.real_cells == sum(int((batch.inputs != 50256).sum()) for batch in batches)
    assert stats.real_cells + stats.padded_cells == sum(batch.inputs.numel() for batch in batches)
    assert stats.trained_tokens == sum(int((batch.targets != -100).sum()) for batch in batches)


def test_an_epoch_trains_the_tokens_of_the_padded_epoch() -> None:
    packed = BatchLoader(STORE, **OPTIONS, batch_size=2, max_length=50, mode="positional", tail="uneven")
    padded = BatchLoader(STORE, batch_size=8, max_length=50, mode="positional", tail="uneven")
    expected = sorted(int(t) for batch in padded for t in batch.targets[batch.targets != -100].tolist())
    assert sorted(int(t) for batch in packed for t in batch.targets[batch.targets != -100].tolist()) == expected
    assert packed.stats.real_cells == padded.stats.real_cells


def test_resume_is_exact_to_the_batch() -> None:
    whole = copies(BatchLoader(STORE, **OPTIONS, batch_size=2))
    for step in (0, 1, 7, 11, 12, 13, len(whole) - 1, len(whole)):
        loader = BatchLoader(STORE, **OPTIONS, batch_size=2)
        iterator = iter(loader)
        for _ in range(step):
            next(iterator)
        other = BatchLoader(STORE, **OPTIONS, batch_size=2)
        other.load_state_dict(json.loads(json.dumps(loader.state_dict())))
        rest = copies(other)
        assert len(rest) == len(whole) - step
        assert all(same(a, b) for a, b in zip(rest, whole[step:], strict=True))


def sorted_rows(batches: list[PackedBatch]) -> list[list[int]]:
    """The rows' tokens in some batches, whatever pack they lie in."""
    rows = []
    for batch in batches:
        tokens, bounds = batch.inputs.flatten().tolist(), batch.cu_seqlens.tolist()
        segments = [tokens[a:b] for a, b in pairwise(bounds)]
        rows += [segment for segment in segments if set(segment) != {50256}]
    return sorted(rows)


def test_a_run_goes_on_at_another_world_size_with_the_rows_not_yet_seen() -> None:
    whole = copies(BatchLoader(STORE, **OPTIONS, batch_size=6))
    first = BatchLoader(STORE, **OPTIONS, max_tokens=320)  # six packs
    iterator = iter(first)
    for _ in range(4):
        next(iterator)
    state = first.state_dict()
    rest = []
    for rank in range(3):
        loader = BatchLoader(STORE, **OPTIONS, batch_size=2, rank=rank, world_size=3)
        loader.load_state_dict(state)
        rest += copies(loader)
    assert sorted_rows(rest) == sorted_rows(whole[4:])
    with pytest.raises(InputError, match="batch_size \\* world_size = 6"):
        BatchLoader(STORE, **OPTIONS, batch_size=2, rank=0, world_size=2).load_state_dict(state)
    with pytest.raises(InputError, match="capacity=50"):
        BatchLoader(STORE, **(OPTIONS | {"capacity": 60}), batch_size=6).load_state_dict(state)


def test_a_range_of_rows_and_a_device() -> None:
    loader = BatchLoader(STORE, policy="packed", batch_size=2, max_length=60, rows=range(100, 140))
    assert sorted_rows(copies(loader)) == sorted(row[:60] for row in ROWS[100:140])
    elsewhere = BatchLoader(STORE, policy="packed", batch_size=2, max_length=60, device="meta")
    batch = next(iter(elsewhere))
    assert isinstance(batch, PackedBatch)
    assert batch.inputs.device.type == batch.cu_seqlens.device.type == "meta"
    assert elsewhere.stats.h2d_bytes == sum(tensor.nbytes for tensor in batch)
