"""How random the shuffle is, and how evenly ranks are loaded. Each test prints its seed, and fails on one in a million.

Where rows move in blocks, a window is one draw of many blocks, and within a window rows are mixed freely: then the
tests look at whole windows, and at the order within them.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from fastcollate.plan.plan import plan_epoch

NUM_ROWS = 60_000
SEEDS = (1, 20_261, 987_654_321)
ALPHA = 1e-6
CASES = [
    pytest.param({"window": NUM_ROWS}, id="one window"),
    pytest.param({"window": 4096}, id="windows"),
    pytest.param({"window": 4096, "block": 64}, id="blocks"),
]


def order(seed: int, epoch: int = 0, **options: int) -> npt.NDArray[np.int64]:
    """The rows of an epoch, in order."""
    print(f"seed {seed}, epoch {epoch}, {options}")
    plan = plan_epoch(np.ones(NUM_ROWS, np.uint16), batch_size=8, policy="shuffled", seed=seed, epoch=epoch, **options)
    return np.concatenate([plan.window(index).rows for index in range(plan.num_windows)])


def chi_square(counts: npt.NDArray[np.int64], expected: float) -> float:
    """The probability of so uneven counts or worse, by the Wilson-Hilferty approximation."""
    freedom = counts.size - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    print(f"chi-square {statistic:.1f} of {freedom} degrees of freedom, z {z:.2f}")
    return math.erfc(z / math.sqrt(2)) / 2


def test_the_approximation_finds_what_is_uneven() -> None:
    rng = np.random.default_rng(0)
    even = np.bincount(rng.integers(0, 100, 100_000), minlength=100)
    assert 0.001 < chi_square(even, 1000) < 0.999
    assert chi_square(even + np.where(np.arange(100) < 10, 200, 0), 1020) < ALPHA


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("options", CASES)
def test_where_rows_go_is_uniform(options: dict[str, int], seed: int) -> None:
    """Twenty parts of the data set by twenty parts of the epoch. Blocks count as one draw each."""
    block = options.get("block", 1)
    parts = 20
    counts = np.zeros((parts, parts), np.int64)
    for epoch in range(8):
        rows = order(seed, epoch, **options)
        where = np.empty(NUM_ROWS, np.int64)
        where[rows] = np.arange(NUM_ROWS)
        # One row of each block: its other rows fall into the same window, which is a part of the epoch.
        chosen = np.arange(epoch % block, NUM_ROWS, block)
        np.add.at(counts, (chosen * parts // NUM_ROWS, where[chosen] * parts // NUM_ROWS), 1)
    expected = counts.sum() / parts**2
    assert chi_square(counts, expected) > ALPHA


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("lag", [1, 2, 7, 64])
def test_neighbours_in_the_epoch_are_unrelated(options: dict[str, int], seed: int, lag: int) -> None:
    """The serial correlation of row numbers, whose standard deviation is one over the root of their number."""
    rows = order(seed, **options).astype(np.float64)
    correlation = float(np.corrcoef(rows[:-lag], rows[lag:])[0, 1])
    num_draws = NUM_ROWS
    if "block" in options:  # within a window rows are mixed, but a window's rows share its blocks: remove its mean
        window = 4096
        means = np.repeat(
            np.add.reduceat(rows, np.arange(0, NUM_ROWS, window)) / window, window
        )[:NUM_ROWS]  # fmt: skip
        whole = NUM_ROWS // window * window
        rest = (rows - means)[:whole]
        correlation = float(np.corrcoef(rest[:-lag], rest[lag:])[0, 1])
        num_draws = whole
    print(f"lag {lag}: correlation {correlation:.5f}")
    assert abs(correlation) * math.sqrt(num_draws) < 4.9  # one in a million


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("options", CASES)
def test_rows_that_were_neighbours_part(options: dict[str, int], seed: int) -> None:
    """How far two neighbouring rows lie apart; in a random order a third of the epoch on average.

    With blocks, neighbours stay in one window, where a random order puts them a third of the window apart.
    """
    where = np.empty(NUM_ROWS, np.int64)
    where[order(seed, **options)] = np.arange(NUM_ROWS)
    apart = np.abs(np.diff(where)) / NUM_ROWS
    if "block" in options:
        inside = np.arange(NUM_ROWS - 1) % 64 != 63
        in_windows = apart[inside] * NUM_ROWS / 4096
        within = in_windows[in_windows < 1]
        print(f"{len(within) / len(in_windows):.4f} stay in a window, {within.mean():.4f} of it apart")
        assert len(within) / len(in_windows) > 0.95
        assert abs(within.mean() - 1 / 3) < 0.02
        return
    # The distance of two random places has mean 1/3 and variance 1/18.
    assert abs(apart.mean() - 1 / 3) < 4.9 * math.sqrt(1 / 18 / NUM_ROWS) * 1.5  # neighbouring pairs share a row


@pytest.mark.parametrize("options", CASES)
def test_epochs_and_seeds_are_unrelated(options: dict[str, int]) -> None:
    orders = [order(seed, epoch, **options) for seed in SEEDS[:2] for epoch in (0, 1)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            meets = int((one == other).sum())
            print(f"{meets} rows in the same place twice")
            assert meets < 20  # one is expected, and a row more in any place is Poisson
            correlation = np.corrcoef(one.astype(float), other.astype(float))[0, 1]
            block = options.get("block", 1)
            assert abs(correlation) * math.sqrt(NUM_ROWS / block) < 4.9


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 32), (4, 16), (8, 8), (8, 64)])
def test_ranks_are_loaded_evenly(world_size: int, batch_size: int) -> None:
    seed = 5
    print(f"seed {seed}")
    drawn = np.random.default_rng(seed).lognormal(math.log(80), 0.7, 200_000)
    lengths = np.clip(np.rint(drawn), 8, 1024).astype(np.int64)
    plans = [
        plan_epoch(lengths, batch_size=batch_size, world_size=world_size, rank=rank, seed=seed)
        for rank in range(world_size)
    ]
    ratios = []
    for index in range(plans[0].num_windows):
        windows = [plan.window(index) for plan in plans]
        assert len({window.num_batches for window in windows}) == 1
        cells = [np.maximum.reduceat(lengths[w.rows], w.bounds[:-1]) * np.diff(w.bounds) for w in windows]
        ratios.append(np.max(cells, 0) / np.mean(cells, 0))
    ratio = np.concatenate(ratios)
    print(f"the widest rank's cells: {ratio.mean():.5f} of the mean, at most {ratio.max():.3f}")
    # The longest rows of a window are few and differ: a step in a thousand may hold them, not more.
    assert np.percentile(ratio, 99.9) < 1.05
    assert ratio.max() < 1.3
