"""Each step of `python -m benchmarks.gpu` really runs: here with a tiny model on the CPU."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import checks, training
from benchmarks.gpu.__main__ import table
from benchmarks.gpu.contenders import Scale
from fastcollate.train.model import GPT2Config

TINY = Scale(
    device=torch.device("cpu"),
    config=GPT2Config(num_layers=1, num_heads=2, width=16, context_length=64),
    cells=1024,
    warmup=1,
    rounds=2,
    steps=1,
    profiled=1,
    workers=0,
)


@pytest.mark.parametrize("name", list(training.STEPS))
def test_a_step_that_trains(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(training, "RESULTS", tmp_path)
    found = training.run(name, TINY)
    for row in found.get("contenders", {}).values():
        assert "failed" not in row, row
        assert 0 < row["last_loss"] < 2 * math.log(50257)
        assert min(row["by_round"]) > 0
    assert found["cells_per_step"] > 0
    assert any(name in line for line in table({name: found}))
    if name == "t0":
        assert found["times_chapter"] > 0
        assert found["share_of_dense_flops"] is None
    if name == "loop":
        assert found["useful_tokens_per_s"] > 0


def test_the_checks_that_need_no_card(capsys: pytest.CaptureFixture[str]) -> None:
    found = checks.agree(TINY, steps=3)
    assert found["largest_relative_difference"] == 0
    checks.short(TINY)
    assert "short: done" in capsys.readouterr().out
