"""The examples in the docstrings of train/ and check/ run as they stand.

Each sees its module's names, and besides them `store` (600 records of the built-in sample), `runs/first` (a run of two
steps on it), `loader`, `model`, `ranks`, `stepper`, `batches` and `num_trained`.
"""

from __future__ import annotations

import doctest
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fastcollate
from fastcollate.check.counts import inspect_store
from fastcollate.sources.sample import sample_records
from fastcollate.train.files import load_checkpoint
from fastcollate.train.loop import train
from fastcollate.train.model import GPT2, config_of
from fastcollate.train.options import TrainOptions
from fastcollate.train.ranks import Ranks
from fastcollate.train.step import Stepper, as_micro_batch

CHECKS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
MODULES = [
    *(f"train.{name}" for name in ("answers", "files", "loop", "loss", "model", "options", "ranks", "step")),
    *(f"check.{name}" for name in ("counts", "measure", "page", "reference_check", "terminal")),
    "progress", "errors",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sample_records(600)))
    fastcollate.prepare(folder / "records.jsonl", folder / "store", workers=1)
    options = TrainOptions(
        out=folder / "runs" / "first", max_steps=2, device="cpu", eval_every=0, sample_tokens=0, tensorboard=False
    )
    train(folder / "store", options, progress=False)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    store = fastcollate.TokenStore("store")
    loader = fastcollate.BatchLoader(store, batch_size=8, mask_prompt=True)
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    model = GPT2(config_of("tiny")).eval()
    batches = [as_micro_batch(next(iter(loader)))]
    context: dict[str, Any] = {
        "store": store, "loader": loader, "ranks": ranks, "model": model, "batches": batches, "Path": Path,
        "num_trained": batches[0].num_trained, "stepper": Stepper(model, TrainOptions(), ranks), "torch": torch,
        "inspect_store": inspect_store, "load_checkpoint": load_checkpoint,
        "TokenStore": fastcollate.TokenStore,
    }  # fmt: skip
    module = importlib.import_module(f"fastcollate.{name}")
    examples = doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=context)
    assert any(example.examples for example in examples)
    said: list[str] = []
    for example in examples:
        doctest.DocTestRunner(verbose=False, optionflags=CHECKS).run(example, out=said.append)
    assert not said, "".join(said)
