"""Steps over ranks: all take the same ones and end together, whatever is left for the last batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcollate.plan.plan import plan_epoch
from fastcollate.train import step as room
from fastcollate.train.options import TrainOptions
from fastcollate.train.ranks import Ranks
from fastcollate.train.step import Feed, MicroBatch, Offer, decide

CELL = torch.zeros((1, 1), dtype=torch.int64)


class Loader:
    """A rank's plan as a loader: its batches are lists of rows, and its epoch goes on when the iterator ends."""

    def __init__(self, num_rows: int, *, early: bool = False, **options: Any) -> None:
        self._lengths, self._options, self._early = np.ones(num_rows, np.int64), options, early
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._plan())

    def _plan(self) -> list[list[int]]:
        return [rows.tolist() for rows in plan_epoch(self._lengths, epoch=self.epoch, seed=1, **self._options)]

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._plan()
        for number, rows in enumerate(batches, 1):
            if self._early and number == len(batches):
                self.epoch += 1
            yield rows
        if not self._early or not batches:
            self.epoch += 1

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}


@pytest.fixture(autouse=True)
def rows_as_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_micro_batch(rows: Any) -> MicroBatch:
        return MicroBatch(rows, CELL, None, None, len(rows), len(rows))

    monkeypatch.setattr(room, "as_micro_batch", as_micro_batch)


class Simulation:
    """The loop of all ranks of a run, step by step, as `_Run` has it: what each took, and when it ended."""

    def __init__(self, options: TrainOptions, loaders: list[Loader]) -> None:
        self.options = options
        world_size = len(loaders)
        ranks = [Ranks(rank, world_size, torch.device("cpu"), None) for rank in range(world_size)]
        self.feeds = [
            Feed(loader, options.accumulate, own)  # type: ignore[arg-type]
            for loader, own in zip(loaders, ranks, strict=True)
        ]
        self.steps = 0
        self.seen: Counter[int] = Counter()
        self.planned = -(-len(loaders[0]) // options.accumulate)

    def run(self, most_calls: int) -> None:
        ended: set[bool] = set()
        for _ in range(most_calls):
            ended = {self.options.ending(step=self.steps, epoch=feed.epoch) is not None for feed in self.feeds}
            assert len(ended) == 1, "some ranks have ended, and gather while the others reduce"
            if ended == {True}:
                return
            self.step()
        raise AssertionError(f"not ended after {most_calls} calls")

    def step(self) -> None:
        own = [feed._take() for feed in self.feeds]
        step = decide([feed._offer(batches, False) for feed, batches in zip(self.feeds, own, strict=True)])
        taken = [feed._accept(batches, step, 0.0) for feed, batches in zip(self.feeds, own, strict=True)]
        assert {len(data.batches) for data in taken} == {step.num_batches}
        self.seen.update(row for batches in own for batch in batches for row in batch.inputs)  # type: ignore[misc]
        self.steps += bool(step.num_batches)


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True], ids=["epoch counted at the end", "with the last batch"])
@pytest.mark.parametrize("tail", ["uneven", "repeat"])
@pytest.mark.parametrize("world_size", range(2, 9))
def test_all_ranks_end_with_the_same_step(world_size: int, tail: str, early: bool) -> None:
    for remainder, accumulate, a_rank in product(range(2 * world_size + 1), (1, 2, 3), (1, 2)):
        group = a_rank * world_size
        if remainder >= group:
            continue
        num_rows = 2 * group + remainder
        for limit in ({"epochs": 2}, {"max_steps": 5}, {"epochs": 1, "max_steps": 100}, {"epochs": 3, "max_steps": 3}):
            options = TrainOptions(accumulate=accumulate, **limit)
            loaders = [
                Loader(num_rows, early=early, rank=rank, world_size=world_size, batch_size=a_rank, tail=tail)
                for rank in range(world_size)
            ]
            run = Simulation(options, loaders)
            run.run(most_calls=40)
            epochs = limit.get("epochs", 100)
            assert run.steps == min(limit.get("max_steps", 1000), epochs * run.planned)
            if tail == "uneven" and run.steps == epochs * run.planned:
                assert run.seen == Counter(dict.fromkeys(range(num_rows), epochs))


def test_the_case_of_the_report() -> None:
    """337 rows, batch 8, 2 ranks: the last batch is one row, and the second rank has none of it."""
    loaders = [Loader(337, rank=rank, world_size=2, batch_size=4, tail="uneven") for rank in range(2)]
    assert [len(loader) for loader in loaders] == [43, 42]
    run = Simulation(TrainOptions(epochs=1), loaders)
    run.run(most_calls=50)
    assert (run.steps, run.seen) == (43, Counter(range(337)))


def test_a_decision_is_one_for_all() -> None:
    first, second = Offer(2, 30, 40, epoch=0, stop=False), Offer(1, 5, 6, epoch=1, stop=False)
    assert decide([first, second]) == decide([second, first]) == Offer(2, 35, 46, epoch=0, stop=False)
    assert decide([first, second._replace(stop=True)]).stop is True
    assert decide([Offer(0, 0, 0, epoch=1, stop=False)] * 3) == Offer(0, 0, 0, epoch=1, stop=False)


def test_a_rank_that_is_asked_to_stop_stops_all_before_the_same_step() -> None:
    loaders = [Loader(20, rank=rank, world_size=2, batch_size=4, tail="uneven") for rank in range(2)]
    run = Simulation(TrainOptions(epochs=1), loaders)
    own = [run.feeds[0]._take(), []]
    step = decide([feed._offer(batches, not batches) for feed, batches in zip(run.feeds, own, strict=True)])
    taken = [feed._accept(batches, step, 0.0) for feed, batches in zip(run.feeds, own, strict=True)]
    assert all(data.total.stop and not data.batches for data in taken)


@pytest.mark.parametrize(
    ("limits", "at", "expected"),
    [
        ({"max_steps": 5}, {"step": 4, "epoch": 9}, None),
        ({"max_steps": 5}, {"step": 5, "epoch": 0}, "finished"),
        ({}, {"step": 7, "epoch": 1}, "finished"),
        ({"epochs": 2, "max_steps": 5}, {"step": 4, "epoch": 2}, "finished"),
        ({"patience": 2}, {"step": 1, "epoch": 0, "evaluations_since_best": 2}, "early stop"),
        ({"patience": 2}, {"step": 1, "epoch": 0, "evaluations_since_best": 1}, None),
    ],
)
def test_how_a_run_ends(limits: dict[str, int], at: dict[str, int], expected: str | None) -> None:
    assert TrainOptions(out=Path("x"), **limits).ending(**at) == expected
