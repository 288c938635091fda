"""Weights that move: rows by step within one of the exact ones, and the same after any stop, at any world size."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcollate import BatchLoader, BucketBatchSampler
from fastcollate.errors import InputError
from fastcollate.plan.mixing import MixedStore
from fastcollate.plan.moving.schedule import Schedule
from fastcollate.store.store import TokenStore
from tests.helpers import random_rows, store_of_rows

TABLE = {3: {"big": 3, "small": 1}, 20: {"big": 1, "small": 3}, 28: {"big": 1, "small": 0}}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenStore]:
    folder: Path = tmp_path_factory.mktemp("moving")
    return {
        name: store_of_rows(folder / name, *random_rows(count, seed=count))
        for name, count in (("big", 300), ("small", 40))
    }


def exact_rows(table: Mapping[int, Mapping[str, float]], rows: int, num_steps: int) -> list[list[Fraction]]:
    """Rows of each source up to each step, by the definition alone."""
    lines = {
        step: [Fraction(w) / sum(map(Fraction, line.values())) for w in line.values()] for step, line in table.items()
    }
    steps, totals = sorted(lines), [[Fraction(0)] * len(next(iter(lines.values())))]
    for step in range(num_steps):
        before = max((s for s in steps if s <= step), default=steps[0])
        behind = min((s for s in steps if s > step), default=before)
        done = Fraction(max(step - before, 0), behind - before) if behind > before else Fraction(0)
        shares = [a + (b - a) * done for a, b in zip(lines[before], lines[behind], strict=True)]
        totals.append([total + rows * share for total, share in zip(totals[-1], shares, strict=True)])
    return totals[1:]


def unpadded(row: list[int]) -> list[int]:
    return [token for token in row if token != 50256]


def counts_of(schedule: Schedule, num_epochs: int) -> Any:
    parts = [schedule.counts_of_epoch(epoch) for epoch in range(num_epochs)]
    counts = np.concatenate([part for _, part in parts])
    for epoch, (before, _) in enumerate(parts):
        assert before.tolist() == counts[: epoch * schedule.steps_an_epoch].sum(0).tolist()
    return counts


_LINE = st.lists(st.integers(0, 50), min_size=6, max_size=6)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 6), st.dictionaries(st.integers(0, 90), _LINE, min_size=1, max_size=4), st.integers(1, 40),
    st.integers(1, 50), st.integers(1, 3),
)  # fmt: skip
def test_rows_up_to_each_step_are_within_one_of_the_exact_ones(
    num_sources: int, lines: dict[int, list[int]], step_rows: int, num_steps: int, num_epochs: int
) -> None:
    table = {step: {str(i): w for i, w in enumerate(line[:num_sources])} for step, line in lines.items()}
    if not all(sum(line.values()) for line in table.values()):
        return
    shares = {step: np.array([w / sum(line.values()) for w in line.values()]) for step, line in table.items()}
    counts = counts_of(Schedule(shares, step_rows, step_rows * num_steps), num_epochs)
    exact = exact_rows(table, step_rows, len(counts))
    assert counts.min() >= 0
    assert set(counts.sum(1)) == {step_rows}
    for total, wanted in zip(counts.cumsum(0).tolist(), exact, strict=True):
        assert all(abs(own - want) <= 1 for own, want in zip(total, wanted, strict=True))


def test_few_rows_of_many_sources_over_many_steps() -> None:
    weights = np.random.default_rng(0).integers(1, 1000, (3, 12)).astype(float)
    weights[2, 3] = 0
    table = dict(zip((100, 4_000, 9_000), weights / weights.sum(1, keepdims=True), strict=True))
    counts = Schedule(table, 1, 20_000).counts_of_epoch(0)[1]
    steps = np.arange(20_000)
    shares = np.stack([np.interp(steps, list(table), column) for column in np.array(list(table.values())).T], 1)
    assert np.abs(counts.cumsum(0) - shares.cumsum(0)).max() < 1


@pytest.mark.parametrize("kind", ["loader", "sampler"])
def test_stopped_at_any_step_and_resumed_by_any_ranks_the_rows_are_the_same(
    stores: dict[str, TokenStore], kind: str
) -> None:
    """Of 12 rows a step on 1 to 4 ranks, over three epochs, at 50 random steps."""
    mix = MixedStore(stores, weights=TABLE, step_rows=12, num_rows=120, seed=3)
    random = np.random.default_rng(5)

    def made(world_size: int, rank: int) -> Any:
        options: dict[str, Any] = {"batch_size": 12 // world_size, "rank": rank, "world_size": world_size}
        options["policy"] = "shuffled"
        if kind == "sampler":
            return BucketBatchSampler(mix, **options)
        return BatchLoader(mix, prefetch=0, **options)

    def batches(reader: Any, count: int) -> list[Any]:
        found: list[Any] = []
        while len(found) < count:
            for batch in reader:
                found.append(batch if kind == "sampler" else [row.tolist() for row in batch.inputs])
                if len(found) == count:
                    break
        return found

    whole = [made(1, 0)]
    steps = batches(whole[0], 36)
    for stop in random.integers(1, 35, 50).tolist():
        before, after = random.integers(1, 5, 2).tolist()
        readers = [made(before, rank) for rank in range(before)]
        for reader in readers:
            batches(reader, stop)
        states = [reader.state_dict() for reader in readers]
        others = [made(after, rank) for rank in range(after)]
        for other in others:
            other.load_state_dict(states[0])
        found = [row for other in others for row in batches(other, 1)[0]]
        if kind == "sampler":
            assert sorted(found) == sorted(steps[stop])
        else:  # the rows, without the padding that the batch's longest row decides
            for own, wanted in zip(sorted(map(unpadded, found)), sorted(map(unpadded, steps[stop])), strict=True):
                assert own == wanted
    if kind == "sampler":
        counts = np.array([mix.count_sources(rows) for rows in steps]).cumsum(0)
        for total, exact in zip(counts.tolist(), exact_rows(TABLE, 12, 36), strict=True):
            assert all(abs(a - b) <= 1 for a, b in zip(total, exact, strict=True))


@pytest.mark.parametrize("options", [{"policy": "bucketed"}, {"policy": "packed", "capacity": 64}], ids=str)
def test_other_policies_keep_to_the_weights_by_window(stores: dict[str, TokenStore], options: dict[str, Any]) -> None:
    mix = MixedStore(stores, weights=TABLE, step_rows=12, num_rows=480, seed=3)
    loaders = [BatchLoader(mix, batch_size=4, window=48, world_size=3, rank=rank, **options) for rank in range(3)]
    plans = [loader._order.plan(loader._plan_options, 0).plan for loader in loaders]
    drawn, exact, total = mix.rows_of_epoch(0), exact_rows(TABLE, 12, 40), np.zeros(2, np.int64)
    for window in range(10):
        rows = np.unique(np.concatenate([plan.window(window).rows for plan in plans]))
        assert rows.tolist() == list(range(48 * window, 48 * window + 48))
        total += mix.count_sources(drawn[rows])
        assert all(abs(a - b) <= 1 for a, b in zip(total.tolist(), exact[4 * window + 3], strict=True))


def test_an_epoch_goes_on_where_the_one_before_stopped(stores: dict[str, TokenStore]) -> None:
    mix = MixedStore(stores, weights=TABLE, step_rows=6, num_rows=60, seed=4)
    drawn = np.zeros(len(mix), np.int64)
    for epoch in range(9):
        drawn += np.bincount(mix.rows_of_epoch(epoch), minlength=len(mix))
        for part in (drawn[:300], drawn[300:]):
            assert part.max() - part.min() <= 1


def test_one_line_keeps_each_step_to_its_shares(stores: dict[str, TokenStore]) -> None:
    mix = MixedStore(stores, weights={"big": 3, "small": 1}, step_rows=8)
    assert mix.shares.sum() == 344  # 340 rows, in whole steps
    sampler = BucketBatchSampler(mix, batch_size=8, policy="sequential")
    assert all(mix.count_sources(rows).tolist() == [6, 2] for rows in sampler)


def test_a_state_of_another_table_is_refused(stores: dict[str, TokenStore]) -> None:
    one, other = (
        MixedStore(stores, weights={0: line, **TABLE}, step_rows=12) for line in ({"big": 1, "small": 1}, TABLE[3])
    )
    state = BatchLoader(one, batch_size=12).state_dict()
    with pytest.raises(InputError, match="mix"):
        BatchLoader(other, batch_size=12).load_state_dict(state)


def test_mistakes_are_named(stores: dict[str, TokenStore]) -> None:
    options: dict[str, Any]
    for options, message in (
        ({"weights": TABLE}, "say step_rows"),
        ({"weights": TABLE, "step_rows": 0}, "step_rows"),
        ({"weights": TABLE, "step_rows": 12, "num_rows": 100}, "give 108"),
        ({"weights": {-1: TABLE[3]}, "step_rows": 12}, "a step of weights"),
        ({"weights": {0: {"big": 1}}, "step_rows": 12}, "give each of"),
        ({"weights": {0: {"big": 1, "smal": 1}}, "step_rows": 12}, "smal"),
        ({"weights": {0: {"big": 0, "small": 0}}, "step_rows": 12}, "0 or more"),
        ({"weights": TABLE, "step_rows": 12, "temperature": 2}, "not both"),
        ({"weights": {"big": "3", "small": 1}}, "0 or more"),
        ({"weights": {"big": None, "small": 1}}, "0 or more"),
        ({"weights": {"big": float("nan"), "small": 1}}, "0 or more"),
        ({"temperature": "2"}, "temperature=2: give a positive number"),
    ):
        with pytest.raises(InputError, match=message):
            MixedStore(stores, **options)
    with pytest.raises(InputError, match="takes 5 at once"):
        BatchLoader(MixedStore(stores, weights=TABLE, step_rows=12), batch_size=5)
