"""Two processes: each row once, by `torch.distributed` alone, under accelerate, under Lightning and Fabric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastcollate import BucketBatchSampler
from fastcollate.store.store import TokenStore
from tests.helpers import numbered_store, torchrun

NUM_ROWS = 203


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return numbered_store(tmp_path_factory.mktemp("many") / "store", NUM_ROWS)


def run(script: str, store: TokenStore, folder: Path, *arguments: object) -> list[dict[str, Any]]:
    """What each of two ranks has noted."""
    result = torchrun(HEAD + script, 2, folder, store.path, *arguments)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


HEAD = """
import json, os, sys, warnings
from pathlib import Path
import torch, torch.distributed as dist
from torch.utils.data import DataLoader
from fastcollate import BatchLoader, BucketBatchSampler, StoreDataset

PATH, RANK = sys.argv[1], int(os.environ["RANK"])
NOTES = {}

def numbers(inputs):
    return (inputs[:, 0] * 100 + inputs[:, 1]).tolist()

def write():
    Path(f"rank{RANK}.json").write_text(json.dumps(NOTES))
"""

ALONE = """
dataset = StoreDataset(PATH)
options = {"batch_size": 8, "seed": 3, "drop_last": True}
early, early_sampler = BatchLoader(PATH, **options), BucketBatchSampler(dataset, **options)
told = BatchLoader(PATH, **options)
before = len(told)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    next(iter(BatchLoader(PATH, **options)))
NOTES["no group"] = [str(warning.message) for warning in caught]
placed = BatchLoader(PATH, **options)
placed.set_position(0, 2)
dist.init_process_group("gloo")
late, late_sampler = BatchLoader(PATH, **options), BucketBatchSampler(dataset, **options)
NOTES["early"] = [numbers(inputs) for inputs, _ in early]
NOTES["early sampler"] = list(early_sampler)
NOTES["late"] = [numbers(inputs) for inputs, _ in late]
NOTES["late sampler"] = list(late_sampler)
NOTES["all"] = [numbers(inputs) for inputs, _ in BatchLoader(PATH, rank=0, world_size=1, **options)]
NOTES["all by number"] = [numbers(inputs) for inputs, _ in BatchLoader(PATH, world_size=1, **options)]
NOTES["other"] = [numbers(inputs) for inputs, _ in BatchLoader(PATH, rank=1 - RANK, world_size=2, **options)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    NOTES["lengths"] = [before, len(told), len(late)]
NOTES["told"] = [str(warning.message) for warning in caught]
for name, call in (
    ("placed", lambda: next(iter(placed))), ("no rank", lambda: BatchLoader(PATH, world_size=4, **options)),
):
    try:
        call()
    except ValueError as error:
        NOTES[name] = str(error)
half = iter(early)
next(half), next(half)
NOTES["state"] = early.state_dict()
dist.destroy_process_group()
NOTES["state behind"] = early.state_dict()
write()
"""


def test_loader_and_sampler_take_their_share_when_an_iteration_starts(store: TokenStore, tmp_path: Path) -> None:
    ranks = run(ALONE, store, tmp_path)
    for rank, notes in enumerate(ranks):
        plan = BucketBatchSampler(store, batch_size=8, seed=3, drop_last=True, rank=rank, world_size=2)
        own = list(plan)
        assert notes["early"] == notes["early sampler"] == notes["late"] == notes["late sampler"] == own
        assert notes["other"] == ranks[1 - rank]["early"]
        assert notes["all"] == notes["all by number"]
        assert len({row for rows in notes["all"] for row in rows}) == 200
        assert notes["lengths"] == [25, 12, 12]
        (message,) = notes["told"]
        assert "has told its length for 1: ask for it again" in message
        assert "one of WORLD_SIZE=2, and there is no process group" in notes["no group"][0]
        assert "before the process group was there" in notes["placed"]
        assert "world_size=4 without rank, and the process group has 2 ranks" in notes["no rank"]
        assert notes["state"] == notes["state behind"]
        assert (notes["state"]["world_size"], notes["state"]["next_batch"]) == (2, 2)
    rows = [row for notes in ranks for batch in notes["early"] for row in batch]
    assert len(rows) == len(set(rows)) == 192
