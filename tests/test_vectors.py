"""Loops over whole vectors: what they write, and that they write nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fastcollate import vectors
from fastcollate.jit import kernel

COUNTS = (*range(2 * vectors.STRIDE + 2), 100, 1000)
GUARD = 77


@kernel
def copy_tokens(source: Any, target: Any, count: int, token: Any, cell: Any) -> None:
    vectors.copy_tokens(source.ctypes.data, target.ctypes.data, count, token, cell)


@kernel
def copy_and_find(source: Any, target: Any, count: int, token: Any, wanted: int) -> int:
    return vectors.copy_and_find(source.ctypes.data, target.ctypes.data, count, token, wanted)


@kernel
def fill_cells(target: Any, count: int, cell: Any, value: int) -> None:
    vectors.fill_cells(target.ctypes.data, count, cell, value)


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
        copy_tokens(tokens, cells[1:], count, token, cell)
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
            assert copy_and_find(own, cells, count, token, 9) == 1
            assert np.array_equal(cells, np.append(own.astype(np.int64), GUARD))
        cells = np.full(count + 1, 9)  # what is behind the last cell, and was in the cells before, does not count
        assert copy_and_find(tokens, cells, count, token, 9) == 0


def test_a_token_is_no_other_one_of_the_same_lower_bits() -> None:
    tokens = np.full(vectors.STRIDE + 1, 9, np.uint16)
    assert copy_and_find(tokens, np.zeros(len(tokens), np.int64), len(tokens), np.uint16, 9 + 2**16) == 0
    assert copy_and_find(tokens, np.zeros(len(tokens), np.int64), len(tokens), np.uint16, 9 - 2**16) == 0


@pytest.mark.parametrize("value", [0, 50256, -100, 2**31 - 1])
@pytest.mark.parametrize("cell", [np.int64, np.int32])
def test_cells_are_filled_and_nothing_beyond_them(cell: Any, value: int) -> None:
    for count in COUNTS:
        cells = np.full(count + 3, GUARD, cell)
        fill_cells(cells[1:], count, cell, value)
        assert np.array_equal(cells, [GUARD, *[value] * count, GUARD, GUARD])
