"""Epochs of one length that flow into each other: nothing lost, nothing twice, wherever one stops."""

from __future__ import annotations

import json
import random
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest

from fastcollate import BucketBatchSampler
from fastcollate.errors import InputError
from fastcollate.integrations.flow import FlowingSampler

LENGTHS = np.random.default_rng(4).integers(1, 60, 150)
OPTIONS: list[dict[str, Any]] = [
    {"max_tokens": 130, "window": 16},
    {"max_tokens": 200, "policy": "shuffled"},
    {"policy": "packed", "capacity": 64, "batch_size": 2, "window": 30, "drop_last": True},
    {"max_tokens": 100, "window": 40, "world_size": 2, "rank": 1},
    {"batch_size": 7, "window": 28},
    {"batch_size": 7, "window": 28, "drop_last": True},
]


def stream(options: dict[str, Any], count: int) -> list[list[int]]:
    """The first batches of planned epochs one after another."""
    sampler = BucketBatchSampler(LENGTHS, **options)
    return list(islice(chain.from_iterable(iter(lambda: list(sampler), None)), count))


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_turns_of_one_length_are_the_planned_epochs_one_after_another(options: dict[str, Any]) -> None:
    sampler = FlowingSampler(LENGTHS, **options)
    length = len(BucketBatchSampler(LENGTHS, **options))
    wanted = stream(options, 8 * length)
    found = []
    for turn in range(8):
        if turn % 2:
            sampler.set_epoch(turn)
        assert len(sampler) == length
        own = list(sampler)
        assert len(own) == length
        found += own
    assert found == wanted
    plain = BucketBatchSampler(LENGTHS, **options)
    counts = {sum(1 for _ in plain) for _ in range(8)}
    assert (len(counts) == 1) == ("batch_size" in options and options.get("policy") != "packed")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("way", ["state", "turn and step", "turn and skip"])
def test_a_run_stopped_anywhere_goes_on(options: dict[str, Any], way: str) -> None:
    length = len(FlowingSampler(LENGTHS, **options))
    wanted = stream(options, 5 * length)
    for stop in (0, 1, length - 1, length, length + 1, 3 * length - 1, 3 * length, 3 * length + length // 2):
        turn, step = divmod(stop, length)
        stopped, resumed = FlowingSampler(LENGTHS, **options), FlowingSampler(LENGTHS, **options)
        for _ in range(turn):
            list(stopped)
        iterator = iter(stopped)
        taken = [next(iterator) for _ in range(step)]
        assert taken == wanted[turn * length : stop]
        if way == "state":
            resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
            resumed.set_epoch(turn)
            rest = list(resumed)
        elif way == "turn and step":
            resumed.set_position(turn, step)
            rest = list(resumed)
        else:
            resumed.set_epoch(turn)
            rest = list(resumed)[step:]
        rest += list(resumed)
        assert rest == wanted[stop : (turn + 2) * length]


def test_a_turn_left_early_starts_again_or_is_followed_by_the_next() -> None:
    sampler = FlowingSampler(LENGTHS, **OPTIONS[0])
    wanted = stream(OPTIONS[0], 3 * len(sampler))
    for turn in (0, 0, 2, 1):
        sampler.set_epoch(turn)
        found = list(islice(sampler, 5))
        assert found == wanted[turn * len(sampler) :][:5]


def test_an_earlier_turn_does_not_drop_a_loaded_position() -> None:
    sampler = FlowingSampler(LENGTHS, **OPTIONS[0])
    sampler.set_position(2, 3)
    again = FlowingSampler(LENGTHS, **OPTIONS[0])
    again.load_state_dict(sampler.state_dict())
    with pytest.raises(InputError, match=r"set_epoch\(2\)"):
        again.set_epoch(0)
    assert list(again) == list(sampler)
    again.set_epoch(0)


def test_a_samplers_state_is_good_where_the_epochs_are_even() -> None:
    plain = BucketBatchSampler(LENGTHS, **OPTIONS[4])
    plain.set_position(1, 9)
    sampler = FlowingSampler(LENGTHS, **OPTIONS[4])
    sampler.load_state_dict(plain.state_dict())
    assert list(sampler) == list(plain)
    uneven = BucketBatchSampler(LENGTHS, **OPTIONS[0])
    with pytest.raises(InputError, match="turn=None"):
        FlowingSampler(LENGTHS, **OPTIONS[0]).load_state_dict(uneven.state_dict())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_mutated_state_is_refused_or_right(options: dict[str, Any]) -> None:
    sampler = FlowingSampler(LENGTHS, **options)
    sampler.set_position(2, 3)
    state = sampler.state_dict()
    names = ["turn", "turn_batches", "epoch", "next_window", "next_batch"]
    rng = random.Random(str(options))
    values: list[Any] = [None, -1, 0, 1, 2, 3, 4, 5, True, 1.0, "2", 10**9, 10**30, []]
    for _ in range(60):
        changed = dict(state)
        for name in rng.sample(names, rng.choice([1, 2, 5])):
            changed[name] = rng.choice(values)
        try:
            sampler.load_state_dict(changed)
        except InputError:
            assert sampler.state_dict() == state
            continue
        placed = FlowingSampler(LENGTHS, **options)
        placed.set_position(sampler.state_dict()["turn"], sampler.state_dict()["turn_batches"])
        assert list(sampler) == list(placed)
        sampler.load_state_dict(state)


def test_ranks_of_different_numbers_of_batches_are_refused() -> None:
    with pytest.raises(InputError, match="tail='uneven'"):
        FlowingSampler(LENGTHS, batch_size=4, world_size=2, rank=0, tail="uneven")
    FlowingSampler(LENGTHS, batch_size=4, tail="uneven")
