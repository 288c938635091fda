"""Where the next batch is: kept, restored and refused alike by the loader and the sampler."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastcollate import BatchLoader, BucketBatchSampler, MixedStore, StoreDataset, pack_lengths, split_rows
from fastcollate.errors import InputError
from fastcollate.plan.options import OrderKeywords, PlanKeywords, PlanOptions
from fastcollate.plan.orders.order import Order
from fastcollate.plan.position import Epochs
from tests.helpers import make_store, random_rows, store_of_rows

LENGTHS = np.random.default_rng(2).integers(1, 40, 203)
STORE = make_store([[7] * int(n) for n in LENGTHS])
BUDGET = int(os.environ.get("FASTCOLLATE_FUZZ", "600"))


def sampler(**options: Any) -> BucketBatchSampler:
    return BucketBatchSampler(LENGTHS, **{"batch_size": 8, "window": 64, "seed": 3, **options})


def loader(**options: Any) -> BatchLoader:
    return BatchLoader(STORE, **{"batch_size": 8, "window": 64, "seed": 3, "prefetch": 0, **options})


MAKERS = [sampler, loader]
KINDS: list[dict[str, Any]] = [
    {},
    {"policy": "shuffled", "batch_size": None, "max_tokens": 100},
    {"policy": "packed", "batch_size": 2, "capacity": 64, "long_rows": "split"},
    {"policy": "sequential", "drop_last": True, "rows": np.arange(200, 20, -3)},
]


def shapes(batches: Any) -> list[Any]:
    """What a loader's or a sampler's batches are, to compare."""
    return [batch if isinstance(batch, list) else batch.inputs.tolist() for batch in batches]


def test_the_keywords_are_the_options() -> None:
    own = {name: field.type for name, field in PlanOptions.__dataclass_fields__.items()}
    assert own.keys() == PlanKeywords.__annotations__.keys()
    for name, kind in PlanKeywords.__annotations__.items():
        assert kind.__forward_arg__ == own[name], name
    assert set(own) - set(OrderKeywords.__annotations__) == {"rank", "world_size"}
    for name in own:
        assert f"\n        {name}: " in (PlanOptions.__doc__ or ""), name


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_loader_and_sampler_resume_alike_and_from_each_others_state(make: Any, options: dict[str, Any]) -> None:
    whole = shapes(make(**options))
    for step in (0, 1, len(whole) // 2, len(whole)):
        for stopped in (sampler(**options), loader(**options)):
            iterator = iter(stopped)
            for _ in range(step):
                next(iterator)
            state = json.loads(json.dumps(stopped.state_dict()))
            if isinstance(stopped, BucketBatchSampler) or make is sampler:  # lengths alone are not the store
                state["store"] = make(**options).state_dict()["store"]
            resumed, placed = make(**options), make(**options)
            resumed.load_state_dict(state)
            placed.set_position(0, step)
            assert shapes(resumed) == shapes(placed) == whole[step:]
            assert resumed.epoch == placed.epoch == 1
            assert shapes(resumed) == shapes(placed)  # the whole next epoch


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("change", ["set_epoch", "load_state_dict", "set_position"])
def test_what_is_set_while_an_iteration_runs_stands_and_ends_that(make: Any, change: str) -> None:
    made = make()
    iterator = iter(made)
    next(iterator), next(iterator)
    other = make()
    other.set_position(2, 5)
    calls: dict[str, Any] = {
        "set_epoch": lambda: made.set_epoch(2),
        "load_state_dict": lambda: made.load_state_dict(other.state_dict()),
        "set_position": lambda: made.set_position(2, 5),
    }
    calls[change]()
    state = made.state_dict()
    with pytest.raises(InputError, match="what was set stands"):
        next(iterator)
    assert made.state_dict() == state
    rest = shapes(made)
    wanted = make()
    wanted.set_position(2, 0 if change == "set_epoch" else 5)
    assert rest == shapes(wanted)


@pytest.mark.parametrize("make", MAKERS)
def test_setting_the_epoch_that_runs_changes_nothing(make: Any) -> None:
    made = make()
    iterator = iter(made)
    first = [next(iterator)]
    made.set_epoch(0)
    assert shapes([*first, *iterator]) == shapes(make())
    assert made.epoch == 1


@pytest.mark.parametrize("make", MAKERS)
def test_the_newest_iteration_moves_the_position(make: Any) -> None:
    made = make()
    old = iter(made)
    next(old)
    made.set_epoch(0)
    new = iter(made)
    next(new), next(new)
    kept = made.state_dict()
    next(old)
    assert made.state_dict() == kept
    assert len(list(old)) == len(made) - 2
    assert made.state_dict() == kept


@pytest.mark.slow
@pytest.mark.parametrize("make", [*MAKERS, lambda **options: loader(prefetch=3, **options)])
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("num_batches", [0, 1, 5, None])
def test_an_iteration_within_another_leaves_the_position_to_that(
    make: Any, options: dict[str, Any], num_batches: int | None
) -> None:
    """As the chapter's script does, which evaluates on its training loader within the training loop."""
    made, plain = make(**options), make(**options)
    for epoch in range(2):
        for step, (batch, wanted) in enumerate(zip(made, plain, strict=True)):
            assert shapes([batch]) == shapes([wanted])
            if step % 3 == 1:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    evaluated = shapes(itertools.islice(made, num_batches))
                told = [str(warning.message) for warning in caught]
                assert len(told) == (step == 1 and epoch == 0 and num_batches != 0)
                assert all("begins while another one runs" in message for message in told)
                other = make(**options)
                other.set_epoch(epoch)
                assert evaluated == shapes(itertools.islice(other, num_batches))
            assert made.state_dict() == plain.state_dict()
    assert made.epoch == plain.epoch == 2


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_who_asks_for_as_many_batches_as_there_are_gets_the_next_epoch_then(make: Any, options: dict[str, Any]) -> None:
    """As Lightning does, which takes the length and asks no further."""
    made, plain = make(**options), make(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert shapes(itertools.islice(made, len(made))) == shapes(plain)
    made.set_epoch(1)
    plain.set_epoch(1)
    assert shapes(made) == shapes(plain)  # an epoch that is asked for is given again


@pytest.mark.parametrize("make", MAKERS)
def test_an_iteration_that_is_kept_and_over_is_told_apart_by_set_epoch(make: Any) -> None:
    made = make()
    kept = iter(made)
    next(kept)
    for epoch in range(2):
        made.set_epoch(epoch)
        assert len(list(made)) == len(made)
        assert made.epoch == epoch + 1
    del kept


@pytest.mark.parametrize("make", MAKERS)
def test_an_epoch_that_starts_again_after_a_break_warns_once_it_is_not_asked_for(make: Any) -> None:
    made = make()
    for _ in made:
        break
    with pytest.warns(UserWarning, match="set_epoch"):
        next(iter(made))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.set_epoch(0)
        next(iter(made))
        made.set_epoch(1)
        list(made)
        list(made)
        made.load_state_dict(make().state_dict())
        next(iter(made))


@pytest.mark.parametrize("make", MAKERS)
def test_an_earlier_epoch_does_not_drop_a_loaded_position(make: Any) -> None:
    """As `accelerate` does, whose prepared loader counts from 0 again."""
    made = make()
    made.set_position(2, 3)
    state = made.state_dict()
    resumed = make()
    resumed.load_state_dict(state)
    with pytest.raises(InputError, match=r"Begin with set_epoch\(2\)"):
        resumed.set_epoch(0)
    resumed.set_epoch(2)
    assert resumed.state_dict() == state
    assert shapes(resumed) == shapes(made)
    resumed.set_epoch(0)  # once that epoch is done, any epoch may follow
    again = make()
    again.load_state_dict(state)
    again.set_position(0, 0)
    assert shapes(again) == shapes(resumed)


def test_numpy_numbers_are_numbers() -> None:
    small: dict[str, Any] = {"window": np.uint16(64), "max_length": np.int8(30), "seed": np.int64(5)}
    wanted = {"window": 64, "max_length": 30, "seed": 5}
    for make in MAKERS:
        found = make(**small, batch_size=np.int32(8), rank=np.int64(1), world_size=np.uint8(2))
        assert shapes(found) == shapes(make(**wanted, rank=1, world_size=2))
        json.dumps(found.state_dict())
        found.set_epoch(np.int64(3))
        found.set_position(np.uint8(1), np.int64(2))
    assert shapes(sampler(seed=2**70 + 1)) == shapes(sampler(seed=1))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    "name", ["batch_size", "window", "max_length", "seed", "rank", "world_size", "shares", "block"]
)
@pytest.mark.parametrize("value", [True, False, np.True_, 2.0, 0.5, np.float32(3), "8", [8], float("nan")], ids=repr)
def test_bools_and_fractions_are_refused_by_name(make: Any, name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        make(**{name: value})


def test_numbers_of_packs_splits_and_mixes(stores: dict[str, Any]) -> None:
    shares = {"a": 0.5, "b": 0.5}
    for kind in (np.int64, np.uint8):
        assert pack_lengths([3, 4], kind(8)).num_bins == 1
        assert (
            split_rows(stores["a"], shares, seed=kind(5))["a"].tolist()
            == split_rows(stores["a"], shares, seed=5)["a"].tolist()
        )
        mix = MixedStore(stores, num_rows=kind(30), seed=kind(3))
        assert mix.rows_of_epoch(2).tolist() == MixedStore(stores, num_rows=30, seed=3).rows_of_epoch(2).tolist()
    for wrong in (True, 8.0, np.float32(8), "8", None):
        with pytest.raises(InputError, match="capacity"):
            pack_lengths([3, 4], wrong)
        with pytest.raises(InputError, match="seed"):
            split_rows(stores["a"], shares, seed=wrong)
        with pytest.raises(InputError, match="seed"):
            MixedStore(stores, seed=wrong)
    for wrong in (True, 8.0, "8", 0, -1):
        with pytest.raises(InputError, match="num_rows"):
            MixedStore(stores, num_rows=wrong)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("value", [-1, 2**40, True, 1.5, "1", None])
def test_epochs_and_steps_that_are_none(make: Any, value: Any) -> None:
    made = make()
    with pytest.raises(InputError, match="epoch"):
        made.set_epoch(value)
    with pytest.raises(InputError, match="epoch"):
        made.set_position(value, 0)
    with pytest.raises(InputError, match="step"):
        made.set_position(0, value)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 204, "drop_last": True}, "no batch"),
        ({"batch_size": 26, "world_size": 8, "drop_last": True}, "no batch"),
        ({"policy": "packed", "capacity": 4096, "batch_size": 9, "window": None, "drop_last": True}, "no batch"),
        ({"policy": "packed", "capacity": 64, "rows": [0, 1], "max_length": 1, "long_rows": "drop"}, "no batch"),
        ({"batch_size": None, "max_tokens": 38}, "has 39 tokens, more than max_tokens=38"),
        ({"batch_size": None, "max_tokens": 77, "shares": 2}, "max_tokens=77 .*shares=2"),
        ({"rows": []}, "no rows"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_leave_a_row_or_everything_out_are_refused_at_once(
    make: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 30, "max_tokens": 30},
        {"max_tokens": 39},
        {"max_tokens": 39, "policy": "packed", "capacity": 8},
        {"rows": np.flatnonzero(LENGTHS <= 20), "max_tokens": 20},
        {"max_tokens": 78, "shares": 2},
    ],
    ids=str,
)
def test_a_longest_row_that_does_not_matter_is_no_reason(options: dict[str, Any]) -> None:
    for make in MAKERS:
        assert len(list(make(**{"batch_size": None, **options}))) > 1


# ------------------------------------------------------------------------------------------------- several stores


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("mix")
    return {name: store_of_rows(folder / name, *random_rows(n, seed=n)) for name, n in (("a", 120), ("b", 30))}


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{"batch_size": 8}, {"max_tokens": 300}, {"policy": "packed", "capacity": 64, "batch_size": 2}]
)
def test_a_loader_draws_from_a_mix_as_the_sampler_does(stores: dict[str, Any], sizes: dict[str, Any]) -> None:
    mix = MixedStore(stores, weights={"a": 1, "b": 3}, num_rows=100)
    options: dict[str, Any] = {**sizes, "window": 40, "tail": "uneven", "seed": 2}
    made, order = BatchLoader(mix, **options), BucketBatchSampler(mix, **options)
    dataset = StoreDataset(mix)
    assert len(made) == len(order)
    for epoch in range(3):
        rows: list[int] = []
        for batch, chosen in zip(made, order, strict=True):
            wanted = dataset.collate(dataset.__getitems__(chosen))
            assert [tensor.tolist() for tensor in batch] == [tensor.tolist() for tensor in wanted]
            rows += chosen
            assert made.source_rows == order.source_rows
        assert sorted(rows) == sorted(mix.rows_of_epoch(epoch).tolist())
        assert made.source_rows == {"a": 25 * (epoch + 1), "b": 75 * (epoch + 1)}
    assert made.stats.rows == 300


def test_a_mix_resumes_at_another_world_size(stores: dict[str, Any]) -> None:
    mix = MixedStore(stores, weights={"a": 1, "b": 1}, num_rows=96, seed=4)
    whole = BucketBatchSampler(mix, batch_size=12, window=48)
    whole.set_epoch(3)
    iterator = iter(whole)
    taken = [next(iterator) for _ in range(5)]
    state = json.loads(json.dumps(whole.state_dict()))
    counts = whole.source_rows
    rest = list(iterator)
    ranks = [BucketBatchSampler(mix, batch_size=4, window=48, rank=rank, world_size=3) for rank in range(3)]
    for rank in ranks:
        rank.load_state_dict(state)
        assert rank.source_rows == counts
    parts = [list(rank) for rank in ranks]
    assert [sorted(row for rows in step for row in rows) for step in zip(*parts, strict=True)] == [
        sorted(rows) for rows in rest
    ]
    assert sum(counts.values()) == sum(map(len, taken))


def test_splits_paths_and_data_sets(stores: dict[str, Any]) -> None:
    store = stores["a"]
    rows = split_rows(store, {"train": 0.7, "val": 0.3})["val"]
    for source in (store, str(store.path), store.path):
        made = BatchLoader(source, batch_size=8, rows=rows, prefetch=0)
        order = BucketBatchSampler(StoreDataset(source), batch_size=8, rows=rows)
        for batch, chosen in zip(made, order, strict=True):
            assert batch.inputs.shape[0] == len(chosen)
            assert set(chosen) <= set(rows.tolist())
        assert made.stats.rows == len(rows)
    subset = BatchLoader(MixedStore(stores), batch_size=8, rows=[5, 125, 149])
    assert [batch.inputs.shape[0] for batch in subset] == [3]
    assert subset.source_rows == {}


def test_a_state_of_other_data_is_refused(stores: dict[str, Any], tmp_path: Path) -> None:
    other = store_of_rows(tmp_path / "other", *random_rows(120, seed=9))  # as many rows, of other tokens
    mix = {"weights": {"a": 1, "b": 1}, "num_rows": 60}
    orders: list[tuple[Any, Any]] = [
        (stores["a"], None), (other, None), (stores["a"], range(100)), (stores["a"], range(20, 120)),
        (stores["a"], np.arange(0, 120, 2)), (stores["a"], np.arange(1, 120, 2)), (stores["a"].lengths, None),
        (MixedStore(stores, **mix), None), (MixedStore(stores, **mix, seed=1), None),
        (MixedStore(stores, weights={"a": 1, "b": 2}, num_rows=60), None),
        (MixedStore({"a": other, "b": stores["b"]}, **mix), None),
        (MixedStore(stores, **mix, rows={"a": range(60)}), None),
        (MixedStore(stores, **mix), range(60)),
    ]  # fmt: skip
    for i, (source, rows) in enumerate(orders):
        state = json.loads(json.dumps(BucketBatchSampler(source, batch_size=4, rows=rows).state_dict()))
        for j, (another, others) in enumerate(orders):
            made = BucketBatchSampler(another, batch_size=4, rows=others)
            if i == j:
                made.load_state_dict(state)
            else:
                with pytest.raises(InputError, match=r"the saved sampler state has (num_rows|store|rows|mix)="):
                    made.load_state_dict(state)


def test_orders_of_the_same_rows_agree(stores: dict[str, Any]) -> None:
    store = stores["a"]
    same = [Order(store, rows).identity() for rows in (None, range(120), np.arange(120), list(range(120)))]
    assert same[1:] == same[:-1]
    assert Order(store, [1, 2, 3]).identity() == Order(store, range(1, 4)).identity()
    assert Order(store, [1, 3, 2]).identity() == Order(store, np.array([1, 3, 2], np.uint8)).identity()


@pytest.mark.parametrize("make", ["loader", "sampler", "mix"])
def test_pickles_hold_no_tokens_and_go_on(stores: dict[str, Any], make: str) -> None:
    mix = MixedStore(stores, num_rows=64)
    made: Any = {
        "loader": lambda: BatchLoader(mix, batch_size=8, prefetch=0),
        "sampler": lambda: BucketBatchSampler(mix, batch_size=8),
        "mix": lambda: StoreDataset(mix),
    }[make]()
    if make == "mix":
        data = pickle.dumps(made)
        again = pickle.loads(data)
        rows = [0, 119, 120, 149]
        assert again.collate([again[i] for i in rows]).inputs.equal(made.collate([made[i] for i in rows]).inputs)
        assert again.store.lengths.tolist() == mix.lengths.tolist()
    else:
        made.set_position(1, 3)
        data = pickle.dumps(made)
        again = pickle.loads(data)
        assert again.state_dict() == made.state_dict()
        assert shapes(again) == shapes(made)
        iterator = iter(made)
        next(iterator)
        pickle.dumps(made)
    assert len(data) < 4000


# ------------------------------------------------------------------------------------------------- mutated states

VALUES: list[Any] = [
    None, True, False, -1, -3, -(10**8), 0, 1, 2, 3, 5, 7, 8, 16, 64, 10**8, 2**31, 2**63, 2**64, 10**30, 0.5, 1.0,
    float("nan"), float("inf"), "", "1", "packed", "bucketed", "repeat", [], [0], [0, 203], {}, b"1", (), [None],
    np.int64(3), np.arange(3), np.float32(1), SimpleNamespace(),
]  # fmt: skip


def mutations(state: dict[str, Any], rng: random.Random) -> Iterator[Any]:
    """The state with something changed, endlessly."""
    names = list(state)
    while True:
        changed: Any = dict(state)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            name = rng.choice([*names, "epoch", "next_window", "next_batch"])
            how = rng.random()
            if how < 0.1:
                changed.pop(name, None)
            elif how < 0.3:
                changed[name] = rng.randrange(-4, 40)
            elif how < 0.4:
                changed[name] = state[rng.choice(names)]
            else:
                changed[name] = rng.choice(VALUES)
        yield changed
        if rng.random() < 0.01:
            yield rng.choice(VALUES)


def expected_rest(made: Epochs, state: dict[str, Any]) -> int:
    """Batches that are left in the epoch at a right position."""
    plan = made._order.plan(made._plan_options, int(state["epoch"])).plan
    window = int(state["next_window"])
    return sum(map(plan.num_batches, range(window, plan.num_windows))) - int(state["next_batch"])


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    "options", [*KINDS, {"batch_size": None, "max_tokens": 100, "world_size": 2, "shares": 4}], ids=str
)
def test_a_mutated_state_is_refused_or_right(make: Any, options: dict[str, Any]) -> None:
    made = make(**options)
    made.set_position(1, 2)
    state = made.state_dict()
    rng = random.Random(f"{make.__name__} {options}")
    loaded = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right = {**state, "next_batch": 1}  # whatever comes by chance
        for changed, _ in zip(itertools.chain([right], mutations(state, rng)), range(BUDGET // 10), strict=False):
            made.load_state_dict(state)
            try:
                made.load_state_dict(changed)
            except InputError:
                assert made.state_dict() == state
                continue
            loaded += 1
            own = made.state_dict()
            position = tuple(int(changed[name]) for name in ("epoch", "next_window", "next_batch"))
            assert (own["epoch"], own["next_window"], own["next_batch"]) == position
            assert len(list(made)) == expected_rest(made, changed)
            assert made.epoch == position[0] + 1
    assert loaded > 0


# -------------------------------------------------------------------------------------------- states of the release


def old_loader_state(**changes: Any) -> dict[str, Any]:
    """As release 0.1 wrote it."""
    return {
        "version": 2, "epoch": 1, "next_window": 1, "next_batch": 3, "num_rows": 203, "first_row": 0, "store": "",
        "policy": "bucketed", "batch_size": 8, "max_tokens": None, "window": 64, "seed": 3, "world_size": 1,
        "max_length": None, "drop_last": False, "tail": "repeat", "shares": 1, "capacity": None,
        "long_rows": "truncate", **changes,
    }  # fmt: skip


def old_sampler_state(**changes: Any) -> dict[str, Any]:
    state = old_loader_state(source_rows=[], **changes)
    return {name: value for name, value in state.items() if name not in ("first_row", "store", "shares")}


def test_states_of_the_release_go_on_where_their_meaning_is_the_same() -> None:
    for options, step in (({}, 11), ({"rank": 1, "world_size": 2, "batch_size": 4}, 11)):
        made, wanted = loader(**options), loader(**options)
        made.load_state_dict(old_loader_state())
        wanted.set_position(1, step)
        assert shapes(made) == shapes(wanted)
    part = loader(rows=range(40, 203))
    part.load_state_dict(old_loader_state(first_row=40, num_rows=163))
    made = sampler()
    with pytest.warns(UserWarning, match="only their number"):
        made.load_state_dict(old_sampler_state())
    other = sampler()
    other.set_position(1, 11)
    assert shapes(made) == shapes(other)
    packed = sampler(policy="packed", batch_size=None, max_tokens=130, max_length=60)
    with pytest.warns(UserWarning, match="only their number"):
        packed.load_state_dict(
            old_sampler_state(policy="packed", batch_size=None, max_tokens=130, max_length=60, next_window=0)
        )


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        (old_loader_state(store="f00"), {}, "store='f00'"),
        (old_loader_state(first_row=3, num_rows=200), {}, "num_rows=200"),
        (old_loader_state(first_row=3, num_rows=200), {"rows": range(200)}, "first_row=3"),
        (old_loader_state(), {"rows": np.arange(0, 203, 2)}, "neither mixes nor row numbers"),
        (old_loader_state(drop_last=True, window=None, next_window=0), {"drop_last": True, "window": None}, "left out"),
        (old_loader_state(version=1), {}, "version=1"),
        (old_loader_state(version=6), {}, "version=6"),
        (old_loader_state(version="2"), {}, "version='2'"),
        (old_loader_state(next_batch=9), {}, "next_batch=9: give 0 to 8"),
        (old_loader_state(next_window=4), {}, "next_window=4: give 0 to 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_states_of_the_release_that_mean_something_else_are_refused(
    state: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        loader(**options).load_state_dict(state)


def test_drop_last_leaves_out_other_rows_in_each_epoch() -> None:
    for options in ({"batch_size": 16}, {"batch_size": 16, "policy": "shuffled"}, {"max_tokens": 400, "shares": 16}):
        seen: list[set[int]] = []
        for epoch in range(6):
            made = BucketBatchSampler(LENGTHS[:201], drop_last=True, max_length=25, **options)
            made.set_epoch(epoch)
            rows = [row for batch in made for row in batch]
            assert len(rows) == len(set(rows)) == 192
            seen.append(set(range(201)) - set(rows))
        assert len(set().union(*seen)) > 30
        assert not set.intersection(*seen)


ENDS: list[dict[str, Any]] = [
    {"batch_size": 8}, {"batch_size": 8, "longest_first": True}, {"batch_size": 8, "policy": "shuffled"},
    {"max_tokens": 100, "balance": False, "shares": 8},
]  # fmt: skip


def of_ranks(
    world_size: int, num_rows: int, options: dict[str, Any], state: Any = None
) -> Iterator[Iterator[list[int]]]:
    """Each rank's batches, from a state on."""
    size = "batch_size" if "batch_size" in options else "max_tokens"
    own = {**options, size: options[size] * 4 // world_size, "world_size": world_size}
    for rank in range(world_size):
        made = BucketBatchSampler(LENGTHS[:num_rows], rank=rank, **own)
        if state is not None:
            made.load_state_dict(state)
        yield iter(made)


@pytest.mark.parametrize("options", ENDS, ids=str)
@pytest.mark.parametrize("num_rows", range(153, 161))
def test_other_ranks_give_the_rest_of_any_number_of_rows(options: dict[str, Any], num_rows: int) -> None:
    given: set[int] = set()
    for batches in of_ranks(4, num_rows, options):
        given |= {row for batch in itertools.islice(batches, 3) for row in batch}
    stopped = BucketBatchSampler(LENGTHS[:num_rows], rank=0, world_size=4, **options)
    stopped.set_position(0, 3)
    for world_size in (1, 2, 4, 8):
        ranks = of_ranks(world_size, num_rows, options, stopped.state_dict())
        rest = [row for batches in ranks for batch in batches for row in batch]
        assert given | set(rest) == set(range(num_rows))
        assert len(rest) - (num_rows - len(given)) < 8


def test_a_state_of_before_within_steps_that_hold_other_rows_now() -> None:
    for num_rows, batch in ((153, 3), (156, 3), (153, 5)):
        own = BucketBatchSampler(LENGTHS[:num_rows], rank=0, world_size=4, batch_size=8)
        state = {**own.state_dict(), "version": 4, "next_batch": batch}
        if (num_rows, batch) == (153, 3):
            with pytest.raises(InputError, match=r"version 4, within .* of 153 rows, no multiple of world_size=4"):
                own.load_state_dict(state)
        else:
            own.load_state_dict(state)
