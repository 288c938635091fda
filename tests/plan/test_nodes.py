"""Parts of a store, one for the ranks of each node: the node's shards alone, in steps that all ranks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pytest
import torch

from fastcollate import BatchLoader, BucketBatchSampler, MixedStore
from fastcollate.check.reference_check import verify
from fastcollate.errors import InputError
from fastcollate.plan.sharded import order as module
from fastcollate.plan.sharded.order import NodesOrder, Shards, parts_of
from fastcollate.store.store import TokenStore
from fastcollate.train.options import OrderOptions, TrainOptions
from fastcollate.train.ranks import Ranks
from fastcollate.train.step import make_loader
from tests.helpers import numbered_store

OPTIONS: list[dict[str, Any]] = [
    {"batch_size": 8, "policy": "shuffled", "window": 64},
    {"batch_size": 8, "policy": "bucketed", "window": 128, "drop_last": True},
    {"batch_size": 8, "policy": "bucketed", "longest_first": True},
    {"max_tokens": 200, "policy": "bucketed", "window": 128, "balance": True},
    {"max_tokens": 200, "policy": "shuffled", "window": 128, "balance": True, "accumulation": 2, "drop_last": True},
    {"max_tokens": 200, "policy": "bucketed", "window": 128, "balance": False},
    {"batch_size": 2, "policy": "packed", "max_length": 64, "window": 128},
    {"batch_size": 2, "policy": "packed", "max_length": 64, "window": 128, "drop_last": True, "balance": False},
]


@pytest.fixture(autouse=True)
def few_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards at a time."""
    monkeypatch.setattr(module, "MIXED_SHARDS", 2)
    monkeypatch.setattr(module, "MIXED_ROWS", 1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Ten shards of 100 rows, the last of 57."""
    return numbered_store(tmp_path_factory.mktemp("nodes") / "store", 957)


def steps(
    source: Any, world_size: int, nodes: int, options: dict[str, Any], epoch: int = 0, state: Any = None
) -> list[list[npt.NDArray[np.int64]]]:
    """Each rank's batches, as row numbers."""
    found = []
    for rank in range(world_size):
        sampler = BucketBatchSampler(
            source, order="shards", nodes=nodes, rank=rank, world_size=world_size, seed=3, **options
        )
        if state is None:
            sampler.set_epoch(epoch)
        else:
            sampler.load_state_dict(state)
        found.append([np.array(rows) for rows in sampler])
    return found


def id_of(options: dict[str, Any]) -> str:
    return " ".join(map(str, options.values()))


@pytest.mark.parametrize("sizes", [[5, 0, 3], [100] * 9, list(range(40)), [1] * 7])
@pytest.mark.parametrize("num_parts", [2, 3, 5])
def test_parts_have_as_many_rows_and_all_of_them(sizes: list[int], num_parts: int) -> None:
    shards = Shards(np.cumsum([0, *sizes]), np.zeros(len(sizes), np.int64))
    parts, total = parts_of(shards, num_parts, np.uint64(7)), sum(sizes)
    rows = [np.concatenate([np.arange(f, f + n) for f, n in zip(*part[:2], strict=True)]) for part in parts]
    most = -(-total // num_parts)
    assert [len(part) for part in rows] == [most] * num_parts
    assert np.array_equal(np.unique(np.concatenate(rows)), np.arange(total))
    order = NodesOrder(shards, num_parts, np.uint64(7), np.uint64(1))
    assert order.num_places == most * num_parts
    assert np.array_equal(np.sort(order.rows(0, most * num_parts)), np.sort(np.concatenate(rows)))
    half = most // 2 * num_parts
    both = order.rows(0, half), order.rows(half, most * num_parts - half)
    own = [part.reshape(num_parts, -1) for part in both]
    assert np.array_equal(np.concatenate(own, 1).ravel(), order.rows(0, most * num_parts))


@pytest.mark.parametrize("options", OPTIONS, ids=id_of)
@pytest.mark.parametrize(("world_size", "nodes"), [(4, 2), (3, 3), (2, 2)])
def test_ranks_have_all_rows_in_as_many_batches_each_node_of_its_shards(
    store: TokenStore, options: dict[str, Any], world_size: int, nodes: int
) -> None:
    shards: list[set[int]] = []
    for epoch in range(2):
        ranks = steps(store, world_size, nodes, options, epoch)
        assert len({len(batches) for batches in ranks}) == 1  # else one waits for ever
        rows = np.concatenate([np.concatenate(batches) for batches in ranks])
        repeated = len(rows) - len(np.unique(rows))
        if options.get("drop_last"):
            assert len(np.unique(rows)) >= 957 - 8 * 8
            assert repeated < nodes
        else:
            assert len(np.unique(rows)) == 957
            assert repeated <= 3 * world_size
        for node in range(nodes):
            ranks_of_node = ranks[node * world_size // nodes : (node + 1) * world_size // nodes]
            numbers = np.concatenate([np.concatenate(batches) for batches in ranks_of_node])
            found = set(np.unique(numbers // 100).tolist())
            assert len(found) <= 10 // nodes + 2  # whole shards, and parts at both ends
            if epoch:
                assert found <= shards[node] or options.get("drop_last")
            else:
                shards.append(found)
    assert sum(map(len, shards)) <= 10 + nodes - 1


@pytest.mark.parametrize("options", OPTIONS, ids=id_of)
def test_resume_gives_the_rest_also_on_other_ranks(store: TokenStore, options: dict[str, Any]) -> None:
    sampler = BucketBatchSampler(store, order="shards", nodes=2, rank=0, world_size=4, seed=3, **options)
    batches = iter(sampler)
    for _ in range(6):
        next(batches)
    state = sampler.state_dict()
    whole = steps(store, 4, 2, options)
    rest = steps(store, 4, 2, options, state=state)
    for own, all_of_it in zip(rest, whole, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(own, all_of_it[6:], strict=True))
    wanted = np.unique(np.concatenate([np.concatenate(own) for own in rest]))
    other = dict(options)
    if "batch_size" in options:
        other["batch_size"] *= 2
    elif options["balance"]:
        other["accumulation"] = 2 * options.get("accumulation", 1)
    else:
        other |= {"max_tokens": 400, "shares": 4}
    got = np.concatenate([np.concatenate(own) for own in steps(store, 2, 2, other, state=state)])
    assert np.array_equal(np.unique(got), wanted)
    with pytest.raises(InputError, match="nodes=2"):
        steps(store, 4, 1, options, state=state)


def test_a_step_is_of_all_nodes_and_of_like_length(store: TokenStore) -> None:
    options = {"batch_size": 8, "policy": "bucketed"}
    ranks = steps(store, 4, 2, options)
    widths = np.array([[store.lengths[rows].max() for rows in batches] for batches in ranks])[:, :-1]
    spread = np.ptp(widths, axis=0)
    assert np.median(spread) <= np.median(np.ptp(np.sort(widths, axis=1)[:, ::7], axis=1)) / 4


def test_remote_ranks_fetch_the_shards_of_their_node_alone(store: TokenStore, tmp_path: Path) -> None:
    fsspec.filesystem("memory").put(str(store.path), f"{tmp_path}/bucket", recursive=True)
    names = []
    for node in range(2):
        cache = tmp_path / f"cache{node}"
        for rank in (2 * node, 2 * node + 1):
            behind = TokenStore(f"memory://{tmp_path}/bucket", cache=cache)
            options: dict[str, Any] = {"batch_size": 4, "nodes": 2, "rank": rank, "world_size": 4, "order": "shards"}
            for _ in range(2):  # epochs
                for got, wanted in zip(BatchLoader(behind, **options), BatchLoader(store, **options), strict=True):
                    assert all((a == b).all() for a, b in zip(got, wanted, strict=True))
        names.append({path.name for path in cache.rglob("shard-*.arrow") if ".locks" not in path.parts})
    assert len(names[0] | names[1]) == 10
    assert len(names[0] & names[1]) <= 1


def test_mixes(store: TokenStore, tmp_path: Path) -> None:
    mix = MixedStore({"a": store, "b": numbered_store(tmp_path / "other", 300)}, weights={"a": 2, "b": 1}, num_rows=600)
    ranks = steps(mix, 2, 2, {"batch_size": 8, "policy": "shuffled"}, epoch=1)
    drawn = np.concatenate([np.concatenate(batches) for batches in ranks])
    assert np.array_equal(np.sort(drawn), np.sort(mix.rows_of_epoch(1)))
    for batches in ranks:
        share = np.mean(np.concatenate(batches) >= 957)
        assert 0.2 < share < 0.47  # a third


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 2, "order": "rows"}, "parts are of shards"),
        ({"nodes": 2, "policy": "sequential"}, "parts are of shards"),
        ({"nodes": 2, "tail": "uneven"}, "all parts have as many batches"),
        ({"nodes": 2, "policy": "packed", "packing": "crop", "capacity": 8}, "all parts have as many batches"),
        ({"nodes": 2, "world_size": 3, "rank": 0}, "give a number of nodes that divides them"),
        ({"nodes": 3}, "give a number of nodes that divides them"),
        ({"nodes": 0}, "nodes=0"),
    ],
)
def test_what_has_no_parts_is_refused(store: TokenStore, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BucketBatchSampler(store, **{"batch_size": 8, "order": "shards", **options})


def test_more_nodes_than_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nodes=8: there are 5 rows"):
        list(
            BucketBatchSampler(
                numbered_store(tmp_path / "s", 5), batch_size=1, order="shards", nodes=8, rank=0, world_size=8
            )
        )


@pytest.mark.parametrize("policy", ["bucketed", "packed"])
def test_the_training_loop_takes_the_order_and_the_nodes(store: TokenStore, policy: str) -> None:
    options = TrainOptions(order="shards", nodes=2, policy=policy, batch_size=8, seed=3)
    given = []
    for rank in range(4):
        ranks = Ranks(rank, 4, torch.device("cpu"), None)
        loader = make_loader(store, options, ranks, None, context=64)  # type: ignore[arg-type]
        state = loader.state_dict()
        assert (state["order"], state["nodes"], state["tail"]) == ("shards", 2, "repeat")
        evaluation = make_loader(store, options, ranks, None, context=64, policy="sequential").state_dict()
        assert (evaluation["order"], evaluation["nodes"], evaluation["tail"]) == ("rows", 1, "uneven")
        plan = loader._order.plan(loader._plan_options, 0).plan
        rows = np.concatenate([plan.window(index).rows for index in range(plan.num_windows)])
        given.append(set((rows // 100).tolist()))
    assert len(given[0] | given[1]) <= 6
    assert given[0] | given[1] | given[2] | given[3] == set(range(10))


def test_order_by_shards_is_verified(store: TokenStore) -> None:
    found = verify(store, order=OrderOptions(order="shards", batch_size=8), progress=False)
    assert found.ok, found.problems
