"""The GPU half, measured: `python -m benchmarks.gpu [STEPS]`, under eight minutes; writes `bench_results/gpu.json`.

Each step is a process of its own with a limit, and its result is written as it ends: `tests` (those marked `cuda`),
`copy` (host to device against the bus), `dense` (rows of 1,024, the work of llm.c's figure), `t0` (instruction data:
the chapter's loop, tuned, bucketed, packed, packed and compiled), `chat` (packs of 8,192), `loop` (`fastcollate
train`), `agree` (losses on the card and on its host), `sanitizer` (compute-sanitizer over a short run). By name only:
`ingredients` (what each part of the step brings). Without CUDA it says so and writes nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.gpu import checks, training
from benchmarks.gpu.contenders import Scale
from benchmarks.gpu.figures import save_step
from benchmarks.harness import RESULTS

ORDER = ("dense", "t0", "tests", "copy", "loop", "chat", "agree", "sanitizer")
LIMIT_S = 170


def serve(name: str) -> None:
    """One step, in a process of its own."""
    if name == "short":
        checks.short(Scale())
        return
    start = time.perf_counter()
    result = training.run(name, Scale()) if name in training.STEPS else checks.STEPS[name](Scale())
    save_step(name, {**result, "seconds": round(time.perf_counter() - start, 1)})


def run(name: str) -> None:
    """A step; one that fails or takes too long says so in the file and costs the others nothing."""
    command = [sys.executable, "-m", "benchmarks.gpu", "serve", name]
    try:
        status = subprocess.run(command, cwd=RESULTS.parent, timeout=LIMIT_S, check=False).returncode
    except subprocess.TimeoutExpired:
        save_step(name, {"failed": f"not done after {LIMIT_S} s"})
        return
    if status:
        save_step(name, {"failed": f"exit status {status}"})


COLUMNS = {
    "useful_tokens_per_s": "tok/s", "ms_per_step": "ms", "model_tflops_per_s": "TFLOP/s", "mfu": "MFU",
    "wait_share": "waiting", "h2d_hidden_share": "hidden", "gpu_idle_share": "idle", "peak_memory_gib": "GiB",
    "compilations": "graphs", "first_step_s": "s first",
}  # fmt: skip


def table(found: dict[str, Any]) -> list[str]:
    """A line a contender, and one a step for what else it says."""
    lines = []
    for name, step in found.items():
        for contender, row in step.get("contenders", {}).items():
            cells = [f"{row[key]} {unit}" for key, unit in COLUMNS.items() if key in row]
            lines.append(f"{name:12} {contender:22} " + (row.get("failed") or "  ".join(cells)))
        rest = {k: v for k, v in step.items() if k not in ("contenders", "data", "card", "driver", "cuda")}
        lines.append(f"{name:12} {json.dumps(rest)[:230]}")
    return lines


def main() -> None:
    if sys.argv[1:2] == ["serve"] or sys.argv[1:] == ["short"]:
        serve(sys.argv[-1])
        return
    if not torch.cuda.is_available():
        print("skipped: this machine has no CUDA device; nothing was measured and nothing written")
        return
    wanted = sys.argv[1:] or ORDER
    for name in wanted:
        run(name)
    found = json.loads((RESULTS / "gpu.json").read_text())
    print("\n".join(table({name: found[name] for name in wanted if name in found})))


if __name__ == "__main__":
    main()
