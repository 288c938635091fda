"""Each step of `python -m benchmarks.gpu` really runs: here with a tiny model on the CPU."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as every_benchmark
from benchmarks import harness, tables
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import checks, training
from benchmarks.gpu.contenders import Scale
from benchmarks.gpu.figures import driver, flops_per_token, nanogpt_flops_per_token
from fastcollate.train.model import CONFIGS, GPT2Config

TINY = Scale(
    device=torch.device("cpu"),
    config=GPT2Config(num_layers=1, num_heads=2, width=16, context_length=64),
    cells=128,
    warmup=0,
    rounds=1,
    steps=1,
    profiled=1,
    workers=0,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(training.STEPS))
def test_a_step_that_trains(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(training, "RESULTS", tmp_path)
    found = training.run(name, TINY._replace(cells=512) if name == "chat" else TINY)  # a pack of 8 contexts
    for row in found.get("contenders", {}).values():
        assert "failed" not in row, row
        assert 0 < row["last_loss"] < 2 * math.log(50257)
        assert min(row["by_round"]) > 0
    assert found["cells_per_step"] > 0
    assert any(name in line for line in program.table({name: found}))
    if name == "t0":
        assert found["times_chapter"] > 0
        assert found["share_of_dense_flops"] is None
    if name == "loop":
        assert found["useful_tokens_per_s"] > 0


@pytest.mark.slow
def test_the_checks_that_need_no_card(capsys: pytest.CaptureFixture[str]) -> None:
    found = checks.agree(TINY, steps=2)
    assert found["largest_relative_difference"] == 0
    checks.short(TINY)
    assert "short: done" in capsys.readouterr().out


@pytest.mark.slow
def test_copies_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic of `copy`; the copies themselves need a card."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, device=None, **k: empty(*size, **k))
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    copied = [("gemm", 0.0, 9.0), ("Memcpy HtoD (Pinned -> Device)", 0.0, 2.0)]
    monkeypatch.setattr(checks, "events_of", lambda _: copied)
    found = checks.copy(TINY._replace(cells=65_536, device=torch.device("meta")))
    assert found["plain_copies_gb_per_s"]["64 MiB"] == round((64 << 20) / 2 / 1e3, 2)
    assert len(found["plain_copies_gb_per_s"]) == len(checks.SIZES)
    for loader in found["loaders"]:  # here all copies take the same time, whatever their size
        assert loader["gb_per_s"] == pytest.approx(loader["mib_per_copy"] * 2**20 / 2 / 1e3, rel=0.01)
        assert loader["share_of_plain_copies_of_that_size"] == pytest.approx(1, abs=0.01)


LIMIT_S = 2
FAILING = [
    ("import sys; sys.exit('no memory left')", "exit status 1: no memory left"),
    ("import os; os.abort()", "signal SIGABRT"),
    ("import time; time.sleep(60)", "not done after 2 s"),
    ("print('done')", None),
]


@pytest.mark.slow
@pytest.mark.parametrize(("code", "expected"), FAILING, ids=["error", "crash", "hang", "success"])
def test_why_a_step_failed_is_said(code: str, expected: str | None) -> None:
    found = program.failure_of([sys.executable, "-S", "-c", code], LIMIT_S)
    assert found == expected


@pytest.mark.slow
def test_what_a_step_has_started_ends_with_it(tmp_path: Path) -> None:
    child = f"import os; open({str(tmp_path / 'id')!r}, 'w').write(str(os.getpid())); import time; time.sleep(60)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-S', '-c', {child!r}]); time.sleep(60)"
    assert program.failure_of([sys.executable, "-S", "-c", code], 3) == "not done after 3 s"
    started = int((tmp_path / "id").read_text())
    for _ in range(100):
        if not is_running(started):
            return
        time.sleep(0.05)
    pytest.fail("the step's child still runs")


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"  # ended; nobody has asked how


def test_a_failed_step_is_written_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(program.signal, "signal", lambda *_: None)
    reasons = {"copy": "signal SIGKILL", "agree": "exit status 1: ValueError"}
    monkeypatch.setattr(program, "failure_of", lambda command, _: reasons[command[-1]])
    monkeypatch.setattr(sys, "argv", ["gpu", "copy", "agree"])
    program.main()
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: saved[name]["failed"] for name in reasons} == reasons
    assert saved["copy"]["torch"] == torch.__version__
    assert not list(tmp_path.glob("*.new"))
    monkeypatch.setattr(sys, "argv", ["gpu", "copi"])
    with pytest.raises(SystemExit, match="no such step: copi; there are dense"):
        program.main()


def test_without_a_card_one_line_and_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    program.main()
    assert capsys.readouterr().out.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "expected"),
    [("echo 580.1", "580.1"), ("printf '580.1\n580.1\n'", "580.1"), ("echo NVIDIA-SMI has failed; exit 9", None)],
    ids=["one card", "two cards", "no driver"],
)
def test_the_driver_s_version(
    script: str, expected: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert driver() == expected


def test_floating_point_operations_a_token() -> None:
    config = CONFIGS["124M"]
    assert flops_per_token(config, 512.5) == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 768 * 512.5
    assert flops_per_token(config, 512.5) - flops_per_token(config, 512.5, 0.5) == 3 * 50257 * 768
    assert nanogpt_flops_per_token(config) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024


def test_the_table_is_of_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.gpu_table() == ""
    row = {"useful_tokens_per_s": 1000, "mfu": None, "wait_share": 0.002, "peak_memory_gib": 8.5}
    steps = {
        "t0": {"card": "A", "contenders": {"chapter": row, "packed": {**row, "useful_tokens_per_s": 2500, "mfu": 0.4}}},
        "chat": {"card": "A", "contenders": {"packed_compiled": {"failed": "out of memory"}}},
        "dense": {"card": "A", "failed": "not done after 170 s"},
    }
    (tmp_path / "gpu.json").write_text(json.dumps(steps))
    lines = tables.gpu_table().splitlines()
    assert lines[0].startswith("| GPT-2 124M, bfloat16, on A |")
    assert lines[2:] == [
        "| T0-like lengths, the chapter's loop | 1,000 | – | 0.20% | 8.5 |",
        "| T0-like lengths, packed | 2,500 (2.5 ×) | 40.0% | 0.20% | 8.5 |",
        "| chat lengths to 8,192, packed, compiled | failed | – | – | – |",
    ]


def test_all_benchmarks_are_run_with_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def note(command: list[str], **_: Any) -> Any:
        ran.append(command[-1])
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(every_benchmark.subprocess, "run", note)
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    every_benchmark.main()
    assert {"benchmarks.gpu", "benchmarks.collate"} <= set(ran)


def test_dense_rows_of_another_card_are_no_measure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training, "RESULTS", tmp_path)
    rows = {"a": {"model_tflops_per_s": 3.0}, "b": {"failed": "no memory"}, "c": {"model_tflops_per_s": 4.0}}
    (tmp_path / "gpu.json").write_text(json.dumps({"dense": {"card": "NVIDIA H200", "contenders": rows}}))
    for card, expected in (("NVIDIA H200", 4.0), ("NVIDIA H100 80GB HBM3", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda card=card: card)
        assert training._dense_flops(Scale()) == expected
