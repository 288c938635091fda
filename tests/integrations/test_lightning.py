"""Real `Trainer.fit` runs over the data module: alone and with two processes, stopped and resumed mid-epoch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastcollate import BatchLoader
from fastcollate.errors import InputError
from fastcollate.plan.mixing import MixedStore
from fastcollate.store.store import TokenStore
from tests.helpers import random_rows, store_of_rows

pytest.importorskip("lightning.pytorch")

ROWS, SPANS = random_rows(90, vocab_size=100)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return store_of_rows(tmp_path_factory.mktemp("lightning") / "store", ROWS, SPANS, vocab_size=100)


def fit(store: TokenStore, out: Path, processes: int, stop_after: int = 0, checkpoint: Path | None = None) -> list[Any]:
    out.mkdir(exist_ok=True)
    script = Path(__file__).with_name("lightning_run.py")
    command = [sys.executable, str(script), store.path, out, processes, stop_after, checkpoint or "-"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PL_DISABLE_FORK": "1"}
    result = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", [1, 2])
def test_stopped_mid_epoch_and_resumed_equals_one_run(store: TokenStore, tmp_path: Path, processes: int) -> None:
    whole = fit(store, tmp_path / "whole", processes)
    stop = len([entry for entry in whole[0]["seen"] if entry[0] == 0]) + 3  # in the second epoch
    stopped = fit(store, tmp_path / "stopped", processes, stop_after=stop)
    resumed = fit(store, tmp_path / "resumed", processes, checkpoint=tmp_path / "stopped" / "stopped.ckpt")
    for rank in range(processes):
        wanted = whole[rank]["seen"]
        assert stopped[rank]["seen"] == wanted[:stop]
        found = resumed[rank]["seen"]
        assert [(epoch, total) for epoch, _, total in found] == [(epoch, total) for epoch, _, total in wanted[stop:]]
        assert [loss for _, loss, _ in found] == pytest.approx([loss for _, loss, _ in wanted[stop:]], abs=1e-6)
    epochs = [[entry[2] for entry in whole[0]["seen"] if entry[0] == epoch] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    if processes == 2:
        assert len(whole[0]["seen"]) == len(whole[1]["seen"])
        assert [entry[2] for entry in whole[0]["seen"]] != [entry[2] for entry in whole[1]["seen"]]
    assert whole[0]["validated"]


def test_a_store_per_split_and_a_mix(store: TokenStore, tmp_path: Path) -> None:
    import lightning.pytorch as pl
    from lightning_run import TinyModel

    from fastcollate.integrations.lightning import DataModule

    other = store_of_rows(tmp_path / "other", *random_rows(20, seed=1, vocab_size=100), vocab_size=100)
    mix = MixedStore({"a": store, "b": other}, weights={"a": 1, "b": 1}, num_rows=40)
    data = DataModule(mix, other, store.path, batch_size=8, max_length=30)
    model = TinyModel()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    assert len(model.seen) == 10
    assert trainer.train_dataloader.batch_sampler.source_rows == {"a": 40, "b": 40}
    model.validated.clear()
    trainer.validate(model, datamodule=data, verbose=False)
    assert sum(model.validated) == 20


@pytest.mark.slow
def test_validation_is_the_same_rows_in_the_same_order_each_time(store: TokenStore) -> None:
    import lightning.pytorch as pl
    from lightning_run import TinyModel

    from fastcollate.integrations.lightning import DataModule

    class Watching(TinyModel):
        def validation_step(self, batch: Any, index: int) -> None:
            self.validated.append(int(batch.inputs.sum()))

    for limit, options in ((None, {"batch_size": 4}), (3, {"batch_size": 4}), (2, {"max_tokens": 150})):
        model = Watching()
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=limit, num_sanity_val_steps=2,
        )  # fmt: skip
        trainer.fit(model, datamodule=DataModule(store, store, window=16, **options))
        each = (len(model.validated) - 2) // 3
        assert each == (limit or 23)
        sanity, epochs = model.validated[:2], np.reshape(model.validated[2:], (3, each)).tolist()
        assert epochs[0] == epochs[1] == epochs[2]
        assert sanity == epochs[0][:2]


@pytest.mark.slow
def test_epochs_of_differing_batches_lose_no_row(store: TokenStore) -> None:
    import lightning.pytorch as pl
    from lightning_run import TinyModel

    from fastcollate.integrations.lightning import DataModule

    class Watching(TinyModel):
        def training_step(self, batch: Any, index: int) -> Any:
            self.seen.append((self.current_epoch, 0.0, int(batch.inputs.sum())))
            return self._loss(batch)

    model = Watching()
    options: dict[str, Any] = {"max_tokens": 150, "window": 16, "seed": 2}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=5, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=DataModule(store, **options))
    loader = BatchLoader(store, prefetch=0, **options)
    epochs = [[int(batch.inputs.sum()) for batch in loader] for _ in range(6)]
    assert len({len(batches) for batches in epochs}) > 1
    wanted = [number for batches in epochs for number in batches]
    assert [number for _, _, number in model.seen] == wanted[: 5 * len(epochs[0])]


def test_wrong_use_is_named(store: TokenStore, tmp_path: Path) -> None:
    import lightning.pytorch as pl
    from lightning_run import TinyModel

    from fastcollate.integrations.lightning import DataModule

    with pytest.raises(InputError, match="choose policy="):
        DataModule(store, batch_size=4, shuffle=True)
    with pytest.raises(InputError, match="train is needed"):
        DataModule(store, batch_size=4, split={"training": 1.0})
    with pytest.raises(InputError, match="store of its own"):
        DataModule(store, store, batch_size=4, split={"train": 0.5, "val": 0.5})
    with pytest.raises(InputError, match="either batch_size"):
        DataModule(store)
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, barebones=False)
    with pytest.raises(InputError, match="embeds 50 ids"):
        trainer.fit(TinyModel(50), datamodule=DataModule(store, batch_size=4))


@pytest.mark.slow
def test_a_missing_extra_is_named() -> None:
    code = "import sys; sys.modules['lightning'] = None; sys.modules['lightning.pytorch'] = None\n"
    code += "import fastcollate.integrations.lightning"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "pip install 'fastcollate[lightning]'" in result.stderr.splitlines()[-1]


def test_ranks_of_a_mesh_share_their_batches(store: TokenStore) -> None:
    from fastcollate.integrations.lightning import DataModule

    options: dict[str, Any] = {"policy": "packed", "batch_size": 2, "capacity": 64, "cp_size": 2, "seed": 5}
    data = DataModule(store, **options)
    for rank in range(4):
        share = {"rank": rank // 2, "num_replicas": 2}
        data.trainer = SimpleNamespace(
            global_rank=rank, world_size=4, current_epoch=0, strategy=None, distributed_sampler_kwargs=share
        )
        wanted = BatchLoader(store, **options, rank=rank // 2, world_size=2)
        for found, batch in zip(data.train_dataloader(), wanted, strict=False):
            assert all(map(torch.equal, found, batch))
        data.trainer.distributed_sampler_kwargs = {"rank": rank, "num_replicas": 4}
        with pytest.raises(InputError, match=r"cp_size=2: .* gives 4 of 4 ranks data of their own"):
            data.train_dataloader()
