"""The kernels work in strides of cells: long rows equal the reference, nothing beyond a shard or a batch is touched."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fastcollate.collate import fill as kernels
from fastcollate.collate.collator import Collator
from fastcollate.collate.reference import custom_collate_fn
from fastcollate.errors import InputError
from tests.helpers import make_shards

PAD = 50256
SENTINEL = -7


def random_rows(chance: random.Random, num_rows: int, longest: int) -> list[list[int]]:
    """Rows with a few padding tokens in them, so that what follows a row is seen if it leaks into it."""
    return [
        [PAD if chance.random() < 0.02 else chance.randrange(PAD) for _ in range(chance.randint(0, longest))]
        for _ in range(num_rows)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_long_rows_equal_the_reference(seed: int, dtype: Any) -> None:
    chance = random.Random(seed)
    rows = random_rows(chance, chance.randint(1, 40), chance.choice([5, 20, 80, 200]))
    limit = chance.choice([None, None, 1, 15, 16, 17, 33, 64])
    shards = make_shards(rows, num_shards=chance.randint(1, 3), dtype=dtype)
    order = chance.choices(range(len(rows)), k=chance.randint(1, 30))
    expected = custom_collate_fn([rows[i] for i in order], allowed_max_length=limit)
    if expected[0].numel() == 0:  # where the reference gives float32
        expected = expected[0].long(), expected[1].long()
    for narrow in (torch.int64, torch.int32):
        found = Collator(shards, max_length=limit, inputs_dtype=narrow)(order)
        assert found.inputs.dtype == narrow, seed
        assert torch.equal(found.inputs.long(), expected[0]), seed
        assert torch.equal(found.targets, expected[1]), seed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("narrow", [False, True])
def test_cells_outside_the_batches_stay_as_they_are(seed: int, narrow: bool) -> None:
    chance = random.Random(seed)
    rows = random_rows(chance, 30, chance.choice([9, 40]))
    bounds = np.array([0, 1, 8, 9, 30])
    collator = Collator(make_shards(rows), inputs_dtype=torch.int32 if narrow else torch.int64)
    out, report = np.full(8192, SENTINEL), np.empty((len(bounds) - 1, kernels.REPORT_COLUMNS), np.int64)
    assert collator.fill_group(np.arange(30), bounds, out, report) == 4
    left_alone = np.ones(2 * len(out), bool)  # by half cell, the size of a narrow input
    for number, line in enumerate(report.tolist()):
        num_rows = int(bounds[number + 1] - bounds[number])
        width, start = line[kernels.WIDTH], line[kernels.START]
        middle = start + kernels.plain_cells_of(num_rows, width, 4 if narrow else 8)[0]
        left_alone[2 * start : 2 * start + num_rows * width * (1 if narrow else 2)] = False
        left_alone[2 * middle : 2 * (middle + num_rows * width)] = False
    expected = np.full(len(out), SENTINEL).view(np.int32)
    assert (out.view(np.int32) == expected)[left_alone].all(), seed


@pytest.fixture
def guarded() -> Iterator[npt.NDArray[np.uint8]]:
    """A page of memory behind which one begins that cannot be touched: a byte too far kills this process."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        pytest.skip("needs an anonymous memory map with a guard page")
    size = mmap.PAGESIZE
    pages = mmap.mmap(-1, 2 * size)
    guard = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(pages)) + size)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(guard, ctypes.c_size_t(size), 0) == 0
    yield np.frombuffer(pages, np.uint8, count=size)
    assert libc.mprotect(guard, ctypes.c_size_t(size), 3) == 0


def test_a_shard_is_never_read_past_its_end(guarded: npt.NDArray[np.uint8]) -> None:
    lengths = np.array([100, 5, 1, 0, 16, 15, 17, 31, 1, 2, 0])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = guarded.view(np.uint16)[-offsets[-1] :]
    ids[:] = np.arange(len(ids))
    shard = make_shards([[0]] * len(lengths))[0]._replace(input_ids=ids, offsets=offsets)
    rows = [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    everything = list(range(len(rows)))
    for order in (everything, everything[::-1], *([i] for i in everything if rows[i])):
        found = Collator([shard])(order)
        expected = custom_collate_fn([rows[i] for i in order])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("bounds", [[0, 5, 3], [-1, 5], [0, 11], [-(10**8), 10], [0, 10**9], [10**12, 10**12], []])
def test_bounds_that_leave_the_rows_are_refused(bounds: list[int]) -> None:
    collator, numbers = Collator(make_shards([[1, 2, 3]] * 10)), np.arange(10)
    out, report = np.empty(4096, np.int64), np.zeros((9, kernels.REPORT_COLUMNS), np.int64)
    given, none = np.array(bounds, np.int64), np.empty(0, np.int64)
    with pytest.raises(InputError, match="bounds"):
        collator.fill_group(numbers, given, out, report)
    with pytest.raises(InputError, match="bounds"):
        collator.fill_packed_group(numbers, none, given, np.array([0, 1]), 64, out, report)
    with pytest.raises(InputError, match="bounds"):
        collator.fill_packed_group(numbers, none, np.arange(11), given, 64, out, report)


def test_memory_that_does_not_hold_a_report_is_refused() -> None:
    collator, numbers, bounds = Collator(make_shards([[1, 2, 3]] * 10)), np.arange(10), np.arange(11)
    good = np.empty(4096, np.int64), np.zeros((10, kernels.REPORT_COLUMNS), np.int64)
    assert collator.fill_group(numbers, bounds, *good) == 10
    for out, report in (
        (good[0], good[1][:9]), (good[0], good[1][:, :9]), (good[0].astype(np.int32), good[1]), (good[0][::2], good[1]),
        (good[0].reshape(2, -1), good[1]),
    ):  # fmt: skip
        with pytest.raises(InputError, match="int64 memory"):
            collator.fill_group(numbers, bounds, out, report)


def test_shards_of_two_dtypes_are_refused() -> None:
    with pytest.raises(InputError, match="uint16 and uint32"):
        Collator([*make_shards([[1]], dtype=np.uint16), *make_shards([[1]], dtype=np.uint32)])
    (shard,) = make_shards([[1]])
    with pytest.raises(InputError, match="spans of int64 and uint32"):
        Collator([shard._replace(spans=shard.spans.astype(dtype)) for dtype in (np.uint32, np.int64)], mask_prompt=True)


def test_a_pad_that_does_not_fit_the_inputs_is_refused() -> None:
    with pytest.raises(InputError, match="pad_token_id=2147483648 does not fit"):
        Collator(make_shards([[1]]), pad_token_id=2**31, inputs_dtype=torch.int32)
