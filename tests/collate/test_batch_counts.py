"""What a batch says it holds, against its tensors and its rows."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch

from fastcollate import BatchLoader
from fastcollate.collate import fill as kernels
from fastcollate.collate.batch import Batch, Counts, PackedBatch
from fastcollate.collate.collator import Collator
from tests.helpers import make_shards, make_store

PAD = 50256


def some_rows(chance: random.Random) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of 0 to 12 tokens, and their prompts, some of which are the whole row."""
    rows = [[chance.randrange(PAD) for _ in range(chance.randint(0, 12))] for _ in range(60)]
    prompts = [chance.choice([0, len(row), chance.randint(0, len(row))]) for row in rows]
    return rows, [[prompt, len(row) - prompt] for prompt, row in zip(prompts, rows, strict=True)]


def expected_counts(lengths: list[int], batch: Any, untrained: int, corners: int) -> Counts:
    width = batch.inputs.shape[1]
    return Counts(
        rows=len(lengths),
        cells=batch.inputs.numel(),
        real_cells=sum(min(length, width) for length in lengths),
        trained_tokens=int((batch.targets != -100).sum()),
        corner_rows=corners,
        untrained_rows=untrained,
        cut_rows=sum(length > width for length in lengths),
        cut_tokens=sum(max(length - width, 0) for length in lengths),
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_padded_batch_knows_what_it_holds(seed: int) -> None:
    chance = random.Random(seed)
    rows, spans = some_rows(chance)
    collator = Collator(
        make_shards(rows, spans, num_shards=2), mode="positional", mask_prompt=bool(seed % 2),
        max_length=chance.choice([None, 3, 9]), truncation=chance.choice(["left", "right"]),
    )  # fmt: skip
    bounds = np.array([0, 7, 8, 40, 60])
    report = np.zeros((4, kernels.REPORT_COLUMNS), np.int64)
    out = np.empty(4096, np.int64)
    assert collator.fill_group(np.arange(60), bounds, out, report) == 4
    for number, batch in enumerate(collator.batches(out, report.tolist())):
        lengths = [len(row) for row in rows[bounds[number] : bounds[number + 1]]]
        untrained = int((batch.targets == -100).all(1).sum())
        assert batch.counts == expected_counts(lengths, batch, untrained, 0)


@pytest.mark.parametrize("mask_prompt", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_packed_batch_knows_what_it_holds(seed: int, mask_prompt: bool) -> None:
    rows, spans = some_rows(random.Random(seed))
    collator = Collator(make_shards(rows, spans), mode="positional", mask_prompt=mask_prompt, max_length=7)
    bounds = np.array([0, 20, 60])
    batch = collator.pack(np.arange(60), bounds, capacity=300)
    real = [min(len(row), 7) for row in rows]
    lines = zip(batch.targets.numpy(), (real[:20], real[20:]), strict=True)
    parts = [part for line, own in lines for part in np.split(line[: sum(own)], np.cumsum(own)[:-1])]
    assert len(parts) == 60
    assert batch.counts == Counts(
        rows=60,
        cells=600,
        real_cells=sum(real),
        trained_tokens=int((batch.targets != -100).sum()),
        corner_rows=0,
        untrained_rows=sum((part == -100).all() for part in parts),
        cut_rows=sum(len(row) > 7 for row in rows),
        cut_tokens=sum(max(len(row) - 7, 0) for row in rows),
    )


def test_parts_of_a_split_row_are_not_cut() -> None:
    collator = Collator(make_shards([list(range(10))]), mode="positional", max_length=4)
    batch = collator.pack([0, 0, 0], [0, 2, 3], capacity=8, starts=[0, 4, 8])
    assert batch.counts == Counts(3, 16, 10, 10, 0, 0, 0, 0)


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"policy": "packed", "batch_size": 1, "capacity": 40}])
def test_counts_go_along_with_a_batch(options: dict[str, Any]) -> None:
    rows, spans = some_rows(random.Random(1))
    loader = BatchLoader(make_store(rows, spans), **options, mask_prompt=True, mode="positional")
    kept: list[Batch | PackedBatch] = list(loader)  # type: ignore[arg-type]
    totals = [sum(column) for column in zip(*(batch.counts or () for batch in kept), strict=True)]
    assert totals[:2] == [60, sum(batch.inputs.numel() for batch in kept)]
    assert totals[3] == loader.stats.trained_tokens > 0
    for batch in kept:
        assert type(batch)(*batch).counts == batch.counts == type(batch)._make(batch).counts
        assert pickle.loads(pickle.dumps(batch)).counts == batch.counts
        moved = batch.with_tensors(tensor.clone() for tensor in batch)
        assert type(moved) is type(batch)
        assert moved.counts == batch.counts
        assert all(torch.equal(a, b) for a, b in zip(moved, batch, strict=True))
        assert type(batch)(*(tensor.clone() for tensor in batch)).counts is None


def test_corners_are_counted() -> None:
    loader = BatchLoader(make_store([[1, PAD, 2], [3], []]), policy="sequential", batch_size=3)
    with pytest.warns(UserWarning, match="corner_rows"):
        (batch,) = loader
    assert batch.counts is not None
    assert batch.counts.corner_rows == 2
