"""Packs and batches that are dealt by cost: every row once, whoever stops where, and ranks that finish together."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from fastcollate import BatchLoader, BucketBatchSampler, plan_epoch
from fastcollate.errors import InputError
from fastcollate.plan import kernels
from fastcollate.plan.cost import deal as costs
from tests.helpers import make_store

LENGTHS = np.random.default_rng(3).lognormal(3, 1, 3000).clip(1, 400).astype(np.int64)
POLICIES: dict[str, dict[str, Any]] = {
    "packed": {"policy": "packed", "capacity": 60},
    "packed, split": {"policy": "packed", "capacity": 40, "long_rows": "split", "max_length": 25},
    "bucketed": {"policy": "bucketed"},
    "shuffled": {"policy": "shuffled"},
}


def draw(name: str, rng: np.random.Generator) -> tuple[dict[str, Any], list[dict[str, int]]]:
    """Options of an order, and several ways for ranks to share its steps."""
    options = {**POLICIES[name], "seed": int(rng.integers(9)), "tail": "uneven", "window": int(rng.integers(20, 200))}
    batches = int(rng.choice([4, 6, 8, 12]))
    sizes = [size for size in range(1, batches + 1) if batches % size == 0]
    shares = []
    for world_size in rng.choice(sizes, 3, replace=True).tolist():
        part: dict[str, int] = {"world_size": world_size}
        if options["policy"] == "packed":
            part["batch_size"] = int(rng.choice([n for n in sizes if (batches // world_size) % n == 0]))
            part["accumulation"] = batches // world_size // part["batch_size"]
        else:
            part |= {"max_tokens": 60, "accumulation": batches // world_size}
        shares.append(part)
    return {**options, "balance": True}, shares


def ranks_of(lengths: Any, options: dict[str, Any], share: dict[str, int]) -> list[BucketBatchSampler]:
    return [BucketBatchSampler(lengths, rank=rank, **share, **options) for rank in range(share["world_size"])]


def parts_of(batch: Any) -> list[tuple[int, int]]:
    """Rows, each with its first token."""
    starts = getattr(batch, "starts", None) or [0] * len(batch)
    return list(zip(batch, starts, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_each_row_once_over_stop_and_resume_at_other_world_sizes(name: str) -> None:
    for case in range(200):
        rng = np.random.default_rng([case, len(name)])
        lengths = rng.integers(0, 50, rng.integers(1, 400))
        options, shares = draw(name, rng)
        whole = Counter(
            part for own in ranks_of(lengths, options, shares[0]) for batch in own for part in parts_of(batch)
        )
        assert set(whole.values()) == {1}
        assert {row for row, _ in whole} == set(range(len(lengths)))
        given: Counter[tuple[int, int]] = Counter()
        state: dict[str, Any] = {}
        for share in shares:
            samplers = ranks_of(lengths, options, share)
            for sampler in samplers:
                if state:
                    sampler.load_state_dict(state)
            steps = len(lengths) if share is shares[-1] else int(rng.integers(0, 8))
            for sampler in samplers:
                taken = zip(range(steps * share["accumulation"]), sampler, strict=False)
                given.update(part for _, batch in taken for part in parts_of(batch))
            state = json.loads(json.dumps(samplers[0].state_dict()))
            if state["epoch"]:
                break
        assert given == whole, (case, options, shares)


@pytest.mark.parametrize("name", POLICIES)
def test_a_step_is_the_same_however_ranks_and_accumulation_share_it(name: str) -> None:
    sizes: dict[str, Any] = {"batch_size": 1} if "packed" in name else {"max_tokens": 60}
    found = []
    for world_size, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        own = [
            list(
                plan_epoch(
                    LENGTHS % 60, **POLICIES[name], **sizes, rank=rank, world_size=world_size, accumulation=accumulation
                )
            )
            for rank in range(world_size)
        ]
        steps = range(0, len(own[0]), accumulation)
        found.append([
            sorted(int(row) for batches in own for rows in batches[step : step + accumulation] for row in rows)
            for step in steps
        ])  # fmt: skip
    assert len(found[0]) > 50
    for other in found[1:]:
        assert other[:-1] == found[0][:-1]
        assert set(other[-1]) == set(found[0][-1])  # `tail="repeat"` halves packs, or repeats rows, for several ranks


def costs_of(lengths: Any, cost: Any, **options: Any) -> np.ndarray:
    """What each rank has to do, batch after batch: `(num_batches, world_size)`, by a plain loop."""
    ranks = []
    for rank in range(options["world_size"]):
        plan = plan_epoch(lengths, rank=rank, cost=cost, **options)
        own: list[float] = []
        for index in range(plan.num_windows):
            if plan.capacity is None:
                rows, bounds = plan.window(index)
                own += [(b - a) * price(cost, max(lengths[rows[a:b]])) for a, b in pairwise(bounds)]
                continue
            window = plan.packs(index)
            for number in range(window.num_batches):
                packs = window.batch(number)
                starts = packs.starts if len(packs.starts) else np.zeros(len(packs.rows), np.int64)
                limit = min(plan.max_length or plan.capacity, plan.capacity)
                parts = zip(packs.rows, starts, strict=True)
                own.append(sum(price(cost, min(lengths[row] - start, limit)) for row, start in parts))
        ranks.append(own)
    return np.array(ranks).T


def price(cost: Any, length: int) -> float:
    return float(cost(np.array([length]))[0]) if callable(cost) else float(cost * length + length**2)


def cubic(lengths: Any) -> Any:
    return lengths**3 / 7


@pytest.mark.parametrize("cost", [0, 30, cubic], ids=["0", "30", "cubic"])
@pytest.mark.parametrize("name", POLICIES)
def test_ranks_finish_together_and_the_plan_says_what_steps_cost(name: str, cost: Any) -> None:
    sizes: dict[str, Any] = {"batch_size": 2} if "packed" in name else {"max_tokens": 60}
    options = {**POLICIES[name], **sizes, "world_size": 4, "accumulation": 3, "window": 1000}
    imbalance = {}
    for balance in (True, False):
        found = costs_of(LENGTHS % 60, cost, **options, balance=balance)
        size = 3 if balance else 1
        whole = found[: len(found) // size * size].reshape(-1, size, 4).sum(1)
        imbalance[balance] = whole.max(1).sum() / whole.mean(1).sum()
        plan = plan_epoch(LENGTHS % 60, **options, balance=balance, cost=cost)
        if balance or "packed" in name:
            dealt = plan.dealt_packs if "packed" in name else plan.dealt_batches
            told = [costs.step_costs(dealt(index)[2], plan.options.group, 4) for index in range(plan.num_windows)]
            slowest, mean = (np.concatenate([getattr(one, part) for one in told]) for part in ("slowest", "mean"))
            np.testing.assert_allclose(slowest[: len(whole)], whole.max(1), rtol=1e-12)
            np.testing.assert_allclose(mean[: len(whole)], whole.mean(1), rtol=1e-12)
    assert imbalance[True] < 1.02
    assert imbalance[True] < imbalance[False]


def test_no_rank_is_always_the_slowest() -> None:
    found = costs_of(LENGTHS, 0, policy="packed", capacity=512, batch_size=1, world_size=4)
    slowest = np.bincount(found.argmax(1), minlength=4)
    assert slowest.min() > 0.15 * slowest.sum()


def test_steps_come_in_any_order_and_the_rest_is_anything() -> None:
    each = np.arange(1000.0)
    rests = set()
    for seed in range(60):
        order = costs.steps_of_like_cost(each, 32, np.uint64(seed))
        assert sorted(order.tolist()) == list(range(1000))
        steps = order[:992].reshape(31, 32)
        assert set(np.ptp(steps, axis=1).tolist()) <= {31, 39}  # one may lie around what is left
        assert abs(np.corrcoef(steps[:-1].mean(1), steps[1:].mean(1))[0, 1]) < 0.7
        rests.add(int(order[992:].max()))
    assert len(rests) > 20


@pytest.mark.parametrize("count", [0, 1, 5, 24, 31, 100])
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_every_rank_gets_as_many_as_the_others_and_the_last_ones_less(count: int, world_size: int) -> None:
    each = np.sort(np.random.default_rng(count).random(count))[::-1].copy()
    order = costs.deal(each, 24, world_size, np.uint64(3))
    assert sorted(order.tolist()) == list(range(count))
    for first in range(0, count, 24):
        assert set(order[first : first + 24]) == set(range(first, min(first + 24, count)))


def test_even_batches_are_whole_steps_of_no_more_than_the_budget() -> None:
    for seed in range(100):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(0, 40, rng.integers(1, 500))
        if seed % 2:
            lengths.sort()
            room = np.zeros((2, len(lengths) + 1), np.int64)
            assert kernels.cut_batches(lengths, 90, room[0]) == kernels.cut_sorted_batches(lengths, 90, room[1])
            assert (room[0] == room[1]).all()
        group = int(rng.integers(1, 20))
        bounds = costs.cut_evenly(lengths, 90, group, is_sorted=seed % 2 == 1)
        counts = np.diff(bounds)
        assert counts.min() > 0
        assert (bounds[0], bounds[-1]) == (0, len(lengths))
        assert (counts * costs.widths(lengths, bounds) <= 90).all()
        assert len(counts) % group == 0 or len(counts) == len(lengths)
    assert costs.cut_evenly(np.empty(0, np.int64), 9, 4, is_sorted=True).tolist() == [0]


# ------------------------------------------------------------------------------------------------- options and states


def sampler(**options: Any) -> BucketBatchSampler:
    return BucketBatchSampler(LENGTHS, **{"policy": "packed", "capacity": 512, "batch_size": 1, "seed": 5, **options})


@pytest.mark.parametrize(
    ("options", "balance"),
    [
        ({}, False),
        ({"world_size": 2}, True),
        ({"accumulation": 2}, True),
        ({"world_size": 2, "balance": False}, False),
        ({"balance": True}, True),
        ({"world_size": 2, "policy": "bucketed", "capacity": None}, False),
        ({"world_size": 2, "policy": "bucketed", "capacity": None, "batch_size": None, "max_tokens": 600}, True),
        ({"world_size": 2, "policy": "sequential", "capacity": None, "batch_size": None, "max_tokens": 600}, False),
        (
            {
                "world_size": 2, "policy": "bucketed", "capacity": None, "batch_size": None, "max_tokens": 600,
                "shares": 2,
            },
            False,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_where_it_is_on(options: dict[str, Any], balance: bool) -> None:
    assert sampler(**options, rank=0).state_dict()["balance"] is balance


def test_one_rank_has_the_order_that_it_had() -> None:
    for name, sizes in (("packed", {"batch_size": 3}), ("bucketed", {"max_tokens": 600})):
        options = {**POLICIES[name], **sizes, "window": 1000}
        found = [[rows.tolist() for rows in plan_epoch(LENGTHS % 60, **options, balance=b)] for b in (None, False)]
        assert found[0] == found[1]
        with_one = plan_epoch(LENGTHS % 60, **{**options, "batch_size": 1}, balance=True) if name == "packed" else None
        assert with_one is None or len(with_one) > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance": "yes"}, "balance='yes': give True or False"),
        ({"balance": True, "policy": "bucketed", "capacity": None}, "balance=True with policy='bucketed'"),
        (
            {
                "balance": True,
                "policy": "bucketed",
                "capacity": None,
                "batch_size": None,
                "max_tokens": 600,
                "shares": 4,
            },
            "balance=True, shares=4: .* 1 here",
        ),
        ({"accumulation": 0}, "accumulation=0: give 1"),
        ({"accumulation": 2.0}, "accumulation=2.0 is a float"),
        ({"cost": -1}, "cost=-1: give 0"),
        ({"cost": 1.5}, "cost=1.5 is a float"),
        ({"balance": True, "cost": lambda lengths: lengths[:-1]}, r"cost\(lengths\) gave int64 of shape"),
        ({"balance": True, "cost": lambda lengths: -lengths}, r"a finite number of at least 0"),
        ({"balance": True, "cost": lambda lengths: lengths / 0.0 * 0}, r"a finite number of at least 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_cannot_be(options: dict[str, Any], message: str) -> None:
    with np.errstate(all="ignore"), pytest.raises(InputError, match=message):
        next(iter(sampler(**options)))


def test_a_state_of_another_cost_is_refused_where_that_decides() -> None:
    state = sampler(world_size=2, rank=0, cost=cubic).state_dict()
    sampler(world_size=2, rank=1, cost=lambda lengths: lengths**3 / 7).load_state_dict(state)  # the same by any name
    for cost in (24576, 4608, lambda lengths: lengths**3):
        with pytest.raises(InputError, match="has cost='function "):
            sampler(world_size=2, rank=1, cost=cost).load_state_dict(state)
    alone = sampler(cost=3).state_dict()
    sampler(cost=cubic).load_state_dict(alone)


def before_version_4(state: dict[str, Any]) -> dict[str, Any]:
    return {name: state[name] for name in state if name not in ("balance", "accumulation", "cost")} | {"version": 3}


def test_a_run_goes_on_as_it_began() -> None:
    share = {"rank": 1, "world_size": 2}
    before = sampler(**share, balance=False)
    before.set_position(1, 5)
    wanted = list(before)
    before.set_position(1, 5)
    state = before.state_dict()
    for saved in (state, before_version_4(state)):
        made = sampler(**share)
        with pytest.warns(UserWarning, match="not balanced by cost: the run goes on in it"):
            made.load_state_dict(saved)
        assert list(made) == wanted
        assert list(made) == list(before_epoch(2, share, balance=False))
        with pytest.raises(InputError, match="has balance=False, this sampler True"):
            sampler(**share, balance=True).load_state_dict(saved)
    balanced = sampler(**share)
    balanced.set_position(1, 5)
    alone = sampler(batch_size=2)  # the ranks' packs at once
    alone.load_state_dict(balanced.state_dict())
    together = sampler(batch_size=2, balance=True)
    together.set_position(1, 5)
    assert list(alone) == list(together)
    with pytest.raises(InputError, match="has balance=True, this sampler False"):
        sampler(batch_size=2, balance=False).load_state_dict(balanced.state_dict())


def before_epoch(epoch: int, share: dict[str, int], **options: Any) -> BucketBatchSampler:
    made = sampler(**share, **options)
    made.set_epoch(epoch)
    return made


def test_a_position_within_a_step_stays_with_its_ranks() -> None:
    share = {"rank": 0, "world_size": 2, "accumulation": 4}
    made = sampler(**share)
    for step, other in ((8, {"world_size": 8, "rank": 5}), (8, {"accumulation": 8}), (9, None)):
        made.set_position(0, step)
        state = made.state_dict()
        if other is not None:
            again = sampler(**other)
            again.load_state_dict(state)
            assert again.state_dict()["next_batch"] == 2 * other.get("accumulation", 1)
            continue
        again = sampler(**share)
        again.load_state_dict(state)
        assert again.state_dict() == state
        with pytest.raises(InputError, match="next_batch=9, within an optimizer step of accumulation=4"):
            sampler(world_size=8, rank=0).load_state_dict(state)
    with pytest.raises(InputError, match=r"batch_size \* world_size \* accumulation = 8"):
        sampler(world_size=4, rank=0).load_state_dict(state)


def test_the_loader_balances_as_the_sampler() -> None:
    store = make_store([[7] * int(n) for n in LENGTHS[:300]])
    options: dict[str, Any] = {"policy": "packed", "capacity": 512, "batch_size": 1, "rank": 1, "world_size": 2}
    loader, order = BatchLoader(store, **options), BucketBatchSampler(LENGTHS[:300], **options)
    assert [batch.counts.rows for batch in loader] == [len(rows) for rows in order]


@pytest.mark.parametrize("name", POLICIES)
def test_the_loader_tells_how_evenly_the_ranks_were_loaded(name: str) -> None:
    lengths = LENGTHS[:600] % 60
    store = make_store([[7] * int(n) for n in lengths])
    sizes: dict[str, Any] = {"batch_size": 1} if "packed" in name else {"max_tokens": 60}
    options = {**POLICIES[name], **sizes, "rank": 1, "world_size": 4, "accumulation": 2, "window": 200, "cost": 30}
    loader = BatchLoader(store, **options, prefetch=0)
    plan = plan_epoch(lengths, **options)
    told = [plan.step_costs(index) for index in range(plan.num_windows)]
    slowest, mean = (np.concatenate([getattr(one, part) for one in told]) for part in ("slowest", "mean"))
    assert [loader.stats.imbalance, loader.stats.worst_imbalance] == [1, 1]
    for number, _ in enumerate(loader):
        steps = number // 2 + 1
        stats = loader.stats
        assert stats.mean_cost == pytest.approx(mean[:steps].sum())
        assert stats.imbalance == pytest.approx(slowest[:steps].sum() / mean[:steps].sum())
        assert stats.step_imbalance == pytest.approx(slowest[steps - 1] / mean[steps - 1])
        assert stats.worst_imbalance == pytest.approx((slowest / mean)[:steps].max())
    assert loader.stats_dict()["slowest_cost"] == pytest.approx(slowest.sum())


def test_padded_batches_that_are_dealt_in_turn_cost_what_each_rank_takes() -> None:
    options: dict[str, Any] = {"policy": "bucketed", "batch_size": 8, "world_size": 4, "window": 320}
    plan = plan_epoch(LENGTHS.astype(np.uint16), **options)
    told = [plan.step_costs(index) for index in range(plan.num_windows)]
    found = costs_of(LENGTHS, 24576, **options)
    np.testing.assert_allclose(np.concatenate([one.slowest for one in told]), found.max(1))
    np.testing.assert_allclose(np.concatenate([one.mean for one in told]), found.mean(1))
    assert 1 < told[0].imbalance < 1.5
