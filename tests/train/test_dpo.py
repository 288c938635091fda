"""Learning from pairs: the loss against plain Python, packed against padded, the reference's file, whole runs."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastcollate import BatchLoader, MixedStore, TokenStore, prepare
from fastcollate.errors import InputError
from fastcollate.train import TrainOptions, train
from fastcollate.train.files import load_checkpoint, load_model
from fastcollate.train.model import GPT2, GPT2Config
from fastcollate.train.preference.dpo import DPOLoss, answer_log_probs
from fastcollate.train.preference.reference import Reference, reference_for, reference_of
from fastcollate.train.ranks import Ranks
from fastcollate.train.step import as_micro_batch, split_rows
from tests.forks import Forks
from tests.helpers import losses, metrics, run_cli

CPU = torch.device("cpu")
BETA = 0.3


def records(count: int = 48) -> list[dict[str, Any]]:
    chance = random.Random(5)
    return [
        {
            "instruction": f"What is {n} and {n + 1}?",
            "chosen": f"It is {2 * n + 1}, " + "for sure " * chance.randint(1, 9),
            "rejected": "No " * chance.randint(1, 20),
        }
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of pairs, one of rows, and a run on these."""
    folder = tmp_path_factory.mktemp("dpo")
    (folder / "pairs.json").write_text(json.dumps(records()))
    prepare(str(folder / "pairs.json"), folder / "pairs", template="preference")
    prepare([{"instruction": r["instruction"], "output": r["chosen"]} for r in records()], folder / "rows")
    options = TrainOptions(out=folder / "sft", max_steps=2, eval_every=0, sample_tokens=0, tensorboard=False)
    train(folder / "rows", options, progress=False)
    return folder


def make_options(folder: Path, out: Path, **options: Any) -> TrainOptions:
    asked = {"max_steps": 4, "learning_rate": 1e-3, "warmup": 1, "eval_every": 2, **options}
    return TrainOptions(
        out=out, objective="dpo", reference_checkpoint=folder / "sft", sample_tokens=0, tensorboard=False, **asked
    )


def models(dtype: torch.dtype) -> tuple[GPT2, GPT2]:
    """A model and another one, its reference."""
    config = GPT2Config(num_layers=2, num_heads=2, width=16)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = GPT2(config)
        for parameter in model.parameters():  # far from uniform, so that answers differ
            parameter.data.mul_(3)
        found.append(model.to(dtype))
    return found[0], found[1]


def by_hand(model: GPT2, store: TokenStore, row: int, limit: int) -> float:
    """The log-probability of a row's answer, from logits of the row alone, a token at a time."""
    ids = [*store[row].input_ids.tolist(), store.end_token_id]
    logits = model(torch.tensor([ids[:-1][:limit]]))[0].double()
    total = 0.0
    for place, token in enumerate(ids[1:][:limit], 1):
        if place >= int(store[row].spans[0]):
            scores = logits[place - 1]
            total += float(scores[token]) - float(torch.logsumexp(scores, 0))
    return total


def steps_of(model: GPT2, reference: GPT2, store: TokenStore, policy: dict[str, Any]) -> tuple[Any, ...]:
    """Of all pairs in one step: the loss, the sums, the gradients, each pair's log-probabilities."""
    values = torch.zeros((2, len(store) // 2), dtype=torch.float64)
    found = torch.zeros_like(values)
    loss_of = DPOLoss(model, SimpleNamespace(beta=BETA, compile=False))  # type: ignore[arg-type]
    loss_of.sums = torch.zeros((2, 1), dtype=torch.float64)
    batches = [*BatchLoader(store, **policy)]
    with torch.no_grad():
        for batch in batches:
            for which, into in ((reference, values), (model, found)):
                hidden = which.hidden(batch.inputs, batch.position_ids, batch.cu_seqlens)
                into[:, batch.pairs] = answer_log_probs(
                    hidden, which.head_weight, batch.targets, batch.rows, batch.cu_seqlens
                )
    total = 0.0
    for batch in batches:
        loss = loss_of(as_micro_batch(batch, Reference(values)), 2 / len(store))
        loss.backward()
        total += float(loss)
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    return total, loss_of.sums.flatten().tolist(), gradients, found, values


LIMIT = 48  # which cuts some of the answers
PADDED = {"batch_size": 7, "max_length": LIMIT}
PACKED = {"policy": "packed", "batch_size": 2, "capacity": 2 * LIMIT + 5, "max_length": LIMIT}


@pytest.mark.slow
@pytest.mark.parametrize("policy", [PADDED, PACKED])
def test_the_loss_is_that_of_plain_python(folder: Path, policy: dict[str, Any]) -> None:
    store = TokenStore(folder / "pairs")
    model, reference = models(torch.float64)
    loss, (margin, right), _, *_ = steps_of(model, reference, store, policy)
    margins = []
    with torch.no_grad():
        for pair in range(len(store) // 2):
            of = [[by_hand(which, store, 2 * pair + i, LIMIT) for i in (0, 1)] for which in (model, reference)]
            margins.append(BETA * ((of[0][0] - of[1][0]) - (of[0][1] - of[1][1])))
    wanted = sum(math.log1p(math.exp(-m)) for m in margins) / len(margins)
    assert loss == pytest.approx(wanted, abs=1e-10)
    assert margin == pytest.approx(sum(margins), abs=1e-9)
    assert right == sum(m > 0 for m in margins)
    assert 0 < right < len(margins)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_packed_is_padded(folder: Path, dtype: torch.dtype, tolerance: float) -> None:
    store = TokenStore(folder / "pairs")
    found = [steps_of(*models(dtype), store, policy) for policy in (PADDED, PACKED)]
    assert found[0][0] == pytest.approx(found[1][0], abs=tolerance)
    assert torch.allclose(found[0][2], found[1][2], rtol=0, atol=tolerance)
    assert torch.allclose(found[0][3], found[1][3], rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)
    assert float(found[0][2].abs().max()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("policy", [{}, {"policy": "packed"}, {"max_tokens": 2048, "accumulate": 2}])
def test_a_run_begins_at_ln_2_and_learns_to_prefer(folder: Path, tmp_path: Path, policy: dict[str, Any]) -> None:
    report = train(folder / "pairs", make_options(folder, tmp_path / "run", **policy), progress=False)
    assert report.first_loss == pytest.approx(math.log(2), abs=5e-7)
    lines = metrics(tmp_path / "run")
    assert lines[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["reward_margin"] > 0.05
    assert lines[-1]["reward_accuracy"] > 0.9
    assert lines[-1]["loss"] < 0.68
    assert all(line["pairs"] > 0 for line in lines)
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["pairs"] for line in evaluations] == [4, 4]
    assert evaluations[-1]["validation_loss"] < math.log(2)


@pytest.mark.slow
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(folder: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(folder / "pairs", make_options(folder, whole, max_steps=6, schedule="constant"), progress=False)
    for steps in (3, 6):
        options = make_options(folder, parts, max_steps=steps, schedule="constant", resume=True)
        train(folder / "pairs", options, progress=False)
    assert losses(parts) == losses(whole)
    with pytest.raises(InputError, match=r"with --beta 0\.1, not with --beta 0\.2"):
        train(folder / "pairs", make_options(folder, parts, resume=True, beta=0.2), progress=False)


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_reference(folder: Path, tmp_path: Path) -> None:
    """A folder whose run went on holds another model."""
    shutil.copytree(folder / "sft", tmp_path / "sft")
    options = make_options(folder, tmp_path / "run", max_steps=1, eval_every=0)
    options = replace(options, reference_checkpoint=tmp_path / "sft")
    train(folder / "pairs", options, progress=False)
    more = TrainOptions(
        out=tmp_path / "sft", max_steps=3, eval_every=0, sample_tokens=0, tensorboard=False, resume=True
    )
    train(folder / "rows", more, progress=False)
    with pytest.raises(InputError, match="is another one than when the run was started"):
        train(folder / "pairs", replace(options, resume=True, max_steps=2), progress=False)


def test_runs_of_before_are_resumed(folder: Path) -> None:
    saved = load_checkpoint(folder / "sft")
    older = {name: value for name, value in saved.options.items() if name not in ("objective", "beta")}
    del older["reference_checkpoint"]
    options = TrainOptions(out=folder / "sft", resume=True)
    options.with_precision("", older).check_against(older)
    with pytest.raises(InputError, match="with --objective sft, not with --objective dpo"):
        make_options(folder, folder / "sft", learning_rate=None, warmup=10).check_against(older)


def asked(store: TokenStore, checkpoint: Path, said: list[str], **options: Any) -> Reference:
    options = {"max_length": 1024, "precision": "float32", **options}
    return reference_of(store, checkpoint, device=CPU, out=store.path.parent, say=said.append, **options)


@pytest.mark.slow
def test_the_reference_is_computed_once_and_never_stale(folder: Path, tmp_path: Path) -> None:
    prepare(str(folder / "pairs.json"), tmp_path / "pairs", template="preference")
    store, said = TokenStore(tmp_path / "pairs"), list[str]()
    first = asked(store, folder / "sft", said)
    (path,) = tmp_path.glob("pairs.reference-*.npz")
    written = path.stat().st_mtime_ns, path.read_bytes()
    assert len(said) == 1
    assert torch.equal(asked(store, folder / "sft" / "checkpoint.pt", said).values, first.values)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == written
    assert len(said) == 1  # nothing was computed
    model, _ = load_model(folder / "sft")
    with torch.no_grad():
        wanted = [[by_hand(model, store, 2 * pair + i, 1024) for pair in range(48)] for i in (0, 1)]
    assert np.allclose(first.values.numpy(), wanted, rtol=1e-6)
    # another limit, precision or model is another file, and so is another store's
    options = make_options(folder, tmp_path / "other", max_steps=1, eval_every=0)
    train(store, options, progress=False)
    others = [
        asked(store, folder / "sft", said, max_length=20), asked(store, folder / "sft", said, precision="bfloat16"),
        asked(store, tmp_path / "other", said),
    ]  # fmt: skip
    assert len({tuple(found.values.flatten().tolist()) for found in [first, *others]}) == 4
    assert len([*tmp_path.glob("pairs.reference-*.npz")]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "other", "text", "shape"])
def test_a_damaged_reference_is_computed_anew(folder: Path, tmp_path: Path, damage: str) -> None:
    prepare(str(folder / "pairs.json"), tmp_path / "pairs", template="preference")
    store, said = TokenStore(tmp_path / "pairs"), list[str]()
    first = asked(store, folder / "sft", said)
    (path,) = tmp_path.glob("*.npz")
    content = dict(np.load(path))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "text":
        path.write_text("nothing")
    elif damage == "other":  # of another model, under this one's name
        np.savez(path, **{**content, "fingerprint": "0" * 64})
    else:
        np.savez(path, **{**content, "log_probs": content["log_probs"][:, :-1]})
    assert torch.equal(asked(store, folder / "sft", said).values, first.values)
    assert len(said) == 3
    assert "damaged, or of something else" in said[1]
    assert torch.equal(asked(store, folder / "sft", said).values, first.values)
    assert len(said) == 3


@pytest.mark.parametrize("limit", [1024, 22, 12])
def test_pairs_that_the_limit_makes_alike_are_said(folder: Path, tmp_path: Path, limit: int) -> None:
    """Answers that differ late, or a prompt that fills the limit: nothing is learnt from these."""
    count = 9
    data = [
        {"prompt": f"How is {n}?", "chosen": " so" * 20 + f" {n}", "rejected": " so" * (20 if n % 2 else 9)}
        for n in range(count)
    ] + [{"prompt": "why " * 20, "chosen": " a", "rejected": " b"}]
    prepare(data, tmp_path / "pairs", template="preference")
    store = TokenStore(tmp_path / "pairs")
    wanted = 0
    for pair in range(count + 1):
        rows = [(*store[2 * pair + i].input_ids.tolist(), store.end_token_id)[: limit + 1] for i in (0, 1)]
        wanted += rows[0] == rows[1]
    assert (wanted > 0) == (limit < 1024)
    for _ in range(2):  # computed, and read from the file
        assert asked(store, folder / "sft", [], max_length=limit).num_alike == wanted
    said: list[str] = []
    options = make_options(folder, tmp_path / "run", max_length=limit)
    reference_for(store, options.with_precision("cpu"), Ranks(0, 1, CPU, None), 1024, said.append)
    told = f"note: {wanted} of 10 pairs have the same answers within their first {limit:,} tokens"
    assert [line.startswith(told) for line in said] == [True] * (wanted > 0)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [[], ["--policy", "packed", "--global-batch-size", "2", "--max-length", "40"]])
def test_two_ranks_learn_as_one_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: list[str], forks: Forks
) -> None:
    prepare(str(folder / "pairs.json"), tmp_path / "pairs", template="preference")
    common = ["--store", str(tmp_path / "pairs"), "--objective", "dpo", "--reference-checkpoint", str(folder / "sft")]
    common += ["--device", "cpu", "--no-tensorboard", "--sample-tokens", "0", "--max-steps", "4", "--eval-every", "2"]
    common += ["--learning-rate", "1e-3", *policy]
    two = ["train", "--out", tmp_path / "two", *common]
    forks.run("-m fastcollate", *two, cwd=tmp_path, num_ranks=2).check_returncode()
    assert run_cli(monkeypatch, "train", "--out", tmp_path / "one", *common) == 0
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert one[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [line["pairs"] for line in two] == [line["pairs"] for line in one]
    assert len([*tmp_path.glob("pairs.reference-*.npz")]) == 1


def test_splits_part_no_pair() -> None:
    options = TrainOptions(objective="dpo", reference_checkpoint=Path("x"))
    for num_pairs in (1, 2, 7, 10, 101):
        pairs = split_rows(num_pairs, replace(options, objective="sft", reference_checkpoint=None))
        found = split_rows(2 * num_pairs, options)
        assert {name: range(2 * part.start, 2 * part.stop) for name, part in pairs.items()} == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "dpo"}, "give --reference-checkpoint RUN with it"),
        ({"reference_checkpoint": Path("x")}, "give --objective dpo with it"),
        ({"objective": "ppo"}, "give sft or dpo"),
        ({"objective": "dpo", "reference_checkpoint": Path("x"), "beta": 0}, "--beta 0: give more than 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainOptions(**options)


def test_data_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    pairs, rows = TokenStore(folder / "pairs"), TokenStore(folder / "rows")
    options = make_options(folder, tmp_path / "run")
    sources: list[TokenStore | MixedStore] = [rows, MixedStore({"a": pairs}), pairs.as_rows()]
    for source in sources:
        with pytest.raises(InputError, match="--objective dpo needs one store of pairs"):
            train(source, options, progress=False)
    with pytest.raises(InputError, match=r"a store of pairs; this makes batches of rows.*; BatchLoader and train"):
        train(pairs, TrainOptions(out=tmp_path / "run"), progress=False)
    with pytest.raises(InputError, match="no checkpoint here"):
        train(pairs, replace(options, reference_checkpoint=tmp_path / "none"), progress=False)


@pytest.mark.slow
def test_the_command_line_learns_from_pairs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    status = run_cli(
        monkeypatch, "train", folder / "pairs.json", "--template", "preference", "--objective", "dpo",
        "--reference-checkpoint", folder / "sft", "--max-steps", 2, "--out", out, "--lr", 1e-3,
    )  # fmt: skip
    assert status == 0
    assert metrics(out)[0]["loss"] == pytest.approx(math.log(2), abs=5e-7)
    assert len([*out.glob("store.reference-*.npz")]) == 1
    assert run_cli(monkeypatch, "evaluate", "--checkpoint", out, "--split", "test", "--max-new-tokens", 2) == 0
    answers = json.loads((out / "answers-test.json").read_text())
    assert [answer["output"].strip() for answer in answers] == [r["chosen"].strip() for r in records()[40:44]]
