"""Shapes that stand still, and packs that split over context-parallel ranks, against the plain reference."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastcollate import ContextParallelBatch, PackedBatch, collate_fn
from fastcollate.collate import fill as kernels
from fastcollate.collate.batch import _CP_SIZE, _LONGEST
from fastcollate.collate.collator import Collator
from fastcollate.collate.reference import (
    collate_in_row,
    custom_collate_fn,
    custom_collate_with_masking_fn,
    pad_columns,
    put_end_to_end,
)
from fastcollate.errors import InputError
from tests.helpers import make_shards

PAD = 50256
ids = st.one_of(st.integers(0, 50255), st.just(PAD))
rows_of_ids = st.lists(st.lists(ids, max_size=12), min_size=1, max_size=8)
limits = st.one_of(st.none(), st.integers(1, 15))
multiples = st.integers(1, 17)
rank_counts = st.one_of(st.none(), st.integers(1, 4))


def same(found: Any, wanted: Any) -> None:
    assert len(found) == len(wanted)
    for name, mine, theirs in zip(found._fields, found, wanted, strict=True):
        assert mine.dtype == theirs.dtype or theirs.numel() == 0, name
        assert mine.shape == theirs.shape, name
        assert mine.tolist() == theirs.tolist(), name


@given(rows_of_ids, st.one_of(limits, st.integers(-5, 0)), multiples, st.sampled_from([-100, -1, PAD]), st.data())
def test_widths_are_multiples(batch: list[list[int]], limit: int | None, multiple: int, ignore: int, data: Any) -> None:
    options: dict[str, Any] = {"ignore_index": ignore, "allowed_max_length": limit}
    wanted = pad_columns(*custom_collate_fn(batch, **options), multiple, PAD, ignore)
    same(collate_fn(batch, **options, pad_to_multiple_of=multiple), wanted)
    pairs = [(data.draw(st.integers(-3, len(row) + 4)), row) for row in batch]
    wanted = pad_columns(*custom_collate_with_masking_fn(pairs, **options), multiple, PAD, ignore)
    same(collate_fn(pairs, **options, pad_to_multiple_of=multiple), wanted)


@pytest.mark.slow
@given(rows_of_ids, limits, multiples, st.booleans(), st.sampled_from(["left", "right"]), st.data())
def test_widths_of_a_store_are_multiples(
    batch: list[list[int]], limit: int | None, multiple: int, masked: bool, truncation: str, data: Any
) -> None:
    spans = [[data.draw(st.integers(0, len(row)))] for row in batch]
    spans = [[prompt, len(row) - prompt] for (prompt,), row in zip(spans, batch, strict=True)]
    shards = make_shards(batch, spans, num_shards=2)
    options: dict[str, Any] = {"max_length": limit, "mask_prompt": masked, "truncation": truncation}
    for more in ({}, {"mode": "positional", "pad_token_id": 7, "ignore_index": -1}):
        plain = Collator(shards, **options, **more)(range(len(batch)))
        wanted = pad_columns(*plain, multiple, more.get("pad_token_id", PAD), more.get("ignore_index", -100))
        collator = Collator(shards, **options, **more, pad_to_multiple_of=multiple, inputs_dtype=torch.int32)
        found = collator(range(len(batch)))
        same(found, (wanted[0].int(), wanted[1]))
        report = np.zeros((2, kernels.REPORT_COLUMNS), np.int64)
        out = np.empty(4096, np.int64)
        numbers, bounds = np.arange(len(batch)), np.array([0, len(batch) // 2, len(batch)])
        if bounds[1]:
            assert collator.fill_group(numbers, bounds, out, report) == 2
            first, second = (type(found)(*map(torch.clone, part)) for part in collator.batches(out, report.tolist()))
            same(first, collator(numbers[: bounds[1]]))
            same(second, collator(numbers[bounds[1] :]))
            assert report[:, kernels.REAL].sum() == sum(min(len(row), limit or 99) for row in batch)
            assert report[:, kernels.CELLS].tolist() == [first.inputs.numel(), second.inputs.numel()]


def packs_of(lengths: list[int], capacity: int) -> list[int]:
    """Rows in order, each behind the one before where it fits: the packs' bounds."""
    bounds, used = [0], 0
    for number, length in enumerate(lengths):
        if used + length > capacity:
            bounds.append(number)
            used = 0
        used += length
    return [*bounds, len(lengths)]


@pytest.mark.slow
@given(rows_of_ids, st.integers(1, 12), st.integers(0, 5), rank_counts, st.integers(0, 9), st.booleans(), st.booleans())
def test_packs(
    batch: list[list[int]], limit: int, more: int, cp_size: int | None, room: int, in_row: bool, narrow: bool
) -> None:
    multiple = 2 * (cp_size or 0) or 1
    lengths = [min(max(len(row) - in_row, 0), limit) for row in batch]
    padded = [-(-length // multiple) * multiple for length in lengths]
    capacity = max(*padded, multiple) + more * multiple
    bounds = packs_of(padded, capacity)
    options: dict[str, Any] = {"max_length": limit, "end": "in_row" if in_row else "append", "mode": "positional"}
    shards = make_shards(batch, num_shards=2)
    if in_row:
        cells = [collate_in_row([row], None, PAD, max_length=limit) for row in batch]
    else:
        cells = [Collator(shards, **options)([number]) for number in range(len(batch))]
    packs = [cells[start:stop] for start, stop in pairwise(bounds)]
    wanted = put_end_to_end(packs, capacity, limit, cp_size=cp_size)
    num_segments = len(wanted[-1]) - 1
    assert not (wanted[-1] % multiple).any()
    options |= {"cp_size": cp_size, "inputs_dtype": torch.int32 if narrow else torch.int64}

    def made(**options: Any) -> Any:
        return Collator(shards, **options).pack(range(len(batch)), bounds, capacity=capacity)

    for most in (None, num_segments + room):
        found = made(**options, max_segments=most)
        assert type(found) is (PackedBatch if cp_size is None else ContextParallelBatch)
        wanted = put_end_to_end(packs, capacity, limit, cp_size=cp_size, max_segments=most)
        same(found, (wanted[0].to(options["inputs_dtype"]), *wanted[1:]))
        assert type(found.max_seqlen) is int
        assert found.max_seqlen == int(wanted[-1].diff().max())
        assert found.max_seqlen == type(found)(*map(torch.clone, found)).max_seqlen
        assert found.counts.real_cells == sum(lengths)
        assert most is None or len(found.cu_seqlens) == most + 1
    if num_segments > 1:
        with pytest.raises(
            InputError, match=rf"has {num_segments} segments, more than max_segments={num_segments - 1}"
        ):
            made(**options, max_segments=num_segments - 1)


def test_the_columns_that_a_batch_reads_of_the_report() -> None:
    assert kernels.LONGEST == kernels.REPORT_COLUMNS + _LONGEST
    assert kernels.RANKS == kernels.REPORT_COLUMNS + _CP_SIZE


def pack(lengths: list[list[int]], capacity: int, **options: Any) -> Any:
    """Packs of rows of these lengths."""
    rng = np.random.default_rng(1)
    batch = [rng.integers(0, 50256, length).tolist() for part in lengths for length in part]
    bounds = np.cumsum([0, *map(len, lengths)])
    return Collator(make_shards(batch), **options).pack(range(len(batch)), bounds, capacity=capacity)


def test_the_number_of_each_cells_segment() -> None:
    batch = pack([[3, 2], [5]], 6, max_segments=7)
    assert batch.seq_idx.dtype == torch.int32
    assert batch.seq_idx.tolist() == [[0, 0, 0, 1, 1, 2], [3, 3, 3, 3, 3, 4]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6, 11, 12, 12, 12]


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 8])
def test_shards_together_are_the_batch_and_cost_alike(cp_size: int) -> None:
    rng = np.random.default_rng(cp_size)
    lengths = [rng.integers(1, 40, 6).tolist() for _ in range(3)]
    capacity = 6 * 48 + 2 * cp_size
    capacity += -capacity % (2 * cp_size)
    batch = pack(lengths, capacity, cp_size=cp_size, max_segments=80)
    parts = [batch.shard(rank, cp_size) for rank in range(cp_size)]
    bounds, whole = batch.cu_seqlens_padded.tolist(), [tensor.flatten().tolist() for tensor in batch[:3]]
    again = [[0] * len(cells) for cells in whole]
    for rank, part in enumerate(parts):
        assert part.inputs.shape == part.targets.shape == part.position_ids.shape == (3, capacity // cp_size)
        assert part.cu_seqlens is batch.cu_seqlens
        assert part.max_seqlen == batch.max_seqlen
        place, flat = 0, [tensor.flatten().tolist() for tensor in part[:3]]
        for start, stop in pairwise(bounds):
            chunk = (stop - start) // (2 * cp_size)
            for number in (rank, 2 * cp_size - 1 - rank):
                for cells, own in zip(again, flat, strict=True):
                    cells[start + number * chunk : start + (number + 1) * chunk] = own[place : place + chunk]
                place += chunk
    assert again == whole
    pairs = {int((part.position_ids + 1).sum()) for part in parts}  # queries by keys that each attends to
    assert len(pairs) == 1
    assert sum(int((part.targets != -100).sum()) for part in parts) == batch.counts.trained_tokens


def test_what_is_no_shard() -> None:
    batch = pack([[5, 3]], 32, cp_size=2)
    elsewhere = ContextParallelBatch(*map(torch.clone, batch))
    for given_batch in (batch, elsewhere):
        assert given_batch.shard(1, 2).inputs.shape == (1, 16)
        assert given_batch.shard(0, 1).inputs.tolist() == batch.inputs.tolist()
        for cp_size in (3, 4, 8):
            with pytest.raises(InputError, match=f"cp_size={cp_size}: the batch's rows are not padded for so many"):
                given_batch.shard(0, cp_size)
        with pytest.raises(InputError, match="it is a shard already"):
            given_batch.shard(0, 2).shard(0, 2)
        with pytest.raises(InputError, match="cp_rank=2: give 0 to 1"):
            given_batch.shard(2, 2)


@pytest.mark.parametrize("name", ["pad_to_multiple_of", "cp_size", "max_segments"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "8", 1 << 25])
def test_numbers_that_are_none(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        Collator(make_shards([[1]]), **{name: value})


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [64, 100])
@pytest.mark.parametrize("block_size", [16, 128])
def test_the_block_mask_is_attention_within_each_segment(capacity: int, block_size: int) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rng = np.random.default_rng(capacity)
    lengths = [[40, 3, 1, 20], [1] * 30, [64], rng.integers(1, 9, 8).tolist()]
    batch = pack(lengths, capacity, max_segments=200)
    mask = batch.block_mask(block_size)
    documents = batch.seq_idx

    def causal(pack: Any, head: Any, query: Any, key: Any) -> Any:
        return (documents[pack, query] == documents[pack, key]) & (query >= key)

    wanted = create_block_mask(causal, 4, None, capacity, capacity, "cpu", block_size)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(wanted, name)), name
    assert torch.equal(mask.to_dense(), wanted.to_dense())

    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 4, 2, capacity, 8, generator=generator, dtype=torch.float64)
    found: Any = flex_attention(query, key, value, block_mask=mask)
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value, found)]
    for start, stop in pairwise(batch.cu_seqlens.tolist()):
        if stop > start:
            query, key, value, mine = (tensor[start:stop].transpose(0, 1)[None] for tensor in flat)
            theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            torch.testing.assert_close(mine, theirs)
