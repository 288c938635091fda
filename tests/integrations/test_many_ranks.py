"""Two processes: each row once, by `torch.distributed` alone, under accelerate, under Lightning and Fabric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastcollate import BucketBatchSampler
from fastcollate.store.store import TokenStore
from tests.forks import Forks
from tests.helpers import numbered_store

NUM_ROWS = 203


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return numbered_store(tmp_path_factory.mktemp("many") / "store", NUM_ROWS)


def run(forks: Forks, script: str, store: TokenStore, folder: Path, *arguments: object) -> list[dict[str, Any]]:
    """What each of two ranks has noted."""
    result = forks.run(
        HEAD + script, store.path, *arguments, cwd=folder, num_ranks=2, environment={"HF_HUB_OFFLINE": "1"}
    )
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
    if dist.is_initialized():  # or its threads may end the process as a failure
        dist.destroy_process_group()
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


@pytest.mark.slow
def test_loader_and_sampler_take_their_share_when_an_iteration_starts(
    store: TokenStore, tmp_path: Path, forks: Forks
) -> None:
    ranks = run(forks, ALONE, store, tmp_path)
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


PREPARED = """
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration

def prepared(sampler, configuration):
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**configuration))
    return accelerator.prepare(DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate))

dataset = StoreDataset(PATH)
early = [BucketBatchSampler(dataset, **options) for options in json.loads(sys.argv[2])]  # before the process group
for options, sampler in zip(json.loads(sys.argv[2]), early):
    for configuration in json.loads(sys.argv[3]):
        loader = prepared(sampler, configuration)
        sampler.set_position(0, 0)
        notes = NOTES[f"{options} {configuration}"] = {"batches": [], "lengths": []}
        for epoch in range(2):
            notes["lengths"].append(len(loader))
            notes["batches"].append([numbers(batch.inputs) for batch in loader])
        notes["state"] = sampler.state_dict()

for configuration in json.loads(sys.argv[4]):
    whole = BucketBatchSampler(dataset, batch_size=8, drop_last=True, rank=0, world_size=1)
    NOTES[f"whole {configuration}"] = [numbers(batch.inputs) for batch in prepared(whole, configuration)]
    share = BucketBatchSampler(dataset, batch_size=8, drop_last=True)
    if not configuration.get("split_batches") and not configuration.get("dispatch_batches"):
        continue
    if RANK == 0 or not configuration.get("dispatch_batches"):  # where only the first rank reads
        try:
            next(iter(prepared(share, configuration)))
        except ValueError as error:
            NOTES[f"share {configuration}"] = str(error)
    dist.barrier()
write()
"""
KINDS: list[dict[str, Any]] = [
    {"batch_size": 8},
    {"batch_size": 8, "drop_last": True},
    {"max_tokens": 150, "policy": "shuffled"},
    {"policy": "packed", "batch_size": 2, "capacity": 80},
]
DEALING: list[dict[str, Any]] = [{}, {"even_batches": False}, {"use_stateful_dataloader": True}]
DIVIDING: list[dict[str, Any]] = [
    {}, {"split_batches": True}, {"dispatch_batches": True, "split_batches": True},
    {"split_batches": True, "even_batches": False},
]  # fmt: skip


@pytest.mark.slow
def test_accelerate_gives_each_rank_its_own_rows_or_is_refused(store: TokenStore, tmp_path: Path, forks: Forks) -> None:
    """`prepare` deals a batch sampler's batches to the ranks; they were dealt already, and half were lost."""
    pytest.importorskip("accelerate")
    ranks = run(forks, PREPARED, store, tmp_path, *map(json.dumps, (KINDS, DEALING, DIVIDING)))
    for rank, notes in enumerate(ranks):
        for options in KINDS:
            own = BucketBatchSampler(store, rank=rank, world_size=2, **options)
            plan = [list(own), list(own)]
            for configuration in DEALING:
                found = notes[f"{options} {configuration}"]
                assert [len(batches) for batches in found["batches"]] == [len(batches) for batches in plan]
                if "capacity" not in options:
                    assert found["batches"] == plan
                    assert found["lengths"] == [len(batches) for batches in plan]
                assert found["state"] == own.state_dict()
    for configuration in DIVIDING:
        rows = [row for notes in ranks for batch in notes[f"whole {configuration}"] for row in batch]
        assert len(rows) == len(set(rows)) == (200 if configuration else 192)
        if configuration:
            message = ranks[0][f"share {configuration}"]
            assert "give the sampler rank=0 and world_size=1, so that accelerate alone divides" in message


LIGHTNING = """
import lightning.pytorch as pl
from lightning.fabric import Fabric

dataset = StoreDataset(PATH)
options = {"batch_size": 8, "seed": 3, "tail": "uneven", "rows": range(192)}

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.rows = []

    def training_step(self, batch, index):
        self.rows.append(numbers(batch.inputs))
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

def loader():
    return DataLoader(
        dataset, batch_sampler=BucketBatchSampler(dataset, **options), collate_fn=dataset.collate
    )

def fit(data, **more):
    model = Model()
    pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **more,
    ).fit(model, data)
    return model.rows

def refused(call):
    try:
        call()
    except ValueError as error:
        return str(error)

early = [loader(), loader()]
fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
NOTES["fabric refused"] = refused(lambda: fabric.setup_dataloaders(loader()))
ready = fabric.setup_dataloaders(early[0], use_distributed_sampler=False)
NOTES["fabric"] = [numbers(batch.inputs) for epoch in range(2) for batch in ready]
NOTES["trainer refused"] = refused(lambda: fit(loader()))
NOTES["trainer"] = fit(early[1], use_distributed_sampler=False)
NOTES["loader"] = fit(BatchLoader(PATH, **options))
write()
"""


@pytest.mark.slow
def test_lightning_and_fabric_give_each_rank_its_own_rows_or_are_refused(
    store: TokenStore, tmp_path: Path, forks: Forks
) -> None:
    pytest.importorskip("lightning")
    ranks = run(forks, LIGHTNING, store, tmp_path)
    for rank, notes in enumerate(ranks):
        own = BucketBatchSampler(store, batch_size=8, seed=3, tail="uneven", rows=range(192), rank=rank, world_size=2)
        plan = [*own, *own]
        for kind in ("fabric", "trainer", "loader"):
            assert notes[kind] == plan
        for kind in ("fabric", "trainer"):
            assert "use_distributed_sampler=False" in notes[f"{kind} refused"]


TRAINER = """
from typing import ClassVar
import transformers
from fastcollate.integrations.huggingface import BucketedTrainerMixin, DataCollator

def trained(kind, configuration, **more):
    seen = []

    class Noting(DataCollator):
        def __call__(self, features, return_tensors="pt"):
            batch = super().__call__(features)
            seen.append(numbers(batch["input_ids"]))
            return batch

    class Step(kind):
        def training_step(self, model, inputs, *args, **kwargs):
            used.append(numbers(inputs["input_ids"]))
            return super().training_step(model, inputs, *args, **kwargs)

    used = []
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=8, n_layer=1, n_head=1)
    arguments = transformers.TrainingArguments(
        "run", per_device_train_batch_size=8, num_train_epochs=1, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, accelerator_config=configuration, remove_unused_columns=False, **more,
    )
    Step(
        transformers.GPT2LMHeadModel(config), arguments, train_dataset=StoreDataset(PATH), data_collator=Noting()
    ).train()
    return used

class Bucketed(BucketedTrainerMixin, transformers.Trainer):
    pass

for name, kind in (("plain", transformers.Trainer), ("bucketed", Bucketed)):
    for configuration in json.loads(sys.argv[2]):
        NOTES[f"{name} {configuration}"] = trained(kind, configuration, dataloader_drop_last=True)
write()
"""
TRAINER_CONFIGURATIONS: list[dict[str, Any]] = [
    {}, {"split_batches": True}, {"even_batches": False}, {"dispatch_batches": True, "split_batches": True},
]  # fmt: skip


@pytest.mark.slow
def test_trainers_on_two_ranks_train_each_row_once(store: TokenStore, tmp_path: Path, forks: Forks) -> None:
    pytest.importorskip("transformers")
    ranks = run(forks, TRAINER, store, tmp_path, json.dumps(TRAINER_CONFIGURATIONS))
    for name in ("plain", "bucketed"):
        for configuration in TRAINER_CONFIGURATIONS:
            batches = [notes[f"{name} {configuration}"] for notes in ranks]
            rows = [row for part in batches for batch in part for row in batch]
            size = 4 if configuration.get("split_batches") else 8
            assert {len(batch) for part in batches for batch in part} == {size}, (name, configuration)
            assert len(batches[0]) == len(batches[1]) == NUM_ROWS // (2 * size)
            assert len(rows) == len(set(rows)) == 2 * size * len(batches[0])
