"""Rows that hold their own end: every way from a store to a batch, and the training loop, give ids[:-1] and ids[1:]."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from fastcollate import BatchLoader, BucketBatchSampler, StoreDataset, TokenStore
from fastcollate.train import TrainOptions, train
from tests.helpers import metrics, random_rows, run_cli, store_of_rows

VOCAB, PAD = 300, 7
ROWS, SPANS = random_rows(90, vocab_size=VOCAB)
ROWS = [[*row[:-1], VOCAB - 1] for row in ROWS]  # the last id is the end
KEYS = {"batch_size": 8, "seed": 5}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    path = tmp_path_factory.mktemp("in_row") / "store"
    return store_of_rows(path, ROWS, SPANS, vocab_size=VOCAB, end="in_row", pad_token_id=PAD)


def by_loader(store: TokenStore, masked: bool) -> Iterable[Any]:
    return BatchLoader(store, mask_prompt=masked, **KEYS)


def by_data_loader(store: TokenStore, masked: bool) -> Iterable[Any]:
    dataset = StoreDataset(store, mask_prompt=masked)
    return DataLoader(dataset, batch_sampler=BucketBatchSampler(dataset, **KEYS), collate_fn=dataset.collate)


def by_stateful(store: TokenStore, masked: bool) -> Iterable[Any]:
    kind = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    dataset = StoreDataset(store, mask_prompt=masked)
    sampler = BucketBatchSampler(dataset, **KEYS)
    return kind(dataset, batch_sampler=sampler, collate_fn=dataset.collate, num_workers=1)  # type: ignore[no-any-return]


def by_lightning(store: TokenStore, masked: bool) -> Iterable[Any]:
    pytest.importorskip("lightning.pytorch")
    from fastcollate.integrations.flow import FlowingSampler
    from fastcollate.integrations.lightning import DataModule, StoreBatches

    data = DataModule(store, mask_prompt=masked, **KEYS)
    return StoreBatches(data.datasets["train"], FlowingSampler(data.datasets["train"], **KEYS))


WAYS = [by_loader, by_data_loader, by_stateful, by_lightning]


def wanted_rows(masked: bool) -> list[tuple[list[int], list[int]]]:
    """Of each row ids[:-1], and ids[1:] with -100 in the place of a prompt's."""
    prompts = [spans[0] if masked else 0 for spans in SPANS]
    return [
        (row[:-1], [-100 if place < prompt else token for place, token in enumerate(row)][1:])
        for row, prompt in zip(ROWS, prompts, strict=True)
    ]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_all_ids_but_one(
    store: TokenStore, way: Callable[[TokenStore, bool], Iterable[Any]], masked: bool
) -> None:
    found = []
    for batch in way(store, masked):
        assert (batch.inputs.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            length = max((i + 1 for i, t in enumerate(inputs) if t != PAD or targets[i] != -100), default=0)
            found.append((inputs, targets, length))
    wanted = wanted_rows(masked)
    rows = sorted((tuple(i[:n]), tuple(t[:n])) for i, t, n in found)
    assert rows == sorted((tuple(i), tuple(t)) for i, t in wanted)
    assert all(set(inputs[n:]) <= {PAD} and set(targets[n:]) <= {-100} for inputs, targets, n in found)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["bucketed", "packed"])
def test_the_training_loop(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], policy: str
) -> None:
    from fastcollate.train.model import CONFIGS, GPT2Config

    small = GPT2Config(num_layers=1, num_heads=2, width=16, vocab_size=VOCAB, context_length=64)
    monkeypatch.setattr("fastcollate.train.model.CONFIGS", {**CONFIGS, "tiny": small})
    options = TrainOptions(
        out=tmp_path / "run", epochs=1, policy=policy, mask_prompt=True, sample_tokens=0, eval_every=0,
        tensorboard=False, device="cpu", train_share=1.0,
    )  # fmt: skip
    report = train(store, options, progress=False)
    assert report.ended == "finished"
    assert report.tokens_seen == sum(len(row) - 1 for row in ROWS)
    assert sum(step["useful_tokens"] for step in metrics(tmp_path / "run")) == report.tokens_seen
    again = train(store, TrainOptions(**{**vars_of(options), "resume": True}), progress=False)
    assert again.steps == report.steps
    command = ["train", "--store", store.path, "--out", tmp_path / "no", "--mode", "reference", "--device", "cpu"]
    assert run_cli(monkeypatch, *command) == 1
    assert "mode='reference' of rows that hold their own end" in capsys.readouterr().err


def vars_of(options: TrainOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in options.__dataclass_fields__}


@pytest.mark.slow
def test_the_command_line_knows_both_ends(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in ("--mask-prompt", "--train-prompt"):
        assert run_cli(monkeypatch, "verify", store.path, flag, "--policy", "packed", "--json") == 0
        assert json.loads(capsys.readouterr().out)["ok"]
        assert run_cli(monkeypatch, "bench", store.path, flag, "--rounds", 1, "--step-ms", 10, "--json") == 0
        assert len(json.loads(capsys.readouterr().out)["contenders"]) == 6
        page = tmp_path / f"page{flag}.html"
        assert run_cli(monkeypatch, "inspect", store.path, flag, "--report", page, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        wanted = wanted_rows(flag == "--mask-prompt")
        assert (found["end"], found["kept_tokens"]) == ("in_row", sum(len(i) for i, _ in wanted))
        assert found["trained_tokens"] == sum(t != -100 for _, targets in wanted for t in targets)
        assert found["options"]["mode"] == "positional"
        assert page.stat().st_size > 10_000
    assert run_cli(monkeypatch, "inspect", store.path, "--row", 3, "--mask-prompt", "--json") == 0
    view = json.loads(capsys.readouterr().out)
    assert view["tokens"][: len(ROWS[3])] == ROWS[3]
    assert set(view["tokens"][len(ROWS[3]) :]) <= {PAD}
    assert view["kinds"][: len(ROWS[3])] == ["prompt"] * SPANS[3][0] + ["trained"] * SPANS[3][1]
    assert set(view["kinds"][len(ROWS[3]) :]) <= {"padding"}
