"""Packing: nothing lost, nothing overfull, and nearly nothing unused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcollate.errors import InputError
from fastcollate.plan import pack_lengths, plan_epoch


def plain_best_fit(lengths: list[int], capacity: int) -> int:
    """The number of bins that best fit decreasing needs, by looking at every bin."""
    rooms: list[int] = []
    for length in sorted((min(n, capacity) for n in lengths), reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


@given(st.lists(st.integers(0, 90), max_size=60), st.integers(1, 80))
def test_bins_are_those_of_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    bins, num_bins = pack_lengths(np.array(lengths, np.int64), capacity)
    used = np.bincount(bins, np.minimum(lengths, capacity), num_bins) if lengths else np.zeros(0)
    assert len(used) == num_bins == plain_best_fit(lengths, capacity)
    assert (used <= capacity).all()


def test_lognormal_lengths_leave_half_a_percent_at_most() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(80), 0.7, 64_000), 8, 1024).astype(np.uint16)
    assert lengths.sum() / (pack_lengths(lengths, 1024).num_bins * 1024) >= 0.995


def test_wrong_values_are_named() -> None:
    with pytest.raises(InputError, match="capacity=0"):
        pack_lengths([1], 0)
    with pytest.raises(InputError, match="lengths"):
        pack_lengths([-1], 4)
    with pytest.raises(InputError, match="policy='packed'"):
        plan_epoch([1], policy="packed", batch_size=1)
