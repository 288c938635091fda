"""Loops over whole vectors: what they write, and that they write nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fastcollate.collate import vectors
from fastcollate.jit import kernel

COUNTS = (*range(2 * vectors.STRIDE + 2), 100, 1000)
GUARD = 77


@kernel
def copy_tokens(source: Any, target: Any, count: int) -> None:
    vectors.copy_tokens(source.ctypes.data, target.ctypes.data, count, source.itemsize, target.itemsize)


@kernel
def copy_and_find(source: Any, target: Any, count: int, wanted: int) -> int:
    return vectors.copy_and_find(source.ctypes.data, target.ctypes.data, count, source.itemsize, wanted)


@kernel
def copy_and_find_each(sources: Any, targets: Any, wanted: int, found: Any) -> None:
    for i in range(len(sources)):
        source, target = sources[i], targets[i]
        found[i] = vectors.copy_and_find(source.ctypes.data, target.ctypes.data, len(source), source.itemsize, wanted)


@kernel
def fill_cells(target: Any, count: int, value: int) -> None:
    vectors.fill_cells(target.ctypes.data, count, target.itemsize, value)


def tokens_of(token: Any, count: int) -> npt.NDArray[Any]:
    """Tokens of all sizes that a dtype has, at an odd place in memory."""
    low, high = (-(2**62), 2**62) if token is np.int64 else (0, np.iinfo(token).max)
    found = np.random.default_rng(count).integers(low, high, count + 1, token, endpoint=True)
    return found[1:]


@pytest.mark.parametrize("cell", [np.int64, np.int32])
@pytest.mark.parametrize("token", [np.uint16, np.uint32, np.int64])
def test_tokens_are_copied_and_nothing_beyond_them(token: Any, cell: Any) -> None:
    for count in COUNTS:
        tokens = tokens_of(token, count)
        cells = np.full(count + 3, GUARD, cell)
        copy_tokens(tokens, cells[1:], count)
        expected = np.concatenate([[GUARD], tokens.astype(cell), [GUARD, GUARD]]).astype(cell)
        assert np.array_equal(cells, expected)


@pytest.mark.parametrize("token", [np.uint16, np.uint32, np.int64])
def test_a_token_is_found_wherever_it_is(token: Any) -> None:
    for count in COUNTS[:-2]:
        tokens = tokens_of(token, count)
        tokens[tokens == 9] = 8
        for place in range(count):
            own = tokens.copy()
            own[place] = 9
            cells = np.full(count + 1, GUARD)
            assert copy_and_find(own, cells, count, 9) == 1
            assert np.array_equal(cells, np.append(own.astype(np.int64), GUARD))
        cells = np.full(count + 1, 9)  # what is behind the last cell, and was in the cells before, does not count
        assert copy_and_find(tokens, cells, count, 9) == 0


def test_what_was_found_is_forgotten_by_the_next_call() -> None:
    sources = np.zeros((4, vectors.STRIDE + 1), np.uint16)
    sources[0, 0] = sources[2, -1] = 9
    found = np.full(4, GUARD)
    copy_and_find_each(sources, np.zeros(sources.shape, np.int64), 9, found)
    assert found.tolist() == [1, 0, 1, 0]


def test_a_token_is_no_other_one_of_the_same_lower_bits() -> None:
    tokens = np.full(vectors.STRIDE + 1, 9, np.uint16)
    for wanted in (9 + 2**16, 9 - 2**16):
        assert copy_and_find(tokens, np.zeros(len(tokens), np.int64), len(tokens), wanted) == 0


@pytest.mark.parametrize("count", [-1, -vectors.STRIDE, -vectors.STRIDE - 1, -(2**62)])
def test_a_negative_count_is_none(count: int) -> None:
    cells, tokens = np.full(4 * vectors.STRIDE, GUARD), np.zeros(4 * vectors.STRIDE, np.uint16)
    half = 2 * vectors.STRIDE
    copy_tokens(tokens[half:], cells[half:], count)
    assert copy_and_find(tokens[half:], cells[half:], count, 0) == 0
    fill_cells(cells[half:], count, 0)
    assert (cells == GUARD).all()


@pytest.mark.parametrize("value", [0, 50256, -100, 2**31 - 1])
@pytest.mark.parametrize("cell", [np.int64, np.int32])
def test_cells_are_filled_and_nothing_beyond_them(cell: Any, value: int) -> None:
    for count in COUNTS:
        cells = np.full(count + 3, GUARD, cell)
        fill_cells(cells[1:], count, value)
        assert np.array_equal(cells, [GUARD, *[value] * count, GUARD, GUARD])
