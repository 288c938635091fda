"""The loader against the reference collate over the plan's rows, and its position."""

from __future__ import annotations

import json
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from numba.core import event
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fastcollate.collate.reference import custom_collate_fn
from fastcollate.errors import InputError
from fastcollate.load.loader import BatchLoader, Stats
from fastcollate.plan.plan import plan_epoch
from tests.helpers import make_store


def rows_of(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 50256, n).tolist() for n in np.clip(rng.lognormal(2, 0.7, count), 1, 60).astype(int)]


def same(found: Any, expected: Any) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


ROWS = rows_of(203)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["sequential", "shuffled", "bucketed"])
@pytest.mark.parametrize("sizes", [{"batch_size": 8}, {"max_tokens": 300}], ids=str)
def test_batches_equal_the_reference_over_the_plan(policy: str, sizes: dict[str, int]) -> None:
    store = make_store(ROWS, num_shards=3)
    loader = BatchLoader(store, policy=policy, seed=3, max_length=40, **sizes)
    plan = plan_epoch(store.lengths, policy=policy, seed=3, max_length=40, **sizes)
    count = 0
    for batch, rows in zip(loader, plan, strict=True):
        assert same(batch, custom_collate_fn([ROWS[i] for i in rows], allowed_max_length=40))
        count += 1
    assert count == len(plan)


def test_resume_is_exact_to_the_batch() -> None:
    store = make_store(ROWS)
    whole = [tuple(t.clone() for t in b) for b in BatchLoader(store, batch_size=8, seed=1, window=32)]
    for step in (0, 1, 3, 4, 5, 24, 25, len(whole)):
        loader = BatchLoader(store, batch_size=8, seed=1, window=32)
        iterator = iter(loader)
        for _ in range(step):
            next(iterator)
        state = json.loads(json.dumps(loader.state_dict()))
        other = BatchLoader(store, batch_size=8, seed=1, window=32)
        other.load_state_dict(state)
        rest = list(other)
        assert len(rest) == len(whole) - step
        assert all(same(a, b) for a, b in zip(rest, whole[step:], strict=True))


@pytest.mark.parametrize(
    "rows",
    [
        range(10, 21), range(200, 10, -7), range(203), np.arange(5, 9, dtype=np.uint16), [7], (3, 1, 2),
        np.array([202, 0, 17, 0]), [np.int64(5), np.int32(6)],
    ],
    ids=str,
)  # fmt: skip
def test_any_row_numbers(rows: Any) -> None:
    loader = BatchLoader(make_store(ROWS), policy="sequential", batch_size=4, rows=rows)
    chosen = [ROWS[row] for row in rows]
    batches = list(loader)
    assert len(batches) == len(loader) == -(-len(chosen) // 4)
    for number, batch in enumerate(batches):
        assert same(batch, custom_collate_fn(chosen[4 * number : 4 * number + 4]))


@pytest.mark.parametrize(
    "rows",
    [range(300), range(5, 5), range(-3, 5), [203], [-1], [0.5], [True, False], [[1, 2]], [], "ab", np.ones(203, bool)],
    ids=str,
)
def test_wrong_rows_are_named(rows: Any) -> None:
    with pytest.raises(InputError, match="rows"):
        BatchLoader(make_store(ROWS), batch_size=4, rows=rows)


def test_statistics_count_what_was_handed_over() -> None:
    store = make_store(ROWS)
    loader = BatchLoader(store, batch_size=8, device="cpu")
    cells = sum(batch.inputs.numel() for batch in loader)
    stats = loader.stats
    assert (stats.rows, stats.batches) == (len(ROWS), len(loader))
    assert stats.real_cells + stats.padded_cells == cells
    assert stats.wait_s > 0
    assert (stats.h2d_bytes, stats.corner_rows) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize(
    "options", [{"policy": "bucketed"}, {"policy": "packed", "capacity": 64}, {"policy": "sequential"}], ids=str
)
def test_waiting_is_without_the_compiling_of_kernels(
    ahead: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here kernels take half a second to compile, and a batch a twentieth of one."""
    job, calls = BatchLoader._job, []

    def compiling(*args: Any) -> Any:
        if not calls:
            with event.trigger_event("numba:compile", data={}):
                time.sleep(0.5)
        calls.append(1)
        time.sleep(0.05)
        return job(*args)

    monkeypatch.setattr(BatchLoader, "_job", compiling)
    loader = BatchLoader(make_store(ROWS), batch_size=8, prefetch=ahead, **options)
    next(iter(BatchLoader(make_store(ROWS), batch_size=8, prefetch=0, **options)))  # really compiled, if they must be
    calls.clear()
    start = time.perf_counter()
    for _ in loader:
        pass
    assert time.perf_counter() - start > 0.5
    assert 0.04 < loader.stats.wait_s < 0.45


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("policy", ["bucketed", "packed"])
def test_statistics_are_exact_to_the_batch(policy: str, ahead: int) -> None:
    """Also in the midst of a group, after it was left, and from one iteration to the next."""
    options: dict[str, Any] = {"policy": policy, "batch_size": 2, "prefetch": ahead, "mode": "positional"}
    loader = BatchLoader(make_store(ROWS), **options, capacity=64 if policy == "packed" else None)
    cells = real = trained = batches = 0
    for stop in (1, 5, 17, 1000):
        for number, batch in enumerate(loader, 1):
            cells += batch.inputs.numel()
            real += int((batch.inputs != 50256).sum())
            trained += int((batch.targets != -100).sum())
            batches += 1
            stats = loader.stats
            assert (stats.batches, stats.real_cells + stats.padded_cells) == (batches, cells)
            assert (stats.real_cells, stats.trained_tokens) == (real, trained)
            if number == stop:
                break
        after = loader.stats
        assert (after.batches, after.real_cells, after.trained_tokens) == (batches, real, trained)
        assert after.rows == stats.rows
    assert loader.stats is not loader.stats
    assert batches > 23


def test_copies_to_a_device_are_counted() -> None:
    loader = BatchLoader(make_store(ROWS), batch_size=8, device="meta")
    batch = next(iter(loader))
    assert batch.inputs.device.type == "meta"
    assert loader.stats.h2d_bytes == 2 * 8 * batch.inputs.numel()


def test_a_corner_of_the_reference_is_told_once() -> None:
    store = make_store([[1, 50256, 2], [3, 4], [5, 50256, 6], [7]])
    loader = BatchLoader(store, policy="sequential", batch_size=1)
    with pytest.warns(UserWarning, match="corner_rows") as told:
        list(loader)
    assert len(told) == 1
    assert loader.stats.corner_rows == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(BatchLoader(store, policy="sequential", batch_size=1, mode="positional"))


def test_a_batch_that_is_kept_is_never_overwritten() -> None:
    store = make_store(ROWS)
    kept = list(BatchLoader(store, policy="sequential", batch_size=4))
    views = [next(iter(BatchLoader(store, policy="sequential", batch_size=4))).inputs[1:, 1:] for _ in range(3)]
    for number, batch in enumerate(kept):
        assert same(batch, custom_collate_fn(ROWS[4 * number : 4 * number + 4]))
    assert all(torch.equal(view, kept[0].inputs[1:, 1:]) for view in views)


class Stream(IterableDataset[Any]):
    """A loader within a `DataLoader`, as those wrap it who want its workers."""

    def __init__(self, *, divides: bool) -> None:
        self._divides = divides

    def __iter__(self) -> Any:
        worker = get_worker_info()
        share = {"rank": worker.id, "world_size": worker.num_workers} if self._divides and worker else {}
        return iter(BatchLoader(make_store(ROWS), batch_size=8, prefetch=0, tail="uneven", **share))


def test_workers_that_would_all_give_all_rows_are_refused() -> None:
    def num_rows(**options: Any) -> int:
        return sum(len(batch.inputs) for batch in DataLoader(Stream(**options), batch_size=None, num_workers=2))

    assert num_rows(divides=True) == len(ROWS)
    with pytest.raises(InputError, match="num_workers=2: each worker gives all rows"):
        num_rows(divides=False)
    assert sum(len(batch.inputs) for batch in DataLoader(Stream(divides=False), batch_size=None)) == len(ROWS)
    one = DataLoader(Stream(divides=False), batch_size=None, num_workers=1)
    assert sum(len(batch.inputs) for batch in one) == len(ROWS)


def test_a_state_of_another_store_is_refused() -> None:
    store, other = make_store(ROWS), make_store(ROWS[:-1])
    state = BatchLoader(store, batch_size=8).state_dict()
    with pytest.raises(InputError, match="num_rows"):
        BatchLoader(other, batch_size=8).load_state_dict(state)


PROMPTS = [len(row) + 1 if number % 3 == 0 else max(len(row) // 2, 1) for number, row in enumerate(ROWS)]
MASKED = make_store(ROWS, [[prompt, max(len(row) - prompt, 0)] for prompt, row in zip(PROMPTS, ROWS, strict=True)])


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 6}, {"max_length": 3, "truncation": "left"}, {"max_length": 9, "mode": "positional"},
        {"policy": "packed", "capacity": 7, "mode": "positional"},
        {"policy": "packed", "capacity": 30, "max_length": 5, "long_rows": "drop", "mode": "positional"},
    ],
    ids=str,
)  # fmt: skip
def test_rows_without_a_target_are_counted_told_once_and_left_out(options: dict[str, Any]) -> None:
    options = {"batch_size": 2, "mask_prompt": True, "seed": 1, "tail": "uneven", **options}
    loader = BatchLoader(MASKED, **options)
    alone = {"policy": "sequential", "batch_size": 1, "capacity": None, "long_rows": "truncate"}
    limit = min(options.get("capacity") or 99, options.get("max_length") or 99)
    chosen = range(203)
    if options.get("long_rows") == "drop":
        chosen = [row for row in chosen if len(ROWS[row]) <= limit]  # type: ignore[assignment]
    single = BatchLoader(MASKED, **{**options, **alone, "max_length": limit, "rows": chosen})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trained = [row for row, batch in zip(chosen, single, strict=True) if bool((batch.targets != -100).any())]
        list(single)
    assert len([warning for warning in told if "no trained target" in str(warning.message)]) == 1
    with pytest.warns(UserWarning, match="rows have no trained target"):
        list(loader)
    assert 0 < len(trained) < len(chosen)
    assert loader.stats.rows == len(chosen)
    assert loader.stats.untrained_rows == len(chosen) - len(trained)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no trained target")
        left = BatchLoader(MASKED, **options, drop_untrained=True)
        targets = [batch.targets for batch in left]
    assert left.stats.untrained_rows == 0
    assert left.stats.rows == len(trained)
    assert all(bool((target != -100).any()) for target in targets)
    with pytest.raises(InputError, match="rows"):
        left.load_state_dict(loader.state_dict())


def test_what_max_length_cuts_away_is_counted() -> None:
    for side in ("right", "left"):
        loader = BatchLoader(make_store(ROWS), batch_size=8, max_length=10, truncation=side, mode="positional")
        list(loader)
        long = [len(row) - 10 for row in ROWS if len(row) > 10]
        assert (loader.stats.cut_rows, loader.stats.cut_tokens) == (len(long), sum(long))


def test_asking_for_statistics_costs_next_to_nothing() -> None:
    """The figures of a group are added once, not at each question: as many lines are read as there are batches."""
    loader = BatchLoader(make_store(ROWS), batch_size=1, prefetch=0)
    calls = []

    class Counting(Stats):
        def count(self, num_batches: int, totals: Any) -> None:
            calls.append(num_batches)
            super().count(num_batches, totals)

    loader._stats = Counting()
    for number, _ in enumerate(loader, 1):
        assert loader.stats.batches == loader.stats.batches == number
    assert calls == [1] * len(ROWS)
