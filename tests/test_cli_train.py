"""`fastcollate train`, `generate` and `evaluate` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastcollate.cli.model import SAMPLE_RUN
from fastcollate.sources.sample import sample_records
from fastcollate.train.files import TrainReport
from fastcollate.train.model import CONFIGS, GPT2
from tests.helpers import losses, metrics, run_cli

QUICK = ["--max-steps", 3, "--batch-size", 4, "--eval-batches", 1, "--device", "cpu", "--no-tensorboard"]
MATRICES = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "records.json"
    path.write_text(json.dumps(sample_records(60)))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, records: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert run_cli(patch, "train", "--data", records, "--out", out, *QUICK, "--json") == 0
    return out


@pytest.mark.slow
def test_everything_lies_under_out(finished: Path) -> None:
    assert [step["step"] for step in metrics(finished)] == [1, 2, 3]
    names = {path.name for path in finished.iterdir()}
    assert {"checkpoint.pt", "metrics.jsonl", "evaluations.jsonl", "store"} <= names


@pytest.mark.slow
def test_resuming_with_the_same_data_goes_on(
    tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--data", records, "--out", tmp_path / "run", *QUICK, "--schedule", "constant", "--json"]
    assert run_cli(monkeypatch, *arguments) == 0
    capsys.readouterr()
    for again in ([], ["--resume"]):  # nothing is left to train
        assert run_cli(monkeypatch, *arguments, *again) == 0
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (report["steps"], report["ended"], report["seconds"]) == (3, "finished", 0.0)
    assert run_cli(monkeypatch, *arguments, "--max-steps", 4) == 1
    assert "continue it with --resume" in capsys.readouterr().err
    assert run_cli(monkeypatch, *arguments, "--max-steps", 5, "--resume") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 5
    assert len(losses(tmp_path / "run")) == 5


@pytest.mark.slow
def test_the_first_command_runs_again_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastcollate.cli.data.SAMPLE_RECORDS", 60)
    monkeypatch.setitem(SAMPLE_RUN, "max_steps", 2)
    first = ["train", "--out", tmp_path / "R", *QUICK[2:]]
    for more, steps, says in (
        ([], 2, "steps"),
        ([], 2, "this run has ended, at step 2"),
        (["--resume"], 2, "this run has ended, at step 2"),
        (["--max-steps", 5, "--resume"], 5, "going on after step 2 of 5; the learning rate goes by 5 steps"),
    ):
        sample = tmp_path / "R" / "sample.jsonl"
        before = sample.stat().st_mtime_ns if sample.exists() else None
        assert run_cli(monkeypatch, *first, *more) == 0
        assert says in " ".join(capsys.readouterr().err.split())
        assert before in (None, sample.stat().st_mtime_ns)
        assert [step["step"] for step in metrics(tmp_path / "R")] == list(range(1, steps + 1))
    assert run_cli(monkeypatch, *first, "--max-steps", 9, "--resume", "--seed", 1) == 1
    assert "with --resume may change: --epochs, --max-steps, --device" in capsys.readouterr().err
    assert run_cli(monkeypatch, *first, "--max-steps", 9, "--resume", "--train-prompt") == 1
    assert "started with --mask-prompt True" in capsys.readouterr().err


def test_the_first_run_has_options_of_its_own_where_none_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    monkeypatch.setattr("fastcollate.train.train", lambda _, options, **__: found.append(options) or TrainReport())
    own = {"max_steps": 1500, "mask_prompt": True, "eval_every": 250}
    for given, expected in (
        ([], own),
        (["--train-prompt"], {**own, "mask_prompt": False}),
        (["--eval-every", 50, "--max-steps", 7], {**own, "eval_every": 50, "max_steps": 7}),
        (["--epochs", 2], {**own, "max_steps": None}),
        (["--store", tmp_path / "R" / "store"], {"max_steps": None, "mask_prompt": False, "eval_every": 50}),
    ):
        assert run_cli(monkeypatch, "train", "--out", tmp_path / "R", "--device", "cpu", *given) == 0
        options = found.pop()
        assert {name: getattr(options, name) for name in own} == expected
    capsys.readouterr()
    assert run_cli(monkeypatch, "train", "--help") == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(f"--{name.replace('_', '-')}" in said for name in own)
    assert str(own["max_steps"]) in said


@pytest.mark.slow
@pytest.mark.parametrize("given", ["--on-error raise", "--template alpaca", "--field a=b", "--workers 1"])
def test_what_decides_how_records_are_tokenized_is_refused_with_a_store(
    given: str, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it is the option's default."""
    assert run_cli(monkeypatch, "train", "--store", finished / "store", *given.split()) == 1
    assert f"{given} and --store: that decides how records are tokenized" in capsys.readouterr().err


@pytest.mark.slow
def test_generate_and_evaluate(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--checkpoint", finished, "--max-new-tokens", 5, "--top-k", 10, "--temperature", 1.0, "--device", "cpu"]
    found = []
    for seed in (1, 1, 2):
        assert run_cli(monkeypatch, "generate", *common, "--prompt", "Add 1 and 2.", "--seed", seed, "--json") == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert found[0]["prompt"].endswith("### Instruction:\nAdd 1 and 2.")
    assert run_cli(monkeypatch, "evaluate", *common, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 6
    answers = json.loads((finished / "answers-test.json").read_text())
    assert [answer["row"] for answer in answers] == list(range(51, 57))
    expected = sample_records(60)[51]
    assert answers[0]["output"] == expected["output"]
    assert expected["instruction"] in answers[0]["prompt"]
    assert isinstance(answers[0]["model_response"], str)
    assert run_cli(monkeypatch, "evaluate", *common, "--split", "exam") == 1
    assert "--split exam: choose one of train, test, validation" in capsys.readouterr().err


@pytest.mark.slow
def test_published_weights_are_where_training_starts(
    tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(7)
    tensors = GPT2(CONFIGS["tiny"]).state_dict()
    published = {
        f"transformer.{name}": tensor.T.contiguous() if name.endswith(MATRICES) else tensor
        for name, tensor in tensors.items()
    }
    torch.save(published, tmp_path / "pytorch_model.bin")
    arguments = ["train", "--data", records, *QUICK, "--max-steps", 1, "--json"]
    assert run_cli(monkeypatch, *arguments, "--out", tmp_path / "a", "--weights", tmp_path / "pytorch_model.bin") == 0
    assert run_cli(monkeypatch, *arguments, "--out", tmp_path / "b") == 0
    assert losses(tmp_path / "a") != losses(tmp_path / "b")
    wrong = [*arguments, "--out", tmp_path / "c", "--weights", tmp_path / "pytorch_model.bin", "--model", "124M"]
    capsys.readouterr()
    assert run_cli(monkeypatch, *wrong) == 1
    assert "a model of width 64 with 2 layers: --model tiny" in capsys.readouterr().err


@pytest.mark.slow
def test_a_malformed_file_is_one_line_and_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('[{"instruction": "x", "input": "", "output": "y"}, {"instruction": ')
    assert run_cli(monkeypatch, "train", "--data", bad, "--out", tmp_path / "run", *QUICK, "--json") == 1
    error = capsys.readouterr().err
    assert "bad.json" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "store" / "manifest.json").exists()
