"""Each kernel timed by pytest-benchmark, its result checked first; timed only with `--benchmark-enable`.

    pytest tests/collate/test_kernel_speed.py --benchmark-enable --benchmark-storage=file://bench_results/kernels \\
        --benchmark-compare

compares with the saved baseline; `--benchmark-save=baseline` writes one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastcollate import pack_lengths
from fastcollate.collate import fill as kernels
from fastcollate.collate import fill_packed as pack_kernels
from fastcollate.collate.collator import Collator
from fastcollate.plan import kernels as plan_kernels
from tests.helpers import make_shards

NUM_ROWS = 512


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 50256, random.integers(40, 300)).tolist() for _ in range(NUM_ROWS)]


@pytest.mark.parametrize("mask", [False, True], ids=["all tokens", "masked"])
def test_fill_padded(benchmark: Any, rows: list[list[int]], mask: bool) -> None:
    collator = Collator(make_shards(rows, [[30, len(row) - 30] for row in rows], num_shards=3), mask_prompt=mask)
    numbers = np.arange(64) * 7
    width = max(len(rows[i]) for i in numbers)
    out = np.empty(kernels.cells_of(64, width, 8)[1], np.int64)
    found = benchmark(kernels.fill_padded, collator.table.array, collator.settings, numbers, out, *collator._types)
    assert found == (width, *kernels.cells_of(64, width, 8))
    inputs, targets = out[: 64 * width], out[found[1] :][: 64 * width]
    assert (inputs != 50256).sum() == sum(len(rows[i]) for i in numbers)
    assert (targets != -100).sum() == sum(len(rows[i]) - 29 * mask for i in numbers)


def test_sort_by_length(benchmark: Any) -> None:
    lengths = np.random.default_rng(1).integers(40, 464, 1 << 16).astype(np.int32)
    rows = np.arange(len(lengths))
    out = np.empty_like(rows), np.empty_like(lengths)
    benchmark(plan_kernels.sort_by_length, rows, lengths, int(lengths.max()), *out)
    assert out[0].tolist() == np.argsort(lengths, kind="stable").tolist()
    assert (out[1] == np.sort(lengths)).all()


@pytest.mark.parametrize("block", [1, 64])
def test_permuted_rows(benchmark: Any, block: int) -> None:
    out = np.empty(1 << 16, np.int64)
    benchmark(plan_kernels.permuted_rows, 0, len(out), block, np.uint64(5), 11, out)
    assert np.array_equal(np.sort(out), np.arange(len(out)))


def test_gather_lengths(benchmark: Any) -> None:
    random = np.random.default_rng(2)
    lengths, rows = random.integers(0, 500, 1 << 16).astype(np.uint16), random.permutation(1 << 16)
    out = np.empty(len(rows), np.int32)
    benchmark(plan_kernels.gather_lengths, lengths, rows, 300, out)
    assert np.array_equal(out, np.minimum(lengths[rows], 300))


def test_cut_by_tokens(benchmark: Any) -> None:
    lengths = np.sort(np.random.default_rng(3).integers(40, 464, 1 << 16)).astype(np.int32)
    bounds = np.empty(len(lengths) + 2, np.int64)
    count = benchmark(plan_kernels.cut_by_tokens, lengths, 8192, 1, bounds)
    for start, stop in zip(bounds[:count].tolist(), bounds[1 : count + 1].tolist(), strict=True):
        assert (stop - start) * lengths[start:stop].max() <= 8192
    assert bounds[count] == len(lengths)


def test_deal(benchmark: Any) -> None:
    items, bounds = np.arange(1 << 16), np.arange(0, (1 << 16) + 1, 64)
    order = np.random.default_rng(4).permutation(len(bounds) - 1)
    out, out_bounds = np.empty(len(items) // 4, np.int64), np.empty(len(bounds), np.int64)
    benchmark(plan_kernels.deal, items, bounds, order, 1, 4, out, out_bounds)
    assert out.tolist() == [row for g in order for row in range(64 * g + 1, 64 * g + 64, 4)]


def test_fill_padded_group(benchmark: Any, rows: list[list[int]]) -> None:
    collator = Collator(make_shards(rows, num_shards=3))
    numbers, bounds = np.random.default_rng(5).permutation(NUM_ROWS), np.arange(0, NUM_ROWS + 1, 8)
    out, report = np.empty(2 * NUM_ROWS * 320, np.int64), np.empty((64, kernels.REPORT_COLUMNS), np.int64)
    filled = benchmark(
        kernels.fill_padded_group,
        collator.table.array,
        collator.settings,
        numbers,
        bounds,
        out,
        report,
        *collator._types,
    )
    assert filled == 64
    assert report[:, kernels.REAL].sum() == sum(map(len, rows))
    assert report[:, kernels.WIDTH].tolist() == [max(len(rows[i]) for i in part) for part in numbers.reshape(64, 8)]


def test_fill_packed_group(benchmark: Any, rows: list[list[int]]) -> None:
    collator = Collator(make_shards(rows, num_shards=3))
    bin_of, num_packs = pack_lengths([len(row) for row in rows], 1024)
    numbers, packs = np.argsort(bin_of, kind="stable"), np.searchsorted(np.sort(bin_of), np.arange(num_packs + 1))
    out = np.empty(collator.packed_cells(num_packs, 1024, NUM_ROWS), np.int64)
    report, batches = np.empty((1, kernels.REPORT_COLUMNS), np.int64), np.array([0, num_packs])
    starts = np.empty(0, np.int64)
    options = (
        collator.table.array,
        collator.settings,
        numbers,
        starts,
        packs,
        batches,
        1024,
        out,
        report,
        *collator._types,
    )
    assert benchmark(pack_kernels.fill_packed_group, *options) == 1
    assert report[0, kernels.REAL] == report[0, kernels.TRAINED] == sum(map(len, rows))


@pytest.mark.slow
def test_pack_best_fit(benchmark: Any) -> None:
    lengths = np.sort(np.random.default_rng(6).integers(8, 464, 1 << 16))
    bin_of = np.empty(len(lengths), np.int64)
    num_bins = benchmark(plan_kernels.pack_best_fit, np.arange(len(lengths)), lengths, 1024, bin_of)
    filled = np.bincount(bin_of, lengths, minlength=num_bins)
    assert filled.max() <= 1024
    assert filled.sum() >= 0.99 * 1024 * num_bins
