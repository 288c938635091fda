"""`balance`: as level as Karmarkar and Karp's method, which is written here plainly, and as many a rank where asked."""

from __future__ import annotations

import heapq
import time
from typing import Any

import numpy as np
import pytest

from fastcollate import balance
from fastcollate.errors import InputError

Part = tuple[float, list[int]]


def karmarkar_karp(costs: list[float], num_parts: int, *, equal_counts: bool) -> float:
    """The dearest part's cost: of all slots the two of the widest spread become one, the dearest with the cheapest."""
    order = sorted(range(len(costs)), key=lambda item: -costs[item])
    size = num_parts if equal_counts else 1
    slots: list[list[Part]] = []
    for first in range(0, len(order), size):
        own: list[Part] = [(costs[item], [item]) for item in order[first : first + size]]
        slots.append(own + [(0.0, [])] * (num_parts - len(own)))
    heap = [(slot[-1][0] - slot[0][0], number, slot) for number, slot in enumerate(slots)]
    heapq.heapify(heap)
    for number in range(len(slots), 2 * len(slots) - 1):
        one, other = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        joined = [(a + b, x + y) for (a, x), (b, y) in zip(one, reversed(other), strict=True)]
        joined.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (joined[-1][0] - joined[0][0], number, joined))
    found = heap[0][2]
    assert sorted(item for _, items in found for item in items) == list(range(len(costs)))
    return found[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("equal_counts", [False, True])
@pytest.mark.parametrize("kind", ["log-normal", "uniform", "heavy"])
def test_no_less_level_than_karmarkar_karp(kind: str, equal_counts: bool) -> None:
    better = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        count, ranks = int(rng.integers(1, 250)), int(rng.integers(1, 24))
        lengths = {
            "log-normal": rng.lognormal(6, 1, count), "uniform": rng.uniform(1, 9000, count),
            "heavy": rng.pareto(1.1, count) * 100,
        }[kind]  # fmt: skip
        costs = 24576 * lengths + lengths**2
        dealt = balance(costs, ranks, equal_counts=equal_counts)
        assert dealt.dtype == np.int64
        sums, counts = np.bincount(dealt, costs, ranks), np.bincount(dealt, minlength=ranks)
        theirs = karmarkar_karp(costs.tolist(), ranks, equal_counts=equal_counts)
        assert sums.max() <= theirs * (1 + 1e-12)
        better += sums.max() < theirs * (1 - 1e-6)
        if equal_counts:
            assert counts.max() - counts.min() <= 1
    assert better > 0 or not equal_counts


@pytest.mark.parametrize("equal_counts", [False, True])
def test_a_hundred_thousand_sequences_at_once(equal_counts: bool) -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1, 100_000).clip(8, 32768).astype(np.int64)
    costs = 24576 * lengths + lengths**2
    times = []
    for _ in range(4):
        start = time.perf_counter()
        dealt = balance(costs, 64, equal_counts=equal_counts)
        times.append(time.perf_counter() - start)
    sums = np.bincount(dealt, costs)
    assert sums.max() / sums.mean() - 1 < 1e-5
    assert min(times) < 0.5  # a tenth of that is measured by benchmarks.balance; a loaded machine takes longer


def test_small_ones() -> None:
    def sums_of(costs: list[Any], ranks: int, **options: Any) -> list[float]:
        return sorted(np.bincount(balance(costs, ranks, **options), costs, ranks).tolist())

    assert sums_of([8, 7, 6, 5, 4], 2) == [15, 15]
    assert sums_of([9, 1, 1, 1], 2) == [3, 9]
    assert sums_of([9, 1, 1, 1], 2, equal_counts=True) == [2, 10]
    assert sums_of([5.5], 3) == [0, 0, 5.5]
    assert sums_of([1, 2, 3], 1) == [6]
    assert balance([], 3).tolist() == []
    assert balance([], 3, equal_counts=True).tolist() == []
    assert sorted(balance([0, 0, 0], 3, equal_counts=True).tolist()) == [0, 1, 2]
    assert balance(np.array([3, 2], np.uint8), np.int64(2)).tolist() == balance([3, 2], 2).tolist()


@pytest.mark.parametrize(
    ("costs", "ranks", "message"),
    [
        ([1, -2], 2, r"costs\[1\]=-2.0: give finite numbers"),
        ([float("nan")], 2, r"costs\[0\]=nan"),
        ([[1.0]], 2, r"shape \(1, 1\)"),
        (["a"], 2, "one number of at least 0 an item"),
        ([1], 0, "num_ranks=0"),
        ([1], 2.0, "num_ranks=2.0 is a float"),
    ],
)
def test_what_it_refuses(costs: Any, ranks: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        balance(costs, ranks)
