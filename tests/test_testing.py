"""The public test helper passes what is right, finds what is wrong, and says where."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from fastcollate import BatchLoader, BucketBatchSampler, MixedStore, StoreDataset
from fastcollate.errors import InputError
from fastcollate.integrations.flow import FlowingSampler
from fastcollate.integrations.huggingface import DataCollator, lengths_of
from fastcollate.store.store import TokenStore
from fastcollate.testing import assert_resumes, rows_of
from tests.helpers import numbered_store

NUM_ROWS = 101
OPTIONS: dict[str, Any] = {"tail": "uneven", "window": 32, "seed": 3}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return numbered_store(tmp_path_factory.mktemp("testing") / "store", NUM_ROWS)


def share(rank: int, num_ranks: int) -> dict[str, Any]:
    return {**OPTIONS, "batch_size": 12 // num_ranks, "rank": rank, "world_size": num_ranks}


class Loop:
    """A pipeline of a user's own: a sampler, a data set, a collator of Hugging Face."""

    def __init__(self, dataset: StoreDataset, sampler: BucketBatchSampler, collate: Callable[..., Any]) -> None:
        self._loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)
        self.state_dict, self.load_state_dict = sampler.state_dict, sampler.load_state_dict

    def __iter__(self) -> Any:
        return iter(self._loader)


def makers(store: TokenStore) -> dict[str, Callable[[int, int], Any]]:
    dataset = StoreDataset(store, mask_prompt=True)

    def flattened(rank: int, num_ranks: int) -> Loop:
        options = {**share(rank, num_ranks), "policy": "packed", "capacity": 64, "balance": True}
        return Loop(dataset, BucketBatchSampler(lengths_of(dataset), **options), DataCollator("flattened"))

    def by_tokens(rank: int, num_ranks: int) -> BatchLoader:
        options = {**share(rank, num_ranks), "batch_size": None, "max_tokens": 600 // num_ranks, "shares": 12}
        return BatchLoader(store, prefetch=0, **options)

    def turns(rank: int, num_ranks: int) -> FlowingSampler:
        return FlowingSampler(store, **{**share(rank, num_ranks), "tail": "repeat", "drop_last": True})

    mix = MixedStore({"a": store, "b": store}, weights={"a": 3, "b": 1}, num_rows=NUM_ROWS)
    return {
        "mix": lambda rank, num_ranks: BatchLoader(mix, prefetch=0, **share(rank, num_ranks)),
        "turns": turns,
        "loader": lambda rank, num_ranks: BatchLoader(store, prefetch=0, mask_prompt=True, **share(rank, num_ranks)),
        "ahead": lambda rank, num_ranks: BatchLoader(store, policy="shuffled", **share(rank, num_ranks)),
        "packed": lambda rank, num_ranks: BatchLoader(
            store, prefetch=0, policy="packed", capacity=64, balance=True, **share(rank, num_ranks)
        ),
        "tokens": by_tokens,
        "sampler": lambda rank, num_ranks: BucketBatchSampler(store, **share(rank, num_ranks)),
        "padded": lambda rank, num_ranks: Loop(
            dataset, BucketBatchSampler(dataset, **share(rank, num_ranks)), DataCollator()
        ),
        "flattened": flattened,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["loader", "ahead", "packed", "tokens", "sampler", "padded", "flattened", "mix", "turns"]
)
def test_our_loaders_lose_no_row(store: TokenStore, kind: str) -> None:
    num_rows = NUM_ROWS // 12 * 12 if kind == "turns" else NUM_ROWS
    assert_resumes(makers(store)[kind], world_sizes=(1, 2, 3), every=3, num_rows=num_rows)


class Broken(BatchLoader):
    """A loader that makes one mistake."""

    def __init__(self, *args: Any, mistake: str, **options: Any) -> None:
        super().__init__(*args, prefetch=0, **options)
        self._mistake = mistake

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self._mistake == "replays" and state["next_batch"]:
            state["next_batch"] -= 1
        if self._mistake == "skips" and state["next_batch"] == 1:
            state["next_batch"] += 1
        if self._mistake == "ranks":
            state["next_batch"] -= self._plan_options.rank * (state["next_batch"] > 1)
        return state

    def __iter__(self, *args: Any) -> Any:
        for number, batch in enumerate(super().__iter__(*args)):
            if self._mistake == "loses" and number == 1:
                continue
            if self._mistake == "bits" and self._position.batch == 2:
                batch.targets[0, 0] = number
            yield batch


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("replays", r"stopped behind batch 1 on 1 ranks, resumed on 1: rank 0, batch 1 is not that of a whole run"),
        ("skips", r"stopped behind batch 1 on 1 ranks, resumed on 1: rank 0, batch 1 is not that"),
        ("ranks", r"stopped behind batch 2 on 2 ranks, resumed on 2: rank 1, batch 2 is not that of a whole run"),
        ("loses", r"an epoch on 1 ranks gives 89 rows, and there are 101"),
        ("bits", r"resumed on 1: rank 0, batch 1 is not that of a whole run"),
        ("twice", r"an epoch on 2 ranks beside one on 1: 0 rows are lost, and 101 come once too often"),
        ("repeats", r"an epoch on 2 ranks beside one on 1: 0 rows are lost, and 1 come once too often"),
    ],
)
def test_a_loader_that_is_wrong_is_found(store: TokenStore, mistake: str, message: str) -> None:
    def make_loader(rank: int, num_ranks: int) -> BatchLoader:
        options = share(rank, num_ranks)
        if mistake == "twice":
            options.update(rank=0, world_size=1)
        if mistake == "repeats":
            options["tail"] = "repeat"
        return Broken(store, mistake=mistake, **options)

    with pytest.raises(AssertionError, match=message):
        assert_resumes(make_loader, num_rows=NUM_ROWS, world_sizes=(1,) if mistake == "bits" else (1, 2))


def test_rows_are_told_apart_whatever_their_padding(store: TokenStore) -> None:
    dataset = StoreDataset(store)
    batch = dataset.collate(dataset.__getitems__(list(range(30))))
    alone = [dataset.collate(dataset.__getitems__([row])) for row in range(30)]
    for known in (None, 299):
        found = list(rows_of(batch, pad_token_id=known))
        assert found == [row for one in alone for row in rows_of(one, pad_token_id=known)]
        assert len(set(found)) == 30
    untrained = [torch.tensor([[1, 2, 9]]), torch.tensor([[-100] * 3])]
    assert list(rows_of(untrained)) == [(b"", b"")]
    (row,) = rows_of(untrained, pad_token_id=9)
    assert row == (untrained[0][0, :2].numpy().tobytes(), untrained[1][0, :2].numpy().tobytes())


@pytest.mark.slow
def test_wrong_arguments_are_named_and_pytest_is_not_needed(store: TokenStore) -> None:
    make_loader = partial(makers(store)["sampler"])
    for options in ({"every": 0}, {"world_sizes": ()}, {"world_sizes": (0,)}):
        with pytest.raises(InputError, match=next(iter(options))):
            assert_resumes(make_loader, **options)  # type: ignore[arg-type]
    check = "import sys, fastcollate.testing; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parent.parent)
