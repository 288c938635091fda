"""The steps of `python -m benchmarks.gpu` that do not train GPT-2: tests, copies, card against CPU, memory checker."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.contenders import Scale
from benchmarks.gpu.figures import events_of
from benchmarks.harness import RESULTS
from benchmarks.train_throughput import loaded, random_rows, t0_like
from fastcollate.load.loader import BatchLoader
from fastcollate.store.store import TokenStore
from fastcollate.train.model import GPT2, GPT2Config, config_of
from fastcollate.train.options import TrainOptions
from fastcollate.train.ranks import Ranks
from fastcollate.train.step import Stepper

SIZES = (64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
SANITIZER_LIMIT_S = 150
CYCLES_A_MS = 1_700_000  # of a card's clock, about


def tests(scale: Scale) -> dict[str, Any]:
    """The tests that need a card."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "cuda",
        "-p",
        "no:cacheprovider",
        "tests/load",
        "tests/train",
    ]
    done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:])
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return {"exit_status": done.returncode, **counts, "names_failed": failed}


def copy(scale: Scale) -> dict[str, Any]:
    """Pinned memory to the card by size, and the loader's own copies beside plain ones of their size and of 64 MiB."""
    bus = {f"{size / 2**20:g} MiB": round(_plain_copies(size), 2) for size in SIZES}
    with tempfile.TemporaryDirectory() as folder:
        store = random_rows(Path(folder) / "dense", np.full(20_000, 1024))
        loaders = [
            _copies_of_a_loader(store, cells, scale.device, step_ms)
            for step_ms in (0.0, 10.0)
            for cells in (scale.cells, 4 * scale.cells)
        ]
    for found in loaders:
        size = int(found["mib_per_copy"] * 2**20)
        found["share_of_plain_copies_of_that_size"] = round(found["gb_per_s"] / _plain_copies(size), 4)
        found["share_of_those_just_written"] = round(found["gb_per_s"] / _plain_copies(size, written=True), 4)
        found["share_of_plain_copies_of_64_mib"] = round(found["gb_per_s"] / bus["64 MiB"], 4)
    return {"plain_copies_gb_per_s": bus, "loaders": loaders}


def _copies_of_a_loader(store: TokenStore, cells: int, device: torch.device, step_ms: float) -> dict[str, Any]:
    """Of a consumer that throws batches away (threads fill buffers all the time), or computes so long on each."""
    loader = BatchLoader(store, policy="packed", max_tokens=cells, max_length=1024, device=device)
    for _ in loader:
        pass  # pins its buffers, compiles
    before, batches = loader.stats.h2d_bytes, 0

    def epoch() -> None:
        nonlocal batches
        batches = 0
        for _ in loader:
            batches += 1
            if step_ms and device.type == "cuda":
                torch.cuda._sleep(int(step_ms * CYCLES_A_MS))
                torch.cuda.current_stream().synchronize()

    times = _times_of_copies(epoch)
    num_bytes = loader.stats.h2d_bytes - before
    return {
        "ms_per_step": step_ms,
        "mib_per_batch": round(num_bytes / batches / 2**20, 2),
        "mib_per_copy": round(num_bytes / len(times) / 2**20, 2),
        "gb_per_s": round(num_bytes / len(times) / statistics.median(times) / 1e3, 2),
    }


def _plain_copies(size: int, *, written: bool = False) -> float:
    """GB a second of copies of one pinned buffer after another, each `written` anew before, or not."""
    host = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(4)]
    there = torch.empty(size, dtype=torch.uint8, device="cuda")

    def copies() -> None:
        for n in range(60):
            if written:
                torch.cuda.synchronize()
                host[n % 4].fill_(n)
            there.copy_(host[n % 4], non_blocking=True)

    times = _times_of_copies(copies)
    return size / statistics.median(times) / 1e3


def _times_of_copies(run: Callable[[], object]) -> list[float]:
    """Microseconds of each copy to the card, as the profiler has them."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return [end - start for name, start, end in events_of(profiler) if "memcpy htod" in name.lower()]


def agree(scale: Scale, *, steps: int = 200) -> dict[str, Any]:
    """Losses of a tiny model in float32, TF32 off, on the card and on its host's CPU, the same batches in order."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    losses: dict[str, list[float]] = {}
    longest = scale.config.context_length
    with tempfile.TemporaryDirectory() as folder:
        store = t0_like(Path(folder) / "t0", 2000)
        for device in (scale.device, torch.device("cpu")):
            torch.manual_seed(0)
            options = TrainOptions(precision="float32", device=device.type)
            stepper = Stepper(GPT2(config_of("tiny")).to(device), options, Ranks(0, 1, device, None))
            batches = loaded(BatchLoader(store, policy="bucketed", batch_size=4, max_length=longest, device=device))
            found = [stepper.step([b], b.num_trained, 1e-4) for b, _ in zip(batches, range(steps), strict=False)]
            losses.setdefault(device.type, []).extend(float(loss) for loss in found)
    card, host = losses[scale.device.type][:steps], losses["cpu"][-steps:]
    differences = [abs(a - b) / b for a, b in zip(card, host, strict=True)]
    return {
        "model": "tiny, float32, TF32 off, learning rate 1e-4, 4 rows a step",
        "steps": steps,
        "largest_relative_difference": max(differences),
        "losses": {"first": [card[0], host[0]], "last": [card[-1], host[-1]]},
    }


def sanitizer(scale: Scale) -> dict[str, Any]:
    """`compute-sanitizer` over `short`: every read and write of device memory is checked."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"result": "compute-sanitizer is not on this machine"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu", "short"]
    try:
        done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, timeout=SANITIZER_LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"result": f"not done after {SANITIZER_LIMIT_S} s"}
    print(done.stdout[-3000:], done.stderr[-3000:])
    summary = re.findall(r"ERROR SUMMARY: .*", done.stdout)
    return {"exit_status": done.returncode, "summary": summary, "finished": "short: done" in done.stdout}


def short(scale: Scale) -> None:
    """A short run of everything that touches device memory: copies, packed attention, the loss's kernel, a step."""
    config = GPT2Config(num_layers=1, num_heads=2, width=128)
    with tempfile.TemporaryDirectory() as folder:
        store = t0_like(Path(folder) / "t0", 200)
        for policy in ("bucketed", "packed"):
            order = {"policy": policy, "max_tokens": min(4096, scale.cells), "max_length": scale.config.context_length}
            here = list(BatchLoader(store, device="cpu", **order))
            there = BatchLoader(store, device=scale.device, **order)
            stepper = Stepper(
                GPT2(config).to(scale.device), TrainOptions(precision="bfloat16", device=scale.device.type),
                Ranks(0, 1, scale.device, None),
            )  # fmt: skip
            for number, (batch, wanted) in enumerate(zip(loaded(there), here, strict=False)):
                assert torch.equal(batch.inputs.cpu(), wanted.inputs)
                assert torch.equal(batch.targets.cpu(), wanted.targets)
                if number < 3:
                    assert float(stepper.step([batch], batch.num_trained, 1e-4)) > 0
    print("short: done")


STEPS: dict[str, Callable[[Scale], dict[str, Any]]] = {
    "tests": tests, "copy": copy, "agree": agree, "sanitizer": sanitizer,
}  # fmt: skip
