"""The GPU half, measured: `python -m benchmarks.gpu [STEPS]`, under eight minutes; writes `bench_results/gpu.json`.

Each step is a process of its own (`run NAME`) with a limit, and its result is written as it ends: `tests` (those
marked `cuda`), `copy` (host to device against the bus), `dense` (rows of 1,024, the work of llm.c's figure), `t0`
(instruction data: the chapter's loop, tuned, bucketed, packed, packed and compiled), `chat` (packs of 8,192), `loop`
(`fastcollate train`), `agree` (losses on the card and on its host), `sanitizer` (compute-sanitizer over a short run).
By name only: `ingredients` (what each part of the step brings). Without CUDA it says so and writes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu import checks, training
from benchmarks.gpu.contenders import Scale
from benchmarks.gpu.figures import save_step
from benchmarks.harness import RESULTS

ORDER = ("dense", "t0", "tests", "copy", "loop", "chat", "agree", "sanitizer")
KNOWN = (*training.STEPS, *checks.STEPS)
LIMIT_S = 170


def run(name: str) -> None:
    """One step, in this process."""
    if name == "short":
        checks.short(Scale())
        return
    start = time.perf_counter()
    result = training.run(name, Scale()) if name in training.STEPS else checks.STEPS[name](Scale())
    save_step(name, {**result, "seconds": round(time.perf_counter() - start, 1)})


def run_alone(name: str) -> None:
    """A step in a process of its own; one that fails or takes too long says so in the file, and only that."""
    start = time.perf_counter()
    failed = failure_of([sys.executable, "-m", "benchmarks.gpu", "run", name], LIMIT_S)
    if failed is not None:
        save_step(name, {"failed": failed, "seconds": round(time.perf_counter() - start, 1)})


def failure_of(command: Sequence[str], limit_s: float) -> str | None:
    """Run a command; why it failed, with the last line of its errors, or `None`. Nothing that it started is left."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, cwd=RESULTS.parent, stderr=errors, start_new_session=True)
        try:
            status = process.wait(limit_s)
            reason = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            status, reason = 1, f"not done after {limit_s:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # workers of a data loader, a tool's own children
            process.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()
    print(said[-3000:], file=sys.stderr, flush=True)
    last = said.splitlines()[-1][:300] if said else ""
    return None if status == 0 else f"{reason}: {last}".rstrip(": ")


COLUMNS = {
    "useful_tokens_per_s": "tok/s", "ms_per_step": "ms", "model_tflops_per_s": "TFLOP/s", "mfu": "MFU",
    "mfu_nanogpt": "by nanoGPT's count",
    "wait_share": "waiting", "h2d_hidden_share": "hidden", "gpu_idle_share": "idle", "peak_memory_gib": "GiB",
    "compilations": "graphs", "first_step_s": "s first",
}  # fmt: skip


def table(found: dict[str, Any]) -> list[str]:
    """A line a contender, and one a step for what else it says."""
    lines = []
    for name, step in found.items():
        if "failed" in step and "contenders" not in step:
            lines.append(f"{name:12} failed, {step['failed']}")
            continue
        for contender, row in step.get("contenders", {}).items():
            cells = [f"{row[key]} {unit}" for key, unit in COLUMNS.items() if key in row]
            lines.append(f"{name:12} {contender:22} " + (row.get("failed") or "  ".join(cells)))
        rest = {k: v for k, v in step.items() if k not in ("contenders", "data", "card", "driver", "cuda")}
        lines.append(f"{name:12} {json.dumps(rest)[:230]}")
    return lines


def main() -> None:
    if sys.argv[1:2] == ["run"] or sys.argv[1:] == ["short"]:
        run(sys.argv[-1])
        return
    if not torch.cuda.is_available():
        print("skipped: this machine has no CUDA device; nothing was measured and nothing written")
        return
    wanted = sys.argv[1:] or ORDER
    if unknown := [name for name in wanted if name not in KNOWN]:
        sys.exit(f"no such step: {', '.join(unknown)}; there are {', '.join(KNOWN)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a step's processes end with this one
    for name in wanted:
        run_alone(name)
    found = json.loads((RESULTS / "gpu.json").read_text())
    print("\n".join(table({name: found[name] for name in wanted if name in found})))


if __name__ == "__main__":
    main()
