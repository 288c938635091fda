"""The training loop: losses to the last bit, resuming, skipping, stopping, refusing."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba.core import event

from fastcollate.collate.collator import Collator
from fastcollate.collate.reference import custom_collate_fn, custom_collate_with_masking_fn
from fastcollate.errors import InputError
from fastcollate.load.loader import BatchLoader
from fastcollate.plan.plan import plan_epoch
from fastcollate.store.store import TokenStore
from fastcollate.train.files import load_checkpoint
from fastcollate.train.loop import train
from fastcollate.train.model import CONFIGS, GPT2, GPT2Config
from fastcollate.train.options import TrainOptions
from fastcollate.train.ranks import Ranks
from fastcollate.train.step import Feed, MicroBatch, Stepper, learning_rate_at, make_loader, split_rows
from tests.helpers import losses, metrics, sample_store, write_store

ALONE = Ranks(0, 1, torch.device("cpu"), None)
TINY = {"name": "gpt2", "fingerprint": "00", "vocab_size": 300, "pad_token_id": 299}
SMALL = GPT2Config(num_layers=2, num_heads=2, width=16, vocab_size=300, context_length=64)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model with a tiny vocabulary, so that a step takes milliseconds."""
    monkeypatch.setattr("fastcollate.train.model.CONFIGS", {**CONFIGS, "tiny": SMALL})


@pytest.fixture(scope="session")
def random_store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """120 rows of 2 to 40 tokens over 300 ids."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(120):
        length = int(random.integers(2, 41))
        prompt = int(random.integers(0, length))
        rows.append(([prompt, length - prompt], random.integers(0, 299, length).tolist()))
    tokenizer = {"name": "gpt2", "fingerprint": "00", "vocab_size": 300, "pad_token_id": 299}
    return write_store(tmp_path_factory.mktemp("train") / "store", rows, shard_rows=50, tokenizer=tokenizer)


def options(out: Path, **values: Any) -> TrainOptions:
    defaults: dict[str, Any] = {"sample_tokens": 0, "eval_every": 0, "tensorboard": False, "device": "cpu"}
    return TrainOptions(out=out, **{**defaults, **values})


def failing_after(num_steps: int) -> Any:
    """`Stepper.step` for so many steps, then an error."""
    step, left = Stepper.step, [num_steps]

    def step_or_fail(self: Stepper, *args: Any) -> torch.Tensor:
        if not left[0]:
            raise RuntimeError("power cut")
        left[0] -= 1
        return step(self, *args)

    return step_or_fail


@pytest.mark.slow
@pytest.mark.parametrize("mask_prompt", [False, True])
@pytest.mark.parametrize("policy", ["shuffled", "bucketed"])
def test_every_loss_equals_training_on_the_reference_collate(tmp_path: Path, mask_prompt: bool, policy: str) -> None:
    store = sample_store(tmp_path / "store", 48)
    settings = options(tmp_path, mask_prompt=mask_prompt)
    plan = plan_epoch(store.lengths, batch_size=8, policy=policy, seed=5)
    rows = [[store[int(row)] for row in batch] for batch in plan]
    loader = BatchLoader(store, policy=policy, batch_size=8, seed=5, mask_prompt=mask_prompt)

    def reference() -> list[tuple[torch.Tensor, torch.Tensor]]:
        if mask_prompt:
            return [custom_collate_with_masking_fn([(int(r.spans[0]), r.input_ids.tolist()) for r in b]) for b in rows]
        return [custom_collate_fn([r.input_ids.tolist() for r in batch]) for batch in rows]

    def run(batches: Any) -> list[float]:
        torch.manual_seed(0)
        stepper = Stepper(GPT2(CONFIGS["tiny"]), settings, ALONE)
        found = []
        for step, (inputs, targets) in enumerate(batches, 1):
            trained = int((targets != -100).sum())
            batch = MicroBatch(inputs, targets, None, None, inputs.numel(), trained)
            found.append(stepper.step([batch], trained, learning_rate_at(step, settings, 6)).item())
        return found

    expected = run(reference())
    assert run(iter(loader)) == expected  # to the last bit
    assert len(expected) == 6
    assert expected[-1] < expected[0]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_mean_is_over_the_trained_tokens_of_the_whole_step(tmp_path: Path, random_store: TokenStore) -> None:
    whole = options(
        tmp_path / "whole", batch_size=12, policy="sequential", max_steps=8, mask_prompt=True, mode="positional"
    )
    parts = replace(whole, out=tmp_path / "parts", batch_size=4, accumulate=3)
    train(random_store, whole, progress=False)
    train(random_store, parts, progress=False)
    assert losses(whole.out) == pytest.approx(losses(parts.out), abs=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("long_rows", ["truncate", "split", "drop"])
@pytest.mark.parametrize("mask_prompt", [False, True])
def test_packed_training_gives_the_losses_of_the_same_rows_padded(
    tmp_path: Path, random_store: TokenStore, mask_prompt: bool, long_rows: str
) -> None:
    packed = options(
        tmp_path / "packed", policy="packed", batch_size=3, capacity=64, max_length=30, long_rows=long_rows, epochs=1,
        mask_prompt=mask_prompt, mode="positional", eval_every=4,
    )  # fmt: skip
    report = train(random_store, packed, progress=False)
    lengths = random_store.lengths[:102]  # the training split
    plan = plan_epoch(
        lengths, policy="packed", batch_size=3, capacity=64, max_length=30, long_rows=long_rows, seed=123,
        tail="uneven", balance=True, cost=6 * SMALL.width,  # a step's packs are the same on any number of ranks
    )  # fmt: skip
    torch.manual_seed(123)
    stepper = Stepper(GPT2(SMALL), packed, ALONE)
    collator = Collator(random_store.shards, pad_token_id=299, mask_prompt=mask_prompt, mode="positional")
    expected, window = [], plan.packs(0)
    for number in range(window.num_batches):
        rows, starts, _ = window.batch(number)
        inputs, targets = collator(rows)
        starts = starts if len(starts) else np.zeros_like(rows)
        inputs, targets = (  # each part as a row of its own
            torch.stack([torch.nn.functional.pad(row[at : at + 30], (0, 30 - len(row[at : at + 30])), value=value)
                         for row, at in zip(tensor, starts, strict=True)])
            for tensor, value in ((inputs, 0), (targets, -100))
        )  # fmt: skip
        trained = int((targets != -100).sum())
        batch = MicroBatch(inputs, targets, None, None, inputs.numel(), trained)
        rate = learning_rate_at(number + 1, packed, window.num_batches)
        expected.append(stepper.step([batch], trained, rate).item())
    assert losses(packed.out) == pytest.approx(expected, abs=1e-5)
    kept = lengths[lengths <= 30] if long_rows == "drop" else lengths
    assert report.tokens_seen == int((kept if long_rows == "split" else np.minimum(kept, 30)).sum())
    assert report.validation_loss is not None


@pytest.mark.usefixtures("small")
def test_the_pack_is_the_context_unless_told_otherwise(random_store: TokenStore, tmp_path: Path) -> None:
    def sizes(world_size: int = 1, **values: Any) -> tuple[Any, Any]:
        ranks = Ranks(0, world_size, torch.device("cpu"), None)
        loader = make_loader(random_store, options(tmp_path, policy="packed", **values), ranks, range(102), 64)
        return tuple(next(iter(loader)).inputs.shape)  # type: ignore[return-value]

    assert sizes() == sizes(world_size=2) == (1, 64)
    assert sizes(batch_size=4, max_length=50) == (4, 50)
    assert sizes(batch_size=4, world_size=2, capacity=100) == (2, 100)
    assert sizes(max_tokens=300) == (4, 64)
    with pytest.raises(InputError, match="max_tokens=60 holds no pack"):
        sizes(max_tokens=60)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_loss_falls_and_the_files_are_there(tmp_path: Path, random_store: TokenStore) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    run = options(tmp_path / "run", epochs=3, eval_every=10, tensorboard=True, learning_rate=0.01)
    report = train(random_store, run, progress=False)
    steps = metrics(run.out)
    assert [step["step"] for step in steps] == list(range(1, 40))  # 102 rows, 13 batches an epoch
    assert set(steps[0]) == {"step", "loss", "learning_rate", "useful_tokens", "wait_s", "step_s"}
    assert (
        report.tokens_seen == sum(step["useful_tokens"] for step in steps) == 3 * int(random_store.lengths[:102].sum())
    )
    assert report.last_loss is not None
    assert report.first_loss is not None
    assert report.last_loss < report.first_loss - 0.1
    assert report.epochs == 3
    assert (run.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run.out / "tensorboard").iterdir())
    evaluations = [json.loads(line) for line in (run.out / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluations] == [10, 20, 30, 39]
    assert {p.name for p in run.out.iterdir()} == {
        "metrics.jsonl", "evaluations.jsonl", "tensorboard", "loss.png", "checkpoint.pt",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("policy", ["shuffled", "bucketed"])
def test_a_crash_and_a_resume_give_the_same_losses(
    tmp_path: Path, random_store: TokenStore, monkeypatch: pytest.MonkeyPatch, dropout: float, policy: str
) -> None:
    plain = options(tmp_path / "plain", epochs=3, accumulate=2, dropout=dropout, policy=policy)
    train(random_store, plain, progress=False)
    broken = replace(plain, out=tmp_path / "broken", checkpoint_every=3, resume=True)
    step = Stepper.step
    for steps_before in (2, 7, 1, 8):  # before the first checkpoint, at the end of an epoch of 7 steps, in the next
        monkeypatch.setattr(Stepper, "step", step)
        monkeypatch.setattr(Stepper, "step", failing_after(steps_before))
        with pytest.raises(RuntimeError, match="power cut"):
            train(random_store, broken, progress=False)
    monkeypatch.setattr(Stepper, "step", step)
    report = train(random_store, broken, progress=False)
    assert losses(broken.out) == losses(plain.out)
    assert [s["step"] for s in metrics(broken.out)] == list(range(1, 22))
    assert report.tokens_seen == 3 * int(random_store.lengths[:102].sum())


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Here and in processes: with two, a product of matrices is now and then another in its last bit (1 run of 20)."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_ctrl_c_leaves_a_run_that_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    store = sample_store(tmp_path / "store", 60)
    plain = options(tmp_path / "plain", batch_size=4, max_steps=14)
    train(store, plain, progress=False)
    code = (
        "import sys; from fastcollate.cli import main; sys.argv = ['fastcollate', 'train', '--store', sys.argv[1], "
        "'--out', sys.argv[2], '--batch-size', '4', '--max-steps', '14', '--eval-every', '0', '--sample-tokens', '0', "
        "'--resume']; main()"
    )
    command = [sys.executable, "-c", code, str(store.path), str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    file = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted after step" in error
    assert "Traceback" not in error
    done = load_checkpoint(tmp_path / "run").step
    assert 3 <= done < 14
    assert len(losses(tmp_path / "run")) == done
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    assert losses(tmp_path / "run") == losses(plain.out)


@pytest.mark.usefixtures("small")
def test_a_step_without_a_trained_token_is_skipped_and_counted(tmp_path: Path) -> None:
    rows = [([5, 0] if i % 8 < 4 else [2, 3], [i % 7, 1, 2, 3, 4]) for i in range(40)]
    rows = [([6, 0] if spans[1] == 0 else spans, ids) for spans, ids in rows]  # a prompt beyond the row's end
    tokenizer = {"name": "gpt2", "fingerprint": "00", "vocab_size": 300, "pad_token_id": 299}
    store = write_store(tmp_path / "store", rows, shard_rows=50, tokenizer=tokenizer)
    run = options(
        tmp_path / "run", policy="sequential", batch_size=4, epochs=1, mask_prompt=True, train_share=1.0, test_share=0.0
    )
    report = train(store, run, progress=False)
    assert [loss is None for loss in losses(run.out)] == [True, False] * 5
    assert (report.steps, report.skipped_steps) == (10, 5)
    before, after = (dict(torch.load(run.out / "checkpoint.pt", weights_only=True)["model"]) for _ in range(2))
    assert all(torch.isfinite(before[name]).all() for name in after)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    "order",
    [
        {"policy": "shuffled", "batch_size": 1}, {"policy": "bucketed", "batch_size": 2},
        {"policy": "packed", "batch_size": 1, "capacity": 7}, {"policy": "bucketed", "max_tokens": 7},
    ],
    ids=str,
)  # fmt: skip
def test_batches_without_a_target_give_no_nan(tmp_path: Path, order: dict[str, Any], accumulate: int) -> None:
    """Two of three rows train nothing, in training and in validation."""
    rows = [([6, 0] if n % 3 else [2, 3], [n, 1, 2, 3, 4]) for n in range(1, 61)]
    store = write_store(tmp_path / "store", rows, tokenizer=TINY)
    run = options(
        tmp_path / "run", epochs=1, mask_prompt=True, accumulate=accumulate, eval_every=4, train_share=0.7,
        test_share=0, **order,
    )  # fmt: skip
    report = train(store, run, progress=False)
    found = losses(run.out)
    assert report.steps == len(found)
    assert report.skipped_steps == sum(loss is None for loss in found)
    assert all(loss is None or math.isfinite(loss) for loss in found)
    assert report.validation_loss is not None
    assert math.isfinite(report.validation_loss)
    model = torch.load(run.out / "checkpoint.pt", weights_only=True)["model"]
    assert all(bool(tensor.isfinite().all()) for tensor in model.values())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("limit", [{"epochs": 2}, {"max_steps": 7}, {"epochs": 1, "max_length": 4}])
def test_a_run_in_which_nothing_was_trained_fails(tmp_path: Path, limit: dict[str, int]) -> None:
    prompt = 6 if "max_length" not in limit else 5  # the whole row, or all that --max-length keeps of it
    store = write_store(tmp_path / "store", [([prompt, 6 - prompt], [1, 2, 3, 4, 5])] * 60, tokenizer=TINY)
    run = options(tmp_path / "run", batch_size=4, mask_prompt=True, **limit)
    with pytest.raises(InputError, match=r"nothing was trained: none of the \d+ steps .* inspect .*--mask-prompt"):
        train(store, run, progress=False)
    assert not (run.out / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("train_share", "test_share"), [(0.9, 0.1), (0.7, 0.3), (0.6, 0.4), (0.95, None), (1.0, None), (0.3, 0.7)]
)
def test_shares_that_add_up_to_one_are_accepted(train_share: float, test_share: float | None) -> None:
    splits = split_rows(1000, options(Path("x"), train_share=train_share, test_share=test_share))
    assert sum(map(len, splits.values())) == 1000
    assert len(splits["train"]) == round(1000 * train_share)
    assert len(splits["test"]) == round(1000 * (min(0.1, 1 - train_share) if test_share is None else test_share))


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_early_stop_keeps_the_best(tmp_path: Path, random_store: TokenStore) -> None:
    run = options(
        tmp_path / "run", epochs=60, eval_every=10, patience=3, learning_rate=0.02, schedule="constant", eval_batches=0
    )
    report = train(random_store, run, progress=False)
    lines = [json.loads(line) for line in (run.out / "evaluations.jsonl").read_text().splitlines()]
    found = [line["validation_loss"] for line in lines]
    assert report.ended == "early stop"
    assert found.index(min(found)) == len(found) - 4
    assert load_checkpoint(run.out / "best.pt").step == lines[-4]["step"]
    assert lines[0]["trained_tokens"] == int(random_store.lengths[114:].sum())


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_bfloat16_trains(tmp_path: Path, random_store: TokenStore) -> None:
    exact = options(tmp_path / "exact", epochs=1)
    narrow = replace(exact, out=tmp_path / "narrow", precision="bfloat16")
    train(random_store, exact, progress=False)
    train(random_store, narrow, progress=False)
    assert losses(narrow.out) != losses(exact.out)
    assert losses(narrow.out) == pytest.approx(losses(exact.out), abs=0.02)


@pytest.mark.usefixtures("small")
def test_a_loss_that_is_not_finite_ends_the_run_before_a_checkpoint(tmp_path: Path, random_store: TokenStore) -> None:
    run = options(tmp_path / "run", epochs=5, learning_rate=1e30, clip=0.0, warmup=0, checkpoint_every=1)
    with pytest.raises(InputError, match=r"the loss became .* at step .*; lower --learning-rate"):
        train(random_store, run, progress=False)
    assert all(loss is not None and np.isfinite(loss) for loss in losses(run.out))


@pytest.mark.usefixtures("small")
def test_what_does_not_fit_is_refused(tmp_path: Path, random_store: TokenStore) -> None:
    run = options(tmp_path / "run", max_steps=2)
    train(random_store, run, progress=False)
    with pytest.raises(InputError, match="holds a run already; continue it with --resume"):
        train(random_store, replace(run, max_steps=3), progress=False)
    for resume in (False, True):
        with pytest.raises(
            InputError, match=r"with --seed 123, not with --seed 124; .* may change: --epochs, --max-st"
        ):
            train(random_store, replace(run, resume=resume, seed=124), progress=False)
    with pytest.raises(InputError, match="started without --global-batch-size, not with --global-batch-size 4"):
        train(random_store, replace(run, resume=True, batch_size=4), progress=False)
    other = write_store(
        tmp_path / "other", [([1, 2], [1, 2, 3])], tokenizer={**random_store.manifest["tokenizer"], "fingerprint": "1"}
    )
    with pytest.raises(InputError, match="started on other data"):
        train(other, replace(run, resume=True, max_steps=4), progress=False)
    with pytest.raises(InputError, match="--max-length 65: the model's context is 64"):
        train(random_store, options(tmp_path / "new", max_length=65), progress=False)
    with pytest.raises(InputError, match="model 'huge': choose one of"):
        train(random_store, options(tmp_path / "new", model="huge"), progress=False)
    (run.out / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(InputError, match="damaged, or not a PyTorch file"):
        train(random_store, replace(run, resume=True), progress=False)


def test_a_vocabulary_beyond_the_model_is_refused(tmp_path: Path) -> None:
    tokenizer = {"name": "cl100k_base", "fingerprint": "00", "vocab_size": 100277, "pad_token_id": 100257}
    store = write_store(tmp_path / "store", [([1, 2], [70000, 2, 3])] * 9, tokenizer=tokenizer)
    with pytest.raises(InputError, match="token ids up to 100276, the model knows 50257"):
        train(store, options(tmp_path / "run"), progress=False)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_longer_run_says_which_learning_rates_follow(
    tmp_path: Path, random_store: TokenStore, capsys: pytest.CaptureFixture[str]
) -> None:
    run = options(tmp_path / "run", max_steps=3, warmup=1)
    train(random_store, run)
    capsys.readouterr()
    again = train(random_store, run)
    said = " ".join(capsys.readouterr().err.split())
    assert "this run has ended, at step 3" in said
    assert (again.steps, again.ended, again.last_loss) == (3, "finished", pytest.approx(np.mean(losses(run.out))))
    longer = replace(run, max_steps=30, resume=True)
    train(random_store, longer)
    said = " ".join(capsys.readouterr().err.split())
    assert "going on after step 3 of 30; the learning rate goes by 30 steps from here on, not 3" in said
    rates = [step["learning_rate"] for step in metrics(run.out)]
    assert rates == [
        learning_rate_at(step, run if step <= 3 else longer, 3 if step <= 3 else 30) for step in range(1, 31)
    ]
    assert rates[3] > rates[2]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_start_is_not_waiting_for_data(
    tmp_path: Path, random_store: TokenStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here kernels take half a second to compile, before the first batch and, for rows of another kind, the third."""
    take, calls = Feed._take, [0]

    def slow_take(self: Feed) -> Any:
        calls[0] += 1
        if calls[0] in (1, 3):
            with event.trigger_event("numba:compile", data={}):
                time.sleep(0.5)
        return take(self)

    monkeypatch.setattr(Feed, "_take", slow_take)
    report = train(random_store, options(tmp_path / "run", max_steps=5))
    assert capsys.readouterr().err.count("compiling kernels (once)") == 1
    waits = [step["wait_s"] for step in metrics(tmp_path / "run")]
    assert waits[0] == 0.0
    assert max(waits) < 0.4
    assert report.wait_share * report.seconds == pytest.approx(sum(waits), abs=1e-3)


@pytest.mark.usefixtures("small")
def test_the_old_name_of_progress_warns(tmp_path: Path, random_store: TokenStore) -> None:
    with pytest.warns(FutureWarning, match="show=False is now progress=False"):
        train(random_store, options(tmp_path / "run", max_steps=1), show=False)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_longer_run_goes_on_from_a_finished_one(tmp_path: Path, random_store: TokenStore) -> None:
    run = options(tmp_path / "run", max_steps=3, schedule="constant")
    train(random_store, run, progress=False)
    train(random_store, replace(run, max_steps=6, resume=True), progress=False)
    whole = replace(run, out=tmp_path / "whole", max_steps=6)
    train(random_store, whole, progress=False)
    assert losses(run.out) == losses(whole.out)


def test_learning_rates() -> None:
    run = options(Path("x"), learning_rate=1.0, warmup=4)
    rates = [learning_rate_at(step, run, 24) for step in (1, 4, 14, 24, 30)]
    assert rates == pytest.approx([0.25, 1.0, 0.55, 0.1, 0.1])
    assert learning_rate_at(20, replace(run, schedule="constant"), 24) == 1.0
    assert learning_rate_at(1, replace(run, warmup=0), 10) < 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0: give 1 or more"),
        ({"learning_rate": -1.0}, "--learning-rate -1.0: give more than 0"),
        ({"train_share": 0.9, "test_share": 0.2}, "--test-share 0.2: give 0 to 0.1, which is left"),
        ({"train_share": 0.75, "test_share": 0.26}, "--test-share 0.26: give 0 to 0.25, which is left"),
        ({"precision": "float8"}, "--precision float8: give auto, float32 or bfloat16"),
        ({"cuda_graphs": True}, "--cuda-graphs True: give --compile with it"),
    ],
)
def test_options_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        options(Path("x"), **values)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_compiled_training_sees_few_widths(
    tmp_path: Path, random_store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # everything but the generation of machine code, which takes a minute
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain = options(tmp_path / "plain", epochs=1)
    train(random_store, plain, progress=False)
    compiled = replace(plain, out=tmp_path / "compiled", compile=True, width_multiple=32)
    report = train(random_store, compiled, progress=False)
    assert losses(compiled.out) == pytest.approx(losses(plain.out), abs=1e-4)
    assert 1 <= report.compilations <= 3  # widths 32 and 64, and batches of 6 rows at the end
